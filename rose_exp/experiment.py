"""One run, top to bottom: read texts, load, prune, measure, save, and keep the record."""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from .calibration import Windows, contiguous_windows, draw_windows, load_text
from .engine.kernels import resolve
from .errors import RoseExpError
from .evaluation import perplexity, speed
from .evaluation.zero_shot import Tasks, prepared
from .evaluation.zero_shot import measure as measure_zero_shot
from .models import all_linear_layers, find_blocks, load_model, load_tokenizer, save_model
from .pipeline import FirstBlock, PassSeconds, PruningPlan, chosen, prune_model
from .ranks import Ranks
from .report.figures import draw_figures, write_study
from .run_id import run_id
from .settings import Settings, ZeroShotSettings
from .tracking import Guarded, Identity, RunRecord, Stopwatch, environment

log = logging.getLogger(__name__)


def run_experiment(
    settings: Settings,
    config: dict[str, Any],
    folder: Path,
    identity: Identity | None = None,
    first_block: FirstBlock | None = None,
) -> dict[str, Any]:
    """Do what ``settings`` say and leave ``run.json`` (and with ``save`` the model) in ``folder``.

    Args:
        config: the resolved configuration that the settings were read from, for the record.
        identity: what trackers call the run; None: the method and the model.
        first_block: what the runs of a sweep in this process share.
    Returns:
        The run record.
    Raises:
        RoseExpError: something outside the code is wrong; the record says ``failed`` and why.
    """
    ranks = Ranks()
    folder = ranks.gather(folder)[0]
    record = RunRecord(folder, config, settings.label, run_id(settings), kept=ranks.first)
    identity = identity or Identity(f"{settings.label} {settings.model.name} {settings.sparsity.build()}")
    tracker = Guarded(settings.tracking, record, identity, folder, settings.tags)
    try:
        with ExitStack() as stack:
            _run(settings, record, folder, ranks, stack, tracker, first_block)
    except BaseException as error:
        record.fail(error)
        tracker.finish(failed=True)
        record.write()
        raise
    record.finish()
    model = folder / "model"
    tracker.tell("keep", record.path, model if settings.tracking.save_model and model.exists() else None)
    tracker.finish(failed=False)
    record.write()
    return record.data


def _run(
    settings: Settings,
    record: RunRecord,
    folder: Path,
    ranks: Ranks,
    stack: ExitStack,
    tracker: Guarded,
    first_block: FirstBlock | None,
) -> None:
    watch = Stopwatch(record.data["seconds"])
    device = _device(settings.device, ranks)
    protocol = record.data["protocol"]
    protocol |= {"seed": settings.seed, "ranks": ranks.size} | environment(device)
    protocol["backend"] = _backend(settings, device) if settings.pruned else None
    torch.manual_seed(settings.seed)

    zero_shot = settings.evaluation.zero_shot
    zero_shot = zero_shot.model_copy(update={"limit": _at_most(settings, zero_shot.limit)})
    tasks = None
    with watch.stage("texts"), ranks.one_by_one():
        tokenizer = load_tokenizer(settings.model)
        calibration = _calibration_windows(settings, tokenizer) if settings.pruned else None
        evaluation = _evaluation_windows(settings, tokenizer)
        if zero_shot.tasks and ranks.first:  # in the stack: the tasks' rows lie in a folder that goes with them
            tasks = stack.enter_context(prepared(zero_shot))
            protocol["zero_shot"] = {"few_shot": zero_shot.few_shot, "limit": zero_shot.limit} | tasks.protocol
    protocol["calibration"] = calibration.protocol if calibration else None
    protocol["evaluation"] = {name: windows.protocol for name, windows in evaluation.items()}

    with watch.stage("loading"), ranks.one_by_one():
        loaded = load_model(settings.model)
    model = loaded.model
    protocol["model"] = loaded.protocol
    _check_window_lengths(settings, model)
    record.write()

    if calibration:
        log.info("pruning with %s, %s", settings.label, settings.sparsity.build())
        with watch.stage("pruning"):
            passes = PassSeconds()
            reports = prune_model(
                model,
                calibration.tokens,
                _plan(settings),
                device,
                on_layer=lambda step, report: tracker.tell("layer", step, report.as_dict()),
                ranks=ranks,
                scratch=folder,
                seconds=passes,
                on_study=lambda name, found: write_study(folder, name, found.as_dict()),
                first_block=first_block,
                first_key=_first_key(settings, protocol),
            )
        record.data["layers"] = [report.as_dict() for report in reports]
        watch.seconds |= {f"pruning.{name}": round(value, 3) for name, value in vars(passes).items()}
        record.write()
    record.data["metrics"]["sparsity"] = _sparsity(settings, model, record.data["layers"])

    if evaluation or zero_shot.tasks:
        model.to(device)
        _measure(settings, zero_shot, record, model, tokenizer, evaluation, tasks, folder, ranks, watch)
    ranks.gather(None)  # the others have waited for it
    if settings.save and ranks.first:
        with watch.stage("saving"):
            log.info("saved the model to %s", save_model(model.to("cpu"), tokenizer, folder / "model"))
    if settings.evaluation.speed is not None and ranks.first:
        with watch.stage("speed"):
            _measure_speed(settings, record, model, device)
    tracker.tell("results", record.data["metrics"], record.data["layers"])
    if settings.figures.draw and ranks.first:
        for name, path in draw_figures(record.data, folder).items():
            tracker.tell("figure", name, path)
    del model, loaded
    gc.collect()


