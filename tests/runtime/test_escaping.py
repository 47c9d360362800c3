"""Escaping of hostile text for every output format, read back by a parser of the format."""

from __future__ import annotations

import csv
import io
import re
import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from rose_exp.runtime.escaping import (
    FORMULA,
    INVISIBLE,
    csv_cell,
    figure_label,
    latex,
    markdown,
    markdown_block,
    markdown_code,
    terminal,
    visible,
)

PIECES = [
    *(
        "\\",
        "{",
        "}",
        "$",
        "^",
        "~",
        "%",
        "&",
        "#",
        "_",
        "*",
        "`",
        "|",
        "<",
        ">",
        "[",
        "]",
        "(",
        ")",
        "!",
        "+",
        "-",
        "=",
        "@",
        ":",
    ),
    *(
        "\n",
        "\r",
        "\t",
        "\x00",
        "\x1b[31m",
        "\x1b]0;title\x07",
        "\x9b2J",
        "\u202e",
        "\u2066",
        "\u200b",
        "\u2028",
        "\ufeff",
        "\ud800",
    ),
    *(
        "<script>alert(1)</script>",
        "![x](http://e/x.png)",
        "[x](javascript:a)",
        "[x]: http://e",
        "&lt;",
        "&#60;",
        "<http://e.x>",
    ),
    *(
        r"\input{/etc/passwd}",
        r"\end{tabular}",
        r"\\",
        "$x$",
        "``",
        "```",
        "~~~",
        "---",
        "# ",
        "1. ",
        "* ",
        "- [ ] ",
        "**",
        "__",
    ),
    *("=1+1", "+cmd|'/c calc'!A0", "@SUM(A1)", "-2+3", "\uff1d1", "a", "B7", " ", "  ", "é", "漢", "😀", "."),
]
fuzzed = settings(deadline=None, max_examples=200)
hostile = st.lists(st.sampled_from(PIECES), max_size=12).map("".join) | st.text(max_size=40)


def shown(text: str) -> str:
    """Return what a reader sees of a text: without invisible characters, and with single spaces."""
    return " ".join(visible(text).split())


@fuzzed
@given(hostile)
def test_no_invisible_character_reaches_a_terminal(text):
    assert not {c for c in terminal(text) if unicodedata.category(c) in INVISIBLE}
    assert not {c for c in terminal(text, lines=True) if unicodedata.category(c) in INVISIBLE and c not in "\n\t"}
    assert terminal(terminal(text)) == terminal(text)
    terminal(text).encode()


def test_escape_sequences_and_overrides_become_visible():
    assert terminal("a\x1b[31mb\u202ec\ud800\r\nd") == r"a\x1b[31mb\u202ec\ud800 d"
    assert terminal("a\tb\r\nc\rd", lines=True) == "a\tb\nc\\x0dd"
    assert terminal("ROSE (σ=0.5) é 漢 😀") == "ROSE (σ=0.5) é 漢 😀"


def texts_of(tokens) -> str:
    """Return the text of parsed Markdown, which must contain no other inline elements."""
    (inline,) = [token for token in tokens if token.type == "inline"]
    assert {child.type for child in inline.children} <= {"text", "text_special"}, inline.children
    return "".join(child.content for child in inline.children)


@fuzzed
@given(hostile)
@example("1. a")
@example("a\\|b")
@example("[x]: http://e")
@example("- [ ] a")
def test_markdown_shows_the_text_itself(text):
    parser = MarkdownIt("gfm-like", {"linkify": False})
    for start, template in ((False, "## {}"), (True, "* {}"), (True, "{}")):
        tokens = parser.parse(template.format(markdown(text, start)) + "\n")
        if shown(text):
            assert " ".join(texts_of(tokens).split()) == shown(text)
            assert [token.type for token in tokens if token.type.endswith("_open")] in (
                ["heading_open"],
                ["bullet_list_open", "list_item_open", "paragraph_open"],
                ["paragraph_open"],
            )


