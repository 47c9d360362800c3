"""Optuna as a Hydra sweeper: a hyperparameter search whose study is stored in a database and can be resumed."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import math
import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep
from hydra.core.plugins import Plugins
from hydra.errors import CompactHydraException
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from ..runtime.errors import RoseExpError
from ..settings.effects import without, without_effect
from ..settings.leaves import flat

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.distributions import BaseDistribution

log = logging.getLogger(__name__)

MAX_FAILED = 5  # consecutive failed trials
LOG = "log"  # tag(log, interval(a, b)): search on a logarithmic scale


class SearchError(RoseExpError, CompactHydraException):
    """A search cannot continue. Hydra prints the message without a traceback."""


class OptunaSweeper(Sweeper):
    """Searches for the settings with the best metric.

    The command line or ``hydra.sweeper.params`` defines the search space: ``interval(0.1, 0.9)``, ``tag(log, interval(1e-3,
    1e-1))``, ``range(2, 10, 2)``, ``choice(32, 64, 128)`` or ``32,64,128``.

    Args:
        metric: a key of the run record's ``metrics``.
        n_trials: total number of trials in the study, including those of earlier commands.
        n_jobs: trials per batch for the launcher.
        storage: URL of the study's database.
        params: search space.
    """

    def __init__(
        self,
        metric: str,
        direction: str,
        n_trials: int,
        n_jobs: int,
        study_name: str,
        storage: str,
        seed: int,
        params: DictConfig | None = None,
    ):
        self.metric, self.direction, self.n_trials, self.n_jobs = metric, direction, n_trials, n_jobs
        self.study_name, self.storage, self.seed, self.params = study_name, storage, seed, params or {}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config, self.hydra_context = config, hydra_context
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        """Run the remaining trials of the study in batches.

        Raises:
            SearchError: the study of that name has other settings, or too many consecutive trials have failed.
        """
        from optuna.trial import TrialState

        Path(self.config.hydra.sweep.dir).mkdir(parents=True, exist_ok=True)
        fixed, space = self._space(arguments)
        study = self._study(fixed, space)
        failed = 0
        while (remaining := self.n_trials - len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))) > 0:
            trials = [study.ask(space) for _ in range(min(self.n_jobs, remaining))]
            overrides = [[*fixed, *(f"{name}={value}" for name, value in trial.params.items())] for trial in trials]
            self.validate_batch_is_legal(overrides)
            results = self.launcher.launch(overrides, initial_job_idx=trials[0].number)
            values = [self._value(result) for result in results]
            for trial, value in zip(trials, values, strict=True):
                self._report(study, trial, value)
            failed = 0 if any(value is not None for value in values) else failed + len(trials)
            if failed >= MAX_FAILED:
                raise SearchError(f"hydra.sweeper: the last {failed} trials of study {self.study_name} have failed")
        best = study.best_trial
        settings = " ".join(f"{name}={value}" for name, value in best.params.items())
        print(f"\nbest of {self.n_trials} trials: {self.metric} {best.value:.4g} with {settings}\nstudy: {self.storage}")

    def _value(self, job_result: Any) -> float | None:
        """Return the metric of a finished job, or None if the job failed or the metric is not finite."""
        metrics = job_result.return_value  # raises the job's exception, if any
        if metrics is None:
            return None
        if self.metric not in metrics:
            raise SearchError(f"hydra.sweeper.metric: expected one of {', '.join(metrics)}, got {self.metric!r}")
        value = float(metrics[self.metric])
        return value if math.isfinite(value) else None

    @staticmethod
    def _report(study: Study, trial: Trial, value: float | None) -> None:
        from optuna.trial import TrialState

        if value is None:
            study.tell(trial, state=TrialState.FAIL)
        else:
            study.tell(trial, value)
            log.info("trial %d: %.4g; best so far %.4g", trial.number, value, study.best_value)

    def _space(self, arguments: Sequence[str]) -> tuple[list[str], dict[str, BaseDistribution]]:
        """Return the overrides that all trials share, and the search space."""
        parser = OverridesParser.create()
        overrides = parser.parse_overrides(list(arguments))
        names = {override.key_or_group for override in overrides}
        added = [parser.parse_override(f"{name}={value}") for name, value in self.params.items() if name not in names]
        fixed, space = [], {}
        for override in [*overrides, *added]:
            if override.is_sweep_override():
                present = OmegaConf.select(self.config, override.key_or_group, throw_on_missing=False)
                space[override.get_key_element()] = _distribution(override, whole=type(present) is int)
            else:
                fixed.append(override.input_line)
        if not space:
            raise SearchError("hydra.sweeper.params: expected a setting to search, such as engine.damping=interval(0.001,0.1)")
        return fixed, space

    def _study(self, fixed: Sequence[str], space: Mapping[str, BaseDistribution]) -> Study:
        """Create or load the study, and enqueue interrupted trials again."""
        import optuna
        from optuna.trial import TrialState

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(
            storage=self.storage, study_name=self.study_name, direction=self.direction, load_if_exists=True
        )
        trials = study.get_trials(deepcopy=False)
        study.sampler = optuna.samplers.TPESampler(seed=self.seed + len(trials))  # a resumed study does not repeat draws
        searched = self._fingerprint(fixed, space)
        if study.user_attrs.setdefault("searched", searched) != searched:
            raise SearchError(
                f"hydra.sweeper.study_name: study {self.study_name!r} in {self.storage} has other settings; choose another name"
            )
        study.set_user_attr("searched", searched)
        for trial in trials:
            if trial.state == TrialState.RUNNING:
                study.tell(trial.number, state=TrialState.FAIL)
                study.enqueue_trial(trial.params)
        if trials:
            log.info("resuming study %s after %d trials", self.study_name, len(trials))
        return study

    def _fingerprint(self, fixed: Sequence[str], space: Mapping[str, BaseDistribution]) -> str:
        """Return a hash of the settings that the trials share and of the search space."""
        ignored = ("hydra", *without_effect())
        shared = without(flat(OmegaConf.to_container(self.config, resolve=False)), ignored)
        fixed_settings = without({text.partition("=")[0].lstrip("+").replace("/", "."): text for text in fixed}, ignored)
        facts = [
            shared,
            sorted(fixed_settings.values()),
            {name: repr(d) for name, d in space.items()},
            self.metric,
            self.direction,
        ]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _distribution(override: Override, whole: bool = False) -> BaseDistribution:
    """Return the search distribution of an override.

    Args:
        whole: whether the setting is an integer, so that an interval contains integers only.
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    value, name = override.value(), override.key_or_group
    by_magnitude = LOG in getattr(value, "tags", ())
    if isinstance(value, IntervalSweep):
        if whole:
            return IntDistribution(math.ceil(value.start), math.floor(value.end), log=by_magnitude)
        return FloatDistribution(value.start, value.end, log=by_magnitude)
    if isinstance(value, RangeSweep):
        steps = list(override.sweep_iterator())
        kind = IntDistribution if all(isinstance(step, int) for step in steps) else FloatDistribution
        return kind(steps[0], steps[-1], step=value.step)
    if isinstance(value, ChoiceSweep):
        return CategoricalDistribution([Override._get_value_element_as_str(choice) for choice in override.sweep_iterator()])
    raise SearchError(f"{name}: expected an interval, a range or a choice to search, got {override.input_line!r}")


def register_sweeper() -> None:
    """Register the sweeper with Hydra under a module name in ``hydra_plugins``, the only package for Hydra's plugins."""
    package = "hydra_plugins"
    if importlib.util.find_spec(package) is None:  # no plugin is installed
        sys.modules[package] = types.ModuleType(package)
        sys.modules[package].__path__ = []
    name = f"{package}.rose_exp"
    sys.modules[name] = sys.modules[__name__]
    OptunaSweeper.__module__ = name
    Plugins.instance().register(OptunaSweeper)
