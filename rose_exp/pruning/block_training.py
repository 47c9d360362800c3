"""Training of a part of a pruned block, with fixed masks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..settings.reconstruction import Reconstruction

if TYPE_CHECKING:
    from .context import PruneContext
    from .unit import Unit

SEED = 0  # of the order of the windows


class Pieces(Protocol):
    """Calibration data in batches."""

    pieces: Sequence[slice]


class Stage(Protocol):
    """A part of a block that is trained at once.

    Attributes:
        unit: the block.
        inputs: batches of its inputs in the pruned model.
    """

    unit: Unit
    inputs: Pieces

    def error(self, batch: slice, /) -> Tensor:
        """Return the sum of errors over a batch, with gradients for the parameters of the block."""


class Training:
    """The training of one stage with Adam, which stops early once the error on the held-out windows does not fall.

    All processes train on their own windows and take the same steps.

    Attributes:
        held_out, batches: batches of windows to measure the error on and to train on, over all processes. Each is a pair of the
            process's rank and a slice of its windows.
    """

    def __init__(self, stage: Stage, options: Reconstruction, context: PruneContext):
        self.stage, self.options, self.context = stage, options, context
        self.parameters: list[nn.Parameter] = []
        self.masks: list[Tensor] = []
        ranks = context.ranks
        batches = [(rank, s) for rank, pieces in enumerate(ranks.gather(stage.inputs.pieces)) for s in pieces]  # of all ranks
        count = min(max(1, round(options.held_out * len(batches))), len(batches) - 1)
        held_out = {int((place + 0.5) * len(batches) / count) for place in range(count)}
        self.held_out = [batch for place, batch in enumerate(batches) if place in held_out]
        self.batches = [batch for place, batch in enumerate(batches) if place not in held_out]

    def run(self, parameters: Sequence[tuple[nn.Parameter, Tensor]]) -> None:
        """Train, and keep the parameters of the epoch with the lowest error on the held-out windows.

        Args:
            parameters: parameters with masks of the entries to train.
        """
        self.parameters = [parameter for parameter, _ in parameters]
        self.masks = [mask for _, mask in parameters]
        options = self.options
        before = best = self.held_out_error()
        if not self.parameters or not before > 0:
            return
        kept = [parameter.detach().clone() for parameter in self.parameters]
        copies = [at_least_float32(parameter.detach()).clone().requires_grad_() for parameter in self.parameters]
        optimizer = torch.optim.Adam(copies, lr=options.rate)
        steps = len(self._steps(0))
        total = options.epochs * steps
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / total)
        waited = 0
        bar = tqdm(desc=f"reconstructing {self.stage.unit.name}", total=total, leave=False, disable=None, unit="step")
        with bar, self._only_these_require_grad():
            for epoch in range(options.epochs):
                for batches in self._steps(epoch):
                    self._step(batches, copies, optimizer, before)
                    schedule.step()
                    bar.update()
                error = self.held_out_error()
                waited = 0 if error < best else waited + 1
                if error < best:
                    best, kept = error, [parameter.detach().clone() for parameter in self.parameters]
                if waited == options.patience:
                    break
        for parameter, values in zip(self.parameters, kept, strict=True):
            parameter.data.copy_(values)

    def _step(
        self, batches: Sequence[tuple[int, slice]], copies: Sequence[Tensor], optimizer: torch.optim.Optimizer, scale: float
    ) -> None:
        """Take one step in at least float32, and round its result to the parameters.

        Args:
            scale: divides the error, so that gradients in half precision do not vanish.
        """
        ranks = self.context.ranks
        sums = [torch.zeros_like(copy) for copy in copies]
        for rank, windows in batches:
            if rank != ranks.rank:
                continue
            self.context.check_stop_between_batches()
            with torch.enable_grad():
                loss = self.stage.error(windows) / scale
            for total, gradient in zip(sums, torch.autograd.grad(loss, self.parameters, allow_unused=True), strict=True):
                if gradient is not None:  # an expert may receive no token
                    total += gradient
        for copy, total, mask in zip(copies, sums, self.masks, strict=True):
            ranks.add_up(total)
            copy.grad = total * mask
        optimizer.step()
        for parameter, copy in zip(self.parameters, copies, strict=True):
            parameter.data.copy_(copy)

    def _steps(self, epoch: int) -> list[list[tuple[int, slice]]]:
        """Return the batches of each step of an epoch, in random order."""
        order = torch.randperm(len(self.batches), generator=torch.Generator().manual_seed(SEED + epoch)).tolist()
        steps: list[list[tuple[int, slice]]] = [[]]
        for place in order:
            if sum(windows.stop - windows.start for _, windows in steps[-1]) >= self.options.batch:
                steps.append([])
            steps[-1].append(self.batches[place])
        return steps

    @torch.no_grad()
    def held_out_error(self) -> float:
        """Return the mean error per held-out window, over all processes."""
        own = [windows for rank, windows in self.held_out if rank == self.context.ranks.rank]
        error = torch.zeros((), dtype=torch.float64, device=self.context.device)
        for windows in own:
            self.context.check_stop_between_batches()
            error += self.stage.error(windows)
        self.context.ranks.add_up(error)
        return error.item() / sum(windows.stop - windows.start for _, windows in self.held_out)

    @contextmanager
    def _only_these_require_grad(self) -> Iterator[None]:
        module = self.stage.unit.module
        before = {parameter: parameter.requires_grad for parameter in module.parameters()}
        module.requires_grad_(False)
        for parameter in self.parameters:
            parameter.requires_grad_()
        try:
            yield
        finally:
            for parameter, required in before.items():
                parameter.requires_grad_(required)


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return a tensor in float32, or in float64 if it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
