"""Escaping of text from records, configurations and models for each output format.

Every function first makes characters visible that a reader would not see, or that would change the surrounding text: control
characters, terminal escape sequences, bidirectional overrides and lone surrogates.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Any

INVISIBLE = ("Cc", "Cf", "Cs", "Zl", "Zp")  # Unicode categories: control, format, surrogate, line and paragraph separators
LONGEST_LABEL = 200  # characters of a label in a figure
NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?%?")
FORMULA = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")  # the last four are full-width forms of the others
LATEX = {
    "\\": r"\textbackslash{}",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "[": "{[}",  # an optional argument after "\\"
    "]": "{]}",
    "*": "{*}",
    "±": r"$\pm$",
    "×": r"$\times$",
    "–": "--",
} | {sign: f"\\{sign}" for sign in "&%#_{}$"}
MARKDOWN = re.compile(
    r"[\\`*<>|&~$#]"
    r"|!(?=\[)|\](?=[(\[:])"  # images, links and link definitions
    r"|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])"  # emphasis does not start or end inside a word
)
MARKDOWN_START = re.compile(r"[-+=\[]|\d+(?=[.)])")  # lists, headings and task lists


def visible(text: str, lines: bool = False) -> str:
    """Return a text with spaces in place of tabs and line breaks, and with other invisible characters as escape sequences.

    Args:
        lines: whether to keep tabs and line breaks.
    """
    if text.isascii() and text.isprintable():
        return text
    text = text.replace("\r\n", "\n")
    return "".join(_visible(character, lines) for character in text)


def _visible(character: str, lines: bool) -> str:
    if character in "\n\t":
        return character if lines else " "
    if character == "\r" and not lines:
        return " "
    if unicodedata.category(character) not in INVISIBLE:
        return character
    number = ord(character)
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


def terminal(text: str, lines: bool = False) -> str:
    """Return a text for a terminal or a log.

    Args:
        lines: whether to keep tabs and line breaks.
    """
    return visible(text, lines)


def markdown(text: str, start: bool = False) -> str:
    """Return a text for a heading, list item or table cell in Markdown, which shows it as it is.

    Args:
        start: whether the text starts a list item or paragraph.
    """
    text = visible(text).strip()
    escaped = MARKDOWN.sub(lambda found: f"\\{found[0]}", text)
    marker = MARKDOWN_START.match(text) if start else None
    if marker is None:
        return escaped
    return f"{marker[0]}\\{escaped[marker.end() :]}" if marker[0].isdigit() else f"\\{escaped}"


def markdown_code(text: str) -> str:
    """Return a text as inline code in Markdown."""
    return _fenced(visible(text), "`", " ")


def markdown_block(text: str) -> str:
    """Return a text as a code block in Markdown."""
    return _fenced(visible(text, lines=True), "```", "\n")


def _fenced(text: str, fence: str, separator: str) -> str:
    longest = max(map(len, re.findall("`+", text)), default=0)
    if len(fence) <= longest:
        fence = "`" * (longest + 1)
    padded = separator == "\n" or text.startswith("`") or text.endswith("`") or not text.strip()
    return f"{fence}{separator}{text}{separator}{fence}" if padded else f"{fence}{text}{fence}"


def latex(text: str) -> str:
    """Return a text for LaTeX, which shows it as it is."""
    return "".join(LATEX.get(character, character) for character in visible(text))


def csv_cell(value: Any) -> Any:
    """Return a cell of a CSV file. A text that a spreadsheet would evaluate as a formula starts with an apostrophe."""
    if not isinstance(value, str):
        return value
    text = visible(value)
    formula = text.lstrip().startswith(FORMULA) and not NUMBER.fullmatch(text)
    return f"'{text}" if formula else text


def figure_label(text: str) -> str:
    """Return a text for a label in a figure, without math mode. A leading underscore would hide it from the legend."""
    text = visible(text)
    text = text if len(text) <= LONGEST_LABEL else f"{text[:LONGEST_LABEL]}…"
    return (f" {text}" if text.startswith("_") else text).replace("$", r"\$")
