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
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from ..runtime.redaction import redacted
from ..settings.effective import without
from ..settings.effects import without_effect
from ..settings.leaves import flat
from .search import NOTHING_TO_SEARCH, WHERE, SearchError, distribution
from .study import exclusive, open_study, storage_errors

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.distributions import BaseDistribution

log = logging.getLogger(__name__)

MAX_FAILED = 5  # consecutive failed trials


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
        """Run the remaining trials of the study in batches. Exit with an error message if the search cannot continue."""
        folder = Path(self.config.hydra.sweep.dir)
        try:
            with exclusive(self.storage, self.study_name, folder), storage_errors(self.storage):
                self._search(arguments, folder)
        except SearchError as error:
            print(redacted(str(error)), file=sys.stderr)
            sys.exit(1)  # an exception would pass through Hydra, which adds how to show a traceback

    def _search(self, arguments: Sequence[str], folder: Path) -> None:
        """Raise SearchError if the study has other settings, or too many consecutive trials have failed."""
        import optuna
        from optuna.trial import TrialState

        fixed, space = self._space(arguments)
        study = open_study(self.storage, self.study_name, self.direction, self._fingerprint(fixed, space), folder)
        count = len(study.get_trials(deepcopy=False))
        study.sampler = optuna.samplers.TPESampler(seed=self.seed + count)  # a resumed study does not repeat draws
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
                raise SearchError(f"{WHERE}: the last {failed} trials of study {self.study_name} have failed")
        best = study.best_trial
        settings = " ".join(f"{name}={value}" for name, value in best.params.items())
        print(f"\nbest of {self.n_trials} trials: {self.metric} {best.value:.4g} with {settings}\nstudy: {self.storage}")

    def _value(self, job_result: Any) -> float | None:
        """Return the metric of a finished job, or None if the job failed or the metric is not finite."""
        metrics = job_result.return_value  # raises the job's exception, if any
        if metrics is None:
            return None
        if self.metric not in metrics:
            raise SearchError(f"{WHERE}.metric: expected one of {', '.join(metrics)}, got {self.metric!r}")
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
                space[override.get_key_element()] = distribution(override, whole=type(present) is int)
            else:
                fixed.append(override.input_line)
        if not space:
            raise SearchError(NOTHING_TO_SEARCH)
        return fixed, space

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


def register_sweeper() -> None:
    """Register the sweeper with Hydra under a module name in ``hydra_plugins``, the only package for Hydra's plugins."""
    package = "hydra_plugins"
    if package not in sys.modules and importlib.util.find_spec(package) is None:  # no plugin is installed
        sys.modules[package] = types.ModuleType(package)
        sys.modules[package].__path__ = []
    name = f"{package}.rose_exp"
    sys.modules[name] = sys.modules[__name__]
    OptunaSweeper.__module__ = name
    Plugins.instance().register(OptunaSweeper)
