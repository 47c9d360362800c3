"""The settings of a search, and their checks before the first trial."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep
from omegaconf import DictConfig, OmegaConf
from pydantic import Field, ValidationError

from ..engine.bounds import Positive
from ..evaluation.zero_shot_data import SPLITS
from ..runtime.errors import RoseExpError, suggest
from ..settings.effects import DIVERGENCES
from ..settings.messages import explain
from ..settings.schema import EvaluationSettings, Settings
from ..settings.section import Section

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

WHERE = "hydra.sweeper"
NOTHING_TO_SEARCH = f"{WHERE}.params: expected a setting to search, such as engine.damping=interval(0.001,0.1), got none"
LOG = "log"  # tag(log, interval(a, b)): search on a logarithmic scale
DISTANCES = ("latent_mse", "latent_mse_all", "psnr", "ssim", "vae_distance")  # of the images of two diffusion models
SPEEDS = ("dense_seconds", "sparse_seconds", "dense_bytes", "sparse_bytes", "difference")


class SearchError(RoseExpError):
    """A search cannot start or continue."""


class SearchSettings(Section):
    """The arguments of :class:`rose_exp.sweeps.optuna.OptunaSweeper`."""

    metric: str
    direction: Literal["minimize", "maximize"]
    n_trials: Positive
    n_jobs: Positive
    study_name: Annotated[str, Field(min_length=1)]
    storage: str
    seed: Annotated[int, Field(ge=0, lt=2**31)]
    params: dict[str, Any] | None = None


def is_search(sweeper: Mapping[str, Any]) -> bool:
    """Return whether a sweeper chooses the jobs while it runs."""
    return "BasicSweeper" not in str(sweeper.get("_target_"))


def search_problems(sweeper: DictConfig, swept: Sequence[Override], jobs: Sequence[Settings]) -> list[str]:
    """Return the errors of a search with this project's sweeper.

    Args:
        sweeper: ``hydra.sweeper``.
        swept: the searched settings.
        jobs: the settings of the jobs at the ends of the search space; empty if they have errors.
    """
    if not str(sweeper.get("_target_")).endswith("rose_exp.OptunaSweeper"):
        return []
    if importlib.util.find_spec("optuna") is None:
        return ["hydra/sweeper: expected an installed optuna for a search: pip install 'rose_exp[sweeps]'"]
    values = {name: value for name, value in OmegaConf.to_container(sweeper, resolve=False).items() if name[0] != "_"}
    try:
        search = SearchSettings.model_validate(values)
    except ValidationError as error:
        return [f"{WHERE}.{explain(mistake, SearchSettings)}" for mistake in error.errors()]
    problems = [] if swept else [NOTHING_TO_SEARCH]
    for override in swept:
        try:
            distribution(override)
        except SearchError as error:
            problems.append(str(error))
        except ValueError:
            expected = "an ascending interval or range, above 0 on a logarithmic scale"
            problems.append(f"{override.key_or_group}: expected {expected}, got {override.input_line!r}")
    problems += [problem for settings in jobs if (problem := metric_problem(search.metric, settings))]
    return list(dict.fromkeys(problems + _storage_problems(search.storage)))


def _storage_problems(storage: str) -> list[str]:
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    if "${" in storage:  # Hydra resolves it later
        return []
    try:
        make_url(storage)
    except ArgumentError:
        return [f"{WHERE}.storage: expected the URL of a database such as sqlite:///outputs/optuna.db, got {storage!r}"]
    return []


def metric_problem(metric: str, settings: Settings) -> str | None:
    """Return the error of a metric that a run with these settings does not measure, or None."""
    known, unlisted = _metrics(settings)
    if metric in known or any(metric.startswith(prefix) for prefix in unlisted):
        return None
    return f"{WHERE}.metric: expected one of {', '.join(known)}, got {metric!r}{suggest(metric, known)}"


def _metrics(settings: Settings) -> tuple[list[str], list[str]]:
    """Return the metrics of a run, and the prefixes of those whose names are not known in advance."""
    evaluation, names, unlisted = settings.evaluation, ["sparsity"], []
    if settings.pruned and settings.reorder:
        names.append("reordered_layers")
    if settings.model.kind == "diffusion":
        return names + _image_metrics(settings), unlisted
    kinds = ["perplexity", *(DIVERGENCES if evaluation.divergence and settings.pruned else ())]
    names += [f"{kind}.{name}" for kind in kinds for name in evaluation.perplexity]
    names += _zero_shot_metrics(evaluation)
    if not set(evaluation.zero_shot.tasks) <= set(SPLITS):
        unlisted.append("zero_shot.")  # a group of tasks has a metric for each task
    if evaluation.speed is not None:
        names += [f"speed.{name}" for name in SPEEDS]
    return names, unlisted


def _zero_shot_metrics(evaluation: EvaluationSettings) -> list[str]:
    tasks = evaluation.zero_shot.tasks
    return [f"zero_shot.{name}" for name in (*tasks, *(["average"] if set(SPLITS) <= set(tasks) else []))]


def _image_metrics(settings: Settings) -> list[str]:
    images = settings.evaluation.images
    if images is None:
        return []
    names = [name for name in images.metrics if name != "distance"]
    names += DISTANCES if "distance" in images.metrics and settings.pruned else []
    return [f"images.{name}" for name in (*names, *(["speedup"] if settings.removes else []))]


def distribution(override: Override, whole: bool = False) -> BaseDistribution:
    """Return the search distribution of an override.

    Args:
        whole: whether the setting is an integer, so that an interval contains integers only.
    Raises:
        SearchError: the override is no interval, range or choice.
        ValueError: the interval is empty, or a logarithmic interval contains numbers that are not positive.
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
