"""Redaction of secrets in everything that is written: records, configurations, logs, messages, reports and trackers.

A secret is recognized by the name of its setting or environment variable, or by the format of common services' tokens.
:func:`redact` redacts data before it is serialized, :func:`redacted` redacts text.
"""

from __future__ import annotations

import html
import json
import os
import re
import urllib.parse
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

HIDDEN = "***"
SECRET_WORDS = frozenset(
    {"secret", "token", "password", "passwd", "passphrase", "credential", "credentials", "key"}
    | {f"{first}{last}" for first in ("api", "access", "auth", "private", "secret") for last in ("key", "token")}
)
WEAK = frozenset({"key", "token"})  # ordinary words, if they stand alone in a text
DESCRIBING = frozenset(  # last words of names whose values describe a secret
    {"path", "file", "dir", "folder", "name", "id", "ids", "count", "type", "kind", "length", "size", "limit", "index", "error"}
)
ORDINARY = {  # words before "token" or "key" that make it an ordinary name
    "token": frozenset({"bos", "class", "cls", "end", "eos", "eot", "image", "mask", "pad", "sep", "special", "start", "unk"})
    | {"first", "last", "max", "min", "new", "next", "num", "per"},
    "key": frozenset({"dict", "first", "foreign", "last", "missing", "primary", "public", "query", "sort", "state"}),
}
SHORTEST = 8  # shorter values of environment variables are redacted only as whole words with letters and other characters
SHORTEST_MIXED = 5

WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
SHAPES = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----(?:.|\n)*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"
    r"|(?<=://)[^\s/\"'<>:@]*:[^\s/\"'<>]+(?=@)"  # user:password@ in a URL
    r"|(?<=://)[^\s/\"'<>:@]{20,}(?=@)"  # token@ in a URL
    r"|(?i:(?<=bearer )[a-z0-9._~+/=-]{16,}|(?<=authorization: basic )[a-z0-9+/=]{8,})"
    r"|(?<![A-Za-z0-9])(?:"
    r"hf_[A-Za-z0-9]{16,}|api_org_[A-Za-z0-9]{16,}"  # Hugging Face
    r"|wandb_v\d_[A-Za-z0-9_]{20,}"  # Weights & Biases
    r"|(?<![-_])sk-[A-Za-z0-9_-]{16,}"  # OpenAI, Anthropic and others
    r"|gh[opsur]_[A-Za-z0-9]{16,}|github_pat_[A-Za-z0-9_]{16,}|glpat-[A-Za-z0-9_-]{16,}"  # GitHub, GitLab
    r"|A(?:KIA|SIA|BIA|CCA)[A-Z0-9]{16}(?![A-Za-z0-9])"  # AWS
    r"|AIza[A-Za-z0-9_-]{30,}|ya29\.[A-Za-z0-9_-]{16,}|GOCSPX-[A-Za-z0-9_-]{16,}"  # Google
    r"|xox[a-z]-[A-Za-z0-9-]{8,}|xapp-[A-Za-z0-9-]{8,}|hooks\.slack\.com/services/[A-Za-z0-9/]+"  # Slack
    r"|eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{4,}\.[A-Za-z0-9_-]*"  # JSON web token
    r"|[sr]k_(?:live|test)_[A-Za-z0-9]{16,}|npm_[A-Za-z0-9]{30,}|pypi-[A-Za-z0-9_-]{30,}|gsk_[A-Za-z0-9]{30,}"
    r"|SG\.[A-Za-z0-9_-]{16,}\.[A-Za-z0-9_-]{16,}"
    r")"
)
HEX_KEY = re.compile(r"(?<![A-Za-z0-9])[0-9a-f]{40}(?![A-Za-z0-9])")  # Weights & Biases; a commit has the same format
COMMIT = re.compile(  # text before a commit, or before several that a report compares
    r"(?i:revision|commit|commit_hash|sha|snapshots|blobs?|tree|resolve|head|parent)[\"'`]?\s*[:=/ @]\s*[\"'`]?"
    r"(?:[^|\n]{1,60} \| )*$|@$"
)
COMMIT_REACH = 500  # characters of that text
ASSIGNMENT = re.compile(
    r"(?<![\w.])(?P<name>[A-Za-z_][\w.-]*)(?P<middle>(?P<quote>[\"']?)\s{0,2}(?P<sign>[=:])\s{0,2})"
    r"(?P<value>\"[^\"\n]*\"|'[^'\n]*'|[^\s\"',;&(){}\[\]<>]+)"
)
OVERRIDE = re.compile(r"(?P<name>[+~]{0,2}[A-Za-z_][\w./@:-]*)=(?P<value>.+)", re.DOTALL)
REVISION = frozenset(("revision", "commit", "sha"))  # last words of the names of settings with a commit


