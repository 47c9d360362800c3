"""Units of a denoiser: which layers can be pruned and in which order."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from rose_exp.diffusion import PackagePruner, Unit, split_into_packages
from rose_exp.diffusion.denoiser import (
    ConvLayer,
    DenoiserCall,
    Layout,
    candidate_layers,
    check_recurrent,
    check_stacked,
    find_units,
    tokens_of,
)
from rose_exp.engine import SparseGPT, Unstructured
from rose_exp.pruning import PruningPlan
from rose_exp.pruning.collect import Clock
from rose_exp.runtime.errors import RoseExpError

from .pipelines import NAMES, sampler, units_of
from .support import Steps


def test_units_of_joint_attention_match_the_paper():
    units = units_of("sd3")
    block = "transformer_blocks.1."
    expected = [
        {f"attn.{name}" for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")},
        {"attn.to_out.0", "attn.to_add_out"},
        {"ff.net.0.proj", "ff_context.net.0.proj"},
        {"ff.net.2", "ff_context.net.2"},
    ]
    assert len(units) == 4 * 4
    assert [set(unit.names) for unit in units[4:8]] == [{block + name for name in names} for names in expected]


def test_layers_with_a_shared_input_form_one_group():
    groups = {group for unit in units_of("sd3") for group in unit.groups}
    assert ("transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k", "transformer_blocks.0.attn.to_v") in groups
    keys = [name for unit in units_of("sd") for group in unit.groups for name in group if name.endswith("attn2.to_k")]
    (shared,) = [group for unit in units_of("sd") for group in unit.groups if keys[0] in group]
    assert set(keys) <= set(shared)  # all blocks attend to the same text


def test_layers_that_see_only_the_time_step_are_excluded():
    names = {name for unit in units_of("sd3") for name in unit.names}
    assert not any("norm" in name for name in names)
    assert not any("time" in name for unit in units_of("ddpm") for name in unit.names)


@pytest.mark.parametrize("name", NAMES)
def test_units_are_in_dependency_order(name):
    """Changing a layer does not affect the inputs of its own unit or of any earlier unit."""
    of = sampler(name)
    units = units_of(name)
    places = {layer: index for index, unit in enumerate(units) for layer in unit.names}
    assert len(places) == sum(len(unit.names) for unit in units)
    with torch.no_grad():
        call = of.first_call("a photograph")
        before = inputs_of(of.denoiser, call, places)
        changed = len(units) // 2
        for layer in units[changed].names:
            of.denoiser.get_submodule(layer).weight.mul_(1.5)
        after = inputs_of(of.denoiser, call, places)
    for layer, place in places.items():
        if place <= changed:
            assert torch.equal(before[layer], after[layer]), layer
    moved = [layer for layer, place in places.items() if not torch.equal(before[layer], after[layer])]
    assert moved
    assert min(places[layer] for layer in moved) > changed


def inputs_of(denoiser: nn.Module, call, names) -> dict[str, torch.Tensor]:
    found, hooks = {}, []
    for name in names:
        module = denoiser.get_submodule(name)
        hooks.append(module.register_forward_pre_hook(lambda _m, args, name=name: found.__setitem__(name, args[0].clone())))
    denoiser(*call.args, **call.kwargs)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize(
    "options", [{}, {"stride": 2, "padding": 1}, {"padding": 2, "dilation": 2, "padding_mode": "circular"}]
)
def test_convolution_equals_a_linear_layer_on_patches(options):
    conv = nn.Conv2d(3, 5, 3, bias=False, **options).double()
    layer, inputs = ConvLayer("conv", conv), torch.randn(2, 3, 9, 8, dtype=torch.float64)
    expected = conv(inputs).flatten(2).transpose(1, 2)
    torch.testing.assert_close(functional.linear(tokens_of(layer, inputs), layer.weight), expected)
    layer.set_weight(torch.zeros_like(layer.weight))
    assert not conv.weight.any()


def test_convolutions_are_included_only_on_request():
    of = sampler("ddpm")
    assert not any(isinstance(layer, ConvLayer) for layer in candidate_layers(of.denoiser, convolutions=False))
    convolutions = [x.name for x in candidate_layers(of.denoiser, convolutions=True) if isinstance(x, ConvLayer)]
    assert convolutions
    assert not {"conv_in", "conv_out"} & set(convolutions)


def test_packages_are_contiguous_and_evenly_sized():
    units = [Unit(((f"layer{i}",),)) for i in range(10)]
    found = split_into_packages(units, 4)
    assert [len(package) for package in found] == [2, 3, 2, 3]
    assert [unit for package in found for unit in package] == units
    assert [len(package) for package in split_into_packages(units, 99)] == [1] * 10


def test_denoiser_without_candidate_layers_raises_an_error():
    of = sampler("sd3")
    with pytest.raises(RoseExpError, match="no attention or feed-forward layer with tokens as input"), torch.no_grad():
        find_units(of.denoiser, of.first_call("a photograph"), [])


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q, self.to_out = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, states):
        return states + self.to_out(self.to_q(states))


class Block(nn.Module):
    """A transformer block whose feed-forward part is the argument."""

    def __init__(self, ffn: nn.Module):
        super().__init__()
        self.attention, self.ffn = Attention(), ffn
        self.norm = nn.Linear(8, 8)

    def forward(self, states, time):
        return self.ffn(self.attention(states) * self.norm(time)[:, None])


class Denoiser(nn.Module):
    def __init__(self, *ffns: nn.Module):
        super().__init__()
        self.blocks = nn.ModuleList(Block(ffn) for ffn in ffns)

    def forward(self, states, time):
        for block in self.blocks:
            states = block(states, time)
        return states


class Ffn(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, states):
        return self.down(self.up(states))


class Experts(Ffn):
    """All tokens of all images in one matrix."""

    def forward(self, states):
        return super().forward(states.flatten(0, 1)).view_as(states)


class WithoutGradient(Ffn):
    @torch.no_grad()
    def forward(self, states):
        return super().forward(states)


class Detached(Ffn):
    def forward(self, states):
        return self.down(self.up(states.detach()).detach())


class InPlace(Ffn):
    """Passes states through a buffer."""

    def forward(self, states):
        buffer = torch.zeros(*states.shape[:-1], 16)
        buffer[...] = self.up(states)
        return self.down(buffer.unsqueeze(0)).squeeze(0)


class ByKeyword(Ffn):
    def forward(self, states):
        return self.down(input=self.up(input=states))


class Split(Ffn):
    """One call for each half of the tokens."""

    def forward(self, states):
        return torch.cat([super(Split, self).forward(half) for half in states.chunk(2, dim=1)], dim=1)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, states):
        return self.layer(self.layer(states))


class Stacked(nn.Module):
    """Experts in one tensor."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 8, 8))

    def forward(self, states):
        return states @ self.weight.sum(dim=0)


