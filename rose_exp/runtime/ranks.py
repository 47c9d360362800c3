"""Several processes at one run (``torchrun``): each calibrates with its share of the windows, and solves its share of the
layers of every block."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from ..engine import Drift, InputMoments
from .errors import RoseExpError

LONG = timedelta(days=7)  # one rank may work for hours while the others wait; torchrun ends them all if one dies


class Ranks:
    """The processes at this run; alone where there is only one."""

    def __init__(self):
        together = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if together else 0
        self.size = dist.get_world_size() if together else 1

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes what the run leaves."""
        return self.rank == 0

    def share(self, windows: Tensor) -> Tensor:
        """This process's part of ``windows`` (windows, ...), which may be empty."""
        return windows.tensor_split(self.size)[self.rank]

    def owners(self, costs: Sequence[float]) -> list[int]:
        """Which rank does which of some tasks: the dearest first, each to the rank with the least to do."""
        loads = [0.0] * self.size
        found = [0] * len(costs)
        for task in sorted(range(len(costs)), key=lambda i: -costs[i]):
            found[task] = min(range(self.size), key=lambda rank: loads[rank])
            loads[found[task]] += costs[task]
        return found

    def reduce(self, moments: InputMoments, owner: int) -> None:
        """Add up the moments of all ranks at ``owner``; elsewhere they are of no meaning afterwards."""
        if self.size == 1:
            return
        dist.reduce(moments.gram, owner)
        dist.reduce(moments.sum, owner)
        counts = torch.tensor([moments.weight, moments.tokens], dtype=torch.float64, device=moments.device)
        dist.all_reduce(counts)
        moments.weight, moments.tokens = float(counts[0]), int(counts[1])

    def reduce_drift(self, drift: Drift, owner: int) -> None:
        """The same of how far inputs have drifted."""
        if self.size == 1:
            return
        for sums in drift.sums:
            dist.reduce(sums, owner)
        count = torch.tensor(drift.tokens, dtype=torch.int64, device=drift.gram.device)
        dist.all_reduce(count)
        drift.tokens = int(count)

    def add_up(self, sums: Tensor) -> None:
        """Make ``sums`` the sum of those of all ranks, on each of them."""
        if self.size > 1:
            dist.all_reduce(sums)

    def broadcast(self, tensor: Tensor, owner: int) -> None:
        """Overwrite ``tensor`` with what it is at ``owner``."""
        if self.size > 1:
            dist.broadcast(tensor, owner)

    def gather(self, value: Any) -> list[Any]:
        """What every rank has, in the order of the ranks; anything that can be pickled."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    @contextmanager
    def one_by_one(self) -> Iterator[None]:
        """Let the first rank do something before the others do, such as fetching a file that they then find in the cache."""
        if self.size > 1 and not self.first:
            dist.barrier()
        try:
            yield
        finally:
            if self.size > 1 and self.first:
                dist.barrier()


def launched() -> tuple[int, int]:
    """Rank and number of processes that ``torchrun`` has told this process of."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def process_group(cpu: bool = False) -> Iterator[None]:
    """Join the processes that ``torchrun`` has started, if it has: with NCCL where each has a CUDA device of its own, else,
    or where the work is to be done on the CPU, with gloo.

    Raises:
        RoseExpError: they cannot be joined.
    """
    if launched()[1] == 1 or dist.is_initialized():
        yield
        return
    local = int(os.environ.get("LOCAL_RANK", "0"))
    own_device = not cpu and torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    try:
        if own_device:
            torch.cuda.set_device(local)
        dist.init_process_group("nccl" if own_device else "gloo", timeout=LONG)
    except (RuntimeError, ValueError) as error:
        raise RoseExpError(f"torchrun: cannot join the other processes: {error}") from error
    try:
        yield
    finally:
        dist.destroy_process_group()
