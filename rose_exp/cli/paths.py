"""The location of the configuration files."""

from __future__ import annotations

from pathlib import Path


def config_folder() -> Path:
    """Return the folder of the configuration files: in the installed package, or next to it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"
