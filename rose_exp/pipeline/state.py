"""The state of a run on disk: after each block all that the run needs to go on from there, whenever it is killed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..effects import flat
from ..errors import RoseExpError
from ..ranks import Ranks
from .activations import Activations
from .plan import LayerReport

Resume = Literal["activations", "recompute"]

NAME = "state.json"
STREAMS = ("activations", "dense")  # hidden states of the pruned model, and beside them of the dense one


@dataclass
class Progress:
    """What is done.

    Attributes:
        blocks: whole blocks, from the first.
        layers: reports of their layers.
        part: reports of layers of the next block that were pruned before the run was stopped.
        shares: of its weights that each layer is to lose, where layers lose different ones.
        seconds: of the walk so far, by kind of work.
        files: name and bytes of every file that belongs to this state.
        generators: states of torch's generators, hexadecimal.
    """

    blocks: int = 0
    layers: list[dict[str, Any]] = field(default_factory=list)
    part: list[dict[str, Any]] = field(default_factory=list)
    shares: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    files: dict[str, int] = field(default_factory=dict)
    generators: list[str] = field(default_factory=list)


class RunState:
    """A folder that holds the state after the last whole block, and changes from one such state to the next at once: files are
    written beside the old ones, flushed to the disk, and count from the moment that ``state.json`` names them.

    Args:
        folder: of this run alone; it need not exist.
        fingerprint: all that the result hangs on, by section; what is kept belongs to it.
        resume: ``activations``: the next block's inputs are kept; ``recompute``: pruned blocks are run again to make them.

    Raises:
        RoseExpError: the folder holds the state of something else, or is damaged; nothing is changed.
    """

    def __init__(
        self, folder: Path, fingerprint: Mapping[str, Any], resume: Resume = "activations", ranks: Ranks | None = None
    ):
        self.folder, self.resume, self.ranks = folder, resume, ranks or Ranks()
        self.fingerprint = {name: json.loads(json.dumps(value)) for name, value in flat(dict(fingerprint)).items()}
        self.progress = Progress()
        self.peak_bytes = 0
        path = folder / NAME
        if path.exists():
            self._read(path)

    def _read(self, path: Path) -> None:
        hint = f"delete {self.folder} to begin anew"
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            progress, fingerprint = Progress(**data["progress"]), data["fingerprint"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RoseExpError(f"{path} is damaged, so this run cannot go on: {error!r}; {hint}") from error
        names = sorted(set(fingerprint) | set(self.fingerprint))
        others = [n for n in names if fingerprint.get(n) != self.fingerprint.get(n)]
        if others:
            told = "; ".join(f"{n}: {_short(fingerprint.get(n))}, now {_short(self.fingerprint.get(n))}" for n in others[:5])
            more = f" and {len(others) - 5} more" if len(others) > 5 else ""
            raise RoseExpError(
                f"{self.folder} holds {progress.blocks} blocks of a run that would end differently: {told}{more}; {hint}"
            )
        for name, size in progress.files.items():
            file = self.folder / name
            if not file.exists() or file.stat().st_size != size:
                got = f"{file.stat().st_size} bytes" if file.exists() else "none"
                raise RoseExpError(f"{file}: expected {size} bytes, as the run's state says, got {got}; {hint}")
        self.progress = progress

    @property
    def reports(self) -> list[LayerReport]:
        return [LayerReport(**report) for report in self.progress.layers]

    def block(self, index: int) -> dict[str, Tensor] | None:
        """Tensors of a pruned block by their names in it, None where it is not done.

        Raises:
            RoseExpError: the file has gone, or is damaged.
        """
        return self._load(_block_file(index)) if index < self.progress.blocks else None

    def part(self) -> tuple[list[LayerReport], dict[str, Tensor]]:
        """Layers of the next block that are pruned already, and their weights by full name."""
        reports = [LayerReport(**report) for report in self.progress.part]
        return reports, self._load(_part_file(self.progress.blocks)) if reports else {}

    def restore(self, streams: Sequence[Activations]) -> bool:
        """Fill in the next block's inputs, of each stream; False where they were not kept."""
        names = [self._activations_file(self.progress.blocks, stream) for stream in range(len(streams))]
        if not set(names) <= set(self.progress.files):
            return False
        with self._careful("read"):
            for name, hidden in zip(names, streams, strict=True):
                hidden.read(self.folder / name)
        return True

    def restore_generators(self) -> None:
        states = [torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8) for text in self.progress.generators]
        if states:
            torch.set_rng_state(states[0])
        if len(states) > 1 and torch.cuda.is_available():
            torch.cuda.set_rng_state(states[1])

    def commit(
        self,
        index: int,
        block: nn.Module,
        streams: Sequence[Activations],
        reports: Sequence[LayerReport],
        seconds: Mapping[str, float],
    ) -> None:
        """Keep a block that is pruned, and the inputs of the next, if there is one, of the pruned model and beside it of the
        dense one, where it has a stream; from here on the run goes on from there.

        Raises:
            RoseExpError: the disk refuses; the state before is kept.
        """
        before, files = self.progress, {k: v for k, v in self.progress.files.items() if k.startswith("block-")}
        problem = None
        try:
            if self.ranks.first:
                tensors = {name: value.detach().to("cpu").contiguous() for name, value in block.state_dict().items()}
                files |= self._written(_block_file(index), lambda path: save_file(tensors, path, {"format": "pt"}))
            for number, hidden in enumerate(streams if self.resume == "activations" else ()):
                files |= self._written(self._activations_file(index + 1, number), hidden.write)
        except RoseExpError as error:
            problem = str(error)
        for of_rank, other in self.ranks.gather((files, problem)):  # on all ranks, or on none
            if other is not None:
                raise RoseExpError(other)
            files |= of_rank
        self.progress = Progress(
            blocks=index + 1,
            layers=[*before.layers, *(report.as_dict() for report in reports)],
            shares=before.shares,
            seconds=dict(seconds),
            files=files,
            generators=_generators(),
        )
        self._write(before)

    def keep_shares(self, shares: Mapping[str, float]) -> None:
        """Keep how layers share what is pruned, before the first is."""
        before = self.progress
        self.progress = Progress(**asdict(before))
        self.progress.shares = dict(shares)
        self._write(before)

    def commit_part(self, reports: Sequence[LayerReport], weights: Mapping[str, Tensor]) -> None:
        """Keep layers of the block at hand, before the run stops inside it."""
        before = self.progress
        tensors = {name: weight.detach().to("cpu").contiguous() for name, weight in weights.items()}
        written = self._written(_part_file(before.blocks), lambda path: save_file(tensors, path))
        self.progress = Progress(**asdict(before))
        self.progress.part = [report.as_dict() for report in reports]
        self.progress.files = before.files | written
        self._write(before)

    def delete(self) -> None:
        if self.ranks.first and self.folder.exists():
            shutil.rmtree(self.folder)

    def _write(self, before: Progress) -> None:
        """Let the new state count, then delete what only the old one needed."""
        problem = None
        if self.ranks.first:
            text = json.dumps({"fingerprint": self.fingerprint, "progress": asdict(self.progress)}, indent=1)
            try:
                self._written(NAME, lambda path: Path(path).write_text(text, encoding="utf-8"))
            except RoseExpError as error:
                problem = str(error)
        problem = self.ranks.gather(problem)[0]
        if problem is not None:
            self.progress = before
            raise RoseExpError(problem)
        if not self.ranks.first:
            return
        present = {path.name: path.stat().st_size for path in self.folder.iterdir() if path.is_file()}
        self.peak_bytes = max(self.peak_bytes, sum(present.values()))
        for name in set(present) - set(self.progress.files) - {NAME}:
            (self.folder / name).unlink()

    def _written(self, name: str, write: Callable[[str], Any]) -> dict[str, int]:
        """Name and size of a file that ``write`` makes under another name, and that is on the disk before it gets its own."""
        scratch = self.folder / f".{name}.{os.getpid()}"
        with self._careful("write"):
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                write(str(scratch))
                with scratch.open("rb+") as file:
                    os.fsync(file.fileno())
                os.replace(scratch, self.folder / name)
                _flush_folder(self.folder)
            finally:
                scratch.unlink(missing_ok=True)
            return {name: (self.folder / name).stat().st_size}

    def _load(self, name: str) -> dict[str, Tensor]:
        with self._careful("read"):
            return load_file(self.folder / name)

    @contextmanager
    def _careful(self, what: str):
        try:
            yield
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            kept = f"{self.progress.blocks} whole blocks are kept in {self.folder}"
            raise RoseExpError(f"cannot {what} the run's state: {reason}; {kept}") from error

    def _activations_file(self, index: int, stream: int = 0) -> str:
        return f"{STREAMS[stream]}-{index:05}.{self.ranks.rank}.bin"


def _block_file(index: int) -> str:
    return f"block-{index:05}.safetensors"


def _part_file(index: int) -> str:
    return f"part-{index:05}.safetensors"


def _generators() -> list[str]:
    states = [torch.get_rng_state()] + ([torch.cuda.get_rng_state().cpu()] if torch.cuda.is_available() else [])
    return [bytes(state.numpy()).hex() for state in states]


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
