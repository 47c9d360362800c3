"""The ``rose-exp`` command: one run, or with ``-m`` a sweep."""

from __future__ import annotations

from . import quiet  # noqa: F401  isort: skip

import atexit
import logging
import shutil
import sys
import tempfile
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from .command import check_command, config_folder, swept_settings
from .errors import RoseExpError, SettingsError
from .ranks import launched, process_group
from .report import format_table
from .report.terminal import show_config
from .settings import read_settings
from .tracking import Identity
from .tracking.record import FILE_NAME

log = logging.getLogger(__name__)


def main() -> None:
    """Check the whole command first, so that no mistake is found after hours of work; then hand over to Hydra."""
    try:
        check_command(sys.argv[1:])
    except SettingsError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    if launched()[0]:
        _be_quiet()
    try:
        with process_group(cpu="device=cpu" in sys.argv):
            _run()
    except RoseExpError as error:
        print(error, file=sys.stderr)
        sys.exit(1)


def _identity(hydra_config: DictConfig) -> Identity | None:
    """A job of a sweep is called by what differs from the other jobs, and belongs to the sweep's folder."""
    if hydra_config.mode == RunMode.RUN:
        return None
    swept = swept_settings(sys.argv[1:]) | set(hydra_config.sweeper.params or {})
    own = [text for text in hydra_config.overrides.task if text.partition("=")[0].lstrip("+~") in swept]
    return Identity(" ".join(own) or str(hydra_config.job.num), "/".join(Path(hydra_config.sweep.dir).parts[-2:]))


def _be_quiet() -> None:
    """Of several processes at one run the first one tells and writes: this one makes no folder and no log."""
    sys.argv += ["hydra.output_subdir=null", "hydra/job_logging=disabled", "hydra/hydra_logging=disabled"]
    scratch = tempfile.mkdtemp(prefix="rose_exp-rank-")  # Hydra writes a sweep's own file wherever it is told to
    sys.argv += ["hydra.run.dir=.", f"hydra.sweep.dir={scratch}", "hydra.sweep.subdir=."]
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)


@hydra.main(version_base="1.3", config_path=str(config_folder()), config_name="config")
def _run(config: DictConfig) -> None:
    from .experiment import run_experiment  # slow to import, and --help needs none of it

    hydra_config = HydraConfig.get()
    folder = Path(hydra_config.runtime.output_dir)
    resolved = OmegaConf.to_container(config, resolve=True)
    if not launched()[0]:
        show_config(resolved)
    try:
        record = run_experiment(read_settings(resolved), resolved, folder, _identity(hydra_config))
    except RoseExpError as error:
        log.error("%s", error)
        if hydra_config.mode == RunMode.RUN or launched()[1] > 1:  # processes that failed by themselves are out of step
            sys.exit(1)
        return  # a sweep goes on with its other jobs; the table at its end tells, and so does the exit status
    if hydra_config.mode == RunMode.RUN and not launched()[0]:
        print(f"\n{format_table([record])}\n\nfull record: {folder / FILE_NAME}")
