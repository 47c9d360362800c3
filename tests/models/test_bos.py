"""BOS modes: which models get a BOS token at the start of every window."""

from __future__ import annotations

import pytest
import transformers

import rose_exp
from rose_exp.models import needs_bos, resolve_bos
from rose_exp.runtime.errors import RoseExpError
from rose_exp.settings.schema import ModelSettings

from ..data.small_tokenizers import BOS, build_tokenizer
from ..evaluation.test_zero_shot import own_task
from .families import CONFIGS, build

GEMMA = ("gemma2", "gemma3", "gemma4")


@pytest.mark.parametrize("family", CONFIGS)
def test_only_gemma_needs_bos(family):
    name, arguments = CONFIGS[family]
    assert needs_bos(getattr(transformers, name)(**arguments)) == (family in GEMMA)


def test_multimodal_models_follow_their_text_model():
    assert needs_bos(transformers.Gemma3Config())
    assert needs_bos(transformers.PaliGemmaConfig())
    llava = transformers.LlavaConfig(text_config=transformers.Gemma2Config())
    assert needs_bos(llava)
    assert not needs_bos(transformers.LlavaConfig(text_config=transformers.LlamaConfig()))


def saved(family, folder):
    name, arguments = CONFIGS[family]
    getattr(transformers, name)(**arguments).save_pretrained(folder)
    return ModelSettings(path=str(folder))


def test_auto_resolves_to_windows_for_gemma_and_tokenizer_for_llama(tmp_path):
    tokenizer = build_tokenizer()
    assert resolve_bos(saved("gemma3", tmp_path / "gemma3"), tokenizer) == "windows"
    assert resolve_bos(saved("llama", tmp_path / "llama"), tokenizer) == "tokenizer"
    assert resolve_bos(saved("llama", tmp_path / "llama"), build_tokenizer(bos=None)) == "tokenizer"


@pytest.mark.parametrize("bos", ["tokenizer", "windows", "none"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_explicit_setting_overrides_the_family_default(family, bos, tmp_path):
    settings = saved(family, tmp_path).model_copy(update={"bos": bos})
    assert resolve_bos(settings, build_tokenizer()) == bos


def test_windows_mode_requires_a_bos_token(tmp_path):
    settings, without = saved("gemma3", tmp_path), build_tokenizer(bos=None)
    message = "model.bos: expected tokenizer or none, since the tokenizer has no BOS token, got "
    with pytest.raises(RoseExpError, match=f"{message}windows$"):
        resolve_bos(settings.model_copy(update={"bos": "windows"}), without)
    with pytest.raises(RoseExpError, match=f"{message}auto, which means windows for this model$"):
        resolve_bos(settings, without)
    assert resolve_bos(settings.model_copy(update={"bos": "none"}), without) == "none"


def overrides(family, folder, **tokenizer):
    build(family).save_pretrained(folder / "model")
    build_tokenizer(**tokenizer).save_pretrained(folder / "model")
    (folder / "text.txt").write_text(" ".join("the quick brown fox jumps over the lazy dog".replace(" ", "")) * 20)
    return [
        *("model=local", f"model.path={folder}/model", "method=wanda", "figures.draw=false"),
        *("calibration=local", f"calibration.path={folder}/text.txt", "calibration.samples=3", "calibration.window=16"),
        *("evaluation=local", f"evaluation.perplexity.local.path={folder}/text.txt"),
        *("evaluation.perplexity.local.window=16", "evaluation.perplexity.local.windows=4"),
    ]


@pytest.mark.parametrize(("family", "bos"), [("gemma3", "windows"), ("llama", "tokenizer")])
def test_bos_mode_is_recorded_and_changes_the_run_id(family, bos, tmp_path, monkeypatch):
    from rose_exp.runs import pruning

    seen = []
    prune_model = pruning.prune_model
    monkeypatch.setattr(
        pruning, "prune_model", lambda model, tokens, *a, **k: seen.append(tokens) or prune_model(model, tokens, *a, **k)
    )
    zero_shot = ["evaluation=[local,zero_shot]", "evaluation.zero_shot.tasks=[own]", "evaluation.zero_shot.limit=2"]
    zero_shot += [f"evaluation.zero_shot.include_path={own_task(tmp_path)}"]
    record = rose_exp.run([*overrides(family, tmp_path), *zero_shot], tmp_path / "runs")
    assert record["protocol"]["zero_shot"]["bos"] == bos
    assert record["config"]["model"]["bos"] == "auto"
    assert record["protocol"]["calibration"]["bos"] == record["protocol"]["evaluation"]["local"]["bos"] == bos
    assert ((seen[0] == BOS).sum(dim=1) == 1).all() == (bos == "windows")
    other = rose_exp.run([*overrides(family, tmp_path), "model.bos=none"], tmp_path / "runs")
    assert other["run_id"] != record["run_id"]
    assert other["metrics"]["perplexity.local"] != record["metrics"]["perplexity.local"]


def test_missing_bos_token_raises_before_the_model_is_loaded(tmp_path, monkeypatch):
    from rose_exp.runs import language as experiment

    monkeypatch.setattr(experiment, "load_model", lambda _: pytest.fail("the model is loaded"))
    with pytest.raises(RoseExpError, match=r"model\.bos: expected tokenizer or none"):
        rose_exp.run(overrides("gemma3", tmp_path, bos=None), tmp_path / "runs")
