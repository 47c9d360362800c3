"""The locations of configuration files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

LOCAL = "conf"  # folder with the user's configuration files in the working directory
SEARCH_PATH = "hydra.searchpath="


def config_folder() -> Path:
    """Return the folder of the configuration files: in the installed package, or next to it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def with_local_files(arguments: Sequence[str]) -> list[str]:
    """Return arguments of ``rose-exp`` that also find configuration files in ``conf/`` of the working directory.

    Files of this package take precedence, so that a local file adds choices but does not change existing ones. Arguments that
    set the search path themselves remain unchanged.
    """
    folder = Path(LOCAL).resolve()
    names = ("--config-dir", "-cd", "--config-path", "-cp", SEARCH_PATH, f"+{SEARCH_PATH}", f"++{SEARCH_PATH}")
    names += ("--shell-completion", "-sc")  # its arguments are not overrides
    if not folder.is_dir() or folder == config_folder().resolve() or any(a.startswith(names) for a in arguments):
        return list(arguments)
    quoted = str(folder).replace("\\", "\\\\").replace("'", "\\'")
    return [*arguments, f"{SEARCH_PATH}['file://{quoted}']"]
