"""Methods and scores of other packages are choices, options and parts of the run ID like the built-in ones."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from rose_exp.engine import METHODS
from rose_exp.engine.scores import SCORES
from rose_exp.runtime.errors import SettingsError
from rose_exp.runtime.plugins import _package_sha256

from .packages import Points, command, forget, installing, write_package

MODULE = '''
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge
from rose_exp.engine import Method
from rose_exp.engine.methods.base import Solution, drop


@dataclass(frozen=True)
class Random(Method):
    """Prunes random weights."""

    seed: Annotated[int, Ge(0)] = 0

    def working(self, sparsity):
        return ()

    def prune(self, layer):
        scores = torch.rand(layer.weight.shape, generator=torch.Generator().manual_seed(self.seed))
        mask = layer.sparsity.select_by_row(scores)
        return Solution(drop(layer.weight, mask), mask)


def power(layer):
    return layer.transposed.square()


NUMBER = 3
'''
POINTS = {"rose_exp.methods": {"random": "my_methods:Random"}, "rose_exp.scores": {"power": "my_methods:power"}}


def write_methods(folder: Path, points: Points, module: str = MODULE) -> None:
    (folder / "broken.py").write_text("undefined\n")
    write_package(folder, "my_methods", "1.2", module, points)


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Install a package with entry points in this process."""
    with installing(write_methods, tmp_path, "my_methods", monkeypatch) as installed:
        yield installed


def test_a_run_with_a_method_and_a_score_of_a_package(small, tmp_path):
    write_methods(tmp_path, POINTS)
    run = [*small, "figures.draw=false"]
    done = command(tmp_path, "-m", *run, "method=random", "method.options.seed=1,2")
    assert done.returncode == 0, done.stderr
    ordered = command(tmp_path, *run, "method=rose", "reorder.score=power")
    assert ordered.returncode == 0, ordered.stderr
    records = [json.loads(path.read_text()) for path in tmp_path.glob("outputs/*/run.json")]
    assert sorted(record["label"] for record in records) == ["Random", "Random", "SparseGPT reordered"]
    values = {json.dumps(record["config"]["method"]["options"]): record["metrics"] for record in records}
    assert values['{"seed": 1}'] != values['{"seed": 2}']
    for record in records:
        (used,) = record["protocol"]["plugins"].values()
        assert used.startswith("my-methods 1.2, SHA-256 ")
        assert abs(record["metrics"]["sparsity"] - 0.5) < 0.01


def test_methods_of_packages_are_listed_in_the_help(tmp_path):
    write_methods(tmp_path, POINTS)
    done = command(tmp_path, "--help")
    assert re.search("^  random +of my-methods 1.2$", done.stdout, re.MULTILINE)
    assert "name: random" in command(tmp_path, "--cfg", "job", "method=random").stdout
    wrong = command(tmp_path, "method=randm")
    assert "oats, random, rose" in wrong.stderr
    assert "did you mean 'random'?" in wrong.stderr
    assert "Traceback" not in wrong.stderr


def test_options_of_packages_are_checked(install):
    from rose_exp.cli.command import check_command

    install(POINTS)
    (job,) = check_command(["method=random", "method.options.seed=3"]).jobs
    assert job.settings.method.create().seed == 3
    for text, message in {
        "method.options.seed=-1": "method.options.seed: expected",
        "method.options.sed=1": "method.options.sed: no such setting; did you mean 'method.options.seed'",
        "reorder=rose": "reorder: expected none, because method random does not prune columns sequentially",
    }.items():
        with pytest.raises(SettingsError, match=message):
            check_command(["method=random", text])
    with pytest.raises(SettingsError, match="reorder.score: .*one of .*power.*got 'powr'"):
        check_command(["method=rose", "reorder.score=powr"])


