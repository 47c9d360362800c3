"""Packages with entry points that tests install, in this process or for a command."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from hydra.core.config_store import ConfigStore

from rose_exp.engine import METHODS
from rose_exp.engine.scores import SCORES
from rose_exp.runtime.plugins import _package_sha256, plugins
from rose_exp.settings.plugins import install_plugins

Points = Mapping[str, Mapping[str, str]]
"""Objects by entry point group and name."""


def write_package(folder: Path, name: str, version: str, module: str, points: Points) -> None:
    """Write a package with one module and its entry points."""
    (folder / f"{name}.py").write_text(module)
    metadata = folder / f"{name}-{version}.dist-info"
    metadata.mkdir(exist_ok=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n")
    text = "\n".join(f"[{group}]\n" + "\n".join(f"{k} = {v}" for k, v in of.items()) for group, of in points.items())
    (metadata / "entry_points.txt").write_text(text + "\n")


def forget() -> None:
    """Forget which packages are installed."""
    importlib.invalidate_caches()
    for cached in (plugins, install_plugins, _package_sha256):
        cached.cache_clear()


@contextmanager
def installing(write: Callable[..., None], folder: Path, name: str, monkeypatch) -> Iterator[Callable[..., None]]:
    """Yield a function that calls ``write`` and installs the package in this process. Afterwards, uninstall it."""
    known = [(group, dict(group)) for group in (METHODS, SCORES)]

    def install(*arguments) -> None:
        write(folder, *arguments)
        monkeypatch.syspath_prepend(str(folder))
        forget()

    yield install
    for group in ("method", "tracking", "calibration", "evaluation"):  # only plugins register choices of these groups
        ConfigStore.instance().repo.pop(group, None)
    for group, before in known:
        group.clear()
        group.update(before)
    sys.modules.pop(name, None)
    forget()


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run ``rose-exp`` in a folder, with the packages in it."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), *sys.path])}
    return subprocess.run(
        [sys.executable, "-m", "rose_exp", *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
