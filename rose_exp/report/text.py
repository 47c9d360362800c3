"""Tables as Markdown, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..runtime import escaping
from ..tracking.record import REORDERED
from .cells import Cell, Difference, WindowCount
from .gather import DESCRIPTIVE, Report, Table
from .published import POINTS, Published

NOTHING = "–"
LOGARITHMIC = ("perplexity.", "kl_divergence.")  # positive metrics, whose noise is multiplicative
FIELDS = (
    *("model", "metric", "protocol", "at", "method", "column", "seeds", "replicates"),
    *("mean", "standard_deviation", "best"),
    *("baseline", "difference", "low", "high", "pairs", "published", "source", "trust", "deviation", "within_tolerance"),
)


def number(value: float) -> str:
    if abs(value) >= 1e4:
        return f"{value:.2e}"
    if 0 < abs(value) < 0.1:
        return f"{value:.3g}"
    return f"{value:.2f}" if abs(value) >= 1 or value == 0 else f"{value:.3f}"


def spread(cell: Cell) -> str:
    """Format the mean ± standard deviation over the seeds, or a single value."""
    if cell.deviation is None:
        return number(cell.mean)
    if abs(cell.mean) < 0.1:
        return f"{number(cell.mean)} ± {cell.deviation:.2g}"
    small = abs(cell.mean) < 1
    return f"{number(cell.mean)} ± " + (
        f"{cell.deviation:.{3 if small else 2}f}" if cell.deviation < 1e4 else number(cell.deviation)
    )


def reordered(cell: Cell) -> str:
    """Format the number of reordered layers, out of all pruned layers."""
    layers = {len(record["layers"]) for record in cell.runs.values()}
    count = f"{cell.mean:g}" if not cell.deviation else spread(cell)
    return f"{count} of {' or '.join(map(str, sorted(layers)))}"


def difference(comparison: Difference) -> str:
    """Format the mean with its confidence interval, and relative to the baseline.

    Marks a difference whose interval contains 0, which is not larger than its noise.
    """
    digits = ".2g" if 0 < abs(comparison.mean) < 0.1 else ".2f"
    interval = f" [{comparison.low:+{digits}}, {comparison.high:+{digits}}]" if comparison.low is not None else ""
    mark = "" if comparison.significant or comparison.low is None else ", within noise"
    return f"{comparison.mean:+{digits}}{interval} ({comparison.relative:+.1%}{mark})"


def noise(cell: Cell) -> str:
    """Format the standard deviations of the logarithm within and between seeds."""
    if cell.noise is None:
        return NOTHING
    between = "" if cell.noise.between is None else f" / {cell.noise.between:.2g}"
    return f"{cell.noise.within:.2g}{between} ({cell.noise.replicates} runs)"


def required(comparison: Difference | None, resolve: float) -> str:
    """Format the number of pairs that resolve a relative difference with its 95 % interval, and how many are missing."""
    count = comparison.pairs_to_resolve(resolve) if comparison is not None else None
    if count is None:
        return NOTHING
    low, high = comparison.limits_of_pairs(resolve)
    missing = max(count - comparison.pairs, 0)
    return f"{count} {comparison.unit}s [{low}, {high}]" + (f" ({missing} more)" if missing else "")


def beside(published: Published, points: bool) -> str:
    """Format a published value, our deviation from it, and whether that is within tolerance."""
    deviation = f"{published.deviation:+.2f}" if points else f"{published.deviation:+.1%}"
    verdict = {True: "within", False: "outside", None: "not judged"}[published.within]
    mark = "" if published.trust == "primary" else f", {published.trust}"
    return f"{number(published.value)}{mark} (ours {deviation}, {verdict})"


def windows(count: WindowCount | None) -> str:
    """Format the number of windows that resolve a difference, and the number of measured windows."""
    return NOTHING if count is None else f"{count.needed} (measured {count.measured})"


def caption(table: Table) -> str:
    """Return a description of the protocol of a table."""
    conditions = table.conditions
    parts = []
    varies = "protocol.calibration.windows" in conditions or table.columns == "calibration.samples"
    pruned = any(row != "Dense" for row in table.cells)
    samples = conditions.get("calibration.samples", "a varying number of" if varies and pruned else None)
    prompts = conditions.get("calibration.draw") == "prompts"
    if samples is not None and not prompts:
        window = conditions.get("calibration.window", "varying")
        cut = conditions.get("protocol.calibration.cut")
        parts.append(f"calibrated on {samples} windows of {window} tokens{_bos(conditions, 'calibration')}, cut as {cut}")
        parts.append(
            f"blocks of {conditions.get('engine.block_size', 'varying')}, damping {conditions.get('engine.damping', 'varying')}"
        )
    if (samples is not None and prompts) or "protocol.images.prompts" in conditions:
        parts.append(_sampling(conditions, samples))
    if "protocol.evaluation.windows" in conditions:
        parts.append(
            f"measured on {conditions['protocol.evaluation.windows']} windows of "
            f"{conditions['protocol.evaluation.window']} tokens{_bos(conditions, 'evaluation')}"
        )
    if table.metric == "zero_shot":
        limit = conditions.get("protocol.zero_shot.limit")
        parts.append("accuracy in %, " + (f"the first {limit} questions of each task" if limit else "all questions"))
        parts[-1] += _bos(conditions, "zero_shot")
    seeds = ", ".join(map(str, table.seeds))
    parts.append(f"seeds {seeds}" if seeds else "no seed")
    if len(table.replicates) > 1:
        parts.append(f"replicates {', '.join(map(str, table.replicates))}")
    if len(table.seeds) > 1 or len(table.replicates) > 1:
        unit = "seeds" if len(table.seeds) > 1 else "replicates"
        parts.append(f"mean ± standard deviation over the {unit}")
    versions = [f"{name} {conditions.get(f'protocol.versions.{name}')}" for name in ("torch", "transformers", "rose_exp")]
    parts.append(", ".join(versions) + f", {conditions.get('protocol.device')}, {_revision(conditions)}")
    return "; ".join(parts)


def _bos(conditions: Mapping[str, Any], part: str) -> str:
    """Describe the position of BOS in a part of the protocol; empty if the tokenizer decides."""
    return {"windows": ", each after BOS", "none": " without BOS"}.get(conditions.get(f"protocol.{part}.bos"), "")


def _sampling(conditions: Mapping[str, Any], samples: Any) -> str:
    """Describe calibration and sampling of a diffusion model; ``samples`` is None for a dense model."""
    options = {name: conditions.get(f"diffusion.{name}", "varying") for name in ("steps", "guidance", "weighting", "packages")}
    parts = [f"{options['steps']} steps, guidance {options['guidance']}"]
    if samples is not None:
        parts = [
            f"calibrated on {samples} prompts",
            *parts,
            f"steps weighted {options['weighting']}, {options['packages']} packages",
        ]
    if "protocol.images.prompts" in conditions:
        parts.append(f"measured on {conditions['protocol.images.prompts']} prompts")
    return "; ".join(parts)


def _revision(conditions: Mapping[str, Any]) -> str:
    """Return the revision, shortened for a caption."""
    commit, sign, changes = (conditions.get("protocol.revision") or "no revision known").partition("+")
    return f"revision {commit[:10]}{sign}{changes}" if " " not in commit else commit


def blocks(report: Report, table: Table) -> list[tuple[str, Callable[[Cell], str]]]:
    """Return the parts of a table, each with its heading: values, and differences and published values if there are any."""
    cells = [cell for row in table.cells.values() for cell in row.values()]
    points = table.metric.startswith(POINTS)
    shown: list[tuple[str, Callable[[Cell], str]]] = [("", values_of(table))]
    if any(cell.difference for cell in cells):
        several = any(cell.difference and cell.difference.low is not None for cell in cells)
        unit = "seed and replicate" if len(table.replicates) > 1 else "seed"
        if len(table.replicates) > 1 and len(table.seeds) == 1:
            unit += " (one seed: its noise is that of rounding alone)"
        heading = f"Difference to {report.baseline}, paired by {unit}" + (", with 95 % confidence interval" if several else "")
        shown.append((heading, lambda cell: difference(cell.difference) if cell.difference else NOTHING))
    if report.resolve is not None and any(cell.windows for cell in cells):
        heading = (
            f"Evaluation windows that resolve the difference to {report.baseline} (paired by window, two-sided 5 % level, "
            "power 80 %)"
        )
        shown.append((heading, lambda cell: windows(cell.windows)))
    if table.metric.startswith(LOGARITHMIC):
        if any(cell.noise for cell in cells):
            heading = "Standard deviation of the logarithm over the replicates of a seed / over the seeds"
            shown.append((heading, noise))
        if report.resolve is not None and any(cell.difference and cell.difference.log_deviation for cell in cells):
            heading = (
                f"Pairs that resolve a difference of {report.resolve:.3g} to {report.baseline} (relative, two-sided 5 % level, "
                "power 80 %), with the 95 % interval that the noise of the estimate leaves"
            )
            shown.append((heading, lambda cell: required(cell.difference, report.resolve)))
    if any(cell.published for cell in cells):
        shown.append(("Published", lambda cell: beside(cell.published, points) if cell.published else NOTHING))
    return shown


def values_of(table: Table) -> Callable[[Cell], str]:
    """Return the function that formats the values of a table."""
    return reordered if table.metric == REORDERED else spread


def notes(table: Table) -> list[str]:
    """Return the sources of published values, why some are not judged, rows without a reordered layer, and warnings."""
    published = [cell.published for row in table.cells.values() for cell in row.values() if cell.published]
    lines = dict.fromkeys(f"published: {p.source} ({p.trust})" for p in published)
    lines |= dict.fromkeys(f"not judged: {p.why_not}" for p in published if p.why_not)
    for name, row in table.cells.items():
        runs = {record["run_id"]: record for cell in row.values() for record in cell.runs.values()}
        lines |= dict.fromkeys([*_not_reordered(name, runs), *_events(name, runs)])
    return list(lines)


def _not_reordered(name: str, runs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return a note on the runs of a row that reordered no layer."""
    unordered = sorted(run for run, record in runs.items() if record["metrics"].get(REORDERED) == 0)
    if not unordered:
        return []
    return [
        f"{name}: no layer reordered in {len(unordered)} of {len(runs)} runs ({_first_names(unordered)}), "
        "which equal runs without an ordering"
    ]