def test_run_id_depends_on_the_code_of_the_package(install, tmp_path):
    from rose_exp.cli.command import check_command

    def ids() -> dict[str, str]:
        commands = ("method=random", "method=rose reorder.score=power", "method=rose", "method=wanda")
        return {text: check_command(text.split()).jobs[0].run_id for text in commands}

    plain = {text: check_command([text]).jobs[0].run_id for text in ("method=rose", "method=wanda")}
    install(POINTS)
    before = ids()
    assert plain == {text: before[text] for text in plain}
    (tmp_path / "my_methods.py").write_text(MODULE + "\n# another version\n")
    _package_sha256.cache_clear()
    after = ids()
    assert [text for text in before if before[text] != after[text]] == ["method=random", "method=rose reorder.score=power"]


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (
            {"rose_exp.methods": {"wanda": "my_methods:Random"}},
            "entry point wanda of .*: expected a new name, got wanda",
        ),
        ({"rose_exp.methods": {"dense": "my_methods:Random"}}, "expected a new name, got dense, which exists"),
        (
            {"rose_exp.methods": {"my-own": "my_methods:Random"}},
            "expected a name of letters, .*, got 'my-own'",
        ),
        (
            {"rose_exp.methods": {"mine": "my_methods:power"}},
            r"mine of rose_exp.methods \(my-methods 1.2\): .*Method",
        ),
        ({"rose_exp.methods": {"mine": "my_methods:Missing"}}, "cannot load my_methods:Missing"),
        ({"rose_exp.methods": {"mine": "nothing:Mine"}}, "cannot load nothing:Mine: No module named 'nothing'"),
        ({"rose_exp.scores": {"mine": "my_methods:NUMBER"}}, "rose_exp.scores.*: expected a function, got int 3"),
        ({"rose_exp.methods": {"mine": "broken:Mine"}}, "cannot load broken:Mine: name 'undefined' is not defined"),
        ({"rose_exp.scores": {"obs": "my_methods:power"}}, "expected a new name, got obs, which exists"),
    ],
    ids=["known", "dense", "hyphen", "function", "missing", "no module", "failing module", "number", "known score"],
)
def test_broken_entry_points_are_one_error(install, points, message):
    from rose_exp.cli.command import check_command

    install(points)
    before = dict(METHODS), dict(SCORES)
    for _ in range(2):  # also the second time
        with pytest.raises(SettingsError, match=message) as caught:
            check_command(["method=wanda"])
        assert len(caught.value.problems) == 1
    assert before == (METHODS, SCORES)


def test_broken_entry_points_have_no_traceback(tmp_path):
    write_methods(tmp_path, {"rose_exp.methods": {"mine": "nothing:Mine"}})
    for arguments in (["method=wanda"], ["-m", "method=wanda,rose"]):
        done = command(tmp_path, *arguments)
        assert "entry point mine of rose_exp.methods (my-methods 1.2): cannot load nothing:Mine" in done.stderr
        assert "Traceback" not in done.stderr
        assert done.returncode in (1, 2)


def test_equal_names_of_two_packages_are_an_error(install, tmp_path):
    from rose_exp.cli.command import check_command

    install(POINTS)
    other = tmp_path / "other_methods-3.0.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: other-methods\nVersion: 3.0\n")
    (other / "entry_points.txt").write_text("[rose_exp.scores]\npower = my_methods:power\n")
    forget()
    with pytest.raises(SettingsError, match=r"expected a name of its own, got that of (my|other)-methods"):
        check_command(["method=wanda"])


def test_modules_of_namespaces_have_a_fingerprint(install, tmp_path):
    from rose_exp.cli.command import check_command

    (tmp_path / "company/pruning").mkdir(parents=True)
    (tmp_path / "company/pruning/__init__.py").write_text("")
    (tmp_path / "company/pruning/scores.py").write_text(MODULE)
    install({"rose_exp.scores": {"power": "company.pruning.scores:power"}})
    command_line = ["method=rose", "reorder.score=power"]
    before = check_command(command_line).jobs[0].run_id
    (tmp_path / "company/pruning/__init__.py").write_text("# changed\n")
    _package_sha256.cache_clear()
    assert check_command(command_line).jobs[0].run_id != before
