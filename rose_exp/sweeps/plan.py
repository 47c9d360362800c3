"""``plan=true``: a table of a command's jobs with estimated time and memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ..models import ModelShape, largest_file, model_shape
from ..report import collect_records
from ..runs.fitting import choose
from ..runs.limits import available
from ..runs.memory import footprint, gib
from ..runs.reuse import lacking
from ..runtime.errors import RoseExpError
from ..runtime.escaping import terminal
from ..tracking import read_record
from ..tracking.record import FILE_NAME, device_name
from .estimate import Rates, Work
from .job import Job

OUTPUTS = Path("outputs")  # parent folder of single runs


def format_plan(jobs: Sequence[Job], sweep: Path | None) -> str:
    """Return a table with one line per job: its run ID, its state, and its estimated time and memory."""
    folder = sweep or OUTPUTS
    notes = list(
        dict.fromkeys(f"{job.name}: ignores sparsity.ratio, which its N:M pattern implies" for job in jobs if job.ignored)
    )
    records = [record for _, record in collect_records(folder)] if folder.is_dir() else []
    device = torch.device("cuda" if jobs[0].settings.device != "cpu" and torch.cuda.is_available() else "cpu")
    rates: dict[str, Rates] = {}
    shapes: dict[str, ModelShape | str] = {}
    rows, total, rough, planned = [], 0.0, False, set()
    for job in jobs:
        model = job.settings.model
        key = f"{model.path} {model.embedded} {model.revision} {model.dtype}"
        if key not in shapes:
            try:
                shapes[key] = model_shape(model)
            except RoseExpError as error:
                shapes[key] = str(error)
        shape = shapes[key]
        if not _to_do(job, job.folder(sweep) or folder / job.run_id):
            rows.append((job.name, job.run_id, "finished already", "", ""))
        elif job.run_id in planned:
            rows.append((job.name, job.run_id, "as an earlier job", "", ""))
        elif isinstance(shape, str):
            rows.append((job.name, job.run_id, "to run", "unknown", "unknown"))
        else:
            if model.name not in rates:
                rates[model.name] = Rates.of(records, device_name(device), model.name)
            seconds, measured = rates[model.name].seconds(Work.planned(job.settings, shape))
            total, rough = total + seconds, rough or not measured
            free = available(folder, device, largest_file(model))
            placed = choose(job.settings, shape, device.type == "cuda", free)
            peak = footprint(job.settings, shape, device.type == "cuda", placed)
            shown = gib(peak.host) + (f" + {gib(peak.device)} on the GPU" if peak.device is not None else "")
            shown += f", {gib(peak.disk)} of disk" + ("; does not fit" if peak.over(free) else "")
            rows.append((job.name, job.run_id, "to run", f"{'' if measured else '~'}{_time(seconds)}", shown))
        planned.add(job.run_id)
    header = ("job", "run", "state", "time", "peak memory")
    rows = [tuple(map(terminal, row)) for row in rows]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    table = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in [header, *rows]]
    to_run = sum(row[2] == "to run" for row in rows)
    unknown = sum(row[2] == "to run" and row[3] == "unknown" for row in rows)
    together = "for an unknown time" if unknown and unknown == to_run else f"{_time(total)} one after the other"
    without = f", without {unknown} jobs whose time is unknown" if 0 < unknown < to_run else ""
    lines = [*table, "", f"{to_run} of {len(jobs)} jobs to run, {together} on {device_name(device)}{without}"]
    if rough:
        lines.append(
            "~ rough estimate from the rate of a float32 matrix product, because no finished run here has rates for all stages"
        )
    texts = [text for job in jobs for text in job.settings.evaluation.perplexity.values()]
    if any(text.windows is None for text in texts) and not all(job.settings.evaluation.limit for job in jobs):
        lines.append("excluding perplexity on whole texts (windows: null), whose lengths are unknown")
    if any(job.settings.evaluation.zero_shot.tasks for job in jobs):
        lines.append("excluding zero-shot tasks, whose time depends on their questions")
    lines += notes
    lines += [f"memory and time unknown: {shape[:200]}" for shape in shapes.values() if isinstance(shape, str)]
    return "\n".join(lines)


def _to_do(job: Job, run_folder: Path) -> bool:
    """Return whether a job has to run, because no finished run can be reused."""
    if job.settings.rerun or not (run_folder / FILE_NAME).exists():
        return True
    record = read_record(run_folder / FILE_NAME)
    return record["status"] != "finished" or bool(lacking(job.settings, record, run_folder))


def _time(seconds: float) -> str:
    if seconds < 1:
        return "<1 s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
