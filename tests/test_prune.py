"""`rose_exp.prune` prunes models in memory like the command, in place, and leaves everything else as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, T5Config, T5ForConditionalGeneration

import rose_exp
from rose_exp.runtime.errors import RoseExpError, SettingsError

from .models.families import CONFIGS, build, tokens

CASES = {
    "rose": ("rose", 0.7, []),
    "wanda 2:4 with least squares": ("wanda", "2:4", ["refine=cg"]),
    "4:8": ("sparsegpt", "4:8", []),
    "1:4": ("sparsegpt", "1:4", []),
    "rose_plus": ("rose_plus", "0.6", []),
    "reconstruction": ("magnitude", 0.5, ["reconstruction=separate", "reconstruction.epochs=1"]),
    "structured": ("sparsegpt", "structured", ["sparsity.ratio=0.5"]),
    "one block is skipped": ("alps", 0.5, ["pipeline.skip=['*.0.*']", "seed=3", "calibration.replicate=1"]),
}


@pytest.mark.parametrize("name", CASES)
def test_results_equal_those_of_the_command(name, small, shared, tmp_path):
    method, sparsity, overrides = CASES[name]
    plain = {"structured": "sparsity=structured"}.get(sparsity)
    if plain is None:
        plain = f"sparsity.pattern='{sparsity}'" if ":" in str(sparsity) else f"sparsity.ratio={sparsity}"
    command = [*small, f"method={method}", plain, *overrides, "evaluation=none", "save=true", "figures.draw=false"]
    expected = rose_exp.run([o for o in command if not o.startswith("evaluation.")], tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / expected["run_id"] / "model").state_dict()

    source = shared / "data/models/stories260k-llama"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    calibration = [override for override in small if override.startswith("calibration")]
    report = rose_exp.prune(model, tokenizer, method, sparsity, overrides=[*calibration, *overrides], device="cpu")
    assert {key: value.shape for key, value in model.state_dict().items()} == {key: v.shape for key, v in saved.items()}
    assert all(torch.equal(value, saved[key]) for key, value in model.state_dict().items())
    assert report.label == expected["label"]
    assert report.sparsity == expected["metrics"]["sparsity"]
    fields = [{k: v for k, v in layer.as_dict().items() if k != "seconds"} for layer in report.layers]
    assert fields == [{k: v for k, v in layer.items() if k != "seconds"} for layer in expected["layers"]]
    assert report.warnings == expected["events"]
    assert str(report) == f"{report.label}: {len(report.layers)} layers pruned to a sparsity of {report.sparsity:.4f}"


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_is_pruned_in_place(family):
    model = build(family).train()
    model.get_input_embeddings().weight.requires_grad_(False)
    model.get_input_embeddings().eval()
    before = dict(model.named_parameters())
    flags = {name: parameter.requires_grad for name, parameter in before.items()}
    dense = {name: parameter.clone() for name, parameter in before.items()}
    random = torch.random.get_rng_state()
    report = rose_exp.prune(model, tokens(3), "wanda", 0.5)
    assert torch.equal(random, torch.random.get_rng_state())
    assert model.training
    assert not model.get_input_embeddings().training
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    assert flags == {name: parameter.requires_grad for name, parameter in after.items()}
    changed = {name for name in after if not torch.equal(after[name], dense[name])}
    assert changed
    assert 0.45 < report.sparsity <= 0.5
    model.eval()(input_ids=tokens(1)).logits.sum().backward()  # pruned models can be trained


def test_tokens_of_the_model_are_not_changed():
    windows = tokens(3)
    copy = windows.clone()
    rose_exp.prune(build("llama"), windows, "sparsegpt", 0.5)
    assert torch.equal(windows, copy)


def test_half_precision():
    model = build("llama").to(torch.bfloat16)
    rose_exp.prune(model, tokens(3), "rose", 0.5)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_structured_sparsity_shrinks_the_layers():
    model = build("llama")
    before = sum(parameter.numel() for parameter in model.parameters())
    rose_exp.prune(model, tokens(3), "sparsegpt", "structured", overrides=["sparsity.ratio=0.5"])
    assert sum(parameter.numel() for parameter in model.parameters()) < before
    assert torch.isfinite(model(input_ids=tokens(1)).logits).all()


def test_models_without_heads_and_neurons_can_be_saved_and_loaded(tmp_path):
    model = build("llama")
    report = rose_exp.prune(
        model, tokens(3), "sparsegpt", "structured", overrides=["sparsity.ratio=0.5", "sparsity.heads=false"]
    )
    assert not report.warnings
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(input_ids=tokens(1)).logits, model(input_ids=tokens(1)).logits)


def test_models_that_cannot_be_loaded_have_a_warning():
    """Llama's configuration rejects a width that is not a multiple of the number of heads."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 128}
    config = LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=4)
    model = AutoModelForCausalLM.from_config(config)
    report = rose_exp.prune(model, tokens(3) % 128, "sparsegpt", "structured", overrides=["sparsity.ratio=0.25"])
    assert [warning["kind"] for warning in report.warnings if warning["layer"] is None] == ["not_loadable"]
    assert torch.isfinite(model(input_ids=tokens(1) % 128).logits).all()


