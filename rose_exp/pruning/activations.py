"""Storage of the hidden states between two blocks: on the device, in host memory or on disk."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ..runtime.errors import RoseExpError

Place = Literal["device", "host", "disk"]


class Activations:
    """The hidden states of all calibration windows, read and written in batches.

    A block's outputs overwrite its inputs, so only one copy exists. In host memory next to a CUDA device, the tensor is pinned
    and the next batch is transferred while the current one is processed.

    Args:
        shape: (windows, tokens, width), or (windows, …) with several streams of hidden states.
        place: where the tensor is stored.
        device: where batches are processed.
        batch: number of windows per batch; the last batch may be smaller.
        file: file for storage on disk; the caller deletes it.

    Raises:
        RoseExpError: the disk does not have enough space.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        place: Place,
        device: torch.device | str,
        batch: int,
        file: Path | None = None,
    ):
        self.shape, self.place, self.batch = shape, place, batch
        self.device = torch.device(device)
        self.pieces = [slice(start, min(start + batch, shape[0])) for start in range(0, shape[0], batch)]
        pinned = self.device.type == "cuda" and place == "host"
        self._stream = torch.cuda.Stream(self.device) if pinned else None
        if place == "disk":
            self._store = _on_disk(shape, dtype, file)
        else:
            storage_device = self.device if place == "device" else "cpu"
            self._store = torch.empty(shape, dtype=dtype, device=storage_device, pin_memory=pinned)

    def copy(self, file: Path | None = None) -> Activations:
        """Return a copy with the same storage; on disk, it is stored in ``file``."""
        other = Activations(self.shape, self._store.dtype, self.place, self.device, self.batch, file)
        for piece, hidden in self:
            other[piece] = hidden
        return other

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield each batch as its slice of windows and a copy of its hidden states on the device.

        Each copy starts on a cache line, like the tensors in a forward pass of the whole model, and may be overwritten.
        """
        if self._stream is None:
            for piece in self.pieces:
                yield piece, self._store[piece].to(self.device, copy=True)
            return
        next_batch = self._transfer(self.pieces[0])
        for piece, following in zip(self.pieces, [*self.pieces[1:], None], strict=True):
            batch = next_batch
            torch.cuda.current_stream(self.device).wait_stream(self._stream)
            batch.record_stream(torch.cuda.current_stream(self.device))
            if following is not None:
                next_batch = self._transfer(following)
            yield piece, batch

    def __setitem__(self, piece: slice, hidden: Tensor) -> None:
        """Overwrite the hidden states of some windows."""
        if self._stream is None or not hidden.is_cuda:
            self._store[piece].copy_(hidden)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            self._store[piece].copy_(hidden, non_blocking=True)
        hidden.record_stream(self._stream)

    def write(self, file: str) -> None:
        """Write the raw bytes of all hidden states to a file, batch by batch."""
        self._synchronize()
        with open(file, "wb") as out:
            for piece in self.pieces:
                self._store[piece].cpu().contiguous().view(torch.uint8).numpy().tofile(out)

    def read(self, file: Path) -> None:
        """Read the hidden states from a file created by :meth:`write`.

        Raises:
            OSError: the file has an unexpected size.
        """
        expected = self._store.numel() * self._store.dtype.itemsize
        if file.stat().st_size != expected:
            raise OSError(f"{file} has {file.stat().st_size} bytes, expected {expected}")
        with file.open("rb") as source:
            for piece in self.pieces:
                part = self._store[piece]
                values = torch.frombuffer(bytearray(source.read(part.numel() * part.dtype.itemsize)), dtype=part.dtype)
                part.copy_(values.view(part.shape))

    def _synchronize(self) -> None:
        """Wait for pending transfers."""
        if self._stream is not None:
            self._stream.synchronize()

    def _transfer(self, piece: slice) -> Tensor:
        with torch.cuda.stream(self._stream):
            return self._store[piece].to(self.device, non_blocking=True)


def _on_disk(shape: tuple[int, ...], dtype: torch.dtype, file: Path) -> Tensor:
    size = torch.Size(shape).numel()
    required, free = size * dtype.itemsize, shutil.disk_usage(file.parent).free
    if required > free:
        raise RoseExpError(
            f"pipeline.activations: expected {required / 1e9:.1f} GB free for {shape[0]} windows in {file.parent}, "
            f"got {free / 1e9:.1f} GB; lower calibration.samples or set pipeline.activations=host"
        )
    return torch.from_file(str(file), shared=True, size=size, dtype=dtype).view(shape)