@lru_cache(maxsize=4096)
def is_secret_name(name: str) -> bool:
    """Return whether the name of a setting or variable, such as ``HF_TOKEN`` or ``wandb.apiKey``, is that of a secret."""
    words = _words(name)
    if not words or words[-1] in DESCRIBING:
        return False
    return any(word in SECRET_WORDS and not (i > 0 and words[i - 1] in ORDINARY.get(word, ())) for i, word in enumerate(words))


@lru_cache(maxsize=4096)
def _words(name: str) -> tuple[str, ...]:
    """Return the lowercase words of the last part of a dotted name."""
    return tuple(word.lower() for word in WORDS.findall(re.split(r"[./]", name.rstrip("./"))[-1]))


def redacted(text: str) -> str:
    """Replace all secrets in a text by asterisks: values of environment variables with names of secrets, values that a text
    assigns to such a name, and strings in the format of a token."""
    return _redacted(text, _environment())


def redact(data: Any) -> Any:
    """Return a copy of JSON-like data with asterisks in place of secrets, and in place of the values of secret names."""
    return _redact(data, _environment(), "")


def _redact(data: Any, values: re.Pattern[str] | None, name: str) -> Any:
    if isinstance(data, Mapping):
        return {
            _redacted(key, values) if isinstance(key, str) else key: _redact(value, values, str(key))
            for key, value in data.items()
        }
    if isinstance(data, (list, tuple)):
        return type(data)(_redact(value, values, name) for value in data) if type(data) in (list, tuple) else data
    if isinstance(data, bool) or data is None:
        return data
    words = _words(name)
    if name and is_secret_name(name) and (isinstance(data, str) or words[-1] in SECRET_WORDS):
        return HIDDEN
    if not isinstance(data, str):
        return data
    override = OVERRIDE.fullmatch(data)
    if override and is_secret_name(override["name"]):
        return f"{_redacted(override['name'], values)}={HIDDEN}"
    return _redacted(data, values, commits=bool(words) and words[-1] in REVISION)


def _redacted(text: str, values: re.Pattern[str] | None, commits: bool = False) -> str:
    """Redact a text.

    Args:
        values: the values of environment variables.
        commits: whether 40 hexadecimal digits are a commit.
    """
    if values is not None:
        text = values.sub(HIDDEN, text)
    text = SHAPES.sub(HIDDEN, text)
    if not commits:
        text = HEX_KEY.sub(_hexadecimal, text)
    return ASSIGNMENT.sub(_assigned, text)


def _hexadecimal(found: re.Match[str]) -> str:
    """Return 40 hexadecimal digits if they are a commit."""
    before = found.string[max(found.start() - COMMIT_REACH, 0) : found.start()]
    return found[0] if COMMIT.search(before) else HIDDEN


def _assigned(found: re.Match[str]) -> str:
    """Return an assignment, such as ``password=…``, without the value of a secret name."""
    name, value = found["name"], found["value"]
    words = _words(name)
    if not is_secret_name(name) or words[-1] not in SECRET_WORDS or value.strip("\"'") == HIDDEN:
        return found[0]
    bare = words == (words[-1],) and words[-1] in WEAK and "." not in name and not found["quote"]
    if bare and len(value.strip("\"'")) < SHORTEST:
        return found[0]  # code such as "key=len", text such as "token: 5"
    sentence = found["sign"] == ":" and found["middle"].endswith(" ") and not found["quote"]
    if sentence and (bare or found.string[found.end() : found.end() + 1] not in ("", "\n", "\r", ",", "}")):
        return found[0]  # such as "api_key: expected a value"
    quote = value[0] if value[0] in "\"'" else ""
    return f"{name}{found['middle']}{quote}{HIDDEN}{quote}"


def _environment() -> re.Pattern[str] | None:
    """Return a pattern for the values of all environment variables with names of secrets, or None if there are none."""
    return _pattern(frozenset(value for name, value in os.environ.items() if is_secret_name(name)))


@lru_cache(maxsize=64)
def _pattern(values: frozenset[str]) -> re.Pattern[str] | None:
    patterns: set[str] = set()
    for value in values:
        for text in (value.strip(), *(line.strip() for line in value.splitlines() if len(line.strip()) >= 2 * SHORTEST)):
            if len(text) >= SHORTEST:
                patterns |= {re.escape(form) for form in _written(text)}
            elif len(text) >= SHORTEST_MIXED and not text.isalpha() and any(map(str.isalpha, text)):
                patterns |= {rf"(?<!\w){re.escape(form)}(?!\w)" for form in _written(text)}
    return re.compile("|".join(sorted(patterns, key=len, reverse=True))) if patterns else None


def _written(value: str) -> Iterable[str]:
    """Return the forms in which files and messages contain a value."""
    quoted = {urllib.parse.quote(value), urllib.parse.quote(value, safe=""), urllib.parse.quote_plus(value)}
    return {value, json.dumps(value)[1:-1], repr(value)[1:-1], html.escape(value), *quoted}