def _first_names(runs: Sequence[str]) -> str:
    return ", ".join(runs[:3]) + (" …" if len(runs) > 3 else "")


def _events(name: str, runs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return a note that counts a row's warnings by kind: layers with a warning, and runs with a warning of the whole run."""
    run_events = [(run, event) for run, record in runs.items() for event in record.get("events", [])]
    layer_counts = Counter(event["kind"] for _, event in run_events if event["layer"] is not None)
    run_counts = Counter(kind for _, kind in {(run, event["kind"]) for run, event in run_events if event["layer"] is None})
    parts = [f"{kind.replace('_', ' ')} in {n} layer(s)" for kind, n in layer_counts.items()]
    parts += [f"{kind.replace('_', ' ')} in {n} run(s)" for kind, n in sorted(run_counts.items())]
    return [f"{name}: {', '.join(parts)} of {len(runs)} runs (events in {_first_names(sorted(runs))})"] if parts else []


def markdown(report: Report) -> str:
    escape = escaping.markdown
    lines = [f"# {escape(report.title)}", ""]
    for table in report.tables:
        lines += [f"## {escape(table.title())}", "", f"{escape(caption(table))}.", ""]
        for heading, show in blocks(report, table):
            rows = _rows(table, show, escape, bold=("**", "**") if not heading else ("", ""))
            if heading:
                rows = [row for row in rows if set(row[1:]) != {NOTHING}]
                lines += [f"{escape(heading)}:", ""]
            header = _line(["", *map(escape, table.names)])
            lines += [header, _line(["---", *("---:" for _ in table.names)]), *map(_line, rows), ""]
        lines += [*map(_item, notes(table)), ""] if notes(table) else []
    lines += _remarks(report)
    return "\n".join(lines).rstrip() + "\n"


def _remarks(report: Report) -> list[str]:
    lines = []
    for title, settings in report.differences.items():
        lines += [f"## Not in one table: {escaping.markdown(title)}", ""]
        lines += ["These settings differ between the protocols A, B and so on:", ""]
        for name, values in settings.items():
            shown = " | ".join(escaping.markdown(str(value)) for value in values)
            lines.append(f"* {escaping.markdown_code(name)}: {shown}")
        lines.append("")
    if report.allowed:
        lines += [f"Allowed to differ within a table: {', '.join(map(escaping.markdown_code, report.allowed))}.", ""]
    if report.left_out:
        lines += ["## Not in the tables", "", *map(_item, report.left_out), ""]
    return lines


def _item(text: str) -> str:
    return f"* {escaping.markdown(text, start=True)}"


def _rows(table: Table, show: Callable[[Cell], str], escape: Callable[[str], str], bold: tuple[str, str]) -> list[list[str]]:
    """Return the escaped cells of a table, starting with the name of the row."""
    rows = []
    for row, cells in table.cells.items():
        texts = [escape(show(cells[name]) if name in cells else NOTHING) for name in table.names]
        marked = [name in cells and cells[name].best for name in table.names]
        rows.append([escape(row), *(f"{bold[0]}{t}{bold[1]}" if best else t for t, best in zip(texts, marked, strict=True))])
    return rows


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def comma_separated(report: Report) -> str:
    """Return one line per cell."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(FIELDS)
    for table in report.tables:
        for row, cells in table.cells.items():
            for name, cell in cells.items():
                d, p = cell.difference, cell.published
                location = (table.model, table.metric, table.letter, table.at or "", row, name)
                replicates = " ".join(map(str, sorted({repeat.replicate for repeat in cell.values})))
                values = (" ".join(map(str, cell.seeds)), replicates, cell.mean, cell.deviation, cell.best)
                difference_fields = (report.baseline, d.mean, d.low, d.high, d.pairs) if d else ("",) * 5
                published_fields = (p.value, p.source, p.trust, p.deviation, p.within) if p else ("",) * 5
                writer.writerow(map(escaping.csv_cell, [*location, *values, *difference_fields, *published_fields]))
    return file.getvalue()


def latex(report: Report) -> str:
    """Return a ``table`` environment with booktabs rules for each table; needs ``\\usepackage{booktabs}``."""
    return "\n".join(_latex_table(table) for table in report.tables)


def _latex_table(table: Table) -> str:
    escape = escaping.latex
    rows = _rows(table, values_of(table), escape, bold=(r"\textbf{", "}"))
    body = [" & ".join(row) + r" \\" for row in rows]
    arrow = r" $\downarrow$" if table.lower_is_better else r" $\uparrow$"
    arrow = "" if table.metric in DESCRIPTIVE else arrow
    return "\n".join(
        [
            r"\begin{table}[t]",
            r"  \centering",
            rf"  \caption{{{escape(table.title())}{arrow}. {escape(caption(table))}.}}",
            rf"  \begin{{tabular}}{{l{'r' * len(table.names)}}}",
            r"    \toprule",
            "    " + " & ".join(["", *map(escape, table.names)]) + r" \\",
            r"    \midrule",
            *("    " + line for line in body),
            r"    \bottomrule",
            r"  \end{tabular}",
            r"\end{table}",
            "",
        ]
    )
