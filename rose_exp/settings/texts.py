"""Settings for the sources of texts and prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from ..engine.bounds import Count, Positive
from ..runtime.errors import suggest
from .messages import embedded_problem, file_problem
from .plugins import DATASETS_GROUP, install_plugins
from .section import Section

PROMPTS = ("calibration_prompts", "evaluation_prompts", "digit_prompts")  # embedded sets

TextFormat = Literal["text", "json", "tsv"]

Bos = Literal["tokenizer", "windows", "none"]
"""Position of BOS tokens. ``tokenizer``: where the tokenizer adds one: once, at the start of a text, document or zero-shot
request. ``windows``: at the start of every window and request. ``none``: nowhere; no special token is added."""

JSON_SUFFIXES = (".json", ".jsonl", ".jsonlines", ".ndjson", ".ldjson", ".jl")
TABLE_SUFFIXES = (".tsv", ".tab")
UNSUPPORTED_SUFFIXES = frozenset(
    (
        *(".csv", ".psv", ".xls", ".xlsx", ".xlsm", ".ods"),  # tables
        *(".parquet", ".arrow", ".feather", ".orc", ".avro", ".hdf5", ".h5", ".db", ".sqlite", ".sqlite3"),  # data sets
        *(".json5", ".jsonc", ".geojson", ".bson", ".msgpack", ".yaml", ".yml", ".toml", ".ini"),  # structured text
        *(".xml", ".html", ".htm", ".xhtml", ".mhtml", ".wet", ".warc"),  # markup and crawls
        *(".pdf", ".ps", ".doc", ".docx", ".odt", ".rtf", ".epub", ".mobi", ".djvu"),  # documents
        *(".pkl", ".pickle", ".pt", ".pth", ".npy", ".npz", ".mat", ".safetensors", ".gguf", ".bin", ".tfrecord"),  # binary
        *(".gz", ".tgz", ".bz2", ".xz", ".lzma", ".zst", ".zstd", ".lz4", ".br", ".z", ".zip", ".7z", ".rar", ".tar"),  # packed
    )
)


def text_format(path: str | Path) -> TextFormat | None:
    """Return how a text or prompts file is read, or None if its format is not supported.

    The suffix decides, ignoring its case. ``json``: rows of JSON, one per line or in one array. ``tsv``: tab-separated values.
    ``text``: plain text, which includes every suffix that names no other format.
    """
    suffix = Path(path).suffix.lower()
    if suffix in UNSUPPORTED_SUFFIXES:
        return None
    if suffix in JSON_SUFFIXES:
        return "json"
    return "tsv" if suffix in TABLE_SUFFIXES else "text"


def prompts_file(name: str) -> Path:
    """Return the file of an embedded set, which holds one prompt per line."""
    return Path(__file__).parent.parent / "data" / f"{name}.txt"


class TextSettings(Section):
    """The source of a text. The first of ``path``, ``embedded``, ``plugin`` and ``dataset`` that is set counts."""

    formats: ClassVar[tuple[TextFormat, ...]] = ("text", "json")  # of local files

    path: str | None = None  # a plain text file, or a file of JSON rows with the text in ``field``
    embedded: str | None = None
    plugin: str | None = None  # a data set of another package
    dataset: str | None = None  # a data set on the hub
    subset: str | None = None
    data_files: str | None = None
    revision: str | None = None
    split: str | None = None
    field: str = "text"
    rows: Positive | None = None  # use only the first N documents
    separator: str = "\n\n"  # joins the documents

    def problems(self, where: str) -> list[str]:
        if self.path is not None:
            return file_problem(f"{where}.path", self.path, folder=False) or self._format_problem(f"{where}.path")
        if self.embedded is not None:
            return embedded_problem(f"{where}.embedded", self.embedded, "text")
        if self.plugin is not None:
            return _plugin_problem(f"{where}.plugin", self.plugin)
        if self.dataset is None:
            return [f"{where}: expected one of path, embedded, plugin or dataset, got none of them"]
        return [] if self.split else [f"{where}.split: expected a split of {self.dataset}, got null"]

    @property
    def used_plugin(self) -> str | None:
        """The data set of another package that supplies the text; None if another source does."""
        return self.plugin if self.path is None and self.embedded is None else None

    def _format_problem(self, where: str) -> list[str]:
        if text_format(self.path) in self.formats:
            return []
        descriptions = {"text": "plain text (.txt)", "json": f"JSON rows ({', '.join(JSON_SUFFIXES)})", "tsv": "a table (.tsv)"}
        expected = ", ".join(descriptions[name] for name in self.formats)
        return [f"{where}: expected a supported format, which is {expected}, got {self.path!r}"]


def _plugin_problem(where: str, name: str) -> list[str]:
    """Return the error of a data set that no installed package provides, or an empty list."""
    known = install_plugins()[DATASETS_GROUP]
    if name in known:
        return []
    expected = f"one of {', '.join(known)}" if known else f"an entry point of {DATASETS_GROUP} of an installed package"
    return [f"{where}: expected {expected}, got {name!r}{suggest(name, known)}"]


class PromptSettings(TextSettings):
    """The source of prompts: the lines of a text file, or ``field`` of a .tsv file, a file of JSON rows or a data set.

    A .tsv file whose first row has no column named ``field`` has no header: its first column holds the prompts.
    """

    formats: ClassVar[tuple[TextFormat, ...]] = ("text", "json", "tsv")

    samples: Positive  # use only the first N prompts

    def problems(self, where: str) -> list[str]:
        if self.path is None and self.embedded is not None and self.embedded not in PROMPTS:
            expected = f"one of {', '.join(PROMPTS)}"
            return [f"{where}.embedded: expected {expected}, got {self.embedded!r}{suggest(self.embedded, PROMPTS)}"]
        return [] if self.path is None and self.embedded is not None else super().problems(where)


class CalibrationSettings(TextSettings):
    samples: Positive  # windows, or prompts
    window: Annotated[int, Field(ge=2)] | None  # tokens; language models only
    # windows: from random positions of the joined text; documents: one window from each of several random long documents;
    # prompts: diffusion models
    draw: Literal["windows", "documents", "prompts"] = "windows"
    replicate: Count = 0  # language models only; above 0: perturbs the embeddings by rounding, to measure its effect

    def problems(self, where: str) -> list[str]:
        if self.draw == "prompts":
            return self.prompts.problems(where)
        if self.window is None:
            return [f"{where}.window: expected a number of tokens with draw={self.draw}, got null"]
        return super().problems(where)

    @property
    def prompts(self) -> PromptSettings:
        return PromptSettings(**self.model_dump(exclude={"window", "draw", "replicate"}))


class PerplexitySettings(TextSettings):
    window: Annotated[int, Field(ge=2)]  # tokens
    windows: Positive | None = None  # use only the first N windows; null: all
