"""Layout of the package and direction of its imports."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import REPOSITORY

PACKAGE = REPOSITORY / "rose_exp"
LAYERS = [  # a package imports only from lower layers
    {"engine"},
    {"runtime"},
    {"settings"},
    {"models", "data", "tracking"},
    {"pruning", "evaluation", "report"},
    {"diffusion"},
    {"runs"},
    {"sweeps"},
    {"cli"},
    {"api"},
    {"__init__", "__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
MODULES = sorted(PACKAGE.rglob("*.py"))
ENGINE_NEEDS = {"__future__", "annotated_types", "numba", "numpy", "scipy", "torch", "triton"}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path, lazy: bool = True) -> Iterator[str]:
    """Yield the full names of imported modules; with ``lazy=False``, only those imported at load time."""
    name = name_of(path)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {node for function in ast.walk(tree) if isinstance(function, ast.FunctionDef) for node in ast.walk(function)}
    inside |= {node for check in tree.body if isinstance(check, ast.If) for node in ast.walk(check)}  # TYPE_CHECKING
    for node in ast.walk(tree):
        if node in inside and not lazy:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")
            base = ".".join(above[: len(above) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            for alias in node.names:
                inner = f"{module}.{alias.name}"
                yield inner if inner in NAMES else module


NAMES = {name_of(path) for path in MODULES}


def test_top_level_contains_only_packages_and_entry_points():
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py", "__main__.py", "api.py"}
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == set(LEVEL) - {"api", "__init__", "__main__"}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_follow_the_layers(path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for target in imports(path):
        if target.startswith("rose_exp.") and target.split(".")[1] != own:
            assert LEVEL[target.split(".")[1]] < LEVEL[own], f"{name_of(path)} imports {target}"
        elif own == "engine" and not target.startswith("rose_exp."):
            import sys

            assert target.split(".")[0] in ENGINE_NEEDS | sys.stdlib_module_names, f"the engine imports {target}"


def test_there_are_no_import_cycles():
    edges = {name_of(path): {t for t in imports(path, lazy=False) if t in NAMES} for path in MODULES}
    for name in list(edges):  # importing a module also loads its parent packages
        for target in list(edges[name]):
            parents = [target.rpartition(".")[0]]
            while "." in parents[-1]:
                parents.append(parents[-1].rpartition(".")[0])
            edges[name] |= {p for p in parents if p and not name.startswith(p)}
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join([*above[above.index(name) :], name])
        if name in done:
            return
        for target in sorted(edges[name] - {name}):
            visit(target, (*above, name))
        done.add(name)

    for name in sorted(edges):
        visit(name, ())


def test_tests_mirror_the_package():
    folders = {path.parent.name for path in (REPOSITORY / "tests").glob("*/__init__.py")}
    assert folders == set(LEVEL) - {"api", "__init__", "__main__"}


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("**/__init__.py")), ids=name_of)
def test_no_export_shadows_a_module(path):
    """Importing the module would replace the export unless the export comes from that module."""
    exported = {
        alias.asname or alias.name
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
        if node.module != alias.name
    }
    modules = {other.stem for other in path.parent.glob("*.py")} | {
        other.parent.name for other in path.parent.glob("*/__init__.py")
    }
    assert not exported & modules
