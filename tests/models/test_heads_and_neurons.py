"""Structured pruning of language models: finding, masking, removing, saving and loading heads and neurons."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, Olmo2Config, Olmo2ForCausalLM

import rose_exp
from rose_exp.engine import Magnitude, SparseGPT, Structured, Unstructured
from rose_exp.models import BlockList, check_removable, find_blocks, find_structures, remove_masked
from rose_exp.pruning import FirstBlock, PruneContext, PruningPlan, RunState, prune_model
from rose_exp.runs.preparation import first_key
from rose_exp.runtime.errors import RoseExpError, SettingsError

from ..cli.test_command import settings_of
from .families import build, tokens


def answers(model) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens()[:2]).logits


def all_structures(model):
    blocks: BlockList = find_blocks(model)
    return [s for i, block in enumerate(blocks.blocks) for s in find_structures(block, blocks.block_name(i))]


def consumers(model) -> set[str]:
    return {part.layer.name for structure in all_structures(model) for part in structure.consumers}


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "mistral"])
def test_removing_masked_structures_preserves_the_logits(family):
    model = build(family)
    dense, sparsity = answers(model), Structured(0.5)
    for structure in all_structures(model):
        removed = torch.zeros(structure.groups, dtype=torch.bool)
        removed[torch.randperm(structure.groups)[: sparsity.count(structure.groups)]] = True
        structure.mask(removed)
        assert torch.equal(structure.masked(), removed)
    masked = answers(model)
    assert not torch.allclose(dense, masked, atol=1e-3)
    parameters = remove_masked(model, find_blocks(model), sparsity, consumers(model), configure=True)
    torch.testing.assert_close(answers(model), masked, rtol=1e-4, atol=1e-4)
    assert parameters["pruned"] == sum(p.numel() for p in model.parameters()) < parameters["dense"]


def test_query_heads_with_a_shared_key_form_one_group():
    model = build("llama")
    attention = model.model.layers[0].self_attn
    heads = next(s for s in all_structures(model) if s.kind == "heads")
    assert heads.groups == model.config.num_key_value_heads
    shared = model.config.num_attention_heads // model.config.num_key_value_heads
    assert heads.consumers[0].places.shape == (heads.groups, shared * attention.head_dim)
    widths = {part.layer.name.rpartition(".")[2]: part.places.shape[1] for part in heads.makers}
    assert widths == {
        "q_proj": shared * attention.head_dim,
        "k_proj": attention.head_dim,
        "v_proj": attention.head_dim,
    }


@pytest.mark.parametrize("method", [SparseGPT(), Magnitude()])
def test_pruning_masks_consumers_and_producers_of_heads_and_neurons(method):
    model, sparsity = build("llama"), Structured(0.5)
    reports = prune_model(model, tokens(), PruningPlan(method, sparsity, batch=2))
    assert {report.name.rpartition(".")[2] for report in reports} == {"o_proj", "down_proj"}
    for structure in all_structures(model):
        assert int(structure.masked().sum()) == sparsity.count(structure.groups)
        for part in structure.makers:
            rows = (part.layer.weight == 0).all(dim=1)[part.places].all(dim=1)
            assert torch.equal(rows, structure.masked())
    kept = PruningPlan(method, Structured(0.5, heads=False), batch=2, skip=["*.layers.0.*"])
    other = build("llama")
    assert {r.name for r in prune_model(other, tokens(), kept)} == {
        f"model.layers.{i}.mlp.down_proj" for i in range(1, len(other.model.layers))
    }


def test_second_block_is_pruned_with_outputs_of_the_pruned_first_block():
    model = build("llama")
    prune_model(model, tokens(), PruningPlan(SparseGPT(), Structured(0.5), batch=2))
    other = build("llama")
    prune_model(other, tokens(), PruningPlan(SparseGPT(), Structured(0.5), batch=2, skip=["*.layers.0.*"]))
    second = "layers.1.mlp.down_proj.weight"
    assert not torch.equal(model.model.get_parameter(second), other.model.get_parameter(second))


def test_saved_model_has_the_reduced_widths(small, tmp_path):
    overrides = [*small, "method=sparsegpt", "sparsity=structured", "sparsity.ratio=0.5", "save=true"]
    record = rose_exp.run(overrides, tmp_path)
    folder = tmp_path / record["run_id"] / "model"
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (4, 2, 8)
    assert config["intermediate_size"] == 86
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert sum(p.numel() for p in model.parameters()) == record["parameters"]["pruned"] < record["parameters"]["dense"]
    assert 0.4 < record["metrics"]["sparsity"] < 0.6
    measured = [f"model.path={folder}" if text.startswith("model.path") else text for text in small]
    again = rose_exp.run([*measured, "method=dense"], tmp_path)
    assert again["metrics"]["perplexity.local"] == pytest.approx(record["metrics"]["perplexity.local"], rel=1e-4)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "mistral"])
def test_saved_models_of_each_family_give_the_same_outputs(family, tmp_path):
    """Qwen2 reads ``head_dim``, although its configuration does not define it."""
    model, sparsity = build(family), Structured(0.5)
    blocks = find_blocks(model)
    check_removable(model, blocks, sparsity)
    pruned = {report.name for report in prune_model(model, tokens(), PruningPlan(SparseGPT(), sparsity, batch=2))}
    remove_masked(model, blocks, sparsity, pruned, configure=True)
    expected = answers(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(answers(loaded), expected, rtol=1e-5, atol=1e-5)
    assert loaded.config.num_key_value_heads == 1


def test_model_classes_that_ignore_the_width_of_heads_are_rejected(monkeypatch):
    model = build("qwen2")
    attention = type(model.model.layers[0].self_attn)
    real = attention.__init__

    def ignoring(self, config, *arguments, **options):
        config = copy.deepcopy(config)
        config.head_dim = config.hidden_size // config.num_attention_heads
        real(self, config, *arguments, **options)

    monkeypatch.setattr(attention, "__init__", ignoring)
    with pytest.raises(RoseExpError, match=r"save: expected a model class that builds 1 heads in model\.layers\.0 from"):
        check_removable(model, find_blocks(model), Structured(0.5, neurons=False))


def test_widths_the_configuration_cannot_express_raise_only_when_saving(small, tmp_path):
    overrides = [*small, "method=sparsegpt", "sparsity=structured", "sparsity.ratio=0.25"]
    with pytest.raises(RoseExpError, match="num_attention_heads 6"):
        rose_exp.run([*overrides, "save=true"], tmp_path)
    record = rose_exp.run(overrides, tmp_path)  # evaluation works without saving
    assert record["parameters"]["pruned"] < record["parameters"]["dense"]
    assert record["layers"][0]["removed"] == 1


def test_unsupported_layouts_and_too_small_ratios_are_rejected():
    for family, kinds, message in (
        ("opt", {}, r"sparsity\.heads: expected a model with heads to prune in a known layout"),
        ("phi", {"heads": False}, r"sparsity\.neurons: expected a model with neurons to prune in a known layout"),
        ("mixtral", {}, r"sparsity\.neurons: expected a model with neurons to prune in a known layout"),
    ):
        with pytest.raises(RoseExpError, match=message):
            prune_model(build(family), tokens(), PruningPlan(SparseGPT(), Structured(0.5, **kinds), batch=2))
    with pytest.raises(RoseExpError, match=r"sparsity\.ratio: expected a ratio that removes at least one of"):
        prune_model(build("llama"), tokens(), PruningPlan(SparseGPT(), Structured(0.01, neurons=False), batch=2))


def test_heads_normalized_together_are_rejected_and_neurons_are_pruned():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = Olmo2ForCausalLM(Olmo2Config(vocab_size=256, **sizes)).eval()
    with pytest.raises(RoseExpError, match="q_norm normalizes over all heads"):
        prune_model(model, tokens(), PruningPlan(SparseGPT(), Structured(0.5), batch=2))
    plan = PruningPlan(SparseGPT(), Structured(0.5, heads=False), batch=2)
    assert {report.groups for report in prune_model(model, tokens(), plan)} == {48}
    check_removable(model, find_blocks(model), plan.sparsity)


def test_only_pruned_layers_are_narrowed_and_they_must_be_masked():
    model, sparsity = build("llama"), Structured(0.5)
    plan = PruningPlan(SparseGPT(), sparsity, batch=2, skip=["*.layers.0.*"])
    pruned = {report.name for report in prune_model(model, tokens(), plan)}
    expected = answers(model)
    remove_masked(model, find_blocks(model), sparsity, pruned, configure=False)
    torch.testing.assert_close(answers(model), expected, rtol=1e-4, atol=1e-4)
    widths = [block.mlp.down_proj.in_features for block in model.model.layers]
    assert widths == [52, *([26] * (len(widths) - 1))]
    with pytest.raises(ValueError, match="masked heads, got 0"):
        remove_masked(build("llama"), find_blocks(build("llama")), sparsity, pruned, configure=False)


def test_models_that_could_not_be_reloaded_are_not_saved():
    model = build("llama")
    check_removable(model, find_blocks(model), Structured(0.5))
    model.model.layers[1].mlp = torch.nn.Linear(4, 4)
    with pytest.raises(RoseExpError, match=r"save: expected \d+ neurons in each block.*got \[\] in model\.layers\.1"):
        check_removable(model, find_blocks(model), Structured(0.5))


def test_runs_of_a_sweep_do_not_share_moments_of_other_layers():
    shared, alone = FirstBlock(), build("llama")
    first = PruningPlan(SparseGPT(), Unstructured(0.5), batch=2)
    second = PruningPlan(SparseGPT(), Structured(0.5), batch=2)
    prune_model(build("llama"), tokens(), first, PruneContext(first_block=shared, first_key="a"))
    with pytest.raises(RuntimeError, match="cached moments belong to other layers"):
        prune_model(build("llama"), tokens(), second, PruneContext(first_block=shared, first_key="a"))
    keys = {
        first_key(settings_of("method=sparsegpt", *own), {})
        for own in ([], ["sparsity=structured"], ["sparsity=structured", "sparsity.heads=false"])
    }
    assert len(keys) == 3
    assert prune_model(alone, tokens(), second)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method=dsnot"], "method: expected one of sparsegpt, wanda, magnitude with structured sparsity, got dsnot"),
        (["method=rose"], "reorder: expected none with structured sparsity"),
        (["method=sparsegpt", "refine=admm"], "refine: expected none with structured sparsity"),
        (["method=sparsegpt", "sparsity.ratio=1"], "sparsity.ratio: expected a number from 0 to below 1"),
        (["method=sparsegpt", "save=true", "pipeline.skip=['*.0.*']"], "save: expected false if structured sparsity excludes"),
        (["method=sparsegpt", "save=true", "sparsity_config=true"], "sparsity_config: expected false with structured"),
        (["method=sparsegpt", "pipeline.permute=true"], "pipeline.permute: expected false with structured sparsity"),
        (["method=sparsegpt", "figures.study=['*']"], "figures.study: expected none with structured sparsity"),
        (["method=magnitude", "+method.layer_options.x={}"], "method.layer_options: expected none with structured"),
        (["method=sparsegpt", "sparsity.heads=false", "sparsity.neurons=false"], "sparsity.heads: expected true"),
    ],
)
def test_incompatible_options_raise_an_error_that_names_them(overrides, message, tmp_path):
    with pytest.raises(SettingsError) as caught:
        rose_exp.run(["sparsity=structured", *overrides], tmp_path)
    assert any(message in problem for problem in caught.value.problems)


def test_resuming_an_interrupted_run_gives_identical_weights(tmp_path):
    plan = PruningPlan(SparseGPT(), Structured(0.5), batch=2)
    whole = build("llama")
    prune_model(whole, tokens(), plan)

    def stop(number: int, _report) -> None:
        if number == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune_model(build("llama"), tokens(), plan, PruneContext(state=RunState(tmp_path, {"code": "a"}), on_layer=stop))
    state, again = RunState(tmp_path, {"code": "a"}), build("llama")
    assert state.progress.blocks == 1
    assert len(prune_model(again, tokens(), plan, PruneContext(state=state))) == 2 * len(again.model.layers)
    for name, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    for model in (again, whole):
        remove_masked(model, find_blocks(model), plan.sparsity, consumers(model), configure=False)
    assert torch.equal(answers(again), answers(whole))