def _measure(
    settings: Settings,
    zero_shot: ZeroShotSettings,
    record: RunRecord,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    evaluation: dict[str, Windows],
    tasks: Tasks | None,
    folder: Path,
    ranks: Ranks,
    watch: Stopwatch,
) -> None:
    """Perplexity on every set, then zero-shot accuracy."""
    if evaluation:
        with watch.stage("evaluation"):
            for name, windows in evaluation.items():
                found = perplexity(model, windows.tokens, settings.evaluation.batch, f"perplexity {name}", ranks)
                record.measured(f"perplexity.{name}", found.value, found.standard_error)
                log.info("%s: perplexity on %s %.4g ± %.2g", settings.label, name, found.value, found.standard_error)
    if tasks is not None:  # on one process: lm-eval has a way of its own to share work
        with watch.stage("zero_shot"):
            accuracies = measure_zero_shot(model, tokenizer, tasks, zero_shot, folder)
        record.data["protocol"]["zero_shot"] |= accuracies.protocol
        for name, value in accuracies.values.items():
            record.measured(f"zero_shot.{name}", value, accuracies.standard_errors.get(name))
            log.info("%s: %s %.2f %%", settings.label, name, value)


def _measure_speed(settings: Settings, record: RunRecord, model: nn.Module, device: torch.device) -> None:
    """Latency of the pruned model where the hardware makes use of its pattern, else the reason why there is none."""
    wanted = settings.evaluation.speed
    names = {layer["name"] for layer in record.data["layers"]}
    layers = [layer for layer in all_linear_layers(find_blocks(model, settings.model.blocks)) if layer.name in names]
    why = speed.obstacle(settings.sparsity.build() if settings.pruned else None, device, model.dtype, layers)
    record.data["protocol"]["speed"] = {"windows": wanted.windows, "window": wanted.window, "not_measured": why}
    if why is not None:
        log.warning("evaluation.speed: cannot be measured: %s", why)
        return
    tokens = torch.zeros(wanted.windows, wanted.window, dtype=torch.int64, device=device)
    found = speed.measure(model.to(device), layers, tokens, wanted.repeats)
    for name, value in found.metrics().items():
        record.measured(name, value)


