"""Storage of the hidden states between two blocks: on the device, in host memory or on disk."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Literal

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
            self._store: Tensor | _File = _File(shape, dtype, file)
        else:
            storage_device = self.device if place == "device" else "cpu"
            self._store = torch.empty(shape, dtype=dtype, device=storage_device, pin_memory=pinned)

    def copy(self, file: Path | None = None) -> Activations:
        """Return a copy with the same storage; on disk, it is stored in ``file``."""
        other = self.empty_like(file)
        for piece, hidden in self:
            other[piece] = hidden
        return other

    def empty_like(self, file: Path | None = None) -> Activations:
        """Return hidden states of the same shape with the same storage, without values; on disk, in ``file``."""
        return Activations(self.shape, self._store.dtype, self.place, self.device, self.batch, file)

    def __getitem__(self, piece: slice) -> Tensor:
        """Return a copy of the hidden states of some windows on the device."""
        self._synchronize()
        return self._store[piece].to(self.device, copy=self.place != "disk")  # a file returns a copy itself

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield each batch as its slice of windows and a copy of its hidden states on the device.

        Each copy starts on a cache line, like the tensors in a forward pass of the whole model, and may be overwritten.
        """
        if self._stream is None:
            for piece in self.pieces:
                yield piece, self[piece]
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
            self._store[piece] = hidden
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
        expected = torch.Size(self.shape).numel() * self._store.dtype.itemsize
        if file.stat().st_size != expected:
            raise OSError(f"{file} has {file.stat().st_size} bytes, expected {expected}")
        with file.open("rb") as source:
            for piece in self.pieces:
                part = self._store[piece]
                values = torch.frombuffer(bytearray(source.read(part.numel() * part.dtype.itemsize)), dtype=part.dtype)
                self._store[piece] = values.view(part.shape)

    def _synchronize(self) -> None:
        """Wait for pending transfers."""
        if self._stream is not None:
            self._stream.synchronize()

    def _transfer(self, piece: slice) -> Tensor:
        with torch.cuda.stream(self._stream):
            return self._store[piece].to(self.device, non_blocking=True)


class _File:
    """A tensor in a file. Slices of its first dimension are read into new tensors, so that they use no memory otherwise.

    Raises:
        RoseExpError: the disk does not have enough space, or the file cannot be read or written.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, file: Path):
        self.shape, self.dtype, self.file = shape, dtype, file
        self.row = torch.Size(shape[1:]).numel() * dtype.itemsize  # bytes
        required, free = shape[0] * self.row, shutil.disk_usage(file.parent).free
        if required > free:
            raise RoseExpError(
                f"pipeline.activations: expected {required / 1e9:.1f} GB free for {shape[0]} windows in {file.parent}, "
                f"got {free / 1e9:.1f} GB; lower calibration.samples or set pipeline.activations=host"
            )
        with self._opened("wb") as stream:
            stream.truncate(required)

    def __getitem__(self, piece: slice) -> Tensor:
        part = torch.empty((piece.stop - piece.start, *self.shape[1:]), dtype=self.dtype)
        with self._opened("rb") as stream:
            stream.seek(piece.start * self.row)
            stream.readinto(part.view(torch.uint8).numpy())
        return part

    def __setitem__(self, piece: slice, part: Tensor) -> None:
        with self._opened("r+b") as stream:
            stream.seek(piece.start * self.row)
            stream.write(part.to("cpu", self.dtype).contiguous().view(torch.uint8).numpy())

    @contextmanager
    def _opened(self, mode: str) -> Iterator[BinaryIO]:
        try:
            with self.file.open(mode) as stream:
                yield stream
        except OSError as error:
            raise RoseExpError(f"pipeline.activations: cannot use {self.file}: {error.strerror or error}") from error
