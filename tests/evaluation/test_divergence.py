"""The divergence from the dense model is that of the models' logits, and measuring it changes nothing else."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

import rose_exp
from rose_exp.cli.command import check_command
from rose_exp.evaluation import Comparison, dense_states, perplexity, whole_answers
from rose_exp.runs.language import LanguageRun
from rose_exp.runtime.errors import RoseExpError, SettingsError

from ..models import survey
from ..models.families import build, tokens

CLASSES = ("LlamaConfig", "GPT2Config", "Gemma2Config", "CohereConfig", "GraniteConfig", "MixtralConfig", "OPTConfig")
WINDOWS = torch.randint(3, survey.VOCABULARY, (5, 24), generator=torch.Generator().manual_seed(0))


def states_of(model: nn.Module, windows: torch.Tensor) -> torch.Tensor:
    return dense_states(model, lambda around: whole_answers(model, windows, 2, around), 3, "dense")


@pytest.mark.parametrize("name", CLASSES)
def test_divergence_is_that_of_the_logits(name):
    """Also for models that scale or cap their logits (Gemma 2, Cohere, Granite)."""
    dense, windows = survey.build(name), WINDOWS
    with torch.no_grad():
        dense.get_output_embeddings().weight.mul_(20)  # large logits, so that caps matter
    states = states_of(dense, windows)
    model = copy.deepcopy(dense)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layers" in name or ".h." in name:
                parameter.mul_(1 + 3 * torch.randn_like(parameter))
        p, q = (functional.log_softmax(m(windows).logits[:, :-1].double(), dim=-1) for m in (dense, model))
    kl = (p.exp() * (p - q)).sum(dim=-1).mean(dim=1)
    same = (p.argmax(dim=-1) == q.argmax(dim=-1)).double().mean(dim=1)
    alone = perplexity(model, windows, 2)
    result = perplexity(model, windows, 2, comparison=Comparison(model, states))
    assert (result.value, result.standard_error) == (alone.value, alone.standard_error)
    found = result.divergence
    assert found.kl == pytest.approx(float(kl.mean()), rel=1e-4, abs=1e-7)  # float32
    assert found.kl_standard_error == pytest.approx(float(kl.std()) / math.sqrt(5), rel=1e-3, abs=1e-7)
    assert found.agreement == pytest.approx(float(same.mean()))
    assert found.agreement_standard_error == pytest.approx(float(same.std()) / math.sqrt(5), abs=1e-9)
    assert found.kl > 1e-4


def test_divergence_of_the_dense_model_is_zero():
    dense, windows = build("llama"), tokens(3)
    found = perplexity(dense, windows, 1, comparison=Comparison(dense, states_of(dense, windows))).divergence
    assert found.kl == pytest.approx(0, abs=1e-7)
    assert (found.agreement, found.agreement_standard_error) == (1, 0)


def test_tokens_with_probability_zero_do_not_count():
    logits, dense = torch.zeros(2, 4), torch.zeros(2, 4)
    logits[:, 3] = dense[:, 3] = -math.inf
    comparison = Comparison(build("llama"), torch.empty(0))
    comparison.add(logits, dense)
    assert comparison.windows == [(0.0, 1.0)]


def test_model_with_another_use_of_its_output_layer_is_rejected():
    class Shortened(nn.Module):
        """Computes the logits of the last position only."""

        def __init__(self):
            super().__init__()
            self.inner = build("llama")

        def get_output_embeddings(self):
            return self.inner.lm_head

        def forward(self, input_ids, use_cache):
            return self.inner(input_ids=input_ids, logits_to_keep=1, use_cache=use_cache)

    with pytest.raises(RoseExpError, match=r"^evaluation.divergence: expected a model that calls its output layer once"):
        states_of(Shortened(), tokens(2))


MODES = {"whole": [], "by blocks": ["pipeline.by_blocks=true"], "from disk": ["pipeline.weights=disk"]}
COMPARED = ["method=wanda", "evaluation.divergence=true"]
NAMES = ["kl_divergence.local", "top1_agreement.local"]


def test_run_measures_the_same_divergence_in_every_mode(small, tmp_path, monkeypatch):
    monkeypatch.setenv("ROSE_EXP_CACHE_GB", "0")
    plain = rose_exp.run([*small, "method=wanda"], tmp_path / "plain")["metrics"]
    found = {
        name: rose_exp.run([*small, *COMPARED, *mode], tmp_path / name.replace(" ", "_"))["metrics"]
        for name, mode in MODES.items()
    }
    for metrics in found.values():
        assert metrics == found["whole"]
        assert {name: value for name, value in metrics.items() if name not in NAMES} == plain
    assert 0 < found["whole"]["kl_divergence.local"] < 5
    assert 0.1 < found["whole"]["top1_agreement.local"] < 1


@pytest.mark.parametrize("mode", ["whole", "from disk"])
def test_resumed_run_compares_with_the_dense_model(small, tmp_path, mode, monkeypatch):
    """Although pruned blocks are restored or read from the run's folder."""
    monkeypatch.setenv("ROSE_EXP_CACHE_GB", "0")
    command = [*small, *COMPARED, *MODES[mode]]
    expected = rose_exp.run(command, tmp_path / "whole")["metrics"]
    with monkeypatch.context() as patch:
        patch.setattr(LanguageRun, "measure", interrupted)
        with pytest.raises(KeyboardInterrupt):
            rose_exp.run(command, tmp_path / "cut")
    record = rose_exp.run(command, tmp_path / "cut")
    assert record["resumed"]
    assert record["metrics"] == expected


def interrupted(_run: LanguageRun) -> None:
    raise KeyboardInterrupt


def test_runs_of_a_model_share_the_predictions_of_the_dense_model(small, tmp_path, monkeypatch):
    monkeypatch.setenv("ROSE_EXP_CACHE", str(tmp_path / "cache"))
    computed = []
    original = LanguageRun._compute_dense_states

    def compute(*arguments):
        computed.append(arguments[-1])
        return original(*arguments)

    monkeypatch.setattr(LanguageRun, "_compute_dense_states", compute)
    first = rose_exp.run([*small, *COMPARED], tmp_path / "first")["metrics"]
    assert rose_exp.run([*small, *COMPARED, "rerun=true"], tmp_path / "second")["metrics"] == first
    assert computed == ["local"]
    rose_exp.run([*small, "method=magnitude", *COMPARED[1:], "seed=1"], tmp_path / "third")
    assert computed == ["local"]
    rose_exp.run([*small, *COMPARED, "evaluation.perplexity.local.windows=4"], tmp_path / "fourth")
    assert computed == ["local", "local"]


def test_dense_run_and_diffusion_model_are_not_compared(small, tmp_path):
    metrics = rose_exp.run([*small, "method=dense", "evaluation.divergence=true"], tmp_path)["metrics"]
    assert not set(NAMES) & set(metrics)
    with pytest.raises(SettingsError, match="evaluation.divergence: expected false for a diffusion model, got true"):
        check_command(["model=small-sd3", "evaluation.divergence=true"])
