"""Terminal output before a run."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.text import Text
from rich.tree import Tree

from ..runtime.escaping import terminal
from ..runtime.redaction import redact


def show_config(config: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the composed configuration as a tree, without unset values and secrets.

    Prints nothing if the output is not a terminal.
    """
    console = console or Console()
    if console.file is sys.stdout and not sys.stdout.isatty():
        return
    tree = Tree("configuration")
    _grow(tree, redact(config))
    console.print(tree)


def _grow(tree: Tree, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            _grow(tree.add(Text(terminal(name), style="bold")), value)
        elif value is not None:
            shown = "none" if value in ([], {}) else repr(value) if isinstance(value, str) and "\n" in value else str(value)
            tree.add(Text(terminal(f"{name}: {shown}")))
