"""Storage of the weights of a model's blocks while they are not in use."""

from __future__ import annotations

import ctypes
import ctypes.util
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..models import BlockList, StreamedModel, let_go, own_memory


class BlockWeights(ABC):
    """The blocks of a model, each of which moves to a device while it is in use."""

    def __init__(self, blocks: BlockList):
        self.blocks = blocks

    @abstractmethod
    def at(self, index: int, device: torch.device | str, original: bool = False):
        """Return a context manager that yields the block on ``device`` with all its weights.

        Args:
            original: whether to use the checkpoint's weights even if a pruned block was saved. Blocks that are pruned in
                memory cannot be restored.
        """


class InMemory(BlockWeights):
    """A model with all blocks in host memory."""

    @contextmanager
    def at(self, index: int, device: torch.device | str, original: bool = False) -> Iterator[nn.Module]:
        block = self.blocks.blocks[index]
        try:
            yield block.to(device)
        finally:
            block.to("cpu")


class OnDisk(BlockWeights):
    """A model whose blocks are read from disk when needed and released afterwards.

    Args:
        kept: returns the tensors of a saved pruned block by name, or None to read the block from the checkpoint.
    """

    def __init__(self, streamed: StreamedModel, kept: Callable[[int], Mapping[str, Tensor] | None]):
        super().__init__(streamed.blocks)
        self.streamed, self.kept = streamed, kept

    @contextmanager
    def at(self, index: int, device: torch.device | str, original: bool = False) -> Iterator[nn.Module]:
        block, tensors = self.blocks.blocks[index], None if original else self.kept(index)
        try:
            if tensors is None:
                self.streamed.load(index)
            else:
                fill(block, tensors)
            yield block.to(device)
        finally:
            let_go(block)
            _trim_memory()


def _trim_memory() -> None:
    """Return freed memory to the system; otherwise glibc keeps fragments and may hold twice the memory in use."""
    libc = ctypes.util.find_library("c")
    trim = getattr(ctypes.CDLL(libc), "malloc_trim", None) if libc else None  # only glibc has it
    if trim is not None:
        trim(0)


def fill(block: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load the saved weights of a block."""
    block.load_state_dict({name: own_memory(value) for name, value in tensors.items()}, strict=True, assign=True)
    block.requires_grad_(False)