def _device(name: str, ranks: Ranks) -> torch.device:
    if name == "auto":
        name = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"  # each rank has set its own
    elif ranks.size > 1 and name != "cpu":
        raise RoseExpError(f"device: expected auto or cpu with {ranks.size} processes, each of which has its own, got {name!r}")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
        if device.type == "cuda":
            torch.cuda.set_device(device)  # where kernels are launched, and memory and time are measured
    except (RuntimeError, AssertionError) as error:
        raise RoseExpError(f"device: expected auto, cpu or a CUDA device of this machine, got {name!r}: {error}") from error
    return device


def _backend(settings: Settings, device: torch.device) -> str:
    """The engine's backend for this device, its name as resolved (layers of float64 models are solved in plain torch)."""
    try:
        return resolve(settings.engine.backend, device, torch.float32)
    except ValueError as error:
        raise RoseExpError(f"engine.{error}") from error


def _calibration_windows(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> Windows:
    wanted = settings.calibration
    text = load_text(wanted, "calibration")
    return draw_windows(text, tokenizer, wanted.window, wanted.samples, settings.seed, wanted.draw, "calibration")


def _evaluation_windows(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> dict[str, Windows]:
    windows = {}
    for name, wanted in settings.evaluation.perplexity.items():
        where = f"evaluation.perplexity.{name}"
        limit = _at_most(settings, wanted.windows)
        windows[name] = contiguous_windows(load_text(wanted, where), tokenizer, wanted.window, limit, where)
    return windows


def _at_most(settings: Settings, limit: int | None) -> int | None:
    limits = [n for n in (limit, settings.evaluation.at_most) if n is not None]
    return min(limits, default=None)


def _check_window_lengths(settings: Settings, model: nn.Module) -> None:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    wanted = {f"evaluation.perplexity.{name}.window": text.window for name, text in settings.evaluation.perplexity.items()}
    if settings.pruned:
        wanted["calibration.window"] = settings.calibration.window
    if settings.evaluation.speed is not None:
        wanted["evaluation.speed.window"] = settings.evaluation.speed.window
    for where, window in wanted.items():
        if limit is not None and window > limit:
            raise RoseExpError(f"{where}: expected at most {limit}, the positions that the model has, got {window}")


def _plan(settings: Settings) -> PruningPlan:
    method, engine, pipeline = settings.method, settings.engine, settings.pipeline
    return PruningPlan(
        method=method.build(),
        methods={pattern: method.build((pattern,)) for pattern in method.layer_options},
        sparsity=settings.sparsity.build(),
        ordering=settings.reorder.build(),
        block_size=engine.block_size,
        damping=engine.damping,
        refine=engine.refine,
        backend=engine.backend,
        precision=engine.precision,
        layers=pipeline.layers,
        skip=pipeline.skip,
        true_sequential=pipeline.true_sequential,
        batch=pipeline.batch,
        activations=pipeline.activations,
        blocks=settings.model.blocks,
        study=settings.figures.study,
    )


def _first_key(settings: Settings, protocol: Mapping[str, Any]) -> str:
    """All that the moments of the first block hang on: what was run on which inputs, how, and on what."""
    evaluated = ("evaluation", "zero_shot", "speed", "seed")
    facts = {name: value for name, value in protocol.items() if name not in evaluated}
    engine, pipeline = settings.engine.precision, settings.pipeline.model_dump(mode="json")
    return json.dumps([facts, engine, pipeline, settings.model.model_dump(mode="json")], sort_keys=True)


def _sparsity(settings: Settings, model: nn.Module, reports: Sequence[Mapping[str, Any]]) -> float:
    """Measured share of zeros (or of numbers saved, see :class:`LayerReport`) among the weights that the pipeline's patterns
    choose, pruned or not."""
    pipeline = settings.pipeline
    layers = [
        layer
        for layer in all_linear_layers(find_blocks(model, settings.model.blocks))
        if chosen(layer.name, pipeline.layers, pipeline.skip)
    ]
    saved = {report["name"]: report["sparsity"] * report["rows"] * report["columns"] for report in reports if report["rank"]}
    zeros = sum(saved[layer.name] if layer.name in saved else int((layer.weight == 0).sum()) for layer in layers)
    return zeros / sum(layer.weight.numel() for layer in layers)
