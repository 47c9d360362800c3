"""Redaction of API keys and tokens in logs, records and messages."""

from __future__ import annotations

import logging
import os
import re

NAMES = re.compile(r"(TOKEN|API_?KEY|SECRET|PASSWORD)$", re.IGNORECASE)  # of environment variables
SHAPES = re.compile(
    r"\bhf_[A-Za-z0-9]{20,}"  # Hugging Face
    r"|\bwandb_v\d_[A-Za-z0-9_]{20,}"  # Weights & Biases
    r"|(?<=://)[^/\s:@\"']+:[^/\s@\"']+(?=@)"  # user:password@ in a URL
    r"|(?<=api_key=)[A-Za-z0-9_-]{16,}"
    r"|(?<=Bearer )[A-Za-z0-9._-]{16,}"
)
HIDDEN = "***"
SHORTEST = 8  # shorter values of such variables are not secrets, and can be ordinary words


def redacted(text: str) -> str:
    """Replace the values of environment variables with names of secrets, and strings that look like secrets, by asterisks."""
    for name, value in os.environ.items():
        if NAMES.search(name) and len(value) >= SHORTEST:
            text = text.replace(value, HIDDEN)
    return SHAPES.sub(HIDDEN, text)


class Redacting(logging.Filter):
    """Redacts secrets in log records."""

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
    """Add the redaction of secrets to all current handlers of the root logger."""
    for handler in logging.getLogger().handlers:
        if not any(isinstance(known, Redacting) for known in handler.filters):
            handler.addFilter(Redacting())
