"""Reader for offline Weights & Biases runs, which are LevelDB logs of protocol buffers."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

BLOCK = 32768
HEADER = 7  # bytes of the file header and of each chunk header (checksum, length, type)
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


@dataclass
class OfflineRun:
    """Content of an offline run."""

    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    run: Any = None
    exit_code: int | None = None
    artifacts: list[Any] = field(default_factory=list)
    kinds: set[str] = field(default_factory=set)


def read_offline_run(folder: Path) -> OfflineRun:
    """Read the single offline run below ``folder``."""
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    found = OfflineRun()
    for data in _records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        found.kinds.add(kind)
        if kind == "run":
            found.run = record.run
            found.config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "config":
            found.config |= {item.key: json.loads(item.value_json) for item in record.config.update if item.key}
        elif kind == "history":
            items = record.history.item
            found.history.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
        elif kind == "summary":
            items = record.summary.update
            found.summary |= {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
        elif kind == "exit":
            found.exit_code = record.exit.exit_code
        elif kind in ("artifact", "request") and record.artifact.type:
            found.artifacts.append(record.artifact)
    return found


def _records(data: bytes) -> Iterator[bytes]:
    place, parts = HEADER, b""
    while place + HEADER <= len(data):
        left = BLOCK - place % BLOCK
        if left < HEADER:  # zero padding
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + HEADER])
        piece = data[place + HEADER : place + HEADER + length]
        place += HEADER + length
        if kind in (FULL, FIRST):
            parts = b""
        parts += piece
        if kind in (FULL, LAST):
            yield parts
