"""Examples of docs/extending.md: the package is installed, its files are created and its commands run."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rose_exp.engine import Ordering, Unstructured, prune_layer
from rose_exp.engine.scores import SCORES

from .conftest import REPOSITORY
from .engine.cases import layer, moments_of

TEXT = (REPOSITORY / "docs/extending.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"`(\S+)`:\n\n```(?:python|yaml|toml)\n(.*?)```", TEXT, re.DOTALL))
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL) for line in block.splitlines()]
LABELS = {
    "rose-exp method=tempered method.options.power=0.25": ["Tempered"],
    "rose-exp -m method=tempered,wanda refine=cg": ["Tempered + CG", "Wanda + CG"],
    "rose-exp method=sparsegpt reorder=rose reorder.score=spread": ["SparseGPT reordered"],
    "rose-exp method=sparsegpt reorder=spread": ["SparseGPT reordered"],
    "rose-exp experiment=tempered": ["Tempered"],
}


@pytest.fixture
def example(monkeypatch):
    """The module of the example package."""
    namespace: dict = {"__name__": "my_pruning"}
    monkeypatch.setitem(sys.modules, "my_pruning", type(sys)("my_pruning"))
    exec(compile(FILES["my_pruning/my_pruning.py"], "my_pruning.py", "exec"), namespace)
    sys.modules["my_pruning"].__dict__.update(namespace)
    return sys.modules["my_pruning"]


def test_the_method_generalizes_wanda(example):
    weight, inputs = layer(10, 30)
    moments = moments_of(inputs)
    for pattern in (0.4, "2:4"):
        mask = prune_layer(weight, moments, method=example.Tempered(power=1.0), sparsity=pattern).mask
        assert torch.equal(mask, prune_layer(weight, moments, method="wanda", sparsity=pattern).mask)
    by_row = prune_layer(weight, moments, method=example.Tempered(power=0.0), sparsity=0.4).mask
    assert torch.equal(by_row, Unstructured(0.4).select_by_row(weight.abs()))
    with pytest.raises(ValueError, match="power: expected a number from 0 to 2, got 3"):
        example.Tempered(power=3)


def test_the_score_orders_columns_by_their_spread(example, monkeypatch):
    monkeypatch.setitem(SCORES, "spread", example.spread)
    weight, inputs = layer(10, 32)
    inputs[:, 8:16] *= 10
    ordering = Ordering(threshold=None, score="spread")
    result = prune_layer(weight, moments_of(inputs), sparsity=0.5, ordering=ordering, block_size=8)
    assert result.reordered
    assert sorted(result.order[:8].tolist()) == list(range(8, 16))


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """Folder with the example files, in whose folder ``site`` the package is installed."""
    folder = tmp_path_factory.mktemp("extending")
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")
    options = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--target", str(folder / "site")]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(folder / "my_pruning")], check=True)
    return folder


def test_every_command_has_an_expected_result():
    assert set(LABELS) == set(COMMANDS)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_example_commands_run(command, installed, small, tmp_path):
    program, *own = shlex.split(command)
    assert program == "rose-exp"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(installed / "site"), str(REPOSITORY)])}
    outputs = [f"hydra.run.dir={tmp_path}/run", f"hydra.sweep.dir={tmp_path}"]
    arguments = [sys.executable, "-m", "rose_exp", *own, *small, "figures.draw=false", *outputs]
    done = subprocess.run(arguments, cwd=installed, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    records = [json.loads(path.read_text(encoding="utf-8")) for path in tmp_path.glob("*/run.json")]
    assert sorted(record["label"] for record in records) == LABELS[command]
    for record in records:
        used = record["protocol"].get("plugins", {})
        assert bool(used) == ("Wanda" not in record["label"])
        assert all(source.startswith("my_pruning 0.1, SHA-256 ") for source in used.values())
