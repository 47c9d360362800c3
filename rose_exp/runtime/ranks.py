"""Distributed runs with ``torchrun``: each process calibrates on its share of the windows and solves its share of the layers of
every block."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from ..engine import CrossMoments, InputMoments
from .errors import RoseExpError

LONG = timedelta(days=7)  # one rank can work for hours while the others wait; torchrun stops all of them if one dies


class Ranks:
    """The processes of this run, and their collective operations, which do nothing if there is only one process."""

    def __init__(self):
        distributed = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if distributed else 0
        self.size = dist.get_world_size() if distributed else 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes the run's files."""
        return self.rank == 0

    def share(self, windows: Tensor) -> Tensor:
        """Return this process's share of ``windows`` of shape (windows, ...), which can be empty."""
        return windows.tensor_split(self.size)[self.rank]

    def owners(self, costs: Sequence[float]) -> list[int]:
        """Return the rank of each task: assigns tasks in order of decreasing cost to the rank with the least load."""
        loads = [0.0] * self.size
        owners = [0] * len(costs)
        for task in sorted(range(len(costs)), key=lambda i: -costs[i]):
            owners[task] = min(range(self.size), key=lambda rank: loads[rank])
            loads[owners[task]] += costs[task]
        return owners

    def reduce(self, moments: InputMoments, owner: int) -> None:
        """Sum the moments of all ranks on ``owner``. On the other ranks they are undefined afterwards."""
        if self.size == 1:
            return
        dist.reduce(moments.gram, owner)
        dist.reduce(moments.sum, owner)
        counts = torch.tensor([moments.weight, moments.tokens], dtype=torch.float64, device=moments.device)
        dist.all_reduce(counts)
        moments.weight, moments.tokens = float(counts[0]), int(counts[1])

    def reduce_cross_moments(self, cross_moments: CrossMoments, owner: int) -> None:
        """Sum the cross moments of all ranks on ``owner``. On the other ranks they are undefined afterwards."""
        if self.size == 1:
            return
        for sums in cross_moments.sums:
            dist.reduce(sums, owner)
        count = torch.tensor(cross_moments.tokens, dtype=torch.int64, device=cross_moments.gram.device)
        dist.all_reduce(count)
        cross_moments.tokens = int(count)

    def add_up(self, sums: Tensor) -> None:
        """Sum ``sums`` over all ranks in place, with the result on every rank."""
        if self.size > 1:
            dist.all_reduce(sums)

    def broadcast(self, tensor: Tensor, owner: int) -> None:
        """Overwrite ``tensor`` with its value on ``owner``."""
        if self.size > 1:
            whole = tensor.contiguous()  # collective operations do not support views of transposed experts
            dist.broadcast(whole, owner)
            if whole is not tensor:
                tensor.copy_(whole)

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks, ordered by rank. Values must be picklable."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    @contextmanager
    def first_rank_first(self) -> Iterator[None]:
        """Run the body on the first rank before the others, for example to download a file that they then find in the cache."""
        if self.size > 1 and not self.first:
            dist.barrier()
        try:
            yield
        finally:
            if self.size > 1 and self.first:
                dist.barrier()


def launched() -> tuple[int, int]:
    """Return the rank of this process and the number of processes, as set by ``torchrun``."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def process_group(cpu: bool = False) -> Iterator[None]:
    """Join the processes that ``torchrun`` has started, if any.

    Uses NCCL if every process has its own CUDA device, and Gloo otherwise.

    Args:
        cpu: use Gloo in any case, because the run uses the CPU.
    Raises:
        RoseExpError: the process group cannot be initialized.
    """
    if launched()[1] == 1 or dist.is_initialized():
        yield
        return
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device_per_process = not cpu and torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    try:
        if device_per_process:
            torch.cuda.set_device(local)
        dist.init_process_group("nccl" if device_per_process else "gloo", timeout=LONG)
    except (RuntimeError, ValueError) as error:
        raise RoseExpError(f"torchrun: cannot join the other processes: {error}") from error
    try:
        yield
    finally:
        dist.destroy_process_group()
