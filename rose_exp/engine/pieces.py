"""Streams of tokens cut into pieces of a fixed length, so that sums do not depend on how the tokens are batched."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

PIECE = 1024  # tokens
ALIGNMENT = 64  # bytes, a cache line; torch's own allocations are aligned to it


class TokenPieces:
    """Cuts parallel streams of tokens into pieces of ``length`` tokens.

    A matrix product over many tokens rounds differently from the sum of products over a few. Cutting the stream at fixed
    places makes a sum over pieces equal bit for bit, whether the tokens arrive one window at a time or all at once.

    Args:
        dtype: of the pieces.
        length: tokens in a piece; the last piece before :meth:`rest` may be shorter.
    """

    def __init__(self, dtype: torch.dtype, length: int = PIECE):
        self.dtype, self.length = dtype, length
        self.held = 0  # tokens in the buffers
        self.weight = 1.0  # of the held tokens
        self._buffers: list[Tensor] = []

    def push(self, streams: Sequence[Tensor], weight: float = 1.0) -> Iterator[tuple[list[Tensor], float]]:
        """Add tokens and yield the pieces that they complete, each with its weight.

        A change of the weight, or of the number of streams, ends the current piece.

        Args:
            streams: tensors (tokens, width) of equal length, one for each stream.
        """
        if self.held and (weight != self.weight or len(streams) != len(self._buffers)):
            yield from self.rest()
        self.weight = weight
        start, tokens = 0, len(streams[0])
        while start < tokens:
            count = min(self.length - self.held, tokens - start)
            parts = [stream[start : start + count] for stream in streams]
            start += count
            if count == self.length:
                yield [aligned(part.to(self.dtype)) for part in parts], weight
                continue
            self._append(parts)
            if self.held == self.length:
                yield from self.rest()

    def rest(self) -> Iterator[tuple[list[Tensor], float]]:
        """Yield the current piece, if there is one, and start a new one."""
        if self.held:
            count, self.held = self.held, 0
            yield [buffer[:count] for buffer in self._buffers], self.weight
        self._buffers = []

    def _append(self, parts: Sequence[Tensor]) -> None:
        if not self._buffers:
            self._buffers = [torch.empty(self.length, part.shape[1], dtype=self.dtype, device=part.device) for part in parts]
        for buffer, part in zip(self._buffers, parts, strict=True):
            buffer[self.held : self.held + len(part)] = part
        self.held += len(parts[0])


def aligned(tensor: Tensor) -> Tensor:
    """``tensor``, or a contiguous copy of it if its data does not start on a cache line.

    CPU libraries may choose another kernel, and so round differently, for memory that is not aligned.
    """
    if tensor.device.type != "cpu" or (tensor.data_ptr() % ALIGNMENT == 0 and tensor.is_contiguous()):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)
