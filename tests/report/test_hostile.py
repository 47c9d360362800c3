"""Reports of runs whose names contain markup, commands, formulas and control characters."""

from __future__ import annotations

import csv
import io
import re
import unicodedata

import pytest
from markdown_it import MarkdownIt

from rose_exp.report import format_table
from rose_exp.report.figures import draw_figures
from rose_exp.report.gather import gather
from rose_exp.report.page import web_page
from rose_exp.report.terminal import show_config
from rose_exp.report.text import comma_separated, latex, markdown
from rose_exp.runtime.escaping import FORMULA, INVISIBLE, visible

from .records import record

HOSTILE = [
    r"\input{/etc/passwd}\end{tabular}",
    "}{$^~%&#_",
    "a | b\n| c",
    "`x` ``y``",
    "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "[x](javascript:alert(1)) ![y](http://e/z.png) [z]: http://e",
    "=HYPERLINK(1)",
    "+1+cmd|' /C calc'!A0",
    "@SUM(A1)",
    "-1-1",
    "\x1b[31mred\x1b]0;title\x07\x9b2J\x08\r\n\ttab",
    "\u202egnp.\u2066x\u200b\u2028",
    "# heading",
    "* item\n- [ ] task\n1. one",
    "_under_ __strong__ *em* **b** ~~s~~ $x^2$",
    r"$\frac{",
    "{{ 7 * 7 }} {% raw %}",
    "\"quoted\", 'single'",
    "--- ",
    "漢字 é 😀",
]


def hostile_records(text: str) -> list[dict]:
    """Return records with a text in every place that a user or a model chooses."""
    records = []
    for seed in (0, 1):
        for label, value in (("SparseGPT", 27.0), ("ROSE", 26.0)):
            made = record(label, value + seed, seed, ratio=0.5)
            other = record(label, value + seed, seed, ratio=0.6, config__engine__damping=0.2)
            for run in (made, other):
                run["label"] = f"{text} {label}"
                run["run_id"] += text
                run["protocol"]["model"]["name"] = text
                run["protocol"]["device"] = run["protocol"]["revision"] = text
                run["config"]["model"]["path"] = text
                run["config"]["pipeline"]["layers"] = [text]
                run["metrics"][f"perplexity.{text}"] = run["metrics"].pop("perplexity.wikitext2")
                run["protocol"]["evaluation"] = {text: run["protocol"]["evaluation"]["wikitext2"] | {"source": text}}
                run["metrics"][f"zero_shot.{text}"] = 50.0
                run["events"] = [{"kind": text, "layer": None, "detail": text}]
                run["layers"] = [{"name": text, "reordered": False, "error": 0.1, "relative_range": 0.5}]
                run["metrics"]["reordered_layers"] = 0
            records += [made, other]
    failed = record("Wanda", 70.0) | {"status": "failed", "error": text, "label": text, "run_id": text}
    return [*records, failed]


@pytest.fixture(params=HOSTILE, ids=range(len(HOSTILE)))
def text(request):
    return request.param


def report_of(text: str):
    return gather(hostile_records(text), baseline=f"{text} SparseGPT", allowed=["pipeline.layers"])


def unseen(output: str) -> set[str]:
    return {c for c in output if unicodedata.category(c) in INVISIBLE and c not in "\n"}


def test_markdown_has_only_its_own_structure(text):
    harmless = MarkdownIt("gfm-like", {"linkify": False}).parse(markdown(report_of("harmless")))
    tokens = MarkdownIt("gfm-like", {"linkify": False}).parse(markdown(report_of(text)))
    assert [token.type for token in tokens] == [token.type for token in harmless]
    inline = {child.type for token in tokens if token.type == "inline" for child in token.children}
    assert inline <= {"text", "text_special", "strong_open", "strong_close", "code_inline"}
    assert not unseen(markdown(report_of(text)))


def test_latex_is_balanced_and_has_only_its_own_commands(text):
    source = latex(report_of(text))
    commands = set(re.findall(r"\\([A-Za-z]+)", source))
    own = {"begin", "end", "centering", "caption", "toprule", "midrule", "bottomrule", "textbf", "downarrow", "uparrow", "pm"}
    assert commands <= own | {f"text{name}" for name in ("backslash", "asciicircum", "asciitilde", "less", "greater", "bar")}
    rest = re.sub(r"\\[&%#_{}$]", "", source)
    depth = 0
    for character in rest:
        depth += {"{": 1, "}": -1}.get(character, 0)
        assert depth >= 0
    assert depth == 0
    assert rest.count("$") % 2 == 0
    assert not set(rest) & set("#%~^")
    for environment in ("table", "tabular"):
        assert (
            source.count(rf"\begin{{{environment}}}") == source.count(rf"\end{{{environment}}}") == len(report_of(text).tables)
        )
    for table in source.split(r"\begin{tabular}")[1:]:
        columns = len(re.match(r"\{(\w+)\}", table)[1])
        rows = [line for line in table.splitlines() if line.endswith(r" \\")]
        assert {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {columns - 1}
    assert not unseen(source)


def test_csv_is_read_back_without_formulas(text):
    report = report_of(text)
    output = comma_separated(report)
    rows = list(csv.DictReader(io.StringIO(output)))
    assert len(rows) == sum(len(cells) for table in report.tables for cells in table.cells.values())
    assert {row["model"].removeprefix("'") for row in rows} == {visible(text).removeprefix("'")}
    for row in rows:
        for value in row.values():
            assert not value.lstrip().startswith(FORMULA) or float(value) < 0
    assert not unseen(output)


def test_web_page_has_only_its_own_elements():
    harmless = re.findall(r"</?\w+", web_page(report_of("harmless")))
    for text in (" ".join(HOSTILE), r"$\frac{", HOSTILE[4]):
        page = web_page(report_of(text))
        assert re.findall(r"</?\w+", page) == harmless
        assert not unseen(page)


def test_terminal_tables_stay_in_their_lines(text):
    records = hostile_records(text)[:-1]
    output = format_table(records)
    assert len(output.splitlines()) == len(records) + 2
    assert not unseen(output)


def test_figures_are_drawn_with_any_name(text, tmp_path):
    path = draw_figures(hostile_records(text)[0], tmp_path)["layers"]
    assert path.stat().st_size > 1000


def test_configuration_tree_shows_the_text_itself(text):
    from rich.console import Console

    out = io.StringIO()
    show_config({"model": {text: text}, "tags": [f"[bold]{text}", "hf_" + "a1" * 20]}, Console(file=out, width=1000))
    assert not unseen(out.getvalue())
    assert visible(text) in out.getvalue()
    assert "a1a1" not in out.getvalue()
