"""Prompts for diffusion models: an embedded set, a text file, a table, or a data set of the hub."""

from __future__ import annotations

import csv
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import RoseExpError
from ..text_settings import PROMPTS, PromptSettings, prompts_file
from .texts import load_text


@dataclass(frozen=True)
class Prompts:
    """Prompts in the order of their source.

    Attributes:
        protocol: for the record; ``sha256`` is of the prompts as they are.
    """

    texts: list[str]
    protocol: dict[str, Any]


def load_prompts(settings: PromptSettings, where: str) -> Prompts:
    """The first ``samples`` prompts of what ``settings``, called ``where`` in the configuration, asks for.

    Raises:
        RoseExpError: they cannot be had, or are fewer.
    """
    path = Path(settings.path).expanduser() if settings.path is not None else None
    if path is None and settings.embedded in PROMPTS:
        texts, source = prompts_file(settings.embedded).read_text(encoding="utf-8").splitlines(), settings.embedded
    elif path is not None and path.suffix == ".tsv":
        texts, source = _table(path, settings.field, where), settings.path
    else:
        text = load_text(settings, where)
        lines = path is not None and path.suffix not in (".jsonl", ".json")
        texts = text.joined.splitlines() if lines else text.documents
        source = text.source
    texts = [text.strip() for text in texts[: settings.rows] if text.strip()]
    if len(texts) < settings.samples:
        raise RoseExpError(f"{where}.samples: expected at most {len(texts)}, the prompts of {source}, got {settings.samples}")
    texts = texts[: settings.samples]
    digest = hashlib.sha256("\n".join(texts).encode(errors="surrogatepass")).hexdigest()
    return Prompts(texts, {"source": source, "prompts": len(texts), "sha256": digest})


def _table(path: Path, column: str, where: str) -> list[str]:
    """One column of a table of tab-separated values: the one that the first row calls so, else the first of all rows."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = [row for row in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise RoseExpError(f"{where}.path: cannot read {path} as tab-separated text: {error}") from error
    if not rows:
        raise RoseExpError(f"{where}.path: expected prompts in {path}, got none")
    if column not in rows[0]:
        return [row[0] for row in rows]
    place = rows[0].index(column)
    return [row[place] for row in rows[1:] if len(row) > place]
