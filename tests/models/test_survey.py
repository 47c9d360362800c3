"""Every causal language model class of transformers is pruned, or rejected for a known reason."""

from __future__ import annotations

import pytest
import torch

from rose_exp.engine import Magnitude, Unstructured
from rose_exp.models import all_linear_layers, find_blocks, projections, unstacked_experts
from rose_exp.pruning import InMemory, PruneContext, PruningPlan, answers_by_blocks, prune_model
from rose_exp.runtime.errors import RoseExpError

from . import survey

REJECTED = {  # the reason, and the classes with it
    "whose predictions depend on later tokens": (
        *("Bert", "BertGeneration", "BigBird", "Camembert", "CpmAnt", "Data2VecText", "Electra", "Ernie", "MegatronBert"),
        *("RemBert", "RoCBert", "RoFormer", "Roberta", "RobertaPreLayerNorm", "XLMRoberta", "XLMRobertaXL", "XLNet", "Xmod"),
    ),
    "encoder_attn.k_proj is never called": (
        *("Bart", "BigBirdPegasus", "Blenderbot", "BlenderbotSmall", "MBart", "Marian", "Mvp", "PLBart", "Pegasus"),
        *("TrOCR", "Whisper"),
    ),
    "which depends on the output of an earlier block": ("Zaya",),
    "expected hidden states of shape": ("DeepseekV4", "HYV4"),
    "all equally large": ("HrmText",),
    "is not a plain chain of blocks": ("XLM",),
    "is called several times in a pass": ("ProphetNet",),
}
NOT_BUILT = {  # the common sizes do not describe a small model
    *("Blt", "CohereCompassText", "Dbrx", "Dots3Note", "Dots3NoteText", "Emu3", "Fuyu", "Gemma3", "Gemma3n", "Gemma3nText"),
    *("Gemma4", "Gemma4Assistant", "Gemma4Unified", "Gemma4UnifiedAssistant", "Git", "GotOcr2", "Lfm2Moe", "Llama4", "Mllama"),
    *("MossTranscribeDiarize", "Musicgen", "MusicgenMelody", "Phi4Multimodal", "Qwen3_5", "Qwen3_5Moe", "Qwen4Exp", "Reformer"),
    *("Zamba", "Zamba2"),
}
REASONS = {f"{name}Config": reason for reason, names in REJECTED.items() for name in names}
PLAN = PruningPlan(Magnitude(), Unstructured(0.5))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in survey.classes() if name.removesuffix("Config") not in NOT_BUILT])
def test_every_class_is_pruned_by_blocks_or_rejected_with_its_reason(name, tmp_path):
    model = survey.build(name)
    tokens = torch.randint(3, survey.VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(0))
    if name in REASONS:
        with pytest.raises(RoseExpError, match=REASONS[name]):
            prune_model(model, tokens, PLAN)
        return
    reports = prune_model(model, tokens, PLAN)
    assert reports
    for report in [report for report in reports if report.fallback is None]:  # others are experts without tokens
        assert int(report.sparsity * report.rows * report.columns + 0.5) == report.rows * (report.columns // 2), report.name
    with torch.no_grad():
        whole = torch.cat([model(input_ids=window[None], use_cache=False).logits for window in tokens])
    blocks = InMemory(find_blocks(model))
    parts = answers_by_blocks(model, blocks, tokens, "cpu", 1, "device", tmp_path, "logits")
    assert torch.equal(torch.cat([logits for _, logits in parts]), whole)


def test_depthwise_convolutions_stay_dense_with_a_warning():
    model = survey.build("MambaConfig")
    before = [layer.mixer.conv1d.weight.clone() for layer in model.backbone.layers]
    tokens, warnings = torch.randint(3, survey.VOCABULARY, (3, 12)), []
    context = PruneContext(on_warning=lambda kind, detail: warnings.append((kind, detail)))
    prune_model(model, tokens, PLAN, context)
    assert warnings[0][0] == "left_dense"
    assert "backbone.layers.0.mixer.conv1d.weight" in warnings[0][1]
    for layer, weight in zip(model.backbone.layers, before, strict=True):
        assert torch.equal(layer.mixer.conv1d.weight, weight)
        assert (layer.mixer.in_proj.weight == 0).float().mean() == pytest.approx(0.5, abs=0.02)


def test_tensors_that_stay_dense_can_be_named_in_skip():
    model, warnings = survey.build("MambaConfig"), []
    tokens = torch.randint(3, survey.VOCABULARY, (3, 12))
    plan = PruningPlan(Magnitude(), Unstructured(0.5), skip=["*conv*"])
    prune_model(model, tokens, plan, PruneContext(on_warning=lambda *warning: warnings.append(warning[1])))
    assert all("conv1d" not in detail for detail in warnings)


def test_tables_name_existing_classes():
    known = set(survey.classes())
    assert set(REASONS) <= known
    assert {f"{name}Config" for name in NOT_BUILT} <= known


GATED = ("gate_proj", "up_proj", "down_proj")
LAYOUTS = {  # the layers of one expert
    "MixtralConfig": GATED,
    "AriaTextConfig": GATED,  # transposed
    "GptOssConfig": GATED,  # transposed, alternating rows, biases, an activation of its own
    "HYV4Config": GATED,  # an activation of its own
    "JetMoeConfig": ("proj",),  # one stack for each projection, and experts in attention
    "Llama4TextConfig": GATED,  # transposed, all tokens for every expert
    "LongcatFlashConfig": GATED,  # further experts without weights
    "MiniMaxM3VLTextConfig": GATED,
}


def random_weights(name: str) -> torch.nn.Module:
    model = survey.build(name)
    torch.manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("name", LAYOUTS)
def test_layers_of_experts_compute_what_the_stack_computes(name):
    model = random_weights(name)
    tokens = torch.randint(3, survey.VOCABULARY, (4, 12), generator=torch.Generator().manual_seed(0))
    stacks = [module for module in model.modules() if projections(module)]
    assert stacks
    for stack in stacks:
        assert {frozenset(layers) for layers in projections(stack)} == {frozenset(LAYOUTS[name])}
    with torch.no_grad():
        expected = model(input_ids=tokens, use_cache=False).logits
        with unstacked_experts(model):
            found = model(input_ids=tokens, use_cache=False).logits
    assert expected.std() > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layers_of_experts_cover_the_whole_stack(name):
    model = random_weights(name)
    for stack in (module for module in model.modules() if projections(module)):
        experts = projections(stack)
        with torch.no_grad():
            for layers in experts:
                for layer in layers.values():
                    layer.weight.fill_(torch.nan)
        for parameter in stack.parameters(recurse=False):
            if parameter.ndim == 3:
                assert parameter[: len(experts)].isnan().all()


def test_routers_are_not_pruned():
    for name in LAYOUTS:
        model = survey.build(name)
        layers = [layer.name for layer in all_linear_layers(find_blocks(model))]
        assert not [layer for layer in layers if "router" in layer and "classifier" not in layer], name


@pytest.mark.parametrize("change", [lambda output: 1.01 * output, lambda output: output.flip(-1), lambda output: output + 0.1])
def test_experts_that_compute_something_else_are_rejected(change, monkeypatch):
    """Their parameters look like a known layout, so that only their outputs tell the difference."""
    model = random_weights("GptOssConfig")
    experts = type(model.model.layers[0].mlp.experts)
    real = experts.forward
    monkeypatch.setattr(experts, "forward", lambda self, *arguments: change(real(self, *arguments)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tokens = torch.randint(3, survey.VOCABULARY, (3, 12))
    with pytest.raises(
        RoseExpError, match=r"model\.layers\.0\.mlp\.experts: expected experts whose layers compute what GptOss"
    ):
        prune_model(model, tokens, PLAN)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
