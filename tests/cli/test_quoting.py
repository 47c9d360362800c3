"""Values that Hydra reads as something else: the error says how to quote them, and the suggestion works."""

from __future__ import annotations

import os
import random
import re
import shlex

import pytest

from rose_exp.cli.command import check_command
from rose_exp.cli.quoting import quoted, value_of
from rose_exp.runtime.errors import SettingsError

SPECIAL = "ab/=,[](){}'\"\\ $~#:;%&*?!|<>.-+@é\t`^"
NAMES = [f"a{character}b.txt" for character in "=,[](){}'\"\\ $~#:;%&*?!|<>-+@é`^"]
NAMES += [
    "a, b.txt",
    "[a].txt",
    "a[1,2].txt",
    "x (1).txt",
    "it's.txt",
    "'a'.txt",
    "a=b=c.txt",
    "${seed}.txt",
    "a b  c.txt",
    "7",
]

FEW = ("a,b.txt", "a=b.txt", "a[b.txt", "it's.txt", "${seed}.txt", "7")


def marks(name: str, multirun: bool):
    return () if name in FEW else pytest.mark.exhaustive if multirun else pytest.mark.slow


def problems_of(arguments: list[str]) -> list[str]:
    try:
        check_command(arguments)
    except SettingsError as error:
        return error.problems
    return []


def suggestions(problems: list[str]) -> list[str]:
    """Return the shell arguments that the problems suggest."""
    return [match[1] for problem in problems if (match := re.search(r" write (.*)$", problem))]


def test_quoted_values_have_exactly_the_text():
    draw = random.Random(0)
    texts = ["".join(draw.choice(SPECIAL) for _ in range(draw.randint(1, 12))) for _ in range(1500)]
    texts += [f"{text}${{x}}{text}" for text in texts[:200]] + ["null", "true", "1e5", "a,b", "[a]", "\\${x}"]
    for text in texts:
        (argument,) = shlex.split(quoted("model.path", text))
        assert value_of(argument) == text


@pytest.mark.parametrize(
    ("name", "multirun"),
    [pytest.param(name, many, marks=marks(name, many)) for name in NAMES for many in (False, True)],
)
def test_suggested_quotes_give_the_path_of_an_existing_file(name, multirun, tmp_path, monkeypatch):
    """Hydra reads some of the names as they are; all others have an error with a suggestion that works."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text("some text")
    common = ["-m"] if multirun else []
    raw = [*common, "calibration=local", f"calibration.path={name}"]
    problems = problems_of(raw)
    if not problems:
        assert [job.settings.calibration.path for job in check_command(raw).jobs] == [name]
        return
    assert len(set(suggestions(problems))) == 1, problems
    fixed = [*common, "calibration=local", *shlex.split(suggestions(problems)[0])]
    assert [job.settings.calibration.path for job in check_command(fixed).jobs] == [name]


def test_values_that_the_shell_has_split_get_a_suggestion(tmp_path):
    path = tmp_path / "my own text.txt"
    path.write_text("some text")
    problems = problems_of(["calibration=local", *f"calibration.path={path}".split()])
    (suggestion, *_) = suggestions(problems[-2:])[-1:]
    assert shlex.split(suggestion) == [f'calibration.path="{path}"']
    assert check_command(["calibration=local", *shlex.split(suggestion)]).jobs[0].settings.calibration.path == str(path)


@pytest.mark.parametrize(
    ("argument", "suggestion"),
    [
        ("model.revision=123", 'model.revision="123"'),
        ("model.revision=true", 'model.revision="true"'),
        ("tags=[1,b]", 'tags=["1","b"]'),
        ("model.path=[a]", 'model.path="[a]"'),
        ("model.path={a:1}", 'model.path="{a:1}"'),
    ],
)
def test_text_that_looks_like_another_type_gets_a_suggestion(argument, suggestion):
    problems = problems_of([argument])
    assert len(problems) == 1
    assert "expected text" in problems[0]
    assert [shlex.split(text) for text in suggestions(problems)] == [[suggestion]]
    assert problems_of([suggestion]) == [] or "expected text" not in problems_of([suggestion])[0]


@pytest.mark.parametrize("argument", ["method=rose,", "seed", "method=wanda", "seed=3", "evaluation.limit=[1"])
def test_no_quotes_are_suggested_for_choices_and_correct_values(argument):
    for problem in problems_of([argument]):
        assert 'method="' not in problem
        assert os.linesep not in problem
