"""Entry point of the ``rose-exp`` command. Answers ``--help`` and shell completion without slow imports."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from ..runtime.exits import exit_on_signals, guarded_output  # every other import is slower, and a signal can interrupt it

if TYPE_CHECKING:
    from omegaconf import DictConfig


def main() -> None:
    """Run the ``rose-exp`` command."""
    exit_on_signals()
    with guarded_output():
        from ..runtime.output import redacted_output

        with redacted_output():
            _run()


def _run() -> None:
    from hydra._internal.utils import get_args_parser

    if "--version" in sys.argv[1:]:  # Hydra's parser prints the version of Hydra
        from importlib.metadata import version

        print(f"rose_exp {version('rose_exp')}")
        return
    from .paths import with_local_files

    sys.argv[1:] = with_local_files(sys.argv[1:])
    parsed = get_args_parser().parse_args()
    if parsed.help:
        from .help import help_text

        print(help_text(parsed))
    elif parsed.shell_completion:
        import hydra

        from .paths import config_folder
        from .plugins import add_choices, prefer_own_files

        prefer_own_files()
        add_choices()
        hydra.main(version_base="1.3", config_path=str(config_folder()), config_name="config")(_no_task)()
    else:
        from .app import main as run  # slow to import

        run()


def _no_task(_: DictConfig) -> None:
    """Do nothing: Hydra needs a task function even if it only completes a command line."""
