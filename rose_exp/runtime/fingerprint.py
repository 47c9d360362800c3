"""Fingerprints of the contents of files and folders, independent of their location."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from .files import write_text
from .outside import outside_errors
from .wheels import cache_folder, file_sha256

# the parts of this package that cannot change a result
IRRELEVANT = ("tracking", "report", "cli", "__main__.py")
CODE = (".py", ".txt", ".safetensors", ".json")  # modules, embedded prompts and embedded networks
LARGE = 64 * 2**20  # bytes; fingerprints of files of at least this size are cached, because reading them takes seconds
BESIDE_GGUF = (  # files that transformers reads from the folder of a GGUF file
    "added_tokens.json",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)
WEIGHTS = (".safetensors", ".bin", ".gguf")


def content_sha256(path: Path) -> str:
    """Return the SHA-256 of a file. That of a large file is cached until its path, inode, size or modification time changes.

    A damaged cache entry is recomputed.
    """
    with outside_errors(f"cannot read {path}"):
        facts = path.stat()
    if facts.st_size < LARGE:
        return file_sha256(path)
    key = json.dumps([str(path.resolve()), facts.st_size, facts.st_mtime_ns, facts.st_ino])
    entry = cache_folder() / "sha256" / hashlib.sha256(key.encode()).hexdigest()
    if (cached := _read_entry(entry, key)) is not None:
        return cached
    digest = file_sha256(path)
    with outside_errors(f"cannot write {entry}", "; set ROSE_EXP_CACHE to a folder that is writable"):
        write_text(entry, _entry(key, digest))
    return digest


def _entry(key: str, digest: str) -> str:
    """Return the text of a cache entry: the digest, and a checksum of key and digest that detects damage."""
    return f"{digest} {hashlib.sha256(f'{key} {digest}'.encode()).hexdigest()}"


def _read_entry(entry: Path, key: str) -> str | None:
    """Return the digest in a cache entry, or None if the entry is missing or damaged."""
    try:
        text = entry.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return None
    digest = text.partition(" ")[0]
    return digest if text == _entry(key, digest) else None


def weights_sha256(path: Path) -> str:
    """Return one fingerprint of a file, or of the names and contents of all weight files in a folder."""
    if path.is_file():
        return _files_sha256([path], path.parent)
    with outside_errors(f"cannot read {path}"):
        files = [file for file in path.iterdir() if file.suffix in WEIGHTS]
    return _files_sha256(files, path)


def folder_sha256(path: Path) -> str:
    """Return one fingerprint of a file, or of the names and contents of all files below a folder, except hidden ones."""
    if path.is_file():
        return content_sha256(path)
    with outside_errors(f"cannot read {path}"):
        files = [file for file in path.rglob("*") if file.is_file()]
    return _files_sha256([f for f in files if not any(part.startswith(".") for part in f.relative_to(path).parts)], path)


def model_sha256(path: Path) -> str:
    """Return one fingerprint of all files that transformers can read for a model: its folder, or a GGUF file and the tokenizer
    and configuration files next to it."""
    if not path.is_file():
        return folder_sha256(path)
    with outside_errors(f"cannot read {path.parent}"):
        companions = [file for file in path.parent.iterdir() if file.name in BESIDE_GGUF and file.is_file()]
    return _files_sha256([path, *companions], path.parent) if companions else content_sha256(path)


def _files_sha256(files: list[Path], folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(f"{file.relative_to(folder)} {content_sha256(file)}\n".encode())
    return digest.hexdigest()


def code_sha256(package: Path | None = None) -> str:
    """Return one fingerprint of all source files of this package, except the parts that cannot change a result.

    Args:
        package: the folder of the package; if None, the running package.
    """
    package = package or Path(__file__).parent.parent
    files = [file for file in package.rglob("*") if file.suffix in CODE and file.is_file()]
    return _files_sha256([file for file in files if file.relative_to(package).parts[0] not in IRRELEVANT], package)


def folder_bytes(folder: Path) -> int:
    """Return the total size of all files below a folder in bytes."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
