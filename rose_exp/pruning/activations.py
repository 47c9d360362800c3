"""The hidden states between two blocks, of all calibration windows: on the device, in host memory or on disk."""

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
    """One tensor (windows, tokens, width), read and written by batches of windows; what a block answers takes the place of
    what it was given, so that nothing is kept that the next block does not need.

    In host memory beside a CUDA device the tensor is pinned, and the next batch travels while one is worked on.

    Args:
        shape: (windows, tokens, width).
        place: where the tensor is kept.
        device: where batches are worked on.
        batch: windows at once; the last batch may be smaller.
        file: where to keep it on disk; it is the caller's to delete.

    Raises:
        RoseExpError: it does not fit on the disk.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        place: Place,
        device: torch.device | str,
        batch: int,
        file: Path | None = None,
    ):
        self.shape, self.place, self.batch = shape, place, batch
        self.device = torch.device(device)
        self.pieces = [slice(start, min(start + batch, shape[0])) for start in range(0, shape[0], batch)]
        travels = self.device.type == "cuda" and place == "host"
        self._stream = torch.cuda.Stream(self.device) if travels else None
        if place == "disk":
            self._store = _on_disk(shape, dtype, file)
        else:
            where = self.device if place == "device" else "cpu"
            self._store = torch.empty(shape, dtype=dtype, device=where, pin_memory=travels)

    def copy(self, file: Path | None = None) -> Activations:
        """Others, equal to these and kept in the same way; on disk in ``file``."""
        other = Activations(self.shape, self._store.dtype, self.place, self.device, self.batch, file)
        for piece, hidden in self:
            other[piece] = hidden
        return other

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        """Each batch: its windows, and a copy of its hidden states on the device.

        A copy starts on a cache line, as the tensors of a model that runs as a whole do, and a block may overwrite it.
        """
        if self._stream is None:
            for piece in self.pieces:
                yield piece, self._store[piece].to(self.device, copy=True)
            return
        coming = self._send(self.pieces[0])
        for piece, following in zip(self.pieces, [*self.pieces[1:], None], strict=True):
            batch = coming
            torch.cuda.current_stream(self.device).wait_stream(self._stream)
            batch.record_stream(torch.cuda.current_stream(self.device))
            if following is not None:
                coming = self._send(following)
            yield piece, batch

    def __setitem__(self, piece: slice, hidden: Tensor) -> None:
        """Keep the hidden states of some windows, in place of those that were there."""
        if self._stream is None or not hidden.is_cuda:
            self._store[piece].copy_(hidden)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            self._store[piece].copy_(hidden, non_blocking=True)
        hidden.record_stream(self._stream)

    def write(self, file: str) -> None:
        """Write all of them to a file as they are in memory, batch by batch."""
        self._settle()
        with open(file, "wb") as out:
            for piece in self.pieces:
                self._store[piece].cpu().contiguous().view(torch.uint8).numpy().tofile(out)

    def read(self, file: Path) -> None:
        """Take them from a file that :meth:`write` has written.

        Raises:
            OSError: its length is another than that of these.
        """
        expected = self._store.numel() * self._store.dtype.itemsize
        if file.stat().st_size != expected:
            raise OSError(f"{file} has {file.stat().st_size} bytes, expected {expected}")
        with file.open("rb") as source:
            for piece in self.pieces:
                part = self._store[piece]
                held = torch.frombuffer(bytearray(source.read(part.numel() * part.dtype.itemsize)), dtype=part.dtype)
                part.copy_(held.view(part.shape))

    def _settle(self) -> None:
        """Wait for what is on its way."""
        if self._stream is not None:
            self._stream.synchronize()

    def _send(self, piece: slice) -> Tensor:
        with torch.cuda.stream(self._stream):
            return self._store[piece].to(self.device, non_blocking=True)


def _on_disk(shape: tuple[int, int, int], dtype: torch.dtype, file: Path) -> Tensor:
    size = torch.Size(shape).numel()
    wanted, free = size * dtype.itemsize, shutil.disk_usage(file.parent).free
    if wanted > free:
        raise RoseExpError(
            f"pipeline.activations: expected {wanted / 1e9:.1f} GB free for {shape[0]} windows in {file.parent}, "
            f"got {free / 1e9:.1f} GB; lower calibration.samples or keep them in host memory"
        )
    return torch.from_file(str(file), shared=True, size=size, dtype=dtype).view(shape)
