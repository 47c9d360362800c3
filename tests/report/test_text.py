"""Report files: Markdown, CSV, LaTeX and HTML."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import subprocess

import pytest

from rose_exp.cli.report import main
from rose_exp.report.files import write_report
from rose_exp.report.gather import gather
from rose_exp.report.page import web_page
from rose_exp.report.text import comma_separated, latex, markdown
from rose_exp.runtime.errors import RoseExpError

from .records import record


@pytest.fixture
def report():
    values = {"SparseGPT": (27.0, 28.0, 27.5), "ROSE": (26.0, 26.5, 26.4), "Wanda": (70.0, 71.0, 75000.0)}
    records = [record(label, v, seed) for label, of_label in values.items() for seed, v in enumerate(of_label)]
    return gather([*records, record("Dense", 5.47), record("ROSE", 300.0, ratio=0.8)])


def test_markdown_report(report):
    text = markdown(report)
    assert "| ROSE | **26.30 ± 0.26** | 300.00 |" in text
    assert "| Dense | 5.47 | 5.47 |" in text
    assert "Difference to SparseGPT, paired by seed, with 95 % confidence interval:" in text
    line = next(line for line in text.splitlines() if line.startswith("| ROSE | -1.20 ["))
    assert re.fullmatch(r"\| ROSE \| -1\.20 \[-1\.\d\d, -0\.\d\d\] \(-4\.4%\) \| – \|", line)
    assert "| ROSE | 26.38 (ours -0.3%, within) | – |" in text
    assert "calibrated on 128 windows of 2048 tokens, cut as documents; blocks of 128, damping 0.01" in text
    assert "seeds 0, 1, 2; mean ± standard deviation over the seeds; torch 2.13.0" in text


def test_captions_state_a_varying_number_of_calibration_samples():
    columns = "calibration.samples"
    runs = [record("ROSE", float(n), config__calibration__samples=n, protocol__calibration__windows=n) for n in (16, 128)]
    assert "calibrated on a varying number of windows of 2048 tokens, cut as documents" in markdown(
        gather(runs, columns=columns)
    )
    prompts = {"source": "prompts", "sha256": "p", "prompts": 10, "seed": 0, "noise_sha256": "n"}
    options = {"config__model__kind": "diffusion", "config__calibration__draw": "prompts", "protocol__calibration": prompts}
    options |= {"protocol__images": {"prompts": 100}}
    of_images = [record("SparseGPT", 1.0, config__calibration__samples=n, **options) for n in (10, 100)]
    assert "calibrated on a varying number of prompts; " in markdown(gather(of_images, columns=columns))
    assert "calibrated on" not in markdown(gather([record("Dense", 5.0)], columns=columns))


def test_run_events_are_summarized():
    one, two = record("SparseGPT", 27.0, 0), record("SparseGPT", 28.0, 1)
    event = {"kind": "dead_columns", "layer": "a", "detail": "3 of 8 inputs never fired"}
    one["events"], two["events"] = [event, event | {"layer": "b"}], [event | {"kind": "damping_raised"}]
    unused = {"kind": "unused_tensors", "layer": None, "detail": "lm_head.bias"}
    one["events"] += [unused, unused]
    text = markdown(gather([one, two, record("ROSE", 26.0)]))
    counts = "dead columns in 2 layer(s), damping raised in 1 layer(s), unused tensors in 1 run(s)"
    assert f"* SparseGPT: {counts} of 2 runs (events in " in text
    assert "* ROSE" not in text


@pytest.fixture
def ordered():
    """Run records of two seeds with and without reordering; the baseline may use reordering."""
    values = {"SparseGPT": (None, None), "ROSE": (4, 6)}
    records = [record(name, 27.0 + s, s, reordered=counts[s]) for name, counts in values.items() for s in (0, 1)]
    other = {"config__reorder__blocks": "descending", "config__reorder__threshold": 0.9}
    records += [record("ROSE", 28.0 + s, s, reordered=0, **other) for s in (0, 1)]
    return records


@pytest.mark.parametrize("baseline", ["SparseGPT", "ROSE (threshold=0.5)"])
def test_reordered_layers_table_has_no_differences_or_best_marks(ordered, baseline):
    report = gather([*ordered, record("Dense", 5.47)], baseline=baseline)
    perplexities, _, counts = report.tables
    assert [table.metric for table in report.tables] == ["perplexity.wikitext2", "minutes.pruning", "reordered_layers"]
    assert any(cell.difference for row in perplexities.cells.values() for cell in row.values())
    assert any(cell.best for row in perplexities.cells.values() for cell in row.values())
    assert not any(cell.difference or cell.best for row in counts.cells.values() for cell in row.values())
    assert list(counts.cells) == ["ROSE (threshold=0.5)", "ROSE (threshold=0.9)"]
    text = markdown(report)
    table = text.partition("reordered_layers")[2].partition("\n## ")[0]
    assert "| ROSE (threshold=0.5) | 5.00 ± 1.41 of 168 |" in table
    assert "| ROSE (threshold=0.9) | 0 of 168 |" in table
    assert "Difference" not in table
    assert "**" not in table
    page = web_page(report)
    assert "5.00 ± 1.41 of 168" in page
    assert r"ROSE (threshold=0.5) & 5.00 $\pm$ 1.41 of 168 \\" in latex(report)
    assert "reordered\\_layers. " in latex(report)  # without an arrow
    rows = [row for row in csv.DictReader(io.StringIO(comma_separated(report))) if row["metric"] == "reordered_layers"]
    assert [(row["mean"], row["best"], row["difference"]) for row in rows] == [("5.0", "False", ""), ("0.0", "False", "")]


def test_rows_without_reordered_layers_have_a_note(ordered):
    report = gather(ordered)
    note = "ROSE (threshold=0.9): no layer reordered in 2 of 2 runs ("
    assert sum(line.startswith(f"* {note}") for line in markdown(report).splitlines()) == len(report.tables)
    assert "which equal runs without an ordering" in web_page(report)
    assert "no layer reordered" not in markdown(gather([record("ROSE", 26.0, reordered=1), record("SparseGPT", 27.0)]))


def test_pairing_ignores_the_count_of_reordered_layers():
    """Records from older versions lack the count and are still paired."""
    old = [record(name, v + s, s) for name, v in (("SparseGPT", 27.0), ("ROSE", 26.0)) for s in (0, 1)]
    new = [record("SparseGPT", 29.0, 2), record("ROSE", 28.0, 2, reordered=4)]
    report = gather([*old, *new])
    cell = report.tables[0].cells["ROSE"]["0.7"]
    assert cell.seeds == [0, 1, 2]
    assert cell.difference.pairs == 3


def test_caption_states_the_bos_mode():
    bos = {"protocol__calibration__bos": "windows", "protocol__evaluation__wikitext2__bos": "windows"}
    text = markdown(gather([record("ROSE", 26.0, **bos)]))
    assert "on 128 windows of 2048 tokens, each after BOS, cut as documents" in text
    assert "measured on 166 windows of 2048 tokens, each after BOS;" in text
    none = dict.fromkeys(bos, "none")
    assert "calibrated on 128 windows of 2048 tokens without BOS, cut" in markdown(gather([record("ROSE", 26.0, **none)]))
    own = dict.fromkeys(bos, "tokenizer")
    assert "BOS" not in markdown(gather([record("ROSE", 26.0, **own)]))
    assert "(protocol A)" in markdown(gather([record("ROSE", 26.0, **own), record("ROSE", 27.0, **bos)]))


def test_protocol_differences_are_listed():
    text = markdown(gather([record("ROSE", 26.0), record("ROSE", 27.0, config__engine__damping=0.1)]))
    assert "## Llama-2-7b-hf: perplexity.wikitext2 (protocol A)" in text
    assert "* `engine.damping`: 0.01 | 0.1" in text
    allowed = markdown(gather([record("ROSE", 26.0), record("ROSE", 27.0, 1, config__engine__damping=0.1)], allowed=["engine"]))
    assert "Allowed to differ within a table: `engine`." in allowed


def test_csv_has_one_line_per_cell(report):
    rows = list(csv.DictReader(io.StringIO(comma_separated(report))))
    rose = next(row for row in rows if row["method"] == "ROSE" and row["column"] == "0.7" and row["metric"].startswith("perp"))
    assert (rose["seeds"], rose["best"], rose["baseline"], rose["pairs"]) == ("0 1 2", "True", "SparseGPT", "3")
    assert float(rose["mean"]) == pytest.approx(26.3)
    assert float(rose["low"]) < float(rose["difference"]) < float(rose["high"]) < 0
    assert (rose["published"], rose["trust"]) == ("26.38", "primary")


def test_latex_has_booktabs_tables(report, tmp_path):
    text = latex(report)
    assert r"ROSE & \textbf{26.30 $\pm$ 0.26} & 300.00 \\" in text
    assert text.count(r"\toprule") == text.count(r"\bottomrule") == len(report.tables)
    assert "perplexity.wikitext2" in text
    assert not re.search(r"(?<!\\)[%_#]", text)
    if shutil.which("pdflatex") is None:
        pytest.skip("needs pdflatex")
    (tmp_path / "t.tex").write_text(r"\documentclass{article}\usepackage{booktabs}\begin{document}" + text + r"\end{document}")
    assert subprocess.run(["pdflatex", "-interaction=batchmode", "t.tex"], cwd=tmp_path, check=False).returncode == 0


def test_web_page_is_self_contained_and_escaped(report):
    report.left_out.append("<script>alert(1)</script>")
    page = web_page(report)
    assert "26.30 ± 0.26" in page
    assert page.count("data:image/png;base64,") == 2  # values and differences
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert "<script" not in page


def test_web_page_contains_study_figures(shared, tmp_path):
    import rose_exp

    from ..conftest import small_overrides

    rose_exp.run([*small_overrides(shared), "figures.study=['*.0.self_attn.o_proj']"], tmp_path)
    write_report([tmp_path])
    page = (tmp_path / "report" / "report.html").read_text()
    assert "Effect of the order on model.layers.0.self_attn.o_proj" in page
    assert page.count("data:image/png;base64,") == 3


def test_command_writes_all_formats_and_prints_the_tables(tmp_path, capsys):
    for seed in (0, 1):
        folder = tmp_path / "runs" / str(seed)
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(json.dumps(record("ROSE", 26.0 + seed, seed)))
    main([str(tmp_path / "runs")])
    printed = capsys.readouterr().out
    assert "| ROSE | 26.50 ± 0.71 |" in printed
    written = {path.name for path in (tmp_path / "runs" / "report").iterdir()}
    assert written == {"report.md", "report.csv", "report.tex", "report.html"}
    assert (tmp_path / "runs" / "report" / "report.md").read_text() in printed


def test_missing_and_invalid_records_raise_an_error(tmp_path, capsys):
    with pytest.raises(RoseExpError, match="expected a folder that exists"):
        write_report([tmp_path / "missing"])
    with pytest.raises(SystemExit):
        main([str(tmp_path)])
    assert capsys.readouterr().err.startswith("DIR: expected folders with run.json in them, got none in")
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(RoseExpError, match=r"DIR: expected a run\.json that is not damaged, got none in"):
        write_report([tmp_path])


def test_printed_report_equals_the_file(tmp_path, capsys):
    """Commits have the format of a key, and both are redacted or kept alike."""
    for seed, letter in enumerate("abc"):
        (tmp_path / letter).mkdir()
        run = record("ROSE", 26.0 + seed, protocol__revision=f"{letter * 40}{'+changes' * seed}")
        (tmp_path / letter / "run.json").write_text(json.dumps(run))
    main([str(tmp_path)])
    text = (tmp_path / "report" / "report.md").read_text()
    assert f"* `protocol.revision`: {'a' * 40} | {'b' * 40}+changes | {'c' * 40}+changes+changes" in text
    assert text in capsys.readouterr().out
