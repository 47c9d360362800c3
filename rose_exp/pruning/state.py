"""The state of a run on disk: after each block, everything a later process needs to resume from there.

The state is a folder of files and ``state.json``, which names them. New files are written next to the old ones and flushed to
disk; they become valid when ``state.json`` names them. ``state.json`` holds the size and the SHA-256 of every file, and a
SHA-256 of its own content. Opening a state verifies all of them before anything is used.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from ..runtime.errors import RoseExpError
from ..runtime.files import written
from ..runtime.ranks import Ranks
from ..settings.leaves import flat
from .activations import Activations
from .progress import NAME, STREAMS, Progress, block_file, is_state_file, part_file, problem_of, remedy, sealed, sha256_of
from .report import LayerReport

Resume = Literal["activations", "recompute"]

FORMAT = 2  # version of state.json; version 1 had no checksums
SHOWN = 2**28  # minimum number of bytes for a progress bar during verification

log = logging.getLogger(__name__)


class RunState:
    """A folder with the state after the last whole block, which changes from one state to the next atomically.

    Opening it verifies every file. Blocks before a damaged or missing block file are kept, and the rest is pruned again.
    Damaged activations are computed again by running the pruned blocks; the layers of a damaged part file are pruned again.
    Each case logs a warning with the name of the file. All ranks come to the same decision. Nothing on the disk changes until
    the next block is complete.

    Args:
        folder: a folder used only by this run; created if it does not exist.
        fingerprint: everything the result depends on, by section. A state with another fingerprint is rejected.
        resume: ``activations`` keeps the inputs of the next block; ``recompute`` runs the pruned blocks again instead.
        ranks: the processes that share the run and the folder; if None, only this process.

    Raises:
        RoseExpError: the folder holds the state of another run, or ``state.json`` is damaged or of another version.
    """

    def __init__(
        self, folder: Path, fingerprint: Mapping[str, Any], resume: Resume = "activations", ranks: Ranks | None = None
    ):
        self.folder, self.resume, self.ranks = folder, resume, ranks or Ranks()
        self.fingerprint = {name: json.loads(json.dumps(value)) for name, value in flat(dict(fingerprint)).items()}
        self.progress = Progress()
        self.peak_bytes = 0
        self._verified: set[str] = set()  # files that this process has already verified
        text = self._on_first(self._read)
        if text is not None:
            self.progress = self._verify(self._parse(text))

    def _read(self) -> str | None:
        """Return the text of ``state.json``, or None if it does not exist."""
        path = self.folder / NAME
        try:
            if path.exists():
                return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            what = "is damaged" if isinstance(error, UnicodeDecodeError) else "cannot be read"
            raise RoseExpError(f"{path} {what}, so this run cannot resume: {error}; {self._hint}") from error
        if block_files := sorted(file.name for file in self.folder.glob("block-*")):
            log.warning("%s holds %s but no %s: the run starts anew", self.folder, block_files[0], NAME)
        return None

    def _parse(self, text: str) -> Progress:
        path = self.folder / NAME
        try:
            data = json.loads(text)
            version = data.get("format")
        except (ValueError, AttributeError, RecursionError) as error:
            raise RoseExpError(f"{path} is damaged, so this run cannot resume: {error!r}; {self._hint}") from error
        if "sha256" not in data and "progress" in data:
            raise RoseExpError(f"{path}: expected a state of format {FORMAT}, got one of an older version; {self._hint}")
        content = {name: value for name, value in data.items() if name != "sha256"}
        if text != sealed(content):
            raise RoseExpError(f"{path} is damaged: its content does not match its SHA-256; {self._hint}")
        if version != FORMAT:
            raise RoseExpError(f"{path}: expected a state of format {FORMAT}, got {version!r}; {self._hint}")
        progress, fingerprint = Progress(**data["progress"]), data["fingerprint"]
        names = sorted(set(fingerprint) | set(self.fingerprint))
        differing = [n for n in names if fingerprint.get(n) != self.fingerprint.get(n)]
        problem = None
        if differing:
            changes = "; ".join(
                f"{n}: {_short(fingerprint.get(n))}, now {_short(self.fingerprint.get(n))}" for n in differing[:5]
            )
            more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
            problem = (
                f"{self.folder} holds {progress.blocks} blocks or packages of a run with another result: "
                f"{changes}{more}; {self._hint}"
            )
        self._raise_on_all_ranks(problem)
        return progress

    def _verify(self, progress: Progress) -> Progress:
        """Return the part of ``progress`` whose files are intact on all ranks. Each rank verifies its share of the files."""
        sizes = {name: facts["bytes"] for name, facts in progress.files.items()}
        owners = dict(zip(sizes, self.ranks.owners(list(sizes.values())), strict=True))
        assigned = [name for name, owner in owners.items() if owner == self.ranks.rank]
        total = sum(sizes[name] for name in assigned)
        problems: dict[str, str] = {}
        with _bar(total) as bar:
            for name in assigned:
                problem = problem_of(self.folder / name, progress.files[name], bar.update)
                if problem is not None:
                    problems[name] = problem
        damaged = {name: problem for rank_problems in self.ranks.gather(problems) for name, problem in rank_problems.items()}
        intact = progress.without(set(damaged))
        self._verified = set(intact.files)
        if self.ranks.first:
            for name, problem in sorted(damaged.items()):
                log.warning("%s is damaged: %s; %s", self.folder / name, problem, remedy(name, intact))
        return intact

    @property
    def reports(self) -> list[LayerReport]:
        return [LayerReport(**report) for block_reports in self.progress.layers for report in block_reports]

    def block(self, index: int) -> dict[str, Tensor] | None:
        """Return the tensors of a pruned block by name, or None if the block is not pruned yet.

        Raises:
            RoseExpError: the file is missing or damaged.
        """
        return self._load(block_file(index)) if index < self.progress.blocks else None

    def part(self) -> tuple[list[LayerReport], dict[str, Tensor]]:
        """Return the reports and the weights, by full name, of the next block's layers that are already pruned."""
        reports = [LayerReport(**report) for report in self.progress.part]
        return reports, self._load(part_file(self.progress.blocks)) if reports else {}

    def restore(self, streams: Sequence[Activations]) -> bool:
        """Read the inputs of the next block into each stream; return False if they are not stored."""
        names = [self._activations_file(self.progress.blocks, stream) for stream in range(len(streams))]
        if not set(names) <= set(self.progress.files):
            return False
        with self._wrap_errors("read"):
            for name, hidden in zip(names, streams, strict=True):
                hidden.read(self.folder / name)
        return True

    def restore_generators(self) -> None:
        """Set torch's generators to their states after the last whole block.

        This package does not use them during pruning, since its random numbers come from separate generators with fixed
        seeds. A custom method or a model's own code may use them.
        """
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
        """Save a pruned block. From here on, the run resumes after it.

        Args:
            streams: the inputs of the next block, if there is one: those of the pruned model and, with a regression target,
                those of the dense model.
            seconds: time spent so far, by kind of work.

        Raises:
            RoseExpError: writing fails; the previous state remains valid.
        """
        before, files = self.progress, {k: v for k, v in self.progress.files.items() if k.startswith("block-")}
        problem = None
        try:
            if self.ranks.first:
                tensors = {name: value.detach().to("cpu").contiguous() for name, value in block.state_dict().items()}
                files |= self._write_file(block_file(index), lambda path: save_file(tensors, path, {"format": "pt"}))
            for number, hidden in enumerate(streams if self.resume == "activations" else ()):
                files |= self._write_file(self._activations_file(index + 1, number), hidden.write)
        except RoseExpError as error:
            problem = str(error)
        answers = self.ranks.gather((files, problem))  # fail on all ranks if any rank fails
        for rank_files, rank_problem in answers:
            if rank_problem is not None:
                raise RoseExpError(rank_problem)
            files |= rank_files
        generators = _generators()
        self._write(
            Progress(
                blocks=index + 1,
                layers=[*before.layers, [report.as_dict() for report in reports]],
                after=[
                    *before.after,
                    {"seconds": dict(seconds), "generators": [] if generators == before.generators else generators},
                ],
                shares=before.shares,
                files=files,
            )
        )

    def keep_shares(self, shares: Mapping[str, float]) -> None:
        """Save the sparsity allocation across layers, before the first layer is pruned."""
        self._write(replace(self.progress, shares=dict(shares)))

    def commit_part(self, reports: Sequence[LayerReport], weights: Mapping[str, Tensor]) -> None:
        """Save the pruned layers of the current block, before the run stops inside it."""
        tensors = {name: weight.detach().to("cpu").contiguous() for name, weight in weights.items()}
        written = self._write_file(part_file(self.progress.blocks), lambda path: save_file(tensors, path))
        part = [report.as_dict() for report in reports]
        self._write(replace(self.progress, part=part, files=self.progress.files | written))

    def _write(self, progress: Progress) -> None:
        """Write ``state.json`` for ``progress``, then delete the files that it does not name."""

        def write() -> None:
            text = sealed({"format": FORMAT, "fingerprint": self.fingerprint, "progress": asdict(progress)})
            self._write_file(NAME, lambda path: Path(path).write_text(text, encoding="utf-8"))

        self._on_first(write)
        self.progress = progress
        if not self.ranks.first:
            return
        present = {
            path.name: path.stat().st_size for path in self.folder.iterdir() if path.is_file() and is_state_file(path.name)
        }
        self.peak_bytes = max(self.peak_bytes, sum(present.values()))
        for name in set(present) - set(progress.files) - {NAME}:
            (self.folder / name).unlink()

    def _write_file(self, name: str, write: Callable[[str], Any]) -> dict[str, dict[str, Any]]:
        """Write a file whole or not at all, and return its size and SHA-256 by its name.

        The digest is computed from the written file, which is still in the page cache.
        """
        with self._wrap_errors("write"):
            with written(self.folder / name) as place:
                write(str(place))
                facts = {"bytes": place.stat().st_size, "sha256": sha256_of(place)}
            self._verified.discard(name)
            return {name: facts}

    def _load(self, name: str) -> dict[str, Tensor]:
        """Read a file; verify it first unless this process has already done so.

        Returns copies, because the tensors of safetensors are not aligned and read the file lazily.
        """
        if name not in self._verified:
            problem = problem_of(self.folder / name, self.progress.files[name])
            if problem is not None:
                raise RoseExpError(
                    f"{self.folder / name} is damaged: {problem}; start the run again to prune again what it held"
                )
            self._verified.add(name)
        with self._wrap_errors("read"):
            return {key: value.clone() for key, value in load_file(self.folder / name).items()}

    @contextmanager
    def _wrap_errors(self, action: str):
        try:
            yield
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            kept = f"{self.progress.blocks} whole blocks are kept in {self.folder}"
            raise RoseExpError(f"cannot {action} the run's state: {reason}; {kept}") from error

    def _on_first(self, act: Callable[[], Any]) -> Any:
        """Run ``act`` on the first rank and return its result on all ranks.

        Raises:
            RoseExpError: the first rank raised it, on all ranks.
        """
        result = problem = None
        if self.ranks.first:
            try:
                result = act()
            except RoseExpError as error:
                problem = str(error)
        result, problem = self.ranks.gather((result, problem))[0]
        if problem is not None:
            raise RoseExpError(problem)
        return result

    def _raise_on_all_ranks(self, problem: str | None) -> None:
        """Raise the problem of the lowest rank that has one on all ranks."""
        problems = [reported for reported in self.ranks.gather(problem) if reported is not None]
        if problems:
            raise RoseExpError(problems[0])

    @property
    def _hint(self) -> str:
        return f"delete {self.folder} to begin anew"

    def _activations_file(self, index: int, stream: int = 0) -> str:
        return f"{STREAMS[stream]}-{index:05}.{self.ranks.rank}.bin"


def _bar(total: int) -> tqdm:
    """Return a progress bar for verified bytes, shown only if there are many."""
    shown = None if total >= SHOWN else True  # None: show it on a terminal only
    return tqdm(desc="verifying the state", total=total, unit="B", unit_scale=True, leave=False, disable=shown)


def _generators() -> list[str]:
    states = [torch.get_rng_state()] + ([torch.cuda.get_rng_state().cpu()] if torch.cuda.is_available() else [])
    return [bytes(state.numpy()).hex() for state in states]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
