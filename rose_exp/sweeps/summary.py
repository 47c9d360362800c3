"""How the jobs of a sweep ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..report import format_table
from ..tracking import read_record
from ..tracking.record import FILE_NAME, versions

ORDER = ("failed", "unfinished", "not run")  # what a person has to look at


@dataclass(frozen=True)
class Outcome:
    """One job of a sweep after it.

    Attributes:
        name: what differs from the other jobs.
        state: ran, reused, failed, unfinished (its process ended without a word) or not run.
        why: of a failure; or which other versions a reused record was made with.
        record: where there is one.
    """

    name: str
    state: str
    why: str | None
    folder: Path
    record: dict[str, Any] | None


def outcomes(jobs: Sequence[tuple[str, str]], sweep: Path, started: str, rerun: bool = False) -> list[Outcome]:
    """Return what became of each job.

    Args:
        jobs: name and run ID of each.
        sweep: the folder that holds the jobs' folders.
        started: when the sweep started, in the format of run records.
        rerun: whether the command reuses nothing.
    """
    found = {identity: sweep / identity for _, identity in jobs}
    if any(not (folder / FILE_NAME).exists() for folder in found.values()):  # hydra.sweep.subdir may say another name
        records = [(path.parent, read_record(path)) for path in sorted(sweep.glob(f"*/{FILE_NAME}"))]
        found |= {record["run_id"]: folder for folder, record in records if record.get("run_id") in found}
    told: list[Outcome] = []
    seen = set()
    for name, identity in jobs:
        path = found[identity] / FILE_NAME
        record = read_record(path) if path.exists() else None
        state, why = _state(record, started, rerun)
        if state == "reused" and rerun:
            state, why = "not run", "its record is of an earlier command"
        if identity in seen and state == "ran":
            state = "reused"  # equal to an earlier job
        seen.add(identity)
        told.append(Outcome(name, state, why, found[identity], record))
    return told


def _state(record: dict[str, Any] | None, started: str, rerun: bool) -> tuple[str, str | None]:
    if record is None:
        return "not run", "it has no record"
    before = record["started"] < started
    if record["status"] == "finished":
        return ("reused", _other_versions(record)) if before else ("ran", None)
    if record["status"] == "failed" and not before:
        return "failed", record["error"]
    words = {"running": "its process ended without a word", "interrupted": f"it was stopped ({record['error']})"}
    why = words.get(record["status"], "it was not tried again")
    return "unfinished", f"{why}; the same command{' without rerun=true' if rerun else ''} resumes it"


def _other_versions(record: dict[str, Any]) -> str | None:
    """What of the code has changed since a record was made, that its numbers may hang on."""
    then, now = record["protocol"].get("versions", {}), versions()
    changed = [f"{name} {then[name]}, now {now[name]}" for name in now if name in then and then[name] != now[name]]
    return f"made with {'; '.join(changed)}" if changed else None


def format_outcomes(found: Sequence[Outcome]) -> str:
    """The table at the end of a sweep: what was measured, then what was reused, and what failed and why."""
    distinct = {outcome.folder: outcome.record for outcome in found if outcome.record is not None}
    lines = [format_table(list(distinct.values()))] if distinct else []
    counts = {state: sum(o.state == state for o in found) for state in ("ran", "reused", *ORDER)}
    lines.append("\n" + ", ".join(f"{count} {state}" for state, count in counts.items() if count) + f", of {len(found)} jobs")
    width = max(len(outcome.name) for outcome in found)
    for state in ("reused", *ORDER):
        for outcome in found:
            if outcome.state == state:
                why = f": {outcome.why}" if outcome.why else ""
                lines.append(f"  {outcome.name.ljust(width)}  {outcome.folder}  {state}{why}")
    return "\n".join(lines)
