"""Speed evaluation: measured only on hardware that accelerates the sparsity pattern."""

from __future__ import annotations

import json
import re

import pytest
import torch

from rose_exp.engine import SemiStructured, Unstructured
from rose_exp.evaluation.speed import obstacle

from ..cli.test_app import rose_exp

CUDA = torch.device("cuda")


@pytest.mark.parametrize(
    ("sparsity", "device", "capability", "dtype", "reason"),
    [
        (SemiStructured(2, 4), "cpu", (0, 0), torch.float16, "expected a CUDA device with sparse tensor cores, got cpu"),
        (SemiStructured(2, 4), "cuda", (7, 5), torch.float16, "expected a GPU of compute capability 8.0 or later, got 7.5"),
        (SemiStructured(2, 4), "cuda", (9, 0), torch.float32, "expected model.dtype float16 or bfloat16, got float32"),
        (SemiStructured(4, 8), "cuda", (9, 0), torch.float16, "expected 2:4 sparsity, .* got 4:8"),
        (Unstructured(0.5), "cuda", (9, 0), torch.float16, "expected 2:4 sparsity, .* got 50% unstructured"),
        (None, "cuda", (9, 0), torch.float16, "expected 2:4 sparsity, .* got a dense model"),
        (SemiStructured(2, 4), "cuda", (9, 0), torch.bfloat16, None),
    ],
)
def test_obstacle_names_the_unmet_requirement(sparsity, device, capability, dtype, reason, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    found = obstacle(sparsity, torch.device(device), dtype)
    if reason is None:
        assert found is None
    else:
        assert re.fullmatch(reason, found)


def test_run_on_unsupported_hardware_reports_no_speed(small, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("requires a CPU-only environment")
    local = [override for override in small if not override.startswith("evaluation")]
    done = rose_exp(
        *local, "sparsity=2:4", "evaluation=speed", "evaluation.speed.window=128", "hydra.run.dir=out", folder=tmp_path
    )
    assert done.returncode == 0, done.stderr
    reason = "expected a CUDA device with sparse tensor cores, got cpu"
    assert f"evaluation.speed: cannot be measured: {reason}" in done.stdout + done.stderr
    record = json.loads((tmp_path / "out/run.json").read_text())
    assert record["protocol"]["speed"]["not_measured"].startswith("expected a CUDA device")
    assert not any(name.startswith("speed") for name in record["metrics"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_sparse_matmul_matches_the_dense_masked_weights():
    from transformers import AutoModelForCausalLM, LlamaConfig

    from rose_exp.engine import SparseGPT
    from rose_exp.evaluation.speed import measure
    from rose_exp.models import all_linear_layers, find_blocks
    from rose_exp.pruning import PruneContext, PruningPlan, prune_model

    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes)).eval().half()
    tokens = torch.randint(0, 128, (4, 64))
    prune_model(model, tokens, PruningPlan(method=SparseGPT(), sparsity=SemiStructured(2, 4)), PruneContext(device="cuda"))
    layers = all_linear_layers(find_blocks(model))
    before = [layer.weight.clone() for layer in layers]
    found = measure(model.cuda(), layers, tokens.cuda(), repeats=2)
    assert found.difference < 1e-2
    assert found.sparse_bytes < 0.7 * found.dense_bytes
    assert all(torch.equal(a.cuda(), layer.weight) for a, layer in zip(before, layers, strict=True))
