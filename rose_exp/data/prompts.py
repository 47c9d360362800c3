"""Sources of prompts for diffusion models: an embedded set, a text file, a table, or a data set of the hub."""

from __future__ import annotations

import csv
import hashlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..runtime.errors import RoseExpError
from ..runtime.outside import outside_errors, read_text
from ..settings.texts import PROMPTS, PromptSettings, prompts_file, text_format
from .texts import load_text


@dataclass(frozen=True)
class Prompts:
    """Prompts in the order of their source.

    Attributes:
        protocol: recorded with the run; ``sha256`` is that of the prompts.
    """

    texts: list[str]
    protocol: dict[str, Any]


def load_prompts(settings: PromptSettings, where: str) -> Prompts:
    """Return the first ``samples`` prompts of the source that ``settings`` name.

    Args:
        where: name of the settings in the configuration, for errors.

    Raises:
        RoseExpError: the source is unavailable, or has too few prompts.
    """
    path = Path(settings.path).expanduser() if settings.path is not None else None
    kind = text_format(path) if path is not None else None
    if path is None and settings.embedded in PROMPTS:
        texts, source = prompts_file(settings.embedded).read_text(encoding="utf-8").splitlines(), settings.embedded
    elif kind == "tsv":
        texts, source = _table(path, settings.field, where), settings.path
    else:
        text = load_text(settings, where)
        texts = text.joined.split("\n") if kind == "text" else text.documents
        source = text.source
    texts = [text.strip() for text in texts[: settings.rows] if text.strip()]
    if len(texts) < settings.samples:
        raise RoseExpError(f"{where}.samples: expected at most {len(texts)}, the prompts of {source}, got {settings.samples}")
    texts = texts[: settings.samples]
    digest = hashlib.sha256("\n".join(texts).encode(errors="surrogatepass")).hexdigest()
    return Prompts(texts, {"source": source, "prompts": len(texts), "sha256": digest})


def _table(path: Path, column: str, where: str) -> list[str]:
    """Return the column that the first row names ``column``; without one, the first column of every row."""
    content = io.StringIO(read_text(path, f"{where}.path"), newline="")
    with outside_errors(f"{where}.path: cannot read {path} as tab-separated text"):
        rows = [row for row in csv.reader(content, delimiter="\t", quoting=csv.QUOTE_NONE) if row]
    if not rows:
        raise RoseExpError(f"{where}.path: expected prompts in {path}, got none")
    if column not in rows[0]:
        return [row[0] for row in rows]
    place = rows[0].index(column)
    return [row[place] for row in rows[1:] if len(row) > place]
