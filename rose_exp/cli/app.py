"""The ``rose-exp`` command, which executes one run or, with ``-m``, a sweep."""

from __future__ import annotations

from ..runtime import quiet  # noqa: F401  isort: skip

import atexit
import logging
import os
import sys
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from ..report import format_table
from ..report.terminal import show_config
from ..runs.identity import register_resolver, run_id
from ..runtime.errors import RoseExpError, SettingsError
from ..runtime.files import scratch_folder
from ..runtime.ranks import launched, process_group
from ..runtime.redaction import guard_logs, redacted
from ..runtime.signals import EXIT_STATUS, Interrupted
from ..settings.schema import Settings, read_settings
from ..sweeps.devices import claimed
from ..sweeps.optuna import register_sweeper
from ..sweeps.summary import format_outcomes, outcomes
from ..tracking import Identity
from ..tracking.record import FILE_NAME, now
from .command import Command, check_command
from .paths import config_folder

if TYPE_CHECKING:
    from ..pruning import FirstBlock

log = logging.getLogger(__name__)

SWEPT = "ROSE_EXP_SWEPT"  # environment variable with the names of the swept settings, for launchers' workers

register_resolver()  # here, because launchers' workers import only this module
register_sweeper()


class _Checked:
    """The run IDs of the command's jobs, which :func:`main` has checked.

    Attributes:
        run_ids: None if no run ID is known in advance: in a search, and in a launcher's worker.
    """

    def __init__(self):
        self.run_ids: frozenset[str] | None = None

    def check(self, settings: Settings) -> None:
        """Raise RoseExpError if ``settings`` are not those of a checked job."""
        identity = run_id(settings)
        if self.run_ids is not None and identity not in self.run_ids:
            raise RoseExpError(
                f"expected one of the {len(self.run_ids)} runs of the checked command, got {identity} ({settings.label}): the "
                "configuration or a file that it names has changed since the check"
            )


_checked = _Checked()


def main() -> None:
    """Check the whole command, so that errors are reported before any job runs. Then let Hydra run its jobs."""
    try:
        command = check_command(sys.argv[1:])
    except SettingsError as error:
        print(redacted(str(error)), file=sys.stderr)
        sys.exit(2)
    if problem := command.without_multirun():
        print(redacted(problem), file=sys.stderr)
        sys.exit(2)
    if command.planned:
        from ..sweeps.plan import format_plan  # slow to import

        print(format_plan(command.jobs[:1] if command.searched else command.jobs, command.sweep))
        if command.searched:
            print("a search: each trial needs about as much as this one, at one end of the search space")
        return
    if command.searched and launched()[1] > 1:
        print(
            "torchrun: expected a run or a sweep, got a search, whose trials would differ from process to process",
            file=sys.stderr,
        )
        sys.exit(2)
    os.environ[SWEPT] = " ".join(sorted(command.swept))
    _checked.run_ids = None if command.searched or not command.jobs else frozenset(job.run_id for job in command.jobs)
    if launched()[0]:
        _silence_hydra()
    started = now()
    try:
        on_cpu = bool(command.jobs) and all(job.settings.device == "cpu" for job in command.jobs)
        with process_group(on_cpu):
            hydra.main(version_base="1.3", config_path=str(config_folder()), config_name="config")(job)()
    except RoseExpError as error:
        print(redacted(str(error)), file=sys.stderr)
        sys.exit(1)
    except Interrupted as stop:
        rerun = any(job.settings.rerun for job in command.jobs)
        hint = "to resume, run the same command without rerun=true" if rerun else "run the same command again to resume"
        print(f"{stop}; {hint}", file=sys.stderr)
        sys.exit(EXIT_STATUS)
    finally:
        if command.sweep is not None and not command.searched and not launched()[0]:
            complete = _print_outcomes(command, started)
            if not complete and sys.exc_info()[0] is None:
                sys.exit(1)


def _print_outcomes(command: Command, started: str) -> bool:
    """Print the table at the end of a sweep. Return whether every job is done."""
    rerun = any(job.settings.rerun for job in command.jobs)
    results = outcomes([(job.name, job.run_id) for job in command.jobs], command.sweep, started, rerun)
    print(f"\n{format_outcomes(results)}\n\nfull records: {command.sweep.resolve()}/RUN/{FILE_NAME}")
    return all(outcome.state in ("ran", "reused") for outcome in results)


def _identity(hydra_config: DictConfig) -> Identity | None:
    """Return the tracker's name and group of a sweep's job, or None for a single run.

    The name consists of the overrides that differ from the other jobs. The group is the experiment or, without one, the folder.
    """
    if hydra_config.mode == RunMode.RUN:
        return None
    swept = os.environ.get(SWEPT, "").split()
    task = hydra_config.overrides.task
    overrides = [text for text in task if text.partition("=")[0].lstrip("+~") in swept] or task
    return Identity(
        " ".join(overrides), hydra_config.runtime.choices.get("experiment") or "/".join(Path(hydra_config.sweep.dir).parts[-2:])
    )


def _silence_hydra() -> None:
    """Disable Hydra's output of this process, because only the first rank prints and writes files."""
    sys.argv += ["hydra.output_subdir=null", "hydra/job_logging=disabled", "hydra/hydra_logging=disabled"]
    stack = ExitStack()
    scratch = stack.enter_context(scratch_folder())  # Hydra always writes a file of the sweep
    sys.argv += ["hydra.run.dir=.", f"hydra.sweep.dir={scratch}", "hydra.sweep.subdir=."]
    atexit.register(stack.close)


@cache
def _first_block() -> FirstBlock:
    """Return the moments of the first block, which a sweep's jobs in this process share."""
    from ..pruning import FirstBlock

    return FirstBlock()


def job(config: DictConfig) -> dict[str, Any] | None:
    """Run one job for Hydra, in this process or in a launcher's worker.

    Returns:
        The metrics; None if the job of a sweep failed.
    """
    from ..runs.execution import do_run  # slow to import

    guard_logs()
    hydra_config = HydraConfig.get()
    sweep = hydra_config.mode == RunMode.MULTIRUN
    folder = Path(hydra_config.runtime.output_dir)
    resolved = OmegaConf.to_container(config, resolve=True)
    if not launched()[0]:
        show_config(resolved)
    try:
        settings = read_settings(resolved)
        _checked.check(settings)
        with claimed(settings.device, sweep) as device:
            shared = _first_block() if sweep else None
            record = do_run(settings.on(device), resolved, folder, _identity(hydra_config), sweep, shared)
    except RoseExpError as error:
        log.error("%s", error)
    except Exception:
        if not sweep:
            raise
        log.exception("the job failed; the sweep continues")
    else:
        if not sweep and not launched()[0]:
            print(f"\n{format_table([record])}\n\nfull record: {folder / FILE_NAME}")
        return record["metrics"]
    if not sweep or launched()[1] > 1:  # a process that failed alone is out of step with the others
        sys.exit(1)
    return None  # the sweep continues with its other jobs; the table at its end and the exit status report the failure
