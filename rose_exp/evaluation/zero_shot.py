"""Zero-shot accuracy of a model in memory, measured with lm-eval."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..runtime.errors import RoseExpError, suggest
from ..runtime.files import scratch_folder, written
from ..runtime.fingerprint import folder_sha256
from ..runtime.outside import outside_errors
from ..settings.schema import ZeroShotSettings
from ..settings.texts import Bos
from .zero_shot_data import SPLITS, embedded_file, local_file

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.tasks import TaskManager

log = logging.getLogger(__name__)

CPU_BATCH = 16  # replaces "auto" on a CPU, where lm-eval's search for the largest batch is slow and exhausts memory
AVERAGED = tuple(SPLITS)  # the papers' seven tasks


@dataclass(frozen=True)
class Tasks:
    """Tasks whose rows have been read.

    Attributes:
        protocol: recorded with the run.
        requests: everything that the tasks ask the model.
    """

    names: list[str]
    manager: TaskManager
    protocol: dict[str, Any]
    requests: list[Instance]


@dataclass(frozen=True)
class Accuracies:
    """Accuracies in %, by task; ``average`` is the mean of the papers' seven, if all seven were measured.

    Attributes:
        values: acc_norm if the task has it, else acc, else the task's first metric.
        standard_errors: as lm-eval reports them; that of the average treats the seven sets as independent.
        protocol: recorded with the run: metric, number of questions and version of each task.
    """

    values: dict[str, float]
    standard_errors: dict[str, float]
    protocol: dict[str, Any]


@contextmanager
def prepared(settings: ZeroShotSettings) -> Iterator[Tasks]:
    """Find the tasks, and read and score all of their rows, before any expensive work starts.

    Raises:
        RoseExpError: a task is unknown, or its rows are unavailable or damaged.
    """
    from lm_eval.tasks import TaskManager  # slow to import, like the next one

    from .rehearsal import rehearse

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it logs every step, and the stock tasks' defaults
    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # it also logs the errors that it raises
    with scratch_folder() as folder:
        file_names, protocol = _task_files(settings, folder)
        fingerprint: dict[str, str] = {}
        paths = [str(folder)] if file_names else []
        if settings.include_path is not None:
            paths.append(str(Path(settings.include_path).expanduser()))
        log.info("reading the tasks %s", ", ".join(settings.tasks))
        with outside_errors(f"evaluation.zero_shot.include_path: cannot read the tasks in {settings.include_path}"):
            manager = TaskManager(include_path=paths, include_defaults=False)
            if not set(settings.tasks) <= set(manager.all_tasks):  # finding lm-eval's own reads thousands of files
                manager = TaskManager(include_path=paths)
        for name in settings.tasks:
            if name not in manager.all_tasks:
                raise RoseExpError(
                    f"evaluation.zero_shot.tasks: expected names of lm-eval's tasks, got {name!r}"
                    f"{suggest(name, manager.all_tasks)}"
                )
        requests = rehearse(manager, settings)
        if settings.include_path is not None:
            fingerprint = {"include_sha256": folder_sha256(Path(settings.include_path).expanduser())}
        yield Tasks(list(settings.tasks), manager, {"data": protocol} | fingerprint, requests)


def _task_files(settings: ZeroShotSettings, folder: Path) -> tuple[list[str], dict[str, Any]]:
    """Write a task file for each stock task with replaced rows; return their names and the protocol of the rows."""
    if settings.data_dir is None and settings.data == "hub":
        return [], {"source": "hub"}
    protocol = {}
    for task in settings.tasks:
        if task not in SPLITS:
            continue  # other tasks use the source in their own file
        if settings.data_dir is not None:
            rows = local_file(Path(settings.data_dir).expanduser(), task)
        else:
            rows = embedded_file(folder, task)
        changes = {
            "include": str(_stock_file(task)),
            "task": task,
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {SPLITS[task]: str(rows.path)}, "cache_dir": str(folder / "cache")},
            "training_split": None,
        }
        if SPLITS[task] == "test":
            changes["validation_split"] = None  # only used for few-shot examples, which are not available
        (folder / f"{task}.yaml").write_text(yaml.safe_dump(changes), encoding="utf-8")
        protocol[task] = rows.protocol
    return list(protocol), protocol


def _stock_file(task: str) -> Path:
    """Return lm-eval's own file that defines a task."""
    import lm_eval

    folder = Path(lm_eval.__file__).parent / "tasks"
    place = {"winogrande": "winogrande/default", "boolq": "super_glue/boolq/default"}
    place |= {"arc_easy": "arc/arc_easy", "arc_challenge": "arc/arc_challenge"}
    return folder / f"{place.get(task, f'{task}/{task}')}.yaml"


