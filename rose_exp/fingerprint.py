"""Fingerprints of files and folders: of their content, whatever they are called and wherever they lie."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from .wheels import cache_folder, file_sha256

# what of this package makes a result
DECIDING = ("engine", "models", "pipeline", "calibration", "diffusion", "experiment.py", "ranks.py")
LARGE = 64 * 2**20  # bytes; the fingerprints of files from here on are kept, as reading them takes seconds
WEIGHTS = (".safetensors", ".bin", ".gguf")


def content_sha256(path: Path) -> str:
    """SHA-256 of a file. Of a large one it is kept in the cache folder, for as long as the file's place, size and time stay."""
    facts = path.stat()
    if facts.st_size < LARGE:
        return file_sha256(path)
    key = json.dumps([str(path.resolve()), facts.st_size, facts.st_mtime_ns, facts.st_ino])
    kept = cache_folder() / "sha256" / hashlib.sha256(key.encode()).hexdigest()
    if kept.is_file():
        return kept.read_text(encoding="ascii")
    found = file_sha256(path)
    kept.parent.mkdir(parents=True, exist_ok=True)
    scratch = kept.with_suffix(f".{os.getpid()}")
    scratch.write_text(found, encoding="ascii")
    os.replace(scratch, kept)
    return found


def weights_sha256(path: Path) -> str:
    """One fingerprint over the weight files of a folder (or one file), by name and content."""
    if path.is_file():
        return _of_files([path], path.parent)
    return _of_files([file for file in path.iterdir() if file.suffix in WEIGHTS], path)


def folder_sha256(path: Path) -> str:
    """One fingerprint over a file, or over all files in a folder and its folders but hidden ones, by name and content."""
    if path.is_file():
        return content_sha256(path)
    files = [file for file in path.rglob("*") if file.is_file()]
    return _of_files([f for f in files if not any(part.startswith(".") for part in f.relative_to(path).parts)], path)


def _of_files(files: list[Path], folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(f"{file.relative_to(folder)} {content_sha256(file)}\n".encode())
    return digest.hexdigest()


def code_sha256() -> str:
    """One fingerprint over those source files of this package that a pruned weight hangs on."""
    package = Path(__file__).parent
    places = [package / name for name in DECIDING]
    files = [file for place in places for file in (place.rglob("*.py") if place.is_dir() else [place])]
    return _of_files(files, package)


def folder_bytes(folder: Path) -> int:
    """Bytes of all files in a folder and its folders."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
