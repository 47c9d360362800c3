"""A check of the metadata of GGUF files. The library that reads them never ends if a damaged length exceeds the file."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

from ..runtime.errors import RoseExpError
from ..runtime.outside import outside_errors

MAGIC = b"GGUF"
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of each scalar type
STRING, ARRAY = 8, 9


def check_gguf(path: Path, where: str) -> None:
    """Check that all metadata of a GGUF file lies inside the file.

    Raises:
        RoseExpError: the file is unreadable or damaged.
    """
    damaged = f"{where}: {path} is not a GGUF file, or is damaged"
    with outside_errors(damaged):
        file, size = path.open("rb"), path.stat().st_size
    with file:
        if file.read(4) != MAGIC:
            raise RoseExpError(f"{damaged}: expected {MAGIC!r} at its start")
        version = file.read(4)
        order = ">" if version[:2] == b"\0\0" else "<"  # a small number, in the byte order of the file
        walk = _Walk(file, size, order, damaged)
        tensors, pairs = walk.number("Q"), walk.number("Q")
        for _ in range(pairs):
            walk.skip(walk.number("Q"))
            walk.value(walk.number("I"))
        if tensors > size:
            raise RoseExpError(f"{damaged}: its header lists {tensors} tensors")


class _Walk:
    def __init__(self, file: BinaryIO, size: int, order: str, damaged: str):
        self.file, self.size, self.order, self.damaged = file, size, order, damaged

    def number(self, kind: str) -> int:
        count = struct.calcsize(f"{self.order}{kind}")
        self._check(count)
        return struct.unpack(f"{self.order}{kind}", self.file.read(count))[0]

    def skip(self, count: int) -> None:
        self._check(count)
        self.file.seek(count, 1)

    def value(self, kind: int) -> None:
        """Skip a value of a type."""
        if kind in SIZES:
            self.skip(SIZES[kind])
        elif kind == STRING:
            self.skip(self.number("Q"))
        elif kind == ARRAY:
            kind, count = self.number("I"), self.number("Q")
            if kind in SIZES:
                self.skip(count * SIZES[kind])
            elif kind == STRING:
                for _ in range(count):
                    self.skip(self.number("Q"))
            else:
                raise RoseExpError(f"{self.damaged}: it contains an array of type {kind}")
        else:
            raise RoseExpError(f"{self.damaged}: it contains a value of type {kind}")

    def _check(self, count: int) -> None:
        if self.file.tell() + count > self.size:
            raise RoseExpError(f"{self.damaged}: its metadata exceeds the file")
