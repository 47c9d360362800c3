"""Outcomes of the jobs of a sweep, and the table at its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..report import format_table
from ..runtime.errors import RoseExpError
from ..runtime.escaping import terminal
from ..tracking import read_record
from ..tracking.record import FILE_NAME, versions

ORDER = ("failed", "unfinished", "not run")  # states that need attention


@dataclass(frozen=True)
class Outcome:
    """The outcome of one job of a sweep.

    Attributes:
        name: the overrides that differ from the other jobs.
        state: ran, reused, failed, unfinished (interrupted, or its process was killed) or not run.
        why: the reason for the state, or the different versions of a reused record; None if there is nothing to report.
        record: the run record, if there is one.
    """

    name: str
    state: str
    why: str | None
    folder: Path
    record: dict[str, Any] | None


def outcomes(
    jobs: Sequence[tuple[str, str]],
    sweep: Path,
    started: str,
    rerun: bool = False,
    expected: Mapping[str, Path] | None = None,
) -> list[Outcome]:
    """Return the outcome of each job.

    Args:
        jobs: name and run ID of each.
        sweep: the folder that holds the jobs' folders.
        started: when the sweep started, in the format of run records.
        rerun: whether the command reuses nothing.
        expected: the folders of runs by run ID, where they are known in advance; the others are named by the run ID.
    """
    folders = {identity: sweep / identity for _, identity in jobs} | dict(expected or {})
    missing = {identity for identity, folder in folders.items() if not (folder / FILE_NAME).exists()}
    if missing:  # hydra.sweep.subdir can set names that Hydra computes later
        found = [(path.parent, _read(path)[0]) for path in sweep.rglob(FILE_NAME)]
        records = [(folder, record) for folder, record in found if record]
        for folder, record in sorted(records, key=lambda item: str(item[1].get("started"))):
            if record.get("run_id") in missing:
                folders[record["run_id"]] = folder  # the latest one
    results: list[Outcome] = []
    seen = set()
    for name, identity in jobs:
        path = folders[identity] / FILE_NAME
        record, problem = _read(path)
        state, reason = ("failed", problem) if problem else _state(record, started, rerun)
        if state == "reused" and rerun:
            state, reason = "not run", "its record is from an earlier command"
        if identity in seen and state == "ran":
            state, reason = "reused", "equal to an earlier job"
        seen.add(identity)
        results.append(Outcome(name, state, reason, folders[identity], record))
    return results


def _read(path: Path) -> tuple[dict[str, Any] | None, str | None]:
    """Return a run record, or None and the reason if it is damaged, or twice None if it does not exist."""
    try:
        return (read_record(path) if path.exists() else None), None
    except RoseExpError as error:
        return None, str(error)


def _state(record: dict[str, Any] | None, started: str, rerun: bool) -> tuple[str, str | None]:
    if record is None:
        return "not run", "no run record"
    before = record["started"] < started
    if record["status"] == "finished":
        return ("reused", _other_versions(record)) if before else ("ran", None)
    if record["status"] == "failed" and not before:
        return "failed", record["error"]
    words = {"running": "its process ended unexpectedly", "interrupted": f"interrupted ({record['error']})"}
    reason = words.get(record["status"], "not repeated")
    return "unfinished", f"{reason}; to resume, run the same command again{' without rerun=true' if rerun else ''}"


def _other_versions(record: dict[str, Any]) -> str | None:
    """Return the version changes since a record was written, on which its results can depend, or None."""
    then, now = record["protocol"].get("versions", {}), versions()
    changed = [f"{name} {then[name]}, now {now[name]}" for name in now if name in then and then[name] != now[name]]
    return f"made with {'; '.join(changed)}" if changed else None


def format_outcomes(results: Sequence[Outcome]) -> str:
    """Return the table at the end of a sweep: the metrics, the reused jobs, and the failed jobs with reasons."""
    distinct = {outcome.folder: outcome.record for outcome in results if outcome.record is not None}
    lines = [format_table(list(distinct.values()))] if distinct else []
    counts = {state: sum(o.state == state for o in results) for state in ("ran", "reused", *ORDER)}
    lines.append("\n" + ", ".join(f"{count} {state}" for state, count in counts.items() if count) + f", of {len(results)} jobs")
    width = max(len(outcome.name) for outcome in results)
    for state in ("reused", *ORDER):
        for outcome in results:
            if outcome.state == state:
                reason = f": {outcome.why}" if outcome.why else ""
                lines.append(terminal(f"  {outcome.name.ljust(width)}  {outcome.folder}  {state}{reason}"))
    return "\n".join(lines)
