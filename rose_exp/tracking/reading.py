"""Reading of run records, which can be damaged, of another version or from another tool."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from ..runtime.errors import RoseExpError
from ..runtime.escaping import visible
from ..runtime.redaction import redact

LARGEST = 512 * 2**20  # bytes; a record has about 1 KB per layer
DEEPEST = 50  # nested values; a record has about 8
REMEDY = "delete this file or its folder to run the run again"


class _Lenient(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


class _Event(_Lenient):
    kind: str
    layer: str | None = None
    detail: str = ""


class _Layer(_Lenient):
    name: str


class _Named(_Lenient):
    name: str


class _Tracking(_Lenient):
    kind: str
    failure: str | None = None
    id: str | None = None


class _Record(_Lenient):
    """The fields of a run record that are read again."""

    status: Literal["running", "finished", "failed", "interrupted"]
    run_id: str | None = None
    label: str
    started: str
    error: str | None = None
    metrics: dict[str, float | None]
    windows: dict[str, list[float]] = {}
    seconds: dict[str, float] = {}
    config: dict[str, Any]
    protocol: dict[str, Any]
    layers: list[_Layer] = []
    events: list[_Event] = []
    tracking: list[_Tracking] = []
    tracked: list[_Tracking] = []

    @field_validator("tracking", mode="before")
    @classmethod
    def _several(cls, tracking: Any) -> Any:
        """Read the tracker in a record of an earlier version, which had at most one, as a list."""
        return [tracking] if isinstance(tracking, dict) else tracking or []


class _Calibration(_Lenient):
    seed: int | None = None


class _Protocol(_Lenient):
    model: _Named | None = None
    calibration: _Calibration | None = None
    versions: dict[str, str | None] = {}


class _Sparsity(_Lenient):
    pattern: str
    ratio: float | None = None


class _Config(_Lenient):
    method: _Named
    sparsity: _Sparsity
    seed: int = 0


class _Finished(_Record):
    """The fields of the record of a finished run that are read again."""

    run_id: str = ""
    config: _Config
    protocol: _Protocol
    metrics: dict[str, float]


class _Reusable(_Finished):
    """The fields of the record of a finished run that replaces a new run."""

    run_id: str
    seconds: dict[str, float]
    layers: list[_Layer]


def read_record(path: Path, reused: bool = False) -> dict[str, Any]:
    """Read a ``run.json``. Secrets in it, such as those of an earlier version, are redacted.

    Args:
        reused: whether the record is to replace a new run if it is finished, which requires more fields.
    Raises:
        RoseExpError: the file is unreadable, damaged, or not a run record. The message names the remedy.
    """
    try:
        data = _parse(path)
        finished = isinstance(data, dict) and data.get("status") == "finished"
        kind = (_Reusable if reused else _Finished) if finished else _Record
        kind.model_validate(data)
    except ValidationError as error:
        raise RoseExpError(f"{path} is not a valid run record: {_explain(error)}; {REMEDY}") from None
    except OSError as error:
        raise RoseExpError(f"cannot read the run record {path}: {error.strerror or error}") from None
    except RecursionError:
        raise RoseExpError(f"cannot read the run record {path}: it is nested too deeply; {REMEDY}") from None
    except ValueError as error:
        raise RoseExpError(f"cannot read the run record {path}: it is damaged ({visible(str(error))}); {REMEDY}") from None
    return redact(data)


@contextmanager
def values_of(path: Path) -> Iterator[None]:
    """Report missing values, and values of another type, that the body finds in a run record.

    Raises:
        RoseExpError: the body has raised such an error. The message names the file and the remedy.
    """
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        reason = visible(f"{type(error).__name__}: {error}")
        raise RoseExpError(f"{visible(str(path))} is not a valid run record: {reason}; {REMEDY}") from error


def _parse(path: Path) -> Any:
    if path.exists() and not path.is_file():
        raise ValueError("expected a file")
    size = path.stat().st_size
    if size > LARGEST:
        raise ValueError(f"expected at most {LARGEST >> 20} MiB, got {size >> 20} MiB")
    text = path.read_text(encoding="utf-8")
    if not text.strip():
        raise ValueError("the file is empty")
    data = json.loads(text)
    level, depth = [data], 0
    while level := [item for value in level if isinstance(value, (dict, list)) for item in _items(value)]:
        depth += 1
        if depth > DEEPEST:
            raise RecursionError
    return data


def _items(value: dict | list) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def _explain(error: ValidationError) -> str:
    """Return the first problem in the form "field: expected …, got …"."""
    problem = error.errors(include_url=False)[0]
    field = visible(".".join(map(str, problem["loc"])) or "the file")
    if problem["type"] == "missing":
        return f"{field}: expected a value, got none"
    expected = problem["msg"].removeprefix("Input should be ")
    return f"{field}: expected {expected}, got {type(problem['input']).__name__}"
