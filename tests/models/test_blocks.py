"""Detection of blocks and linear layers from the structure of a model."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from rose_exp.models import LinearLayer, all_linear_layers, find_blocks, shared_layers
from rose_exp.runtime.errors import RoseExpError

from .families import CONFIGS, build

BLOCKS = {"opt": "model.decoder.layers", "gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers"}


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_blocks_are_found_in_every_family(family):
    blocks = find_blocks(build(family))
    assert blocks.name == BLOCKS.get(family, "model.layers")
    assert len(blocks.blocks) == build(family).config.num_hidden_layers
    names = [layer.name for layer in all_linear_layers(blocks)]
    assert len(set(names)) == len(names)
    assert not any("lm_head" in name or "embed" in name for name in names)


def test_conv1d_weight_is_exposed_in_linear_layout():
    conv = Conv1D(5, 3)  # 3 inputs, 5 outputs
    layer = LinearLayer("c", conv)
    assert layer.weight.shape == (5, 3)
    inputs = torch.randn(2, 3)
    torch.testing.assert_close(inputs @ layer.weight.T + conv.bias, conv(inputs))
    new = torch.randn(5, 3)
    layer.set_weight(new)
    assert torch.equal(conv.weight, new.T)


def test_missing_block_lists_raise_an_error():
    with pytest.raises(RoseExpError, match="Linear has no list of blocks"):
        find_blocks(nn.Linear(3, 3))
    with pytest.raises(RoseExpError, match="model.blocks: expected one of a, b, got 'c'"):
        find_blocks(two_lists(), "a,c")


def two_lists() -> nn.Module:
    return nn.ModuleDict({name: nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)]) for name in ("a", "b")})


def test_equally_large_lists_are_pruned_together():
    model = two_lists()
    blocks = find_blocks(model)
    assert blocks.names == ["a.0", "a.1", "b.0", "b.1"]
    assert [layer.name for layer in all_linear_layers(blocks)] == blocks.names
    assert [blocks.index_of(name) for name in ("a.0.weight", "b.1.bias", "b.10.weight", "c.0.weight")] == [0, 3, None, None]
    assert find_blocks(model, blocks.name).names == blocks.names
    assert find_blocks(model, "b").names == ["b.0", "b.1"]


def test_layers_of_several_blocks_are_shared():
    model = two_lists()
    assert shared_layers(model, find_blocks(model)) == set()
    model["b"][1].weight = model["a"][0].weight
    assert shared_layers(model, find_blocks(model)) == {"a.0", "b.1"}
