"""What killed and interrupted processes leave in run folders, and its removal.

A run removes what an earlier process of the same run left behind when it starts, except the state from which it resumes. For
runs that never start again, the ``rose-exp-clean`` command does the same for all run folders below a folder.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from ..pruning.progress import is_state_file
from ..report.figures import FOLDER
from ..runtime.errors import RoseExpError
from ..runtime.files import PREFIX, left_behind, remove, remove_left_behind
from ..runtime.fingerprint import folder_bytes
from ..tracking import read_record
from .folder import RunFolder

EARLIER = re.compile(r"\.(activations|dense|model|run\.json)-[a-z0-9_]{8}")  # temporary files of earlier versions
OWN = ("state", "model", FOLDER, "layers.csv", "metrics.csv", "tensorboard", "wandb", ".hydra", "rose-exp.log")
RESULTS = "results_*.json"  # of lm-eval


@dataclass(frozen=True)
class Leftover:
    """Files that nothing uses.

    Attributes:
        what: description for the user.
        run: the run that they belong to; None for a temporary folder outside of run folders.
    """

    path: Path
    what: str
    run: RunFolder | None = None

    @property
    def size(self) -> int:
        """The size in bytes."""
        return folder_bytes(self.path) if self.path.is_dir() else self.path.stat().st_size

    def remove(self) -> list[Path]:
        """Remove the files; return the files of the user that remain in the folder of a run.

        Raises:
            RoseExpError: a file cannot be removed.
        """
        if self.path.name.startswith(PREFIX):
            remove_left_behind(self.path)
        elif self.run is not None and self.path == self.run.root:
            return _remove_run(self.run)
        else:
            remove(self.path)
        return []


def clean(run: RunFolder, finished: bool = False) -> None:
    """Remove what dead processes of a run left behind. The caller holds the lock of the run.

    Args:
        finished: whether the run is finished, so that nothing resumes from its state.
    """
    for leftover in _temporary(run):
        leftover.remove()
    if has_state(run) and (finished or not any(run.state.iterdir())):
        remove(run.state)


def has_state(run: RunFolder) -> bool:
    """Return whether the run has a folder with a state, in which there are no other files."""
    return run.state.is_dir() and all(is_state_file(entry.name) for entry in run.state.iterdir())


def find(top: Path, unfinished: bool = False) -> tuple[list[Leftover], list[str]]:
    """Return the leftovers below a folder, and remarks on run folders that were skipped.

    Args:
        unfinished: whether runs that are not finished, with their state, count as leftovers.
    """
    found: list[Leftover] = []
    remarks: list[str] = []
    for folder, names, files in os.walk(top):
        names.sort()
        path = Path(folder)
        run = RunFolder(path)
        if run.record.name in files or run.lock.name in files:
            names[:] = [name for name in names if name not in OWN and not name.startswith(".")]
            with _unused(run) as free:
                if free:
                    found += _of_run(run, unfinished, remarks)
                else:
                    remarks.append(f"{path}: in use by a live process")
            continue
        found += [Leftover(leftover, "temporary files") for leftover in left_behind(path)]
        names[:] = [name for name in names if not name.startswith(PREFIX)]
    return found, remarks


def remove_all(leftovers: list[Leftover]) -> list[str]:
    """Remove leftovers, except those of runs that a process has started meanwhile; return remarks on what remains."""
    remarks = []
    for leftover in leftovers:
        if leftover.run is None:
            leftover.remove()
            continue
        with _unused(leftover.run) as free:
            if not free:
                remarks.append(f"{leftover.run.root}: in use by a live process")
            elif kept := leftover.remove():
                remarks.append(f"{leftover.path}: kept {', '.join(sorted(path.name for path in kept))}")
    return remarks


def _of_run(run: RunFolder, unfinished: bool, remarks: list[str]) -> Iterator[Leftover]:
    status = "without a record"
    if run.record.exists():
        try:
            status = read_record(run.record)["status"]
        except RoseExpError as error:
            remarks.append(str(error))
            return
    if status == "finished":
        yield from _temporary(run)
        if has_state(run):
            yield Leftover(run.state, "state of a finished run", run)
    elif unfinished:
        yield Leftover(run.root, f"unfinished run ({'killed' if status == 'running' else status})", run)
    else:
        yield from _temporary(run)


def _temporary(run: RunFolder) -> list[Leftover]:
    places = [place for place in (run.root, run.state, run.root / FOLDER) if place.is_dir()]
    temporary = [path for place in places for path in left_behind(place)]
    temporary += sorted(path for path in run.root.iterdir() if EARLIER.fullmatch(path.name))
    return [Leftover(path, "temporary files", run) for path in temporary]


def _remove_run(run: RunFolder) -> list[Path]:
    """Remove what a run wrote, the record last; return the other files in its folder, which remain."""
    for leftover in _temporary(run):
        leftover.remove()
    for path in [*(run.root / name for name in OWN), *run.root.glob(RESULTS), run.record]:
        if path != run.state or has_state(run):
            remove(path)
    kept = [path for path in run.root.iterdir() if path != run.lock and not path.name.startswith(PREFIX)]
    run.lock.unlink(missing_ok=True)
    if not kept:
        run.root.rmdir()
    return kept


@contextmanager
def _unused(run: RunFolder) -> Iterator[bool]:
    """Hold the lock of a run if it is free; yield whether it is."""
    if not run.lock.exists():  # no process has started the run here
        yield True
        return
    lock = FileLock(run.lock)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()
