"""Pruning and evaluation of the real embedded model, downloaded once from the package index."""

from __future__ import annotations

import pytest
import torch

from rose_exp.data import contiguous_windows, draw_windows, load_text
from rose_exp.engine import METHODS, Ordering, SparseGPT, Unstructured
from rose_exp.evaluation import perplexity
from rose_exp.models import load_model, load_tokenizer, save_model
from rose_exp.pruning import PruningPlan, prune_model
from rose_exp.settings.schema import ModelSettings
from rose_exp.settings.texts import TextSettings

pytestmark = pytest.mark.slow
MODEL = ModelSettings(embedded="smollm2-135m")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(MODEL)


@pytest.fixture(scope="module")
def windows(tokenizer):
    calibration = load_text(TextSettings(embedded="c4"), "calibration")
    evaluation = load_text(TextSettings(embedded="wiki"), "evaluation")
    return (
        draw_windows(calibration, tokenizer, 512, 16, 0, "windows", "calibration").tokens,
        contiguous_windows(evaluation, tokenizer, 512, 8, "evaluation").tokens,
    )


def test_embedded_model_is_the_real_one(tokenizer):
    model = load_model(MODEL).model
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    prompt = tokenizer("The capital of France is", return_tensors="pt").input_ids
    answer = model.generate(prompt, max_new_tokens=3, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0])


def test_methods_rank_as_expected(windows, tmp_path, tokenizer):
    """Perplexity at 50 %: dense < SparseGPT ≤ Wanda < magnitude; ROSE within a few percent of SparseGPT."""
    calibration, evaluation = windows
    loaded = load_model(MODEL)
    dense = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    found = {"dense": perplexity(loaded.model, evaluation, batch=2).value}
    for name, method, ordering in [
        ("magnitude", METHODS["magnitude"](), None),
        ("wanda", METHODS["wanda"](), None),
        ("rose", SparseGPT(), Ordering.rose()),
        ("sparsegpt", SparseGPT(), None),
    ]:
        loaded.model.load_state_dict(dense)
        prune_model(loaded.model, calibration, PruningPlan(method=method, sparsity=Unstructured(0.5), ordering=ordering))
        found[name] = perplexity(loaded.model, evaluation, batch=2).value
    assert found["dense"] == pytest.approx(16, abs=2)
    assert found["dense"] * 1.5 < found["sparsegpt"] <= found["wanda"] < 0.5 * found["magnitude"]
    assert found["rose"] == pytest.approx(found["sparsegpt"], rel=0.05)

    # a model loaded from a GGUF file is saved as a regular checkpoint
    folder = save_model(loaded.model, tokenizer, tmp_path / "model")
    again = load_model(ModelSettings(path=str(folder))).model
    assert not hasattr(again.config, "quantization_config")
    assert perplexity(again, evaluation, batch=2).value == pytest.approx(found["sparsegpt"], rel=1e-5)
    assert all(torch.equal(again.state_dict()[n], v) for n, v in loaded.model.state_dict().items())
