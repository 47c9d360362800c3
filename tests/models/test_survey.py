"""Every causal language model class of transformers is pruned, or rejected for a documented reason."""

from __future__ import annotations

import re

import pytest
import torch

from rose_exp.engine import Magnitude, Unstructured
from rose_exp.models import all_linear_layers, find_blocks, projections, unstacked_experts
from rose_exp.pruning import PruneContext, PruningPlan, prune_model
from rose_exp.runtime.errors import RoseExpError

from . import support, survey

PLAN = PruningPlan(Magnitude(), Unstructured(0.5))


FAST = (  # classes with something particular
    *("LlamaConfig", "GptOssConfig", "Gemma3nTextConfig", "MllamaConfig", "ZayaConfig", "Zamba2Config", "HrmTextConfig"),
    *("HYV4Config", "Qwen3_5Config", "T5Config", "BertConfig"),
)


def documented() -> dict[str, str]:
    """Rows of supported classes, and reasons for the others, by configuration class, from the page in the documentation."""
    supported, _, others = support.PAGE.read_text(encoding="utf-8").partition("## Not supported")
    rows = {
        line.split(" | ")[0].removeprefix("| "): line for line in supported.splitlines() if re.match(r"\| \w+Config \|", line)
    }
    for reason, names in re.findall(r"^\| (.+?) \| (\w+Config.*) \|$", others, re.MULTILINE):
        rows |= dict.fromkeys(names.split(", "), reason)
    return rows


def check_class(name: str, folder) -> None:
    found = support.examine(name, folder)
    row = support.row(name, found) if found.rejected is None else support.reason_of(found.rejected)
    assert row == documented().get(name), f"run `python -m tests.models.support --write` if this is intended: {found}"


@pytest.mark.parametrize("name", [name for name in FAST if name in set(survey.classes())])
def test_particular_classes_are_pruned_as_documented(name, tmp_path):
    check_class(name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in survey.classes() if name not in {*FAST, *support.NOT_BUILT}])
def test_every_class_is_pruned_as_documented(name, tmp_path):
    check_class(name, tmp_path)


def test_page_lists_every_class():
    assert set(documented()) == set(survey.classes())


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


GATED = ("gate_proj", "up_proj", "down_proj")
LAYOUTS = {  # the layers of one expert
    "MixtralConfig": GATED,
    "AriaTextConfig": GATED,  # transposed
    "GptOssConfig": GATED,  # transposed, alternating rows, biases, an activation of its own
    "HYV4Config": GATED,  # an activation of its own
    "InklingTextConfig": GATED,  # shared experts in stacks of their own
    "JetMoeConfig": ("proj",),  # one stack for each projection, and experts in attention
    "Llama4TextConfig": GATED,  # transposed, all tokens for every expert
    "LongcatFlashConfig": GATED,  # further experts without weights
    "MiniMaxM3VLTextConfig": GATED,
}


def random_weights(name: str) -> torch.nn.Module:
    model = survey.build(name)
    torch.manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.25)
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
