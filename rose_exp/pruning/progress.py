"""The contents of a run's state, the names of its files, and their verification."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..runtime.files import PREFIX

STREAMS = ("activations", "dense")  # hidden states of the pruned and of the dense model
NAME = "state.json"
STATE_FILES = re.compile(r"state\.json|(block|part)-\d+\.safetensors|(activations|dense)-\d+\.\d+\.bin")
CHUNK = 2**22  # number of bytes hashed at once


@dataclass(frozen=True)
class Progress:
    """The contents of the state.

    Attributes:
        blocks: number of whole blocks, counted from the first.
        layers: for each block, the reports of its layers.
        after: for each block, ``seconds``, the time spent up to its end by kind of work, and ``generators``, the states of
            torch's generators at its end (hexadecimal; empty if they equal those after the previous block).
        part: reports of the layers of the next block that were pruned before the run stopped.
        shares: sparsity of each layer, if an allocation chose it; empty otherwise.
        files: ``bytes`` and ``sha256`` of every file of the state, by name.
    """

    blocks: int = 0
    layers: list[list[dict[str, Any]]] = field(default_factory=list)
    after: list[dict[str, Any]] = field(default_factory=list)
    part: list[dict[str, Any]] = field(default_factory=list)
    shares: dict[str, float] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def seconds(self) -> dict[str, float]:
        """Time spent on the whole blocks, by kind of work."""
        return self.after[-1]["seconds"] if self.after else {}

    @property
    def generators(self) -> list[str]:
        """States of torch's generators after the last whole block; empty before the first."""
        return next((block["generators"] for block in reversed(self.after) if block["generators"]), [])

    def without(self, damaged: set[str]) -> Progress:
        """Return the part of this progress that does not depend on the ``damaged`` files."""
        kept = next((index for index in range(self.blocks) if block_file(index) in damaged), self.blocks)
        if kept < self.blocks:  # the part and the activations belong to the next block
            files = {name: self.files[name] for name in map(block_file, range(kept))}
            return Progress(kept, self.layers[:kept], self.after[:kept], shares=self.shares, files=files)
        progress = self
        if part_file(self.blocks) in damaged:
            progress = replace(progress, part=[])
        stream_files = {name for name in self.files if name.startswith(STREAMS)}
        if damaged & stream_files:  # the streams are only usable together, from all ranks
            damaged = damaged | stream_files
        return replace(progress, files={name: facts for name, facts in self.files.items() if name not in damaged})


def block_file(index: int) -> str:
    return f"block-{index:05}.safetensors"


def part_file(index: int) -> str:
    return f"part-{index:05}.safetensors"


def is_state_file(name: str) -> bool:
    """Return whether a state may hold a file of this name."""
    return STATE_FILES.fullmatch(name) is not None or name.startswith(PREFIX)


def sealed(content: Mapping[str, Any]) -> str:
    """Return the text of ``state.json``: the content and its SHA-256. Equal content gives equal text."""
    digest = hashlib.sha256(json.dumps(content, indent=1).encode()).hexdigest()
    return json.dumps({"sha256": digest, **content}, indent=1)


def problem_of(file: Path, expected: Mapping[str, Any], on_bytes: Callable[[int], Any] | None = None) -> str | None:
    """Describe how a file differs from its expected size and SHA-256; return None if it matches."""
    try:
        size = file.stat().st_size
        if size != expected["bytes"]:
            return f"expected {expected['bytes']} bytes, got {size}"
        if sha256_of(file, on_bytes) != expected["sha256"]:
            return "its content does not match its SHA-256"
    except FileNotFoundError:
        return f"expected {expected['bytes']} bytes, got no file"
    except OSError as error:
        return f"it cannot be read: {error.strerror or error}"
    return None


def sha256_of(file: Path, on_bytes: Callable[[int], Any] | None = None) -> str:
    """Return the SHA-256 of a file, and call ``on_bytes`` with the number of bytes of each piece."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(CHUNK))
    with file.open("rb", buffering=0) as source:
        while count := source.readinto(buffer):
            digest.update(buffer[:count])
            if on_bytes is not None:
                on_bytes(count)
    return digest.hexdigest()


def remedy(name: str, kept: Progress) -> str:
    """Describe how the run recovers from a damaged file."""
    if name.startswith("block-"):
        return f"{kept.blocks} whole blocks are kept, and the rest is pruned again"
    if name.startswith("part-"):
        return "its layers are pruned again"
    return "the pruned blocks run again to compute the next block's inputs"
