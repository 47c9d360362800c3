"""Objects that other installed packages provide through entry points.

A package declares them in its ``pyproject.toml``::

    [project.entry-points."rose_exp.methods"]
    mine = "my_package.methods:Mine"
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from .errors import RoseExpError
from .fingerprint import code_sha256, content_sha256


@dataclass(frozen=True)
class Plugin:
    """An object of another package.

    Attributes:
        name: name of the entry point.
        value: the object.
        source: name and version of the package.
        where: description of the entry point, for errors.
        module: name of the module of the object.
    """

    name: str
    value: Any
    source: str
    where: str
    module: str

    @property
    def sha256(self) -> str:
        """Fingerprint of the source files of the package that defines the object.

        Raises:
            RoseExpError: it has none.
        """
        return _package_sha256(self.module)


@cache
def plugins(group: str) -> tuple[Plugin, ...]:
    """Return the objects of an entry point group, in alphabetical order of their names.

    Raises:
        RoseExpError: an entry point cannot be loaded.
    """
    return tuple(_load(group, point) for point in sorted(entry_points(group=group), key=lambda point: point.name))


def declared(group: str) -> dict[str, str]:
    """Return the names in an entry point group with the names and versions of their packages, without loading them."""
    return {point.name: _source(point) for point in sorted(entry_points(group=group), key=lambda point: point.name)}


def _source(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist is not None else point.value


def _load(group: str, point: EntryPoint) -> Plugin:
    source = _source(point)
    where = f"entry point {point.name} of {group} ({source})"
    try:
        value = point.load()
    except Exception as error:  # whatever the code of the package raises
        raise RoseExpError(f"{where}: cannot load {point.value}: {error}") from error
    return Plugin(point.name, value, source, where, point.module)


@cache
def _package_sha256(module: str) -> str:
    """Return the fingerprint of the outermost package, or the file, that contains a module. Namespaces do not count."""
    parts = module.split(".")
    for length in range(1, len(parts) + 1):
        spec = importlib.util.find_spec(".".join(parts[:length]))
        file = Path(spec.origin) if spec is not None and spec.has_location else None
        if file is not None:
            return code_sha256(file.parent) if file.stem == "__init__" else content_sha256(file)
    raise RoseExpError(f"entry points: expected a module with a source file, got {module}")
