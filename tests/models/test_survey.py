"""Every causal language model class of transformers is pruned, or rejected for a known reason."""

from __future__ import annotations

import pytest
import torch

from rose_exp.engine import Magnitude, Unstructured
from rose_exp.models import find_blocks
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
    "nor a stack of experts in a known layout": (*("AriaText", "GptOss", "HYV4", "JetMoe", "Llama4Text", "LongcatFlash"),),
    "which depends on the output of an earlier block": ("Zaya",),
    "expected hidden states of shape": ("DeepseekV4",),
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
    for report in reports:
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
