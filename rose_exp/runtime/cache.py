"""A cache of derived data on disk, such as weights unpacked from a GGUF file.

An entry is a folder, found by a key that names everything that its contents are derived from. It is complete or absent, and
its contents are checked when it is opened. Several processes can use the cache at a time. If it exceeds its limit, the entries
that have not been used for the longest time are removed, except those in use.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from .errors import RoseExpError
from .files import remove, written
from .fingerprint import content_sha256, folder_bytes
from .wheels import cache_folder

log = logging.getLogger(__name__)

LIMIT = "ROSE_EXP_CACHE_GB"  # environment variable: limit of all entries in GB; 0 disables the cache
DEFAULT_LIMIT = 20.0
DERIVED = "derived"  # folder of the entries in the cache folder
FACTS = "entry.json"  # key and checksums of an entry

_in_use: dict[Path, int] = {}  # open files of the entries that this process uses


def cached(kind: str, key: Mapping[str, Any], fill: Callable[[Path], None], size: int = 0) -> Path | None:
    """Return the folder of an entry. If there is none, ``fill`` writes its contents into a new folder.

    Args:
        kind: name of the data, such as ``weights``.
        key: everything that the contents depend on, serializable as JSON.
        size: upper bound of the size in bytes.
    Returns:
        None if the cache is disabled, not writable or too small for the entry.
    Raises:
        RoseExpError: the limit is not a number. Errors of ``fill`` other than OSError are passed on, and leave no entry.
    """
    limit = limit_bytes()
    folder = cache_folder() / DERIVED
    entry = folder / f"{kind}-{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]}"
    if not limit:
        return None
    try:
        if _open(entry, key):
            return entry
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if size > limit / 2 or 2 * size > free:
            log.info("%s: %.1f GB are not cached (limit %.1f GB, %.1f GB free)", kind, size / 1e9, limit / 1e9, free / 1e9)
            return None
        with FileLock(folder / f".{kind}.lock"):  # another process may be filling the same entry
            opened = _open(entry, key)
            if not opened:
                _create(entry, key, fill)
                opened = _open(entry, key)
        _shrink(folder, limit)
    except OSError as error:
        log.warning("cannot use the cache in %s: %s", folder, error.strerror or error)
        return None
    return entry if opened else None


def limit_bytes() -> float:
    """Return the limit of the cache in bytes, from the environment variable ``ROSE_EXP_CACHE_GB``.

    Raises:
        RoseExpError: it is not a number of at least 0.
    """
    text = os.environ.get(LIMIT) or str(DEFAULT_LIMIT)
    try:
        limit = float(text)
    except ValueError:
        limit = -1.0
    if not 0 <= limit < float("inf"):
        raise RoseExpError(f"{LIMIT}: expected a number of GB of at least 0, got {text!r}")
    return limit * 1e9


def _create(entry: Path, key: Mapping[str, Any], fill: Callable[[Path], None]) -> None:
    with written(entry) as place:
        place.mkdir()
        fill(place)
        files = {str(path.relative_to(place)): content_sha256(path) for path in place.rglob("*") if path.is_file()}
        (place / FACTS).write_text(json.dumps({"key": key, "files": files}, sort_keys=True), encoding="utf-8")


def _open(entry: Path, key: Mapping[str, Any]) -> bool:
    """Mark an entry as in use and check it. Return whether it exists; a damaged one is removed."""
    if not _lock(entry):
        return False
    if _is_intact(entry, key):
        os.utime(entry / FACTS)
        return True
    log.warning("the cache entry %s is damaged: creating it again", entry)
    _unlock(entry)
    remove(entry)
    return False


def _is_intact(entry: Path, key: Mapping[str, Any]) -> bool:
    try:
        facts = json.loads((entry / FACTS).read_text(encoding="utf-8"))
        same_key, files = facts["key"] == json.loads(json.dumps(key)), dict(facts["files"])
    except (OSError, ValueError, KeyError, TypeError):  # whatever damage causes
        return False
    return same_key and all(
        (entry / name).is_file() and content_sha256(entry / name) == digest for name, digest in files.items()
    )


def _lock(entry: Path) -> bool:
    """Keep other processes from removing an entry, until this process ends. Return whether it exists."""
    if entry in _in_use and entry.exists():
        return True
    _unlock(entry)
    try:
        handle = os.open(entry / FACTS, os.O_RDONLY)
    except FileNotFoundError:
        return False
    fcntl.flock(handle, fcntl.LOCK_SH)
    try:
        same = os.path.samestat(os.fstat(handle), os.stat(entry / FACTS))
    except FileNotFoundError:  # removed before it was locked
        same = False
    if not same:
        os.close(handle)
        return False
    _in_use[entry] = handle
    return True


def _unlock(entry: Path) -> None:
    if entry in _in_use:
        os.close(_in_use.pop(entry))


def _shrink(folder: Path, limit: float) -> None:
    """Remove the entries that have not been used for the longest time, until the cache does not exceed its limit."""
    entries = sorted((path for path in folder.iterdir() if (path / FACTS).exists()), key=lambda p: (p / FACTS).stat().st_mtime)
    sizes = {entry: folder_bytes(entry) for entry in entries}
    for entry in entries:
        if sum(sizes.values()) <= limit:
            return
        if entry not in _in_use and _remove_unused(entry):
            log.info("removed %s from the cache, which exceeds its limit of %g GB (%s)", entry.name, limit / 1e9, LIMIT)
            del sizes[entry]


def _remove_unused(entry: Path) -> bool:
    """Remove an entry, unless a process uses it. Return whether it is removed."""
    try:
        handle = os.open(entry / FACTS, os.O_RDONLY)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        remove(entry)
    except BlockingIOError:
        return False
    finally:
        os.close(handle)
    return True
