"""Settings of where texts and prompts come from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from .errors import suggest
from .mistakes import embedded_problem, file_problem
from .section import Positive, Section

PROMPTS = ("calibration_prompts", "evaluation_prompts")  # embedded sets


def prompts_file(name: str) -> Path:
    """Of an embedded set, a prompt a line."""
    return Path(__file__).parent / "calibration" / f"{name}.txt"


class TextSettings(Section):
    """Where a text comes from: the embedded set, a local file, or a data set of the hub; the first of these that is set."""

    path: str | None = None  # a text file, or a .jsonl file with the text in ``field``
    embedded: str | None = None
    dataset: str | None = None
    subset: str | None = None
    data_files: str | None = None
    revision: str | None = None
    split: str | None = None
    field: str = "text"
    rows: Positive | None = None  # only the first so many documents
    separator: str = "\n\n"  # between documents that are joined

    def problems(self, where: str) -> list[str]:
        if self.path is not None:
            return file_problem(f"{where}.path", self.path, folder=False)
        if self.embedded is not None:
            return embedded_problem(f"{where}.embedded", self.embedded, "text")
        if self.dataset is None:
            return [f"{where}: expected one of path, embedded or dataset, got none of them"]
        return [] if self.split else [f"{where}.split: expected a split of {self.dataset}, got null"]


class PromptSettings(TextSettings):
    """Prompts in place of texts: lines of a text file, or one column or field of a .tsv or .jsonl file or a data set. Of a .tsv
    file whose first row has no column called ``field``, the first column."""

    samples: Positive  # only the first so many

    def problems(self, where: str) -> list[str]:
        if self.path is None and self.embedded is not None and self.embedded not in PROMPTS:
            expected = f"one of {', '.join(PROMPTS)}"
            return [f"{where}.embedded: expected {expected}, got {self.embedded!r}{suggest(self.embedded, PROMPTS)}"]
        return [] if self.path is None and self.embedded is not None else super().problems(where)


class CalibrationSettings(TextSettings):
    samples: Positive  # windows, or prompts
    window: Annotated[int, Field(ge=2)] | None  # tokens; of language models
    # from the joined text, or one from each of random long documents; prompts: of diffusion models
    draw: Literal["windows", "documents", "prompts"] = "windows"

    def problems(self, where: str) -> list[str]:
        if self.draw == "prompts":
            return self.prompts.problems(where)
        if self.window is None:
            return [f"{where}.window: expected a number of tokens with draw={self.draw}, got null"]
        return super().problems(where)

    @property
    def prompts(self) -> PromptSettings:
        return PromptSettings(**self.model_dump(exclude={"window", "draw"}))


class PerplexitySettings(TextSettings):
    window: Annotated[int, Field(ge=2)]  # tokens
    windows: Positive | None = None  # only the first so many; null: all
