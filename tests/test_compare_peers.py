"""The comparison with llm-compressor: its own parts, without the other project."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from rose_exp.engine import METHODS
from scripts.compare_peers import ROWS, WAYS, table

from .conftest import REPOSITORY


def test_rows_name_methods_of_this_project():
    assert {method for method, _ in ROWS.values()} <= set(METHODS)


def test_table_shows_means_over_seeds_and_the_ratio_of_times():
    results = [
        {"row": "wanda-0.5", "way": way, "seed": seed, "seconds": seconds + seed, "peak_bytes": 2e9, "sparsity": 0.5}
        | {"perplexity": 10.0 + seed}
        for way, seconds in zip(WAYS, (40, 20, 10), strict=True)
        for seed in (0, 2)
    ]
    lines = table(results).splitlines()
    assert lines[2] == "| wanda-0.5, llm-compressor | 41.0 ± 1.4 | 1.00 | 2.00 ± 0.00 | 0.5000 ± 0.0000 | 11.00 ± 1.41 | 2 |"
    assert lines[3].startswith("| wanda-0.5, rose_exp | 21.0 ± 1.4 | 1.95 |")
    assert table(results[-1:]).splitlines()[2] == "| wanda-0.5, rose_exp bfloat16 | 12.0 |  | 2.00 | 0.5000 | 12.00 | 1 |"


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS)
def test_process_prunes_and_reports(row, tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
    AutoModelForCausalLM.from_config(LlamaConfig(**sizes)).save_pretrained(tmp_path / "dense")
    torch.save(torch.randint(0, 96, (2, 64)), tmp_path / "tokens.pt")
    arguments = ["--run", "rose_exp", row, "dense", "tokens.pt", "pruned.pt"]
    script = REPOSITORY / "scripts/compare_peers.py"
    done = subprocess.run([sys.executable, script, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["seconds"] > 0
    assert found["peak_bytes"] > 1e8
    weights = torch.load(tmp_path / "pruned.pt")["model.layers.1.mlp.down_proj.weight"]
    assert (weights == 0).float().mean() == pytest.approx(0.7 if row == "sparsegpt-0.7" else 0.5, abs=0.01)
