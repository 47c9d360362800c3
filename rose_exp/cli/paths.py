"""Where the package keeps its configuration files."""

from __future__ import annotations

from pathlib import Path


def config_folder() -> Path:
    """The configuration files: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"
