"""Lists, descriptions and comparisons of runs, from their records."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ..runtime.errors import RoseExpError, suggest
from ..runtime.escaping import terminal
from ..runtime.files import write_text
from ..settings.effective import effective
from ..settings.leaves import flat
from ..settings.tracking import current
from ..tracking.reading import values_of
from ..tracking.record import FILE_NAME
from .conditions import SPARSITY, column_of, is_dense
from .gather import repeat_of
from .table import aligned, collect_records, number

log = logging.getLogger(__name__)

METRICS = 3  # columns with metrics in a list
UNSUITABLE = ("sparsity", "reordered_layers")  # metrics that a list leaves out
ABSENT = "-"


@dataclass(frozen=True)
class Run:
    """A run on disk.

    Attributes:
        folder: folder of the run.
        record: contents of its ``run.json``.
    """

    folder: Path
    record: Mapping[str, Any]

    @property
    def id(self) -> str:
        return str(self.record.get("run_id"))

    @property
    def status(self) -> str:
        return self.record["status"]

    @property
    def label(self) -> str:
        return self.record["label"]

    @property
    def model(self) -> str:
        """Name of the model; a run that failed early has only its settings."""
        model = self.record["config"].get("model") or {}
        known = (self.record["protocol"].get("model") or {}).get("name")
        return str(known or model.get("path") or model.get("built") or model.get("embedded"))

    @property
    def sparsity(self) -> str:
        return ABSENT if is_dense(self.record) else column_of(self.record, SPARSITY)

    @property
    def repeat(self) -> str:
        """The seed and, if it is not 0, the replicate."""
        seed, replicate = repeat_of(self.record)
        return f"{seed}.{replicate}" if replicate else str(seed)

    @property
    def tags(self) -> list[str]:
        return [str(tag) for tag in self.record["config"].get("tags") or []]

    @property
    def minutes(self) -> float:
        """Minutes of all stages."""
        return sum(value for name, value in self.record["seconds"].items() if "." not in name) / 60


FILTERS = {
    "method": lambda run: [run.label, run.record["config"]["method"]["name"]],
    "model": lambda run: [run.model],
    "sparsity": lambda run: [run.sparsity],
    "tag": lambda run: run.tags,
    "status": lambda run: [run.status],
}
"""For each filter of :func:`select`, the values of a run."""


def find_runs(folders: Sequence[Path]) -> list[Run]:
    """Return the runs below folders, newest first. Skip damaged records with a warning.

    Raises:
        RoseExpError: a folder does not exist, or none has a run.
    """
    for folder in folders:
        if not folder.is_dir():
            raise RoseExpError(f"DIR: expected a folder that exists, got {folder}")
    found = {path.resolve(): Run(path.parent, record) for folder in folders for path, record in collect_records(folder)}
    runs = [run for run in found.values() if _usable(run)]
    if not runs:
        raise RoseExpError(f"DIR: expected folders with {FILE_NAME} in them, got none in {', '.join(map(str, folders))}")
    return sorted(runs, key=lambda run: run.record["started"], reverse=True)


def _usable(run: Run) -> bool:
    """Return whether all values that a list shows can be read; if not, log a warning."""
    try:
        with values_of(run.folder / FILE_NAME):
            list_of([run])
            [values(run) for values in FILTERS.values()]
    except RoseExpError as error:
        log.warning("skipped: %s", terminal(str(error)))
        return False
    return True


def select(runs: Sequence[Run], filters: Mapping[str, str]) -> list[Run]:
    """Return the runs that match all filters.

    Args:
        filters: patterns such as ``ROSE*`` by the names in :data:`FILTERS`; upper and lower case are equal.
    Raises:
        RoseExpError: no run has a value that matches a pattern.
    """
    for name, pattern in filters.items():
        values = {str(value) for run in runs for value in FILTERS[name](run)}
        if not any(_matches(value, pattern) for value in values):
            expected = f"one of {', '.join(sorted(values))}" if values else "no filter, because no run has one"
            raise RoseExpError(f"--{name}: expected {expected}, got {pattern!r}{suggest(pattern, values)}")
    return [
        run
        for run in runs
        if all(any(_matches(str(value), pattern) for value in FILTERS[name](run)) for name, pattern in filters.items())
    ]


def _matches(value: str, pattern: str) -> bool:
    return fnmatchcase(value.lower(), pattern.lower())


def find_run(name: str, folders: Sequence[Path]) -> Run:
    """Return the run in the folder ``name``, or the run below ``folders`` with an ID that starts with ``name``.

    Raises:
        RoseExpError: no run or several runs match.
    """
    if (Path(name) / FILE_NAME).is_file():
        return find_runs([Path(name)])[0]
    runs = find_runs(folders)
    matching = [run for run in runs if run.id.startswith(name)]
    if len(matching) == 1:
        return matching[0]
    if not matching:
        identities = [run.id for run in runs]
        raise RoseExpError(f"RUN: expected a run ID, the start of one, or a folder, got {name!r}{suggest(name, identities)}")
    raise RoseExpError(f"RUN: expected the start of one run ID, got {name!r}, which {len(matching)} runs have")


def list_of(runs: Sequence[Run]) -> str:
    """Return a table with one line per run: its ID, status, start, method, model, sparsity, seed, metrics and minutes.

    A seed such as 0.2 is replicate 2 of seed 0.
    """
    metrics = list(dict.fromkeys(name for run in runs for name in run.record["metrics"] if name not in UNSUITABLE))[:METRICS]
    header = ["run", "status", "started", "method", "model", "sparsity", "seed", *metrics, "minutes"]
    rows = [
        [
            *(run.id, run.status, str(run.record["started"])[:16].replace("T", " "), run.label, run.model, run.sparsity),
            run.repeat,
            *(_value(run.record, name) for name in metrics),
            f"{run.minutes:.1f}",
        ]
        for run in runs
    ]
    return aligned(header, rows, header.index("sparsity"))


def _value(record: Mapping[str, Any], metric: str) -> str:
    """Format a metric with its standard error, if the record has it."""
    value, error = record["metrics"].get(metric), record.get("standard_errors", {}).get(metric)
    if value is None:
        return ABSENT
    return number(metric, value) + (f" ± {error:.2g}" if error is not None else "")


def describe(run: Run) -> str:
    """Return everything about a run except its layers: settings with an effect, protocol, results, time and warnings."""
    record = run.record
    parts = {
        "run": {"id": run.id, "status": run.status, "folder": run.folder, "started": record["started"]}
        | {name: record.get(name) for name in ("ended", "error", "resumed") if record.get(name)}
        | {"method": run.label, "model": run.model, "sparsity": run.sparsity}
        | ({"tags": ", ".join(run.tags)} if run.tags else {}),
        "results": {name: _value(record, name) for name in record["metrics"]},
        "settings": effective(record["config"]),
        "protocol": flat(record["protocol"], ""),
        "seconds": record["seconds"],
        "warnings": dict(Counter(event["kind"] for event in record.get("events", []))),
    }
    return _sections(parts)


def compare(one: Run, other: Run) -> str:
    """Return the results of two runs, and the settings, the protocol and the warnings in which they differ."""
    sides = (one, other)
    records = [run.record for run in sides]
    parts = {
        "runs": {name: [getattr(run, name) for run in sides] for name in ("id", "label", "model", "sparsity", "status")},
        "results": _paired([{name: _value(record, name) for name in record["metrics"]} for record in records]),
        "settings": _different([effective(record["config"]) for record in records]),
        "protocol": _different([flat(record["protocol"], "") for record in records]),
        "seconds": _paired([{k: f"{v:.1f}" for k, v in record["seconds"].items() if "." not in k} for record in records]),
        "warnings": _different([dict(Counter(e["kind"] for e in record.get("events", []))) for record in records]),
    }
    equal = [f"{name}: equal" for name in ("settings", "protocol", "warnings") if not parts[name]]
    return "\n\n".join(filter(None, [_sections(parts), "\n".join(equal)]))


def _paired(values: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return the values of both runs by name."""
    return {name: [value.get(name, ABSENT) for value in values] for name in dict.fromkeys(n for v in values for n in v)}


