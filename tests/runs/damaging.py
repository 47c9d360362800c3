"""Mutations that damage a file."""

from __future__ import annotations

import gzip
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

VALUES = (None, True, -1, 0, 1, 3, 0.5, 10**12, 10**30, -(10**30), 1e300, "", "x", "\ud800", [], [[]], ["x"], {}, {"a": None})
"""JSON values of every type and size, which replace a value of a file."""

Mutation = Callable[[Path, random.Random], None]


def rewritten(change: Callable[[bytes, random.Random], bytes]) -> Mutation:
    """Return the mutation that replaces the content of a file."""

    def mutate(path: Path, generator: random.Random) -> None:
        path.write_bytes(change(path.read_bytes(), generator))

    return mutate


def flipped(content: bytes, generator: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(generator.choice((1, 8, 64))):
        place = generator.randrange(min(len(changed), generator.choice((16, 1024, len(changed)))))
        changed[place] ^= 1 << generator.randrange(8)
    return bytes(changed)


def inserted(part: bytes) -> Callable[[bytes, random.Random], bytes]:
    def change(content: bytes, generator: random.Random) -> bytes:
        place = generator.randrange(len(content) + 1)
        return content[:place] + part + content[place:]

    return change


def recoded(encoding: str) -> Callable[[bytes, random.Random], bytes]:
    return lambda content, _: ("é" + content.decode("latin-1")).encode(encoding)


def replaced(content: bytes) -> Callable[[bytes, random.Random], bytes]:
    return lambda _content, _generator: content


def missing(path: Path, _: random.Random) -> None:
    path.unlink()


def folder(path: Path, _: random.Random) -> None:
    path.unlink()
    path.mkdir()


def linked(target: str) -> Mutation:
    def mutate(path: Path, _: random.Random) -> None:
        path.unlink()
        path.symlink_to(target)

    return mutate


def swapped(path: Path, generator: random.Random) -> None:
    """Replace the file by another one, of another format or purpose."""
    others = sorted(p for p in path.parent.parent.rglob("*") if p.is_file() and p != path)
    shutil.copyfile(generator.choice(others), path)


BYTES: dict[str, Mutation] = {
    "truncated": rewritten(lambda content, generator: content[: generator.randrange(len(content))]),
    "flipped": rewritten(flipped),
    "repeated": rewritten(lambda content, _: content + content),
    "longer": rewritten(lambda content, _: content + b"\0" * 999),
    "empty": rewritten(replaced(b"")),
    "blank": rewritten(replaced(b"\n \n")),
    "zeros": rewritten(lambda content, _: bytes(len(content))),
    "random": rewritten(lambda content, generator: generator.randbytes(len(content))),
    "huge header": rewritten(lambda content, _: b"\xff" * 7 + b"\x7f" + content),
    "UTF-16": rewritten(recoded("utf-16")),
    "UTF-16 without mark": rewritten(recoded("utf-16-le")),
    "Latin-1": rewritten(recoded("latin-1")),
    "byte order mark": rewritten(lambda content, _: b"\xef\xbb\xbf" + content),
    "NUL": rewritten(inserted(b"\0")),
    "invalid UTF-8": rewritten(inserted(b"\xc3\x28")),
    "gzip": rewritten(lambda content, _: gzip.compress(content)),
    "truncated gzip": rewritten(lambda content, _: gzip.compress(content)[:-9]),
    "parquet": rewritten(replaced(b"PAR1\x15\x04\x15\x10")),
    "zip": rewritten(replaced(b"PK\x03\x04" + bytes(60))),
    "pickle": rewritten(replaced(b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x04true\x85R.")),
    "page": rewritten(replaced(b"<!DOCTYPE html><html><body>404</body></html>")),
    "pointer": rewritten(replaced(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")),
    "nested": rewritten(replaced(b"[" * 200_000)),
    "nested objects": rewritten(replaced(b'{"text":' * 50_000 + b"1" + b"}" * 50_000)),
    "digits": rewritten(replaced(b"1" * 10_000)),
    "null": rewritten(replaced(b"null")),
    "number": rewritten(replaced(b"1e999")),
    "string": rewritten(replaced(b'"text"')),
    "list": rewritten(replaced(b"[[], 1, null]")),
    "object": rewritten(replaced(b"{}")),
    "missing": missing,
    "folder": folder,
    "dangling link": linked("nowhere"),
    "unreadable": linked("/proc/self/mem"),
    "no permission": lambda path, _: path.chmod(0),  # which root does not need
    "swapped": swapped,
}


def places(value: Any, found: tuple = ()) -> Iterator[tuple]:
    """Yield the path of every value inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*found, key)
        yield from places(item, (*found, key))


def with_value(data: Any, generator: random.Random) -> Any:
    """Replace or remove a random value, preferring those near the root."""
    every = list(places(data))
    shallow = [place for place in every if len(place) == 1]
    *parents, last = generator.choice(shallow if generator.random() < 0.7 else every)
    owner = data
    for key in parents:
        owner = owner[key]
    if generator.random() < 0.15:
        del owner[last]
    else:
        owner[last] = generator.choice(VALUES)
    return data


def json_value(path: Path, generator: random.Random) -> None:
    path.write_text(json.dumps(with_value(json.loads(path.read_text()), generator)))


def row_value(path: Path, generator: random.Random) -> None:
    lines = path.read_text().splitlines()
    place = generator.randrange(len(lines))
    row = with_value(json.loads(lines[place]), generator) if generator.random() < 0.7 else generator.choice(VALUES)
    lines[place] = json.dumps(row)
    path.write_text("\n".join(lines))


def duplicate_key(path: Path, _: random.Random) -> None:
    head, brace, rest = path.read_text().partition("{")
    first = json.loads(path.read_text().splitlines()[0]) if path.suffix == ".jsonl" else json.loads(path.read_text())
    key = next(iter(first if isinstance(first, dict) else first[0]))
    path.write_text(f'{head}{brace}"{key}": 5, {rest}')


JSON: dict[str, Mutation] = {f"value {i}": json_value for i in range(12)} | {"duplicate key": duplicate_key}
ROWS: dict[str, Mutation] = {f"row {i}": row_value for i in range(8)} | {"duplicate key": duplicate_key}
