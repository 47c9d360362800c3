"""Detection of blocks and linear layers from the structure of a model."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from rose_exp.models import LinearLayer, all_linear_layers, find_blocks
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


def test_missing_or_ambiguous_block_lists_raise_an_error():
    with pytest.raises(RoseExpError, match="Linear has no list of blocks"):
        find_blocks(nn.Linear(3, 3))
    two = nn.ModuleDict({"a": nn.ModuleList([nn.Linear(3, 3)]), "b": nn.ModuleList([nn.Linear(3, 3)])})
    with pytest.raises(RoseExpError, match="one of the lists a, b, all equally large"):
        find_blocks(two)
    assert find_blocks(two, "b").name == "b"