@fuzzed
@given(st.lists(hostile, min_size=1, max_size=4))
def test_markdown_cells_stay_in_their_cells(texts):
    line = "| " + " | ".join(map(markdown, texts)) + " |"
    tokens = MarkdownIt("gfm-like", {"linkify": False}).parse(f"{line}\n|{'---|' * len(texts)}\n{line}\n")
    cells = [token for token in tokens if token.type == "inline"]
    assert [token.type for token in tokens].count("tr_open") == 2
    found = ["".join(child.content for child in cell.children) for cell in cells]
    assert [" ".join(cell.split()) for cell in found] == 2 * list(map(shown, texts))
    assert {child.type for cell in cells for child in cell.children} <= {"text", "text_special"}


@fuzzed
@given(hostile)
def test_markdown_code_shows_the_text_itself(text):
    parser = MarkdownIt("gfm-like", {"linkify": False})
    if text.strip():
        (inline,) = [t for t in parser.parse(f"* {markdown_code(text)}\n") if t.type == "inline"]
        assert [child.type for child in inline.children] == ["code_inline"]
        assert inline.children[0].content.strip() == visible(text).strip()
    (block,) = parser.parse(markdown_block(text))
    assert (block.type, block.content) == ("fence", visible(text, lines=True) + "\n")


def check_latex(text: str) -> None:
    """Check that a text contains only known commands, balanced groups and no other active character."""
    rest = re.sub(r"\\(?:textbackslash|textasciicircum|textasciitilde|textless|textgreater|textbar)\{\}", "", text)
    rest = re.sub(r"\\[&%#_{}$]", "", rest)
    rest = rest.replace(r"$\pm$", "").replace(r"$\times$", "")
    rest = re.sub(r"\{[\[\]*]\}", "", rest)
    assert not set(rest) & set("\\{}$^~%&#_<>|[]*"), rest


@fuzzed
@given(hostile)
def test_latex_has_balanced_groups_and_no_active_characters(text):
    check_latex(latex(text))


def test_latex_shows_the_text_itself():
    assert latex(r"\input{x} 50 % & a_b^c~d #1 $x$") == (
        r"\textbackslash{}input\{x\} 50 \% \& a\_b\textasciicircum{}c\textasciitilde{}d \#1 \$x\$"
    )
    assert latex("[1] 2 ± 3 × 4 – 5") == r"{[}1{]} 2 $\pm$ 3 $\times$ 4 -- 5"


@fuzzed
@given(hostile)
def test_csv_cells_are_read_back_and_are_no_formulas(text):
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerow([csv_cell(text), "end"])
    (row,) = csv.reader(io.StringIO(file.getvalue()))
    assert row[0].removeprefix("'") == visible(text).removeprefix("'")
    assert row[1] == "end"
    assert not row[0].lstrip().startswith(FORMULA) or re.fullmatch(r"[+-]?[\d.]+([eE][+-]?\d+)?%?", row[0])


@pytest.mark.parametrize("number", ["-1", "-0.5", "+3", "-1e-05", ".5", "-4.4%"])
def test_numbers_in_csv_stay_numbers(number):
    assert csv_cell(number) == number


@pytest.mark.parametrize("value", [-1, -0.5, float("-inf"), None, True])
def test_values_in_csv_stay_values(value):
    assert csv_cell(value) is value


@pytest.mark.parametrize("text", ["=1+1", "+1+1", "-1+1", "@A1", " =1", "\t=1", "\r=1", "-", "+x", "＝1", "-1_000"])
def test_formulas_in_csv_become_text(text):
    assert csv_cell(text) == f"'{visible(text)}"


@fuzzed
@given(hostile)
def test_figure_labels_have_no_math_mode(text):
    from matplotlib.cbook import is_math_text

    label = figure_label(text)
    assert label.count("$") == label.count(r"\$")
    assert not is_math_text(label)
    assert not label.startswith("_")