def measure(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Tasks,
    settings: ZeroShotSettings,
    folder: Path,
    bos: Bos = "tokenizer",
) -> Accuracies:
    """Run the tasks on ``model``, and write lm-eval's own file of results to ``folder``.

    Args:
        model: a causal language model, on the device to run on.
        tokenizer: the model's tokenizer; it is not modified.
        bos: where a BOS token stands, see :data:`rose_exp.settings.texts.Bos`.

    Raises:
        RoseExpError: lm-eval cannot write its results.
    """
    from lm_eval import simple_evaluate  # slow to import, like the two below
    from lm_eval.loggers import EvaluationTracker

    from .lm_eval_model import PrunedLM

    batch = settings.batch
    if batch == "auto" and next(model.parameters()).device.type == "cpu":
        batch = CPU_BATCH
    lm = PrunedLM(model, copy.deepcopy(tokenizer), batch, bos)
    with scratch_folder(folder) as scratch:
        tracker = EvaluationTracker(output_path=str(scratch / "results.json"))
        results = simple_evaluate(
            model=lm,
            tasks=tasks.names,
            task_manager=tasks.manager,
            num_fewshot=settings.few_shot,
            limit=settings.limit,
            batch_size=batch,
            log_samples=False,
            evaluation_tracker=tracker,
        )
        tracker.save_results_aggregated(results)
        files = sorted(scratch.glob("results_*.json"))
        if not files:
            raise RoseExpError(f"evaluation.zero_shot: lm-eval cannot write its results to {folder}")
        with written(folder / files[-1].name) as place:
            files[-1].rename(place)
    return _accuracies(results, batch, files[-1].name)


def _accuracies(results: Mapping[str, Any], batch: int | str, file: str) -> Accuracies:
    values, errors, protocol = {}, {}, {}
    for task, task_results in results["results"].items():
        metric = _metric(task_results)
        if metric is None:
            continue  # a group without an aggregate
        values[task] = 100 * task_results[metric]
        error = task_results.get(metric.replace(",", "_stderr,", 1))
        if isinstance(error, (int, float)):
            errors[task] = 100 * error
        protocol[task] = {
            "metric": metric.partition(",")[0],
            "questions": results["n-samples"].get(task, {}).get("effective"),
            "of": results["n-samples"].get(task, {}).get("original"),
            "version": results["versions"].get(task),
            "few_shot": results["n-shot"].get(task),
        }
    if set(AVERAGED) <= set(values):
        values["average"] = sum(values[task] for task in AVERAGED) / len(AVERAGED)
    if set(AVERAGED) <= set(errors):  # a single question has no standard error
        errors["average"] = math.sqrt(sum(errors[task] ** 2 for task in AVERAGED)) / len(AVERAGED)
    return Accuracies(values, errors, {"tasks": protocol, "batch": batch, "results": file})


def _metric(task_results: Mapping[str, Any]) -> str | None:
    """Return acc_norm if the task has it, else acc, else the first number."""
    numbers = [name for name, value in task_results.items() if isinstance(value, (int, float)) and "_stderr" not in name]
    numbers = [name for name in numbers if "," in name]
    for preferred in ("acc_norm", "acc"):
        for name in numbers:
            if name.partition(",")[0] == preferred:
                return name
    return numbers[0] if numbers else None