SETTINGS_ERRORS = {
    "method": ({"method": "wnda"}, "method: expected one of .*got 'wnda'; did you mean 'wanda'"),
    "dense": ({"method": "dense"}, "method: expected a method that prunes, got dense"),
    "percent": ({"sparsity": 70}, r"sparsity: expected a ratio from 0 to 1.*got 70; did you mean 0.7\?"),
    "pattern": ({"sparsity": "4:2"}, "sparsity.pattern: expected N:M with N at most M and M at least 1, got .4:2."),
    "quotes": ({"sparsity": "2:4' save=true"}, "sparsity"),
    "setting": ({"overrides": ["engine.block_sze=3"]}, "engine.block_sze: no such setting; did you mean 'engine.block_size'"),
    "value": ({"overrides": ["engine.block_size=0"]}, "engine.block_size: expected"),
    "another model": ({"overrides": ["model=llama2-7b"]}, "overrides: expected settings of pruning, got 'model=llama2-7b'"),
    "saving": ({"overrides": ["save=true"]}, "overrides: expected settings of pruning, got 'save=true'"),
    "evaluation": ({"overrides": ["evaluation=wikitext2"]}, "overrides: expected settings of pruning, got 'evaluation=wiki"),
    "text besides tokens": (
        {"overrides": ["calibration=c4"]},
        "expected no settings of a calibration text besides calibration",
    ),
    "another method": (
        {"overrides": ["method=wanda"]},
        "overrides: expected no value of the argument method, got 'method=wanda'",
    ),
    "another ratio": ({"overrides": ["sparsity.ratio=0.2"]}, "expected no value of the argument sparsity, got 'sparsity.ratio"),
    "forced text": ({"overrides": ["++calibration.samples=2"]}, "expected no settings of a calibration text"),
    "BOS besides tokens": ({"overrides": ["model.bos=windows"]}, "expected no settings of a calibration text"),
    "several values": ({"overrides": ["seed=0,1"]}, "seed: expected one value, got several"),
    "combination": ({"method": "wanda", "overrides": ["reorder=rose"]}, "reorder: expected none"),
    "no calibration": (
        {"calibration": None},
        r"calibration: expected tokens of shape \(windows, length\) or the model's token",
    ),
    "prompts": ({"calibration": ["a cat"]}, "calibration: expected tokens of shape"),
    "device": ({"device": "cuda:77"}, "device: expected auto, cpu or a CUDA device of this machine, got 'cuda:77'"),
}


@pytest.mark.parametrize("name", SETTINGS_ERRORS)
def test_wrong_arguments_leave_the_model_unchanged(name):
    arguments, message = SETTINGS_ERRORS[name]
    check_unchanged(build("llama"), {"calibration": tokens(3), "method": "sparsegpt"} | arguments, message)


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        (torch.zeros(8, dtype=torch.int64), r"expected int64 tokens of shape \(windows, length\).*got int64 of shape \(8,\)"),
        (torch.zeros(0, 8, dtype=torch.int64), "samples|int64 tokens"),
        (torch.zeros(2, 1, dtype=torch.int64), "length of at least 2|window"),
        (torch.zeros(2, 8), r"got float32 of shape \(2, 8\)"),
        (torch.zeros(2, 8, dtype=torch.int32), r"got int32 of shape \(2, 8\)"),
        (torch.full((2, 8), -1), "calibration: expected token IDs from 0 to .*, got -1"),
        (torch.full((2, 8), 10**6), "calibration: expected token IDs from 0 to .*, got 1000000"),
        (
            torch.zeros(1, 4096, dtype=torch.int64),
            "calibration: expected windows of at most .* maximum sequence length, got 4096",
        ),
    ],
    ids=["one dimension", "no window", "one token", "float", "int32", "negative", "too large", "too long"],
)
def test_wrong_tokens_leave_the_model_unchanged(windows, message):
    check_unchanged(build("llama"), {"calibration": windows, "method": "sparsegpt"}, message)


def check_unchanged(model: nn.Module, arguments: dict, message: str) -> None:
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises((SettingsError, RoseExpError), match=message):
        rose_exp.prune(model, **arguments)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def quantized() -> nn.Module:
    model = build("llama")
    model.config.quantization_config = {"quant_method": "gptq"}
    return model


def adapted() -> nn.Module:
    model = build("llama")
    model.peft_config = {"default": object()}
    return model


