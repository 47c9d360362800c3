"""The ``rose-exp`` command: one run, or with ``-m`` a sweep."""

from __future__ import annotations

from . import quiet  # noqa: F401  isort: skip

import atexit
import logging
import os
import shutil
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from .command import Command, check_command
from .entry import config_folder
from .errors import RoseExpError, SettingsError
from .interruption import EXIT_STATUS, Interrupted
from .ranks import launched, process_group
from .report import format_table
from .report.terminal import show_config
from .run_id import register_resolver
from .secrets import guard_logs, redacted
from .settings import read_settings
from .sweeps.devices import claimed
from .sweeps.optuna import register_sweeper
from .sweeps.summary import format_outcomes, outcomes
from .tracking import Identity
from .tracking.record import FILE_NAME, now

if TYPE_CHECKING:
    from .pipeline import FirstBlock

log = logging.getLogger(__name__)

SWEPT = "ROSE_EXP_SWEPT"  # environment of a sweep's jobs, wherever they run: the settings that they differ in

register_resolver()  # here, since a launcher's workers import this module and no other
register_sweeper()


def main() -> None:
    """Check the whole command first, so that no mistake is found after hours of work; then hand over to Hydra."""
    try:
        command = check_command(sys.argv[1:])
    except SettingsError as error:
        print(redacted(str(error)), file=sys.stderr)
        sys.exit(2)
    if command.planned:
        from .sweeps.plan import format_plan  # slow to import

        print(format_plan(command.jobs[:1] if command.searched else command.jobs, command.sweep))
        if command.searched:
            print("a search: each of its trials takes about as much as this one, at an end of what is searched")
        return
    if command.searched and launched()[1] > 1:
        print(
            "torchrun: expected a run or a sweep, got a search, whose trials would differ from process to process",
            file=sys.stderr,
        )
        sys.exit(2)
    os.environ[SWEPT] = " ".join(sorted(command.swept))
    if launched()[0]:
        _be_quiet()
    started = now()
    try:
        with process_group(cpu="device=cpu" in sys.argv):
            hydra.main(version_base="1.3", config_path=str(config_folder()), config_name="config")(job)()
    except RoseExpError as error:
        print(redacted(str(error)), file=sys.stderr)
        sys.exit(1)
    except Interrupted as stop:
        print(f"{stop}; the same command goes on from there", file=sys.stderr)
        sys.exit(EXIT_STATUS)
    finally:
        if command.sweep is not None and not command.searched and not launched()[0]:
            whole = _tell(command, started)
            if not whole and sys.exc_info()[0] is None:
                sys.exit(1)


def _tell(command: Command, started: str) -> bool:
    """The table at the end of a sweep, however it ended; whether every job of it is done."""
    rerun = any(job.settings.rerun for job in command.jobs)
    found = outcomes([(job.name, job.run_id) for job in command.jobs], command.sweep, started, rerun)
    print(f"\n{format_outcomes(found)}\n\nfull records: {command.sweep.resolve()}/RUN/{FILE_NAME}")
    return all(outcome.state in ("ran", "reused") for outcome in found)


def _identity(hydra_config: DictConfig) -> Identity | None:
    """A job of a sweep is called by what differs from the other jobs, and belongs to the experiment, or to the folder."""
    if hydra_config.mode == RunMode.RUN:
        return None
    swept = os.environ.get(SWEPT, "").split()
    task = hydra_config.overrides.task
    own = [text for text in task if text.partition("=")[0].lstrip("+~") in swept] or task
    return Identity(
        " ".join(own), hydra_config.runtime.choices.get("experiment") or "/".join(Path(hydra_config.sweep.dir).parts[-2:])
    )


def _be_quiet() -> None:
    """Of several processes at one run the first one tells and writes: this one makes no folder and no log."""
    sys.argv += ["hydra.output_subdir=null", "hydra/job_logging=disabled", "hydra/hydra_logging=disabled"]
    scratch = tempfile.mkdtemp(prefix="rose_exp-rank-")  # Hydra writes a sweep's own file wherever it is told to
    sys.argv += ["hydra.run.dir=.", f"hydra.sweep.dir={scratch}", "hydra.sweep.subdir=."]
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)


@cache
def _first_block() -> FirstBlock:
    """What the jobs of a sweep that this process runs share."""
    from .pipeline import FirstBlock

    return FirstBlock()


def job(config: DictConfig) -> dict[str, Any] | None:
    """One run, as Hydra calls it, here or in a launcher's worker; its metrics, None where it failed."""
    from .runs import do_run  # slow to import, and --help needs none of it

    guard_logs()
    hydra_config = HydraConfig.get()
    sweep = hydra_config.mode == RunMode.MULTIRUN
    folder = Path(hydra_config.runtime.output_dir)
    resolved = OmegaConf.to_container(config, resolve=True)
    if not launched()[0]:
        show_config(resolved)
    try:
        settings = read_settings(resolved)
        with claimed(settings.device, sweep) as device:
            shared = _first_block() if sweep else None
            record = do_run(settings.on(device), resolved, folder, _identity(hydra_config), sweep, shared)
    except RoseExpError as error:
        log.error("%s", error)
    except Exception:
        if not sweep:
            raise
        log.exception("the job failed; the sweep goes on")
    else:
        if not sweep and not launched()[0]:
            print(f"\n{format_table([record])}\n\nfull record: {folder / FILE_NAME}")
        return record["metrics"]
    if not sweep or launched()[1] > 1:  # processes that failed by themselves are out of step
        sys.exit(1)
    return None  # a sweep goes on with its other jobs; the table at its end tells, and so does the exit status