def layout_of(*ffns: nn.Module) -> Layout:
    denoiser = Denoiser(*ffns)
    call = DenoiserCall((torch.randn(2, 4, 8),), {"time": torch.randn(2, 8)})
    return find_units(denoiser, call, candidate_layers(denoiser, convolutions=False))


@pytest.mark.parametrize("ffn", [Ffn, Experts, WithoutGradient, Detached, InPlace, ByKeyword, Split])
def test_order_follows_the_tensors_in_every_kind_of_code(ffn):
    layout = layout_of(Ffn(), ffn())
    names = ["attention.to_q", "attention.to_out", "ffn.up", "ffn.down"]
    assert [unit.names for unit in layout.units] == [[f"blocks.{block}.{name}"] for block in range(2) for name in names]
    assert layout.per_image == ["blocks.0.norm", "blocks.1.norm"]
    assert layout.uncalled == []


@pytest.mark.parametrize("ffn", [Experts, WithoutGradient, ByKeyword, Split])
def test_moments_cover_all_inputs_of_a_layer(ffn):
    denoiser = Denoiser(ffn()).requires_grad_(False)
    call = DenoiserCall((torch.randn(2, 4, 8),), {"time": torch.randn(2, 8)})
    layers = {layer.name: layer for layer in candidate_layers(denoiser, convolutions=False)}
    plan = PruningPlan(SparseGPT(), Unstructured(0.5))
    pruner = PackagePruner(Steps(denoiser, [call]), layers, [], plan, ["a"], [0], lambda *_step: 1.0)
    layer = layers["blocks.0.ffn.up"]
    (found,) = pruner.collect_moments([[layer]], "collecting", Clock("cpu"))
    block = denoiser.blocks[0]
    inputs = (block.attention(call.args[0]) * block.norm(call.kwargs["time"])[:, None]).flatten(0, 1).double()
    assert found.tokens == 8
    torch.testing.assert_close(found.gram, inputs.T @ inputs, rtol=1e-5, atol=1e-5)


