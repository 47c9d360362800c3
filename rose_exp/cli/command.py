"""Checks a whole command line, including every job of a sweep, before any job runs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig

from ..runtime.errors import RoseExpError, SettingsError
from ..settings.schema import Settings, applied, read_settings
from ..sweeps.job import Job
from ..sweeps.search import is_search, search_problems
from .composer import COMPOSITION_ERRORS, RUN_ID, Composer, one_line
from .hydra_files import stored_secrets
from .overrides import SEVERAL, as_text, choices, choices_error, valid_overrides
from .paths import config_folder
from .plugins import add_choices
from .quoting import value_hint

__all__ = ["Command", "check_command", "config_folder"]

RATIO = "sparsity.ratio"


@dataclass(frozen=True)
class Command:
    """A command line without errors.

    Attributes:
        jobs: all jobs; empty for a command that only prints information. For a search, the jobs at the ends of the searched
            intervals.
        swept: settings with several values.
        sweep: the folder that holds the folders of a sweep's jobs; None for a single run.
        searched: whether a sweeper chooses the jobs while it runs.
    """

    jobs: list[Job]
    swept: set[str]
    sweep: Path | None
    searched: bool

    @property
    def planned(self) -> bool:
        """Whether the command lists its jobs instead of running them."""
        return any(job.settings.plan for job in self.jobs)


def check_command(arguments: Sequence[str]) -> Command:
    """Compose and check every job of a command line. Nothing runs.

    Raises:
        SettingsError: with all errors of all jobs.
    """
    parsed = get_args_parser().parse_args(arguments)
    if parsed.experimental_rerun:
        raise SettingsError(["--experimental-rerun: not supported; give the settings of the run, and rerun=true"])
    if any((parsed.help, parsed.hydra_help, parsed.cfg, parsed.info, parsed.shell_completion)):
        add_choices()  # Hydra composes the configuration itself
        return Command([], set(), None, False)
    composer = Composer(parsed)
    overrides, problems = valid_overrides(composer, parsed.overrides)
    hydra_config = _hydra_config(composer, overrides) if composer.multirun else None
    problems += stored_secrets(hydra_config.launcher._target_, parsed.overrides) if hydra_config is not None else []
    added, added_problems = _params(composer, overrides, hydra_config)
    problems += added_problems
    single, swept = _separated([*overrides, *added])
    axes = [[as_text(override, value) for value in choices(override)] for override in swept]
    jobs = []
    for number, combination in enumerate(itertools.product(*axes)):
        result = _job(composer, [*single, *combination], combination, number)
        jobs += [result] if isinstance(result, Job) else []
        problems += [p for p in result if p not in problems] if isinstance(result, list) else []
    problems = _with_hints(problems, [*overrides, *added])
    problems += _ratio_problems(jobs) + _folder_problems(jobs)
    searched = hydra_config is not None and is_search(hydra_config.sweeper)
    problems += search_problems(hydra_config.sweeper, swept, [job.settings for job in jobs]) if searched else []
    if hydra_config is not None and not searched:
        problems += [_not_searched_error(override) for override in swept if override.is_interval_sweep()]
    if problems:
        raise SettingsError(problems)
    swept_names = {override.key_or_group for override in swept}
    sweep = Path(hydra_config.sweep.dir) if hydra_config is not None else None
    return Command(jobs, swept_names, sweep, searched)


def check_settings(overrides: Sequence[str]) -> Settings:
    """Compose and check the settings of a single run, without reading what they name.

    Raises:
        SettingsError: with all errors.
    """
    composer = Composer(get_args_parser().parse_args([]))
    valid, problems = valid_overrides(composer, overrides)
    if problems:
        raise SettingsError(_with_hints(problems, valid))
    try:
        config = composer.resolve(composer.compose([override.input_line for override in valid]))
    except COMPOSITION_ERRORS as error:
        raise SettingsError([one_line(error)]) from error
    try:
        settings = read_settings(config)
    except SettingsError as error:
        raise SettingsError(_with_hints(error.problems, valid)) from None
    if contradiction := settings.sparsity.contradiction("sparsity"):
        raise SettingsError([contradiction])
    return settings


def _with_hints(problems: Sequence[str], overrides: Sequence[Override]) -> list[str]:
    """Add how to quote the values of overrides that Hydra has read as something else than their text, once for each."""
    text, hinted = "\n".join(problems), []
    for problem in problems:
        named = (o for o in overrides if problem.startswith((f"{o.key_or_group}:", f"{o.key_or_group}.")))
        hint = next(filter(None, (value_hint(override, problem) for override in named)), "")
        new = bool(hint) and hint not in text and not any(hint in other for other in hinted)
        hinted.append(problem + hint if new else problem)
    return hinted


def _hydra_config(composer: Composer, overrides: Sequence[Override]) -> DictConfig | None:
    """Return Hydra's own settings, or None if they cannot be composed. Checking a job then reports the reason."""
    single = [o.input_line for o in overrides if not o.is_sweep_override()]
    try:
        return composer.compose(single).hydra
    except COMPOSITION_ERRORS:
        return None


