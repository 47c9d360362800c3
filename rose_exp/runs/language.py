"""Runs one experiment: reads texts, loads the model, prunes, evaluates and saves it, and writes the run record."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterable
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data import Windows
from ..engine import Structured
from ..evaluation import perplexity, speed
from ..evaluation.zero_shot import Tasks, prepared
from ..evaluation.zero_shot import measure as measure_zero_shot
from ..models import (
    StreamedModel,
    all_linear_layers,
    check_removable,
    find_blocks,
    linear_layers,
    load_model,
    load_tokenizer,
    model_shape,
    open_model,
    remove_masked,
    resolve_bos,
    save_model,
    save_streamed,
    sparsity_description,
    tie_again,
)
from ..pruning import (
    BlockWeights,
    FirstBlock,
    InMemory,
    OnDisk,
    PassSeconds,
    RunState,
    answers_by_blocks,
    check_decoder,
    chosen,
    events,
    loading_blocks,
    prune_model,
    saved_and_total,
)
from ..report.figures import draw_figures, write_study
from ..runtime import signals as interruption
from ..runtime.errors import RoseExpError
from ..runtime.fingerprint import code_sha256, folder_bytes
from ..runtime.ranks import Ranks
from ..settings.schema import Settings
from ..tracking import Guarded, Identity, RunRecord, Stopwatch, environment
from .identity import identifying, run_id
from .memory import available, check_fits
from .preparation import (
    at_most,
    calibration_windows,
    check_window_lengths,
    evaluation_windows,
    find_device,
    first_key,
    pruning_plan,
    resolved_backend,
)

log = logging.getLogger(__name__)

STATE = "state"  # subfolder of an unfinished run


def run_experiment(
    settings: Settings,
    config: dict[str, Any],
    folder: Path,
    identity: Identity | None = None,
    first_block: FirstBlock | None = None,
) -> dict[str, Any]:
    """Run an experiment, and write ``run.json`` (and with ``save`` the model) to ``folder``.

    Resumes from the state of the same run in ``folder``, if there is one.

    Args:
        config: the resolved configuration of the settings, for the record.
        identity: the name of the run for trackers; None: its method, model and pattern.
        first_block: the moments of the first block that the runs of a sweep share.
    Returns:
        The run record.
    Raises:
        RoseExpError: an error outside the code. The record has status ``failed`` and the error.
        Interrupted: a signal has stopped the run. The record has status ``interrupted``; running again resumes.
    """
    ranks = Ranks()
    folder = ranks.gather(folder)[0]
    record = RunRecord(folder, config, settings.label, run_id(settings), kept=ranks.first)
    identity = identity or Identity(f"{settings.label} {settings.model.name} {settings.sparsity.build()}")
    tracker = Guarded(settings.tracking, record, identity, folder, settings.tags)
    try:
        if settings.model.kind == "diffusion":
            from .diffusion import DiffusionRun  # requires packages that language models do not

            run: _Run | DiffusionRun = DiffusionRun(settings, record, folder, ranks, tracker)
        else:
            run = _Run(settings, record, folder, ranks, tracker, first_block)
        with interruption.heeded(), ExitStack() as stack:
            run.prepare(stack)
            run.load()
            if settings.pruned:
                run.prune()
            run.measure()
            run.finish()
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
    if run.state is not None:
        run.state.delete()
    return record.data


class _Run:
    """The stages of a language model's run, and the data that they share."""

    def __init__(
        self,
        settings: Settings,
        record: RunRecord,
        folder: Path,
        ranks: Ranks,
        tracker: Guarded,
        first_block: FirstBlock | None,
    ):
        self.settings, self.record, self.folder, self.ranks, self.tracker = settings, record, folder, ranks, tracker
        self.first_block = first_block
        self.watch = Stopwatch(record.data["seconds"])
        self.protocol = record.data["protocol"]
        self.device = find_device(settings.device, ranks)
        zero_shot = settings.evaluation.zero_shot
        self.zero_shot = zero_shot.model_copy(update={"limit": at_most(settings, zero_shot.limit)})
        self.calibration: Windows | None = None
        self.evaluation: dict[str, Windows] = {}
        self.tasks: Tasks | None = None
        self.streamed: StreamedModel | None = None
        self.state: RunState | None = None

    def prepare(self, stack: ExitStack) -> None:
        """Check that the run fits into memory and on disk, then read the texts."""
        settings = self.settings
        self.protocol |= {"seed": settings.seed, "ranks": self.ranks.size} | environment(self.device)
        self.protocol["backend"] = resolved_backend(settings, self.device) if settings.pruned else None
        torch.manual_seed(settings.seed)
        with self.watch.stage("preflight"), self.ranks.one_by_one():
            cuda = self.device.type == "cuda"
            there = available(self.folder, self.device)
            self.placed, estimate = check_fits(settings, model_shape(settings.model), cuda, there)
        self.record.data["estimate"] = estimate.as_dict() | vars(self.placed)
        with self.watch.stage("texts"), self.ranks.one_by_one():
            self.tokenizer = load_tokenizer(settings.model)
            self.bos = resolve_bos(settings.model, self.tokenizer)
            self.calibration = calibration_windows(settings, self.tokenizer, self.bos) if settings.pruned else None
            self.evaluation = evaluation_windows(settings, self.tokenizer, self.bos)
            if self.zero_shot.tasks and self.ranks.first:  # the stack removes the tasks' temporary folder
                self.tasks = stack.enter_context(prepared(self.zero_shot))
                facts = {"few_shot": self.zero_shot.few_shot, "limit": self.zero_shot.limit, "bos": self.bos}
                self.protocol["zero_shot"] = facts | self.tasks.protocol
        self.protocol["calibration"] = self.calibration.protocol if self.calibration else None
        self.protocol["evaluation"] = {name: windows.protocol for name, windows in self.evaluation.items()}

    def load(self) -> None:
        """Load the model, or open it for streaming from disk, and the state of an interrupted run."""
        settings = self.settings
        with self.watch.stage("loading"), self.ranks.one_by_one():
            if self.placed.weights == "memory":
                loaded = load_model(settings.model)
            else:
                log.info("streaming %s from disk, one block at a time", settings.model.name)
                loaded, self.streamed = open_model(settings.model)
        self.model = loaded.model
        self.protocol["model"] = loaded.protocol
        for kind, detail in loaded.warnings:
            self.record.warn(kind, detail)
        check_window_lengths(settings, self.model)
        if settings.pruned and settings.save and isinstance(settings.sparsity.build(), Structured):
            if self.streamed is not None:
                raise RoseExpError("save: expected false for structured sparsity of a model streamed from disk, got true")
            check_removable(self.model, find_blocks(self.model, settings.model.blocks), settings.sparsity.build())
        if settings.pruned and settings.pipeline.resume != "none":
            self.state = RunState(self.folder / STATE, self._fingerprint(), settings.pipeline.resume, self.ranks)
        blocks = self.streamed.blocks if self.streamed else find_blocks(self.model, settings.model.blocks)
        kept = self.state.block if self.state is not None else lambda _index: None
        self.weights: BlockWeights = OnDisk(self.streamed, kept) if self.streamed else InMemory(blocks)
        if self.state is not None and self.state.progress.blocks:
            self.record.data["resumed"] = self.state.progress.blocks
        if not settings.pruned:  # pruning checks this itself
            vocabulary = self.model.config.get_text_config().vocab_size
            with loading_blocks(self.weights, "cpu") if self.streamed else nullcontext():
                check_decoder(self.model, torch.arange(vocabulary)[None])
        self.record.write()

    def _fingerprint(self) -> dict[str, Any]:
        """Return everything that the result depends on, for the check that a state belongs to this run."""
        protocol = self.protocol
        model = {name: value for name, value in protocol["model"].items() if name not in ("name", "source")}
        names = ("versions", "device", "threads", "float32_matmul_precision", "ranks", "backend")
        own = {name: protocol[name] for name in names}
        calibration = protocol["calibration"]["tokens_sha256"]
        return {"settings": identifying(self.settings), "model": model, "calibration": calibration, "code": code_sha256()} | own

    def prune(self) -> None:
        settings, record = self.settings, self.record
        log.info("pruning with %s, %s", settings.label, settings.sparsity.build())
        with self.watch.stage("pruning"):
            passes = PassSeconds()
            reports = prune_model(
                self.model,
                self.calibration.tokens,
                pruning_plan(settings),
                self.device,
                on_layer=lambda step, report: self.tracker.tell("layer", step, report.as_dict()),
                ranks=self.ranks,
                scratch=self.folder,
                seconds=passes,
                on_study=lambda name, found: write_study(self.folder, name, found.as_dict()),
                first_block=self.first_block,
                first_key=first_key(settings, self.protocol),
                weights=self.weights,
                state=self.state,
            )
        self.watch.seconds |= {f"pruning.{name}": round(value, 3) for name, value in vars(passes).items()}
        engine = settings.engine
        found = [event for report in reports for event in events(report, engine.damping, engine.block_size)]
        record.pruned([report.as_dict() for report in reports], found, settings.reorder.build() is not None)

    def measure(self) -> None:
        """Measure sparsity, then perplexity on every text, then zero-shot accuracy."""
        settings, record = self.settings, self.record
        record.data["metrics"]["sparsity"] = self._sparsity()
        if settings.pruned and isinstance(settings.sparsity.build(), Structured) and self.streamed is None:
            pruned = {report["name"] for report in record.data["layers"]}
            sparsity = settings.sparsity.build()
            record.data["parameters"] = remove_masked(self.model, self.weights.blocks, sparsity, pruned, settings.save)
        whole = not self.placed.by_blocks
        if self.evaluation or self.zero_shot.tasks:
            if whole:
                self.model.to(self.device)
            else:
                _move_outside(self.model, self.weights, self.device)
        if self.evaluation:
            with self.watch.stage("evaluation"):
                for name, windows in self.evaluation.items():
                    bar = f"perplexity {name}"
                    answers = None if whole else lambda tokens, bar=bar: self._answers(tokens, bar)
                    found = perplexity(self.model, windows.tokens, settings.evaluation.batch, bar, self.ranks, answers)
                    record.measured(f"perplexity.{name}", found.value, found.standard_error)
                    log.info("%s: perplexity on %s %.4g ± %.2g", settings.label, name, found.value, found.standard_error)
        if self.tasks is not None:  # only on the first rank: lm-eval distributes work differently
            with self.watch.stage("zero_shot"), ExitStack() as stack:
                hook = self.model.register_forward_pre_hook(lambda *_: interruption.check())
                stack.callback(hook.remove)
                if not whole:
                    stack.enter_context(loading_blocks(self.weights, self.device))
                wanted = self.zero_shot
                accuracies = measure_zero_shot(self.model, self.tokenizer, self.tasks, wanted, self.folder, self.bos)
            self.protocol["zero_shot"] |= accuracies.protocol
            for name, value in accuracies.values.items():
                record.measured(f"zero_shot.{name}", value, accuracies.standard_errors.get(name))
                log.info("%s: %s %.2f %%", settings.label, name, value)
        self.ranks.gather(None)  # the other ranks wait for the first

    def _answers(self, tokens: Tensor, bar: str) -> Iterable[tuple[Tensor, Tensor]]:
        batch, place = self.settings.evaluation.batch, self.settings.pipeline.activations
        if not len(tokens):
            return []
        return answers_by_blocks(self.model, self.weights, tokens, self.device, batch, place, self.folder, bar)

    def _sparsity(self) -> float:
        """Return the fraction of parameters that need not be stored, over all layers that match the pipeline's patterns."""
        pipeline, blocks = self.settings.pipeline, self.weights.blocks
        reports = {report["name"]: report for report in self.record.data["layers"]}
        saved = total = 0
        for index, block in enumerate(blocks.blocks):
            layers = linear_layers(block, blocks.block_name(index))
            layers = [layer for layer in layers if chosen(layer.name, pipeline.layers, pipeline.skip)]
            of_block = saved_and_total(layers, reports, self.weights.at(index, "cpu"))
            saved, total = saved + of_block[0], total + of_block[1]
        return saved / total

    def finish(self) -> None:
        """Save the model, measure its speed, log the results and draw the figures."""
        settings, record = self.settings, self.record
        if settings.save and self.ranks.first:
            with self.watch.stage("saving"):
                log.info("saved the model to %s", self._save(self.folder / "model"))
        if settings.evaluation.speed is not None and self.ranks.first:
            with self.watch.stage("speed"):
                self._measure_speed()
        record.data["peak_disk_bytes"] = self._peak_disk()
        self.tracker.tell("results", record.data["metrics"], record.data["layers"])
        if settings.figures.draw and self.ranks.first:
            for name, path in draw_figures(record.data, self.folder).items():
                self.tracker.tell("figure", name, path)
        del self.model, self.weights, self.streamed
        gc.collect()

    def _save(self, place: Path) -> Path:
        description = None
        if self.settings.sparsity_config:
            reports = self.record.data["layers"]
            pruned = {report["name"] for report in reports if not report["instead"]}
            layers = all_linear_layers(self.weights.blocks)
            left = [layer.name for layer in layers if layer.name not in pruned] + ["lm_head"]
            share = self.record.data["metrics"]["sparsity"]
            description = sparsity_description(self.settings.sparsity.pattern, share, ["Linear"], left)
        if self.streamed is not None:
            return save_streamed(self.streamed, self.weights.at, self.tokenizer, place, description)
        return save_model(self.model.to("cpu"), self.tokenizer, place, description)

    def _peak_disk(self) -> int:
        """Return the peak size of the run's folder in bytes, excluding activations on disk while a block is processed."""
        state = self.state.peak_bytes if self.state is not None else 0
        model = self.folder / "model"
        return state + (folder_bytes(model) if model.exists() else 0)

    def _measure_speed(self) -> None:
        """Measure the latency of the pruned model if the hardware supports its pattern, else record the reason."""
        settings, record = self.settings, self.record
        wanted = settings.evaluation.speed
        names = {layer["name"] for layer in record.data["layers"]}
        layers = [layer for layer in all_linear_layers(self.weights.blocks) if layer.name in names]
        pattern = settings.sparsity.build() if settings.pruned else None
        if self.placed.by_blocks:
            why = "the whole model does not fit on the device"
        else:
            why = speed.obstacle(pattern, self.device, self.model.dtype, layers)
        self.protocol["speed"] = {"windows": wanted.windows, "window": wanted.window, "not_measured": why}
        if why is not None:
            log.warning("evaluation.speed: cannot be measured: %s", why)
            return
        tokens = torch.zeros(wanted.windows, wanted.window, dtype=torch.int64, device=self.device)
        found = speed.measure(self.model.to(self.device), layers, tokens, wanted.repeats)
        for name, value in found.metrics().items():
            record.measured(name, value)


def _move_outside(model: nn.Module, weights: BlockWeights, device: torch.device) -> None:
    """Move all modules outside the blocks to the device."""
    inside = {id(module) for block in weights.blocks.blocks for module in block.modules()}
    for module in model.modules():
        if id(module) not in inside:
            module._apply(lambda tensor: tensor.to(device), recurse=False)
    tie_again(model)
