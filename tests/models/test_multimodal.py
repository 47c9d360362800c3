"""The language model inside a multimodal model is pruned; its vision tower stays as it is and is saved."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
import transformers

import rose_exp
from rose_exp.engine import Magnitude, Unstructured
from rose_exp.models import find_blocks, load_model, model_shape, open_model
from rose_exp.pruning import OnDisk, PruneContext, PruningPlan, RunState, prune_model
from rose_exp.settings.schema import ModelSettings

from .survey import VOCABULARY

TEXT = {
    **{
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "max_position_embeddings": 64,
    },
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
EXPERTS = {"num_local_experts": 4, "intermediate_size_mlp": 48}
SECTIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
LINEAR = {
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    "layer_types": ["linear_attention", "full_attention"],
}
TOWER = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 28,
    "patch_size": 14,
}
QWEN = {"depth": 2, "embed_dim": 32, "num_heads": 4, "patch_size": 14}
QWEN3 = {"depth": 2, "hidden_size": 32, "num_heads": 4, "intermediate_size": 64, "out_hidden_size": 32}
PAIRS = {"image_size": [28, 28], "patch_size": [14, 14]}
LLAMA4 = TOWER | {"projector_input_dim": 32, "projector_output_dim": 32, "vision_output_dim": 32}
QWEN_TOKENS = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {  # text, vision, and other fields
    "Gemma3Config": (TEXT | {"sliding_window": 8}, TOWER, {"image_token_id": 90, "boi_token_index": 91, "eoi_token_index": 92}),
    "Idefics3Config": (TEXT | {"model_type": "llama"}, TOWER, {"image_token_id": 90}),
    "InternVLConfig": (
        TEXT | {"model_type": "qwen2"},
        TOWER | PAIRS,
        {"image_token_id": 90},
    ),
    "Llama4Config": (TEXT | EXPERTS, LLAMA4, {"image_token_index": 90, "boi_token_index": 91, "eoi_token_index": 92}),
    "LlavaConfig": (TEXT | {"model_type": "llama"}, TOWER | {"model_type": "clip_vision_model"}, {"image_token_index": 90}),
    "Mistral3Config": (TEXT | {"model_type": "mistral"}, TOWER | {"model_type": "pixtral"}, {"image_token_index": 90}),
    "Qwen2VLConfig": (TEXT | SECTIONS, QWEN | {"hidden_size": 32}, QWEN_TOKENS),
    "Qwen3_5Config": (TEXT | LINEAR, QWEN3, QWEN_TOKENS),
}
PLAN = PruningPlan(Magnitude(), Unstructured(0.5))


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(3, 90, (3, 12), generator=torch.Generator().manual_seed(0))


def saved(name: str, folder) -> ModelSettings:
    text, vision, others = MODELS[name]
    config = getattr(transformers, name)(text_config=text, vision_config=vision, **others)
    torch.manual_seed(0)
    transformers.AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    return ModelSettings(path=str(folder))


def logits(model, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(input_ids=window[None], use_cache=False).logits for window in tokens])


@pytest.mark.parametrize("name", MODELS)
def test_only_the_language_model_is_pruned_and_the_whole_model_is_saved(name, tokens, tmp_path):
    settings = saved(name, tmp_path / "dense")
    model = load_model(settings).model
    before = {key: value.clone() for key, value in model.state_dict().items()}
    blocks = find_blocks(model)
    assert "language_model" in blocks.name or "text_model" in blocks.name
    assert len(model_shape(settings).blocks) == len(blocks.blocks) == 2
    reports = prune_model(model, tokens, PLAN)
    assert {report.name.startswith(f"{blocks.name}.") for report in reports} == {True}
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed
    assert all(key.startswith(blocks.name) for key in changed)
    model.save_pretrained(tmp_path / "pruned")
    again = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "pruned").eval()
    assert {key for key in again.state_dict() if "vision" in key or "visual" in key}
    assert torch.equal(logits(again, tokens), logits(model, tokens))


@pytest.mark.parametrize("name", ["Gemma3Config", "Qwen3_5Config"])
def test_a_multimodal_model_is_pruned_from_disk_as_in_memory(name, tokens, tmp_path):
    settings = saved(name, tmp_path / "dense")
    whole = load_model(settings).model
    expected = [report.sparsity for report in prune_model(whole, tokens, PLAN)]
    loaded, streamed = open_model(settings)
    state = RunState(tmp_path / "state", {"code": "a"})
    context = PruneContext(weights=OnDisk(streamed, state.block), state=state)
    assert [report.sparsity for report in prune_model(loaded.model, tokens, PLAN, context)] == expected
    for index, block in enumerate(find_blocks(whole).blocks):
        for key, value in block.state_dict().items():
            assert torch.equal(state.block(index)[key], value)


@pytest.mark.parametrize("weights", ["memory", "disk"])
def test_a_run_saves_the_processor_of_a_multimodal_model(weights, small, shared, tmp_path):
    settings = saved("Gemma3Config", tmp_path / "dense")
    for file in (shared / "data" / "models" / "stories260k-llama").glob("tokenizer*"):
        shutil.copyfile(file, tmp_path / "dense" / file.name)
    model = load_model(settings).model
    model.resize_token_embeddings(512)
    model.save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / "preprocessor_config.json").write_text('{"size": 28}')
    overrides = [
        text for text in small if not text.startswith(("model.path", "calibration.window", "evaluation.perplexity.local.w"))
    ]
    overrides += [f"model.path={tmp_path}/dense", "calibration.window=32", "evaluation.perplexity.local.window=32"]
    overrides += ["evaluation.perplexity.local.windows=2", "method=magnitude", "save=true", f"pipeline.weights={weights}"]
    record = rose_exp.run(overrides, tmp_path / "out")
    folder = tmp_path / "out" / record["run_id"] / "model"
    assert (folder / "preprocessor_config.json").read_text() == '{"size": 28}'
    again = transformers.AutoModelForImageTextToText.from_pretrained(folder)
    assert (again.model.language_model.layers[0].mlp.up_proj.weight == 0).float().mean() == pytest.approx(0.5, abs=0.01)
