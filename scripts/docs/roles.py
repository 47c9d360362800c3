"""Extension of Griffe that turns the Sphinx roles in docstrings into Markdown."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`([\w.]+)`")


class Roles(griffe.Extension):
    """Turns a role such as ``:class:`Ordering``` into code, with a link if the name is part of the API reference."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(lambda match: reference(match[1], obj), obj.docstring.value)


def reference(name: str, where: griffe.Object) -> str:
    """Return Markdown for a name in the docstring of an object."""
    try:
        path = name if name.startswith("rose_exp.") else where.resolve(name)
    except griffe.NameResolutionError:
        return f"`{name}`"
    return f'<autoref identifier="{path}" optional><code>{name.removeprefix("rose_exp.engine.")}</code></autoref>'
