"""The documentation site builds without warnings, and the notebook runs."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import nbformat
import pytest

import rose_exp
import rose_exp.engine

from .conftest import REPOSITORY

NOTEBOOK = REPOSITORY / "docs/quickstart.ipynb"
SCRIPTS = REPOSITORY / "scripts/docs"
DOCUMENTED = re.findall(r"^::: (\S+)$", (REPOSITORY / "docs/api.md").read_text(encoding="utf-8"), re.MULTILINE)
PATHS = re.compile(r"(?<![\w.:/])/(?:home|root|tmp|usr|var|opt|work|mnt|data|Users|private)/|[A-Z]:\\\\")

LOADED = re.compile(r'<(?:script|img|link rel="stylesheet")[^>]* (?:src|href)="(?:https?:)?//')
"""Files that a page loads from another host."""


def load(name: str) -> ModuleType:
    """Import a script of the site, as MkDocs does."""
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*command: str, folder: Path = REPOSITORY) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "NO_MKDOCS_2_WARNING": "1"}
    command = (sys.executable, *command)
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("module", [rose_exp, rose_exp.engine], ids=lambda module: module.__name__)
def test_api_reference_contains_all_public_names(module):
    assert {f"{module.__name__}.{name}" for name in module.__all__} <= set(DOCUMENTED)


@pytest.mark.parametrize(
    ("link", "page", "expected"),
    [
        ("noise.md", "methods.md", "noise.md"),
        ("../scripts/cost_model.md", "results.md", "cost_model.md"),
        ("../../CHANGELOG.md", "results/noise.md", "../changelog.md"),
        ("quickstart.ipynb", "python.md", "quickstart.md"),
        ("docs/results/noise.md", "changelog.md", "results/noise.md"),
        ("missing.md", "python.md", "missing.md"),
        ("https://example.org/a.md", "python.md", "https://example.org/a.md"),
    ],
)
def test_links_are_adapted_to_the_site(link, page, expected):
    assert load("pages").site_link(link, page) == expected


def test_stored_notebook_has_outputs_without_errors_and_paths():
    cells = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert {output.output_type for output in outputs} == {"stream", "execute_result", "display_data"}
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 1
    texts = [str(output.get("text", "")) + str(output.get("data", {})) for output in outputs]
    for text in (re.sub(r"'image/png': '[^']*'", "", text) for text in texts):
        assert not PATHS.search(text), text
        assert "Traceback" not in text
        assert "Warning" not in text


@pytest.mark.slow
def test_notebook_runs():
    from nbclient import NotebookClient

    NotebookClient(nbformat.read(NOTEBOOK, as_version=4), timeout=300).execute()


@pytest.mark.slow
def test_sketches_are_drawn(tmp_path):
    done = run(str(SCRIPTS / "sketches.py"), str(tmp_path))
    assert done.returncode == 0, done.stderr
    names = {path.name for path in (REPOSITORY / "docs/figures").glob("*.png")}
    assert {path.name for path in tmp_path.iterdir()} == names


@pytest.mark.slow
def test_site_builds_without_warnings(tmp_path):
    done = run("-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    page = (tmp_path / "api.html").read_text(encoding="utf-8")
    anchors = set(re.findall(r'id="([\w.]+)"', page))
    assert set(DOCUMENTED) <= anchors
    assert not re.search(r":(?:class|func|data|meth|attr|mod):|<blockquote>|\b(?:Args|Returns|Raises|Attributes):\n", page)
    pages = {path.relative_to(tmp_path).as_posix(): path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.html")}
    for name, text in pages.items():
        assert not LOADED.search(text), name
        for link in re.findall(r'(?:src|href)="([^"#?:]+)[#"?]', text):
            assert (tmp_path / name).parent.joinpath(link).exists() or name == "404.html", (name, link)
