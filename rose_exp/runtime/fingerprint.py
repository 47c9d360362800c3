"""Fingerprints of files and folders: of their content, whatever they are called and wherever they lie."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from .wheels import cache_folder, file_sha256

# the parts of this package that cannot change a result
IRRELEVANT = ("tracking", "report", "cli", "__main__.py")
CODE = (".py", ".txt")  # modules and embedded prompts
LARGE = 64 * 2**20  # bytes; the fingerprints of files from here on are kept, as reading them takes seconds
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
    """SHA-256 of a file. That of a large file is cached for as long as its place, size and time stay the same.

    A damaged entry of the cache is computed again.
    """
    facts = path.stat()
    if facts.st_size < LARGE:
        return file_sha256(path)
    key = json.dumps([str(path.resolve()), facts.st_size, facts.st_mtime_ns, facts.st_ino])
    entry = cache_folder() / "sha256" / hashlib.sha256(key.encode()).hexdigest()
    if (cached := _read_entry(entry, key)) is not None:
        return cached
    found = file_sha256(path)
    entry.parent.mkdir(parents=True, exist_ok=True)
    scratch = entry.with_suffix(f".{os.getpid()}")
    scratch.write_text(_entry(key, found), encoding="ascii")
    os.replace(scratch, entry)
    return found


def _entry(key: str, digest: str) -> str:
    """The text of an entry of the cache: a digest, and one of it and its key, which tells damage."""
    return f"{digest} {hashlib.sha256(f'{key} {digest}'.encode()).hexdigest()}"


def _read_entry(entry: Path, key: str) -> str | None:
    """The digest in an entry of the cache, None if there is none or it is damaged."""
    try:
        text = entry.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return None
    digest = text.partition(" ")[0]
    return digest if text == _entry(key, digest) else None


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


def model_sha256(path: Path) -> str:
    """One fingerprint over everything that transformers may read of a model: its folder, or a GGUF file and the files of a
    tokenizer or configuration beside it."""
    if not path.is_file():
        return folder_sha256(path)
    beside = [file for file in path.parent.iterdir() if file.name in BESIDE_GGUF and file.is_file()]
    return _of_files([path, *beside], path.parent) if beside else content_sha256(path)


def _of_files(files: list[Path], folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(f"{file.relative_to(folder)} {content_sha256(file)}\n".encode())
    return digest.hexdigest()


def code_sha256(package: Path | None = None) -> str:
    """Return one fingerprint of all source files of this package, except the parts that cannot change a result.

    Args:
        package: the folder of the package; None: the one that is running.
    """
    package = package or Path(__file__).parent.parent
    files = [file for file in package.rglob("*") if file.suffix in CODE and file.is_file()]
    return _of_files([file for file in files if file.relative_to(package).parts[0] not in IRRELEVANT], package)


def folder_bytes(folder: Path) -> int:
    """Bytes of all files in a folder and its folders."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