def with_integers() -> nn.Module:
    model = build("llama")
    model.extra = nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)
    return model


def without_values() -> nn.Module:
    model = build("llama")
    model.lm_head.to("meta")
    model.lm_head.weight = nn.Parameter(torch.empty_like(model.lm_head.weight, device="meta"))
    return model


MODELS = {
    "text": (lambda: "llama", "model: expected a language model or a diffusers pipeline, got str"),
    "no blocks": (lambda: nn.Linear(2, 2), "block"),
    "no weights": (nn.ReLU, "model: expected a model with weights, got ReLU without any"),
    "quantized": (quantized, "model: expected plain weights, got LlamaForCausalLM with quantized weights"),
    "adapters": (adapted, "model: expected a model without adapters, got LlamaForCausalLM with adapters; merge them first"),
    "integers": (with_integers, "model: expected weights of a floating-point dtype, .* with int8 in extra"),
    "meta": (
        without_values,
        "model: expected all weights in memory, got LlamaForCausalLM without the values of lm_head.weight",
    ),
    "encoder-decoder": (
        lambda: T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)),
        "model: expected a decoder, got T5ForConditionalGeneration, an encoder-decoder, which is not supported",
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_unsupported_models_are_refused(name):
    make, message = MODELS[name]
    with pytest.raises(RoseExpError, match=message):
        rose_exp.prune(make(), tokens(2), "sparsegpt", 0.5)


def test_failure_restores_mode_and_random_numbers():
    model = build("llama").train()
    random = torch.random.get_rng_state()
    model.model.layers[1].mlp.down_proj.weight.data.fill_(torch.inf)
    with pytest.raises(RoseExpError, match="finite"):
        rose_exp.prune(model, tokens(2), "sparsegpt", 0.5)
    assert model.training
    assert torch.equal(random, torch.random.get_rng_state())


PIPELINES = {
    "sd3": ("model=small-sd3", "sparsegpt", 0.5, ["diffusion.steps=2"]),
    "ddpm": ("model=small-ddpm", "wanda", "2:4", ["diffusion.steps=2"]),
    "sd3 structured": ("model=small-sd3", "sparsegpt", "structured", ["diffusion.steps=2", "sparsity.ratio=0.25"]),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_pipelines_are_pruned_as_by_the_command(name, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    import rose_exp.diffusion
    from rose_exp.cli.command import check_settings

    choice, method, sparsity, overrides = PIPELINES[name]
    plain = {"structured": "sparsity=structured", "2:4": "sparsity=2:4"}.get(sparsity, f"sparsity.ratio={sparsity}")
    overrides = [*overrides, "calibration.samples=2"]
    run = rose_exp.run([choice, f"method={method}", plain, *overrides, "evaluation=none", "save=true"], tmp_path)
    expected = diffusers.DiffusionPipeline.from_pretrained(tmp_path / run["run_id"] / "model", trust_remote_code=True)

    settings = check_settings([choice])
    pipeline, _ = rose_exp.diffusion.load_pipeline(settings.model, settings.diffusion.scheduler)
    sampling = [f"diffusion.{name}={value}" for name, value in vars(settings.diffusion).items() if value is not None]
    report = rose_exp.prune(pipeline, None, method, sparsity, overrides=[*sampling, *overrides])
    assert report.sparsity == run["metrics"]["sparsity"]
    part = "unet" if name == "ddpm" else "transformer"
    one, other = (getattr(each, part).state_dict() for each in (pipeline, expected))
    assert {key: value.shape for key, value in one.items()} == {key: value.shape for key, value in other.items()}
    assert all(torch.equal(value, other[key]) for key, value in one.items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"calibration": []}, "calibration: expected a list of prompts or None for a diffusers pipeline, got list"),
        ({"calibration": "a cat"}, "calibration: expected a list of prompts or None for a diffusers pipeline, got str"),
        ({"calibration": torch.zeros(2, 8, dtype=torch.int64)}, "calibration: expected a list of prompts or None"),
        ({"device": "cpu"}, "device: expected auto for a pipeline, which is pruned on its own device, got 'cpu'"),
        ({"overrides": ["target=residual"]}, "target: expected none for a diffusion model"),
    ],
    ids=["no prompt", "one text", "tokens", "device", "target"],
)
def test_wrong_arguments_for_pipelines(arguments, message):
    pytest.importorskip("diffusers")
    import rose_exp.diffusion
    from rose_exp.cli.command import check_settings

    settings = check_settings(["model=small-ddpm"])
    pipeline, _ = rose_exp.diffusion.load_pipeline(settings.model, settings.diffusion.scheduler)
    with pytest.raises(SettingsError, match=message):
        rose_exp.prune(pipeline, **{"method": "sparsegpt", "sparsity": 0.5} | arguments)