def _different(values: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    return {name: both for name, both in _paired(values).items() if both[0] != both[1]}


def _sections(parts: Mapping[str, Mapping[str, Any]]) -> str:
    """Format values by section and name; lists take one column for each value."""
    texts = []
    for title, values in parts.items():
        if not values:
            continue
        rows = [[name, *(map(str, value) if isinstance(value, list) else [str(value)])] for name, value in values.items()]
        columns = max(map(len, rows))
        rows = [[*row, *[""] * (columns - len(row))] for row in rows]
        texts.append(aligned([title, *[""] * (columns - 1)], rows, columns))
    return "\n\n".join(texts)


def copy_config(run: Run, path: Path, hydra: Mapping[str, Any]) -> None:
    """Write the settings of a run to a new configuration file, which ``--config-dir`` and ``--config-name`` select.

    Args:
        hydra: Hydra's own settings.
    Raises:
        RoseExpError: the file exists, its name does not end in .yaml, or it cannot be written.
    """
    if path.suffix != ".yaml":
        raise RoseExpError(f"FILE: expected a name that ends in .yaml, got {path}")
    if path.exists():
        raise RoseExpError(f"FILE: expected a new file, got {path}, which exists")
    settings = {name: value for name, value in run.record["config"].items() if name != "hydra"}
    if settings.get("tracking"):
        settings["tracking"] = current(settings["tracking"])
    head = [
        f"# The settings of run {run.id}: {run.label}, {run.model}, sparsity {run.sparsity}.",
        "#   command: rose-exp --config-dir FOLDER --config-name NAME seed=1",
        "# This file replaces the choices of all groups: edit the values, or override them by their full names, such as",
        "# sparsity.ratio=0.6.",
    ]
    text = OmegaConf.to_yaml(OmegaConf.create({"defaults": ["_self_"], **settings, "hydra": dict(hydra)}))
    write_text(path, "\n".join(map(terminal, head)) + "\n" + text)
