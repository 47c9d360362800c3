"""The run of a language model."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

from ..data import Windows
from ..evaluation import Around, Comparison, dense_states, perplexity, speed, whole_answers
from ..evaluation.zero_shot import Tasks, prepared
from ..evaluation.zero_shot import measure as measure_zero_shot
from ..models import (
    StreamedModel,
    all_linear_layers,
    check_removable,
    check_savable,
    class_for,
    extra_files,
    find_blocks,
    largest_file,
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
    InMemory,
    LayerReport,
    OnDisk,
    PruneContext,
    answers_by_blocks,
    check_decoder,
    loading_blocks,
)
from ..runtime import signals as interruption
from ..runtime.batches import batch_size
from ..runtime.errors import RoseExpError
from .card import model_card
from .dense import dense_key, shared_states
from .fitting import check_fits
from .limits import available
from .preparation import (
    calibration_windows,
    check_window_lengths,
    evaluation_windows,
    first_key,
    limited,
    warn_of_slow_dtype,
)
from .pruning import prune_language_model, sparsity_of_blocks
from .run import Run

log = logging.getLogger(__name__)


class LanguageRun(Run):
    """The run of a causal language model, in memory or streamed from disk."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        zero_shot = self.settings.evaluation.zero_shot
        self.zero_shot = zero_shot.model_copy(update={"limit": limited(self.settings, zero_shot.limit)})
        self.hidden_size = 0
        self.calibration: Windows | None = None
        self.evaluation: dict[str, Windows] = {}
        self.dense_states: dict[str, Tensor] = {}  # by text, see rose_exp.evaluation.dense_states
        self.tasks: Tasks | None = None
        self.streamed: StreamedModel | None = None
        self.extra_files: list[Path] = []

    def read_inputs(self, stack: ExitStack) -> None:
        """Check that the run fits into memory and on disk, then read the texts."""
        settings = self.settings
        with self.watch.stage("preflight"), self.ranks.first_rank_first():
            cuda = self.device.type == "cuda"
            shape = model_shape(settings.model)
            free = available(self.folder.root, self.device, largest_file(settings.model))
            self.hidden_size = shape.hidden
            check_window_lengths(settings, shape.context)
            self.placed, estimate = check_fits(settings, shape, cuda, free)
        self.record.data["estimate"] = estimate.as_dict() | vars(self.placed)
        with self.watch.stage("texts"), self.ranks.first_rank_first():
            self.tokenizer = load_tokenizer(settings.model)
            self.bos = resolve_bos(settings.model, self.tokenizer)
            self.calibration = calibration_windows(settings, self.tokenizer, self.bos) if settings.pruned else None
            self.evaluation = evaluation_windows(settings, self.tokenizer, self.bos)
            cut = {"calibration": self.calibration} if self.calibration else {}
            cut |= {f"evaluation.perplexity.{name}": windows for name, windows in self.evaluation.items()}
            for setting, windows in cut.items():
                shape.check_tokens(setting, int(windows.tokens.max()))
            if self.zero_shot.tasks and self.ranks.first:  # the stack removes the tasks' temporary folder
                self.tasks = stack.enter_context(prepared(self.zero_shot))
                from ..evaluation.rehearsal import check_requests  # slow to import

                check_requests(self.tasks.requests, self.tokenizer, shape)
                facts = {"few_shot": self.zero_shot.few_shot, "limit": self.zero_shot.limit, "bos": self.bos}
                self.protocol["zero_shot"] = facts | self.tasks.protocol
        self.protocol["calibration"] = self.calibration.protocol if self.calibration else None
        self.protocol["evaluation"] = {name: windows.protocol for name, windows in self.evaluation.items()}

    def load_model(self) -> None:
        """Load the model, or open it for streaming from disk."""
        settings = self.settings
        if self.placed.weights == "memory":
            loaded = load_model(settings.model)
        else:
            log.info("streaming %s from disk, one block at a time", settings.model.name)
            loaded, self.streamed = open_model(settings.model)
        self.model = loaded.model
        warn_of_slow_dtype(self.model.dtype, self.device)
        self.protocol["model"] = loaded.protocol
        for kind, detail in loaded.warnings:
            self.record.warn(kind, detail)
        if settings.save:  # now, while the hub is known to be reachable
            check_savable(self.model, self.tokenizer)
            self.extra_files = extra_files(settings.model)
        self.blocks = self.streamed.blocks if self.streamed else find_blocks(self.model, settings.model.blocks)
        if settings.removes and settings.save:
            if self.streamed is not None:
                raise RoseExpError("save: expected false for structured sparsity of a model streamed from disk, got true")
            check_removable(self.model, self.blocks, settings.sparsity.parsed)

    def after_load(self) -> None:
        kept = self.state.block if self.state is not None else lambda _index: None
        self.weights: BlockWeights = OnDisk(self.streamed, kept) if self.streamed else InMemory(self.blocks)
        if not self.settings.pruned:  # pruning checks this itself
            vocabulary = self.model.config.get_text_config().vocab_size
            with loading_blocks(self.weights, "cpu") if self.streamed else nullcontext():
                check_decoder(self.model, torch.arange(vocabulary)[None])

    def calibration_fingerprint(self) -> str:
        return self.protocol["calibration"]["tokens_sha256"]

    def before_pruning(self) -> None:
        """Keep the dense model's predictions, if the pruned model is compared with them."""
        settings = self.settings
        if not settings.evaluation.divergence or not self.evaluation:
            return
        with self.watch.stage("evaluation.dense"):
            for name, windows in self.evaluation.items():
                batch = batch_size(settings.evaluation.batch, self.device)
                key = None if settings.model.trust_remote_code else dense_key(self.protocol, name, batch)
                size = windows.tokens.numel() * self.hidden_size * self.model.dtype.itemsize
                self.dense_states[name] = shared_states(key, size, partial(self._compute_dense_states, windows.tokens, name))

    def prune_layers(self, context: PruneContext) -> Sequence[LayerReport]:
        key = first_key(self.settings, self.protocol) if self.first_block is not None else None
        limit = self.ranks.gather(self.placed.moments_bytes)[0]
        context = replace(context, weights=self.weights, first_block=self.first_block, first_key=key, moments_bytes=limit)
        return prune_language_model(self.model, self.calibration.tokens, self.settings, context)

    def measure(self) -> None:
        """Measure sparsity, then perplexity on every text, then zero-shot accuracy."""
        settings, record = self.settings, self.record
        reports = {report["name"]: report for report in record.data["layers"]}
        record.data["metrics"]["sparsity"] = sparsity_of_blocks(self.weights, reports, settings.pipeline)
        if settings.removes and self.streamed is None:
            sparsity = settings.sparsity.parsed
            record.data["parameters"] = remove_masked(self.model, self.weights.blocks, sparsity, reports, settings.save)
        whole = not self.placed.by_blocks
        if self.evaluation or self.zero_shot.tasks:
            self._move(self.device)
        if self.evaluation:
            with self.watch.stage("evaluation"):
                for name, windows in self.evaluation.items():
                    self._measure_perplexity(name, windows.tokens)
        if self.tasks is not None:  # only on the first rank: lm-eval distributes work differently
            with self.watch.stage("zero_shot"), ExitStack() as stack:
                hook = self.model.register_forward_pre_hook(lambda *_: interruption.check())
                stack.callback(hook.remove)
                if not whole:
                    stack.enter_context(loading_blocks(self.weights, self.device))
                zero_shot = self.zero_shot
                accuracies = measure_zero_shot(self.model, self.tokenizer, self.tasks, zero_shot, self.folder.root, self.bos)
            self.protocol["zero_shot"] |= accuracies.protocol
            for name, value in accuracies.values.items():
                record.measured(f"zero_shot.{name}", value, accuracies.standard_errors.get(name))
                log.info("%s: %s %.2f %%", settings.label, name, value)
        self.ranks.gather(None)  # the other ranks wait for the first

    def _measure_perplexity(self, name: str, tokens: Tensor) -> None:
        """Measure perplexity on a text and, if the dense model's predictions are kept, the divergence from them."""
        settings, record, bar = self.settings, self.record, f"perplexity {name}"
        states = self.dense_states.pop(name, None)
        comparison = None if states is None else Comparison(self.model, states)
        around = nullcontext if comparison is None else comparison.both
        answers = (lambda share: self._answers(share, bar, around)) if self.placed.by_blocks else None
        result = perplexity(self.model, tokens, settings.evaluation.batch, bar, self.ranks, answers, comparison)
        record.measured(f"perplexity.{name}", result.value, result.standard_error, result.windows)
        log.info("%s: perplexity on %s %.4g ± %.2g", settings.label, name, result.value, result.standard_error)
        if (found := result.divergence) is not None:
            record.measured(f"kl_divergence.{name}", found.kl, found.kl_standard_error, found.kl_windows)
            agreement, error = found.agreement, found.agreement_standard_error
            record.measured(f"top1_agreement.{name}", agreement, error, found.agreement_windows)
            log.info("%s: KL divergence on %s %.4g ± %.2g", settings.label, name, found.kl, found.kl_standard_error)

    def _answers(
        self, tokens: Tensor, bar: str, around: Around = nullcontext, weights: BlockWeights | None = None
    ) -> Iterable[tuple[Tensor, Tensor]]:
        """Return batches of windows and their logits, computed block by block.

        Args:
            around: context in which the logits of a batch are computed.
            weights: the blocks; None for those of the run.
        """
        batch, place, folder = self.settings.evaluation.batch, self.settings.pipeline.activations, self.folder.root
        if not len(tokens):
            return []
        return answers_by_blocks(self.model, weights or self.weights, tokens, self.device, batch, place, folder, bar, around)

    def _dense_answers(self, tokens: Tensor, bar: str, around: Around) -> Iterable[tuple[Tensor, Tensor]]:
        """Return batches of windows and their logits with dense weights, also in a run that resumes."""
        if not self.placed.by_blocks:
            return whole_answers(self.model, tokens, batch_size(self.settings.evaluation.batch, self.device), around)
        weights = OnDisk(self.streamed, lambda _index: None) if self.streamed else self.weights
        return self._answers(tokens, bar, around, weights)

    def _compute_dense_states(self, tokens: Tensor, name: str) -> Tensor:
        share, bar = self.ranks.share(tokens), f"dense model on {name}"
        batches = -(-len(share) // batch_size(self.settings.evaluation.batch, self.device))
        self._move(self.device)
        try:
            return dense_states(self.model, lambda around: self._dense_answers(share, bar, around), batches, bar)
        finally:
            self._move("cpu")

    def _move(self, device: torch.device | str) -> None:
        """Move the model to a device or, if it is evaluated by blocks, what is outside the blocks."""
        if self.placed.by_blocks:
            _move_outside(self.model, self.weights, device)
        else:
            self.model.to(device)

    def save(self, place: Path) -> Path:
        description = None
        if self.settings.sparsity_config:
            reports = self.record.data["layers"]
            pruned = {report["name"] for report in reports if not report["fallback"]}
            layers = all_linear_layers(self.weights.blocks)
            unpruned = [layer.name for layer in layers if layer.name not in pruned] + ["lm_head"]
            share = self.record.data["metrics"]["sparsity"]
            description = sparsity_description(self.settings.sparsity.pattern, share, ["Linear"], unpruned)
        multimodal = class_for(self.model.config) is AutoModelForImageTextToText
        card = model_card(self.record.data, self.settings, multimodal)
        if self.streamed is not None:
            return save_streamed(self.streamed, self.weights.at, self.tokenizer, place, description, self.extra_files, card)
        return save_model(self.model.to("cpu"), self.tokenizer, place, description, self.extra_files, card)

    def after_saving(self) -> None:
        if self.settings.evaluation.speed is not None and self.ranks.first:
            with self.watch.stage("speed"):
                self._measure_speed()

    def release(self) -> None:
        del self.model, self.weights, self.streamed, self.blocks

    def _measure_speed(self) -> None:
        """Measure the latency of the pruned model if the hardware supports its pattern, else record the reason."""
        settings, record = self.settings, self.record
        request = settings.evaluation.speed
        names = {layer["name"] for layer in record.data["layers"]}
        layers = [layer for layer in all_linear_layers(self.weights.blocks) if layer.name in names]
        pattern = settings.sparsity.parsed if settings.pruned else None
        if self.placed.by_blocks:
            reason = "the whole model does not fit on the device"
        else:
            reason = speed.obstacle(pattern, self.device, self.model.dtype, layers)
        self.protocol["speed"] = {"windows": request.windows, "window": request.window, "not_measured": reason}
        if reason is not None:
            log.warning("evaluation.speed: cannot be measured: %s", reason)
            return
        tokens = torch.zeros(request.windows, request.window, dtype=torch.int64, device=self.device)
        timing = speed.measure(self.model.to(self.device), layers, tokens, request.repeats)
        for name, value in timing.metrics().items():
            record.measured(name, value)


def _move_outside(model: nn.Module, weights: BlockWeights, device: torch.device) -> None:
    """Move all modules outside the blocks to the device."""
    inside = {id(module) for block in weights.blocks.blocks for module in block.modules()}
    for module in model.modules():
        if id(module) not in inside:
            module._apply(lambda tensor: tensor.to(device), recurse=False)
    tie_again(model)