class Routed(nn.Module):
    """Two experts, the second of which can be without tokens."""

    def __init__(self, name: str):
        super().__init__()
        self.name, self.empty = name, False
        self.add_module(name, nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)]))

    def forward(self, states):
        tokens = states.flatten(0, 1)
        count = len(tokens) if self.empty else len(tokens) - 1
        first, second = self.get_submodule(self.name)
        return torch.cat([first(tokens[:count]), second(tokens[count:])]).view_as(states)


@pytest.mark.parametrize("name", ["experts", "branches"])
def test_layers_without_calibration_tokens_stay_dense_and_are_reported(name):
    denoiser = Denoiser(Routed(name)).requires_grad_(False)
    call = DenoiserCall((torch.randn(2, 4, 8),), {"time": torch.randn(2, 8)})
    layers = {layer.name: layer for layer in candidate_layers(denoiser, convolutions=False)}
    units = find_units(denoiser, call, list(layers.values())).units
    names = [f"blocks.0.ffn.{name}.{place}" for place in range(2)]
    assert units[-1].names == names
    denoiser.blocks[0].ffn.empty = True
    plan = PruningPlan(SparseGPT(), Unstructured(0.5))
    pruner = PackagePruner(Steps(denoiser, [call]), layers, [units], plan, ["a"], [0], lambda *_step: 1.0)
    with torch.no_grad(), pruner.unit(0) as unit:
        reports = {report.name: report for report in pruner.prune_unit(unit)}
    assert [(reports[layer].sparsity, reports[layer].fallback) for layer in names] == [(0.5, None), (0.0, "dense")]


def test_layer_that_depends_on_its_own_output_raises_an_error_unless_skipped():
    layout = layout_of(Recurrent(), Ffn())
    assert layout.recurrent == ["blocks.0.ffn.layer"]
    names = ["blocks.0.attention.to_q", "blocks.0.attention.to_out", "blocks.1.attention.to_q"]
    assert [unit.names for unit in layout.units][:3] == [[name] for name in names]
    with pytest.raises(RoseExpError, match=r"blocks.0.ffn.layer is called several times .* add it to pipeline.skip"):
        check_recurrent(layout, lambda _name: True)
    check_recurrent(layout, lambda name: "ffn" not in name)


def test_uncalled_layers_are_listed():
    ffn = Ffn()
    ffn.other = nn.Linear(8, 8)
    assert layout_of(ffn).uncalled == ["blocks.0.ffn.other"]


def test_experts_in_one_tensor_raise_an_error_unless_skipped():
    denoiser = Denoiser(Ffn(), Stacked())
    with pytest.raises(RoseExpError, match=r"blocks.1.ffn.weight holds 54% of its block's weights"):
        check_stacked(denoiser, lambda _name: True)
    assert check_stacked(denoiser, lambda name: "ffn" not in name) == ["blocks.1.ffn.weight"]
