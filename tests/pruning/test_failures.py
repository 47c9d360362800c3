"""An error in the code of a model is one clear error; an error in this package keeps its traceback."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from rose_exp.engine import Magnitude, Unstructured
from rose_exp.pruning import PruneContext, PruningPlan, capture, prune_model
from rose_exp.runtime.errors import RoseExpError

PLAN = PruningPlan(Magnitude(), Unstructured(0.5))


class Block(nn.Module):
    def __init__(self, error: Exception | None):
        super().__init__()
        self.layer, self.error = nn.Linear(8, 8), error

    def forward(self, hidden_states):
        if self.error is not None:
            raise self.error
        return self.layer(hidden_states)


class Model(nn.Module):
    """A decoder that raises an error outside its blocks, or inside the second one."""

    def __init__(self, outside: Exception | None = None, inside: Exception | None = None):
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.layers = nn.ModuleList([Block(None), Block(inside)])
        self.outside = outside

    def forward(self, input_ids, **_):
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        if self.outside is not None:
            raise self.outside
        return SimpleNamespace(logits=hidden)


@pytest.mark.parametrize("place", ["outside", "inside"])
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (TypeError("inputs_embeds"), "TypeError: inputs_embeds"),
        (RuntimeError("shape"), "shape"),
        (KeyError("state"), "KeyError: 'state'"),
        (AssertionError(), "AssertionError"),
    ],
)
def test_errors_of_the_model_name_the_model_and_the_reason(error, reason, place):
    message = f"expected a decoder that runs on token IDs alone, got Model, which fails: {reason}$"
    with pytest.raises(RoseExpError, match=message):
        prune_model(Model(**{place: error}), torch.zeros(2, 4, dtype=torch.int64), PLAN)


@pytest.mark.parametrize("name", ["linear_layers", "check_layouts", "first_tensor", "equal"])
def test_errors_of_this_package_keep_their_traceback(name, monkeypatch):
    package = {"__name__": "rose_exp.broken"}
    exec("def broken(*_arguments, **_keywords):\n    raise TypeError('a bug')", package)  # code of this package, by its globals
    monkeypatch.setattr(capture, name, package["broken"])
    warnings = []
    context = PruneContext(on_warning=lambda *warning: warnings.append(warning))
    with pytest.raises(TypeError, match="a bug"):
        prune_model(Model(), torch.zeros(2, 4, dtype=torch.int64), PLAN, context)
    assert not warnings


def test_exhausted_memory_is_not_an_error_of_the_model():
    with pytest.raises(torch.OutOfMemoryError):
        prune_model(Model(inside=torch.OutOfMemoryError("no memory")), torch.zeros(2, 4, dtype=torch.int64), PLAN)