def _params(
    composer: Composer, overrides: Sequence[Override], hydra_config: DictConfig | None
) -> tuple[list[Override], list[str]]:
    """Return the overrides in ``hydra.sweeper.params`` that the command line does not replace, and their errors."""
    params = (hydra_config.sweeper.get("params") or {}) if hydra_config is not None else {}
    given = {override.key_or_group for override in overrides}
    texts = [f"{name}={values}" for name, values in params.items() if name not in given]
    return valid_overrides(composer, texts, overrides)


def _separated(overrides: Sequence[Override]) -> tuple[list[str], list[Override]]:
    """Return the overrides that all jobs share, and those with several values."""
    single = [override.input_line for override in overrides if not override.is_sweep_override()]
    return single, [override for override in overrides if override.is_sweep_override()]


def _job(composer: Composer, overrides: Sequence[str], swept: Sequence[str], number: int) -> Job | list[str]:
    """Return one job, or its errors.

    Args:
        swept: the overrides that differ from the other jobs.
        number: the job's number in the sweep.
    """
    try:
        composed = composer.compose(overrides)
        if mixed := {group: names for group, names in composer.merged().items() if group not in SEVERAL}:
            return [choices_error(group, names) for group, names in mixed.items()]
        config = composer.resolve(composed)
        folder = composer.run_folder(composed, number)
    except COMPOSITION_ERRORS as error:
        return [one_line(error)]
    try:
        settings = read_settings(config)
    except SettingsError as error:
        return error.problems
    changes = " ".join(swept).replace("\\:", ":")  # Hydra escapes colons
    name = changes or f"{settings.label} {settings.model.name} {settings.sparsity.parsed}"
    ignored = settings.sparsity.contradiction("sparsity")
    job = Job(name, settings, applied(config, settings), folder, ignored)
    try:
        job.run_id  # noqa: B018  (cached: reads every file that the settings name)
    except RoseExpError as error:
        return [str(error)]
    return job


def _ratio_problems(jobs: Sequence[Job]) -> list[str]:
    """Return the errors of ratios that contradict an N:M pattern, unless another job of the sweep uses the ratio."""
    if any(not job.settings.sparsity.semi_structured for job in jobs):
        return []
    return list(dict.fromkeys(job.ignored for job in jobs if job.ignored))


def _folder_problems(jobs: Sequence[Job]) -> list[str]:
    """Return the error of different jobs with the same folder."""
    shared: dict[str, set[str]] = {}
    for job in jobs:
        if job.folder_template is not None and RUN_ID not in job.folder_template:
            shared.setdefault(job.folder_template, set()).add(job.run_id)
    return [
        f"hydra.sweep.subdir: expected a folder for each job, such as ${{run_id:}}, got {folder!r} for {len(run_ids)} jobs"
        for folder, run_ids in shared.items()
        if len(run_ids) > 1
    ]


def _not_searched_error(override: Override) -> str:
    setting = override.key_or_group
    return f"{setting}: expected values such as {setting}=1,2 for a sweep, got an interval; hydra/sweeper=optuna searches it"
