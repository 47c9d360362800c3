"""Where the weights of a model's blocks are while nobody works on them."""

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
    """The blocks of a model, each of which visits a device while it is worked on."""

    def __init__(self, blocks: BlockList):
        self.blocks = blocks

    @abstractmethod
    def at(self, index: int, device: torch.device | str, original: bool = False):
        """A context in which the block, which it gives, is on ``device`` with all its weights.

        Args:
            original: those of the checkpoint, also where the block has been pruned and kept; what is pruned in memory is not
                brought back.
        """


class InMemory(BlockWeights):
    """A whole model on the host."""

    @contextmanager
    def at(self, index: int, device: torch.device | str, original: bool = False) -> Iterator[nn.Module]:
        block = self.blocks.blocks[index]
        try:
            yield block.to(device)
        finally:
            block.to("cpu")


class OnDisk(BlockWeights):
    """A model whose blocks are read when they are wanted and let go afterwards.

    Args:
        kept: the tensors of a block by their names in it, where it has been pruned and kept; None: the checkpoint's count.
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
            _give_back()


def _give_back() -> None:
    """Hand freed memory back to the system: the C library keeps it in pieces, and would hold twice what is in use."""
    libc = ctypes.util.find_library("c")
    trim = getattr(ctypes.CDLL(libc), "malloc_trim", None) if libc else None  # glibc has it
    if trim is not None:
        trim(0)


def fill(block: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a block the weights that were kept of it."""
    block.load_state_dict({name: own_memory(value) for name, value in tensors.items()}, strict=True, assign=True)
    block.requires_grad_(False)
