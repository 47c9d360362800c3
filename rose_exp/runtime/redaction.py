"""Keeping keys and tokens out of everything that is written."""

from __future__ import annotations

import logging
import os
import re

NAMES = re.compile(r"(TOKEN|API_?KEY|SECRET|PASSWORD)$", re.IGNORECASE)  # of environment variables
SHAPES = re.compile(
    r"\bhf_[A-Za-z0-9]{20,}"  # Hugging Face
    r"|\bwandb_v\d_[A-Za-z0-9_]{20,}"  # Weights & Biases
    r"|(?<=://)[^/\s:@\"']+:[^/\s@\"']+(?=@)"  # user:password@ of an address
    r"|(?<=api_key=)[A-Za-z0-9_-]{16,}"
    r"|(?<=Bearer )[A-Za-z0-9._-]{16,}"
)
HIDDEN = "***"
SHORTEST = 8  # a shorter value in a variable of such a name is no secret, and may be any word


def redacted(text: str) -> str:
    """``text`` without the values of environment variables that are named like secrets, and without what looks like one."""
    for name, value in os.environ.items():
        if NAMES.search(name) and len(value) >= SHORTEST:
            text = text.replace(value, HIDDEN)
    return SHAPES.sub(HIDDEN, text)


class Redacting(logging.Filter):
    """Takes secrets out of what is logged."""

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        clean = redacted(text)
        if clean != text:
            record.msg, record.args = clean, ()
        if record.exc_info and record.exc_text is None:
            record.exc_text = logging.Formatter().formatException(record.exc_info)
        if record.exc_text:
            record.exc_text = redacted(record.exc_text)
        return True


def guard_logs() -> None:
    """Let every handler that logging has by now leave secrets out."""
    for handler in logging.getLogger().handlers:
        if not any(isinstance(known, Redacting) for known in handler.filters):
            handler.addFilter(Redacting())
