"""Where hidden states are stored affects memory only."""

from __future__ import annotations

import pytest
import torch

from rose_exp.engine import Ordering, SparseGPT, Unstructured
from rose_exp.pruning import PruneContext, PruningPlan, prune_model
from rose_exp.pruning.activations import Activations
from rose_exp.runtime.errors import RoseExpError

from ..models.families import build, tokens


@pytest.mark.parametrize("place", ["device", "host", "disk"])
def test_hidden_states_can_be_written_and_read(place, tmp_path):
    hidden = Activations((5, 4, 3), torch.float32, place, "cpu", 2, tmp_path / "hidden")
    values = torch.randn(5, 4, 3)
    for piece in hidden.pieces:
        hidden[piece] = values[piece]
    assert [piece for piece, _ in hidden] == [slice(0, 2), slice(2, 4), slice(4, 5)]
    for piece, batch in hidden:
        assert torch.equal(batch, values[piece])
        hidden[piece] = batch + 1
    assert torch.equal(torch.cat([batch for _, batch in hidden]), values + 1)
    assert (tmp_path / "hidden").exists() == (place == "disk")


def test_every_storage_gives_bitwise_equal_weights(tmp_path):
    found = {}
    for place in ("device", "host", "disk"):
        model = build("llama")
        plan = PruningPlan(
            method=SparseGPT(), sparsity=Unstructured(0.5), ordering=Ordering.rose(), block_size=16, activations=place
        )
        prune_model(model, tokens(), plan, PruneContext(scratch=tmp_path))
        found[place] = model.state_dict()
    for name, value in found["device"].items():
        assert torch.equal(value, found["host"][name])
        assert torch.equal(value, found["disk"][name])
    assert list(tmp_path.iterdir()) == []


def test_insufficient_disk_space_raises_an_error(tmp_path):
    with pytest.raises(RoseExpError, match=r"pipeline.activations: expected 4000000.0 GB free for 1000000 windows"):
        Activations((10**6, 10**6, 1000), torch.float32, "disk", "cpu", 1, tmp_path / "hidden")
    assert list(tmp_path.iterdir()) == []
