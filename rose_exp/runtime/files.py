"""Files and folders that are written whole or not at all, and removal of what killed processes leave behind.

Everything temporary lives in a *scratch folder*: a hidden folder next to its destination, with a lock that its process holds.
The system releases the lock when the process ends, however it ends. A scratch folder whose lock is free is therefore left
behind, and can be removed without disturbing a live process.
"""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from .errors import RoseExpError

PREFIX = ".rose_exp-"  # of the names of scratch folders
LOCK = ".in-use"  # lock file in a scratch folder


@contextmanager
def scratch_folder(parent: Path | None = None) -> Iterator[Path]:
    """Yield a new scratch folder, which is removed at the end.

    First removes scratch folders in ``parent`` that killed processes left behind.

    Args:
        parent: where the folder is created; None for the system's temporary folder.
    Raises:
        OSError: the folder cannot be created.
    """
    parent = Path(tempfile.gettempdir()) if parent is None else parent
    parent.mkdir(parents=True, exist_ok=True)
    for leftover in left_behind(parent):
        remove_left_behind(leftover)
    folder, lock = _create(parent)
    try:
        yield folder
    finally:
        lock.release()  # first: some network file systems cannot remove a folder with an open file
        shutil.rmtree(folder, ignore_errors=True)  # whatever remains is removed with the next scratch folder


def _create(parent: Path) -> tuple[Path, FileLock]:
    """Create a scratch folder and acquire its lock. Between the two, another process may remove the folder."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        lock = FileLock(folder / LOCK)
        try:
            lock.acquire()
        except (FileNotFoundError, FileExistsError):  # the library creates the folder again if it is missing, which can fail
            continue
        if (folder / LOCK).exists():
            return folder, lock
        lock.release()


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """Yield the place at which to write a file or a folder, which becomes ``path`` once it is complete and on the disk.

    If writing fails or the process is killed, ``path`` is unchanged. A file replaces an earlier one; a folder requires that
    ``path`` does not exist or is empty.

    Raises:
        OSError: writing fails.
    """
    with scratch_folder(path.parent) as folder:
        place = folder / path.name
        yield place
        _allow_readers(place)
        for part in [place, *place.rglob("*")] if place.is_dir() else [place]:
            _flush(part)
        os.replace(place, path)
        _flush(path.parent)


def _allow_readers(place: Path) -> None:
    """Add the permissions of the umask to files and folders. Some libraries create files that only their owner can read."""
    probe = place.with_name(".mode")
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for part in [place, *place.rglob("*")] if place.is_dir() else [place]:
        if not part.is_symlink():
            current = stat.S_IMODE(part.stat().st_mode)
            wanted = current | mode | ((mode & 0o444) >> 2 if part.is_dir() else 0)
            if wanted != current:
                part.chmod(wanted)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all.

    Raises:
        RoseExpError: the file cannot be written.
    """
    try:
        with written(path) as place:
            place.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RoseExpError(f"cannot write {path}: {error.strerror or error}") from error


def remove(path: Path) -> None:
    """Remove a file or a folder in one step, if it exists: a killed process leaves either all or nothing of it.

    Raises:
        RoseExpError: it cannot be removed.
    """
    if not path.exists() and not path.is_symlink():
        return
    try:
        with scratch_folder(path.parent) as folder:
            os.replace(path, moved := folder / path.name)
            shutil.rmtree(moved) if moved.is_dir() and not moved.is_symlink() else moved.unlink()
    except FileNotFoundError:
        return
    except OSError as error:
        raise RoseExpError(f"cannot remove {path}: {error.strerror or error}") from error


def left_behind(parent: Path) -> list[Path]:
    """Return the scratch folders in ``parent`` that no live process uses, in order of their names."""
    with os.scandir(parent) as entries:
        found = [Path(entry) for entry in entries if entry.name.startswith(PREFIX) and _is_own_folder(entry)]
    return [folder for folder in sorted(found) if _is_free(folder)]


def remove_left_behind(folder: Path) -> None:
    """Remove a scratch folder, unless a live process uses it."""
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except (Timeout, OSError):  # in use, or already removed
        return
    try:
        # its process may be about to acquire the lock; under another name, it cannot find the folder
        os.rename(folder, renamed := Path(tempfile.mkdtemp(prefix=PREFIX, dir=folder.parent)))
    except OSError:
        return
    finally:
        lock.release()
    shutil.rmtree(renamed, ignore_errors=True)


def _is_own_folder(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a folder, not a link, of this user."""
    try:
        return entry.is_dir(follow_symlinks=False) and entry.stat(follow_symlinks=False).st_uid == os.getuid()
    except OSError:  # removed meanwhile
        return False


def _is_free(folder: Path) -> bool:
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except (Timeout, OSError):
        return False
    lock.release()
    return True


def _flush(path: Path) -> None:
    """Write a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
