"""The ``rose-exp`` command, which executes one run or, with ``-m``, a sweep."""

from __future__ import annotations

from ..runtime import quiet  # noqa: F401  isort: skip
from ..runtime import exits  # isort: skip

import atexit
import contextlib
import logging
import multiprocessing
import os
import shlex
import signal
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
from ..runtime.escaping import terminal
from ..runtime.files import scratch_folder
from ..runtime.output import guard_logs, redacted_output
from ..runtime.ranks import launched, process_group
from ..runtime.redaction import redacted
from ..runtime.signals import EXIT_STATUS, Interrupted
from ..settings.schema import Settings, applied, read_settings
from ..sweeps.devices import claimed
from ..sweeps.optuna import register_sweeper
from ..sweeps.summary import format_outcomes, outcomes
from ..tracking import Identity
from ..tracking.record import FILE_NAME, now
from .command import Command, check_command
from .hydra_files import redact_hydra, without_secrets
from .paths import config_folder
from .quoting import quoted

if TYPE_CHECKING:
    from ..pruning import FirstBlock

log = logging.getLogger(__name__)

WORKER = multiprocessing.current_process().name != "MainProcess"  # a launcher's worker, which imports only this module
PARENT = os.getppid()
if WORKER:
    exits.exit_on_signals()

SWEPT = "ROSE_EXP_SWEPT"  # environment variable with the names of the swept settings, for launchers' workers

register_resolver()
register_sweeper()
redact_hydra()


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
    with redacted_output():
        _main()


def _main() -> None:
    sys.argv[1:] = without_secrets(sys.argv[1:])
    try:
        command = check_command(sys.argv[1:])
    except SettingsError as error:
        _print_error(error)
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
    _prepare(command)
    started = now()
    try:
        on_cpu = bool(command.jobs) and all(job.settings.device == "cpu" for job in command.jobs)
        with process_group(on_cpu):
            hydra.main(version_base="1.3", config_path=str(config_folder()), config_name="config")(job)()
    except RoseExpError as error:
        _print_error(error)
        sys.exit(1)
    except Interrupted as stop:
        exits.message(f"{stop}; {_resume_hint(command)}")
        sys.exit(EXIT_STATUS)
    except KeyboardInterrupt:
        exits.message(f"stopped by SIGINT; {_resume_hint(command)}")
        sys.exit(128 + signal.SIGINT)
    finally:
        if command.sweep is not None and not command.searched and not launched()[0]:
            complete = _print_outcomes(command, started)
            if not complete and sys.exc_info()[0] is None:
                sys.exit(1)


def _prepare(command: Command) -> None:
    """Pass to Hydra and to launchers' workers what the check has found."""
    os.environ[SWEPT] = " ".join(sorted(command.swept))
    _checked.run_ids = None if command.searched or not command.jobs else frozenset(job.run_id for job in command.jobs)
    if launched()[0]:
        _silence_hydra()
    elif command.sweep is not None:
        fixed = quoted("hydra.sweep.dir", str(command.sweep))  # an interpolation such as ${now:} would give another folder
        sys.argv += shlex.split(fixed) if fixed else []
    # otherwise, joblib's process that cleans up after a signal warns of what it cleans up
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, (os.environ.get("PYTHONWARNINGS"), "ignore:resource_tracker")))


def _resume_hint(command: Command) -> str:
    rerun = any(job.settings.rerun for job in command.jobs)
    return "to resume, run the same command without rerun=true" if rerun else "run the same command again to resume"


def _print_error(error: object) -> None:
    print(terminal(redacted(str(error)), lines=True), file=sys.stderr)


def _print_outcomes(command: Command, started: str) -> bool:
    """Print the table at the end of a sweep. Return whether every job is done."""
    rerun = any(job.settings.rerun for job in command.jobs)
    folders = {job.run_id: job.folder(command.sweep) for job in command.jobs if job.folder_template is not None}
    results = outcomes([(job.name, job.run_id) for job in command.jobs], command.sweep, started, rerun, folders)
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
    for register in (atexit.register, exits.cleanups.append):
        register(stack.close)


@cache
def _first_block() -> FirstBlock:
    """Return the moments of the first block, which a sweep's jobs in this process share."""
    from ..pruning import FirstBlock

    return FirstBlock()


def job(config: DictConfig) -> dict[str, Any] | None:
    """Run one job for Hydra, in this process or in a launcher's worker.

    Relative paths refer to the folder in which the command was started, even with ``hydra.job.chdir=true``.

    Returns:
        The metrics; None if the job of a sweep failed.
    """
    with redacted_output(), contextlib.chdir(HydraConfig.get().runtime.cwd):
        try:
            return _job(config)
        except Interrupted:
            if WORKER and exits.is_orphan(PARENT):
                os._exit(EXIT_STATUS)  # otherwise, the worker would wait for its next job
            raise


def _job(config: DictConfig) -> dict[str, Any] | None:
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
        resolved = applied(resolved, settings)
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
