"""Knowledge about model families, built in and from other packages."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch
import transformers
from torch import nn

from rose_exp.engine import SparseGPT, Structured, Unstructured
from rose_exp.models import families as find_families
from rose_exp.models import find_blocks, find_structures, needs_bos, projections, remove_masked
from rose_exp.models.families import BUILT_IN, installed_families
from rose_exp.pruning import PruningPlan, prune_model
from rose_exp.runtime.errors import RoseExpError
from rose_exp.runtime.plugins import plugins

from .families import build, tokens

MODULE = '''
import torch
from torch import nn
from rose_exp.models import Family, Layout, LinearLayer, Part, Projection, Structure


class Stack(nn.Module):
    """Two experts without an activation, each for every second token."""

    def __init__(self, width):
        super().__init__()
        self.both = nn.Parameter(torch.randn(2, width, width) / width**0.5)

    def forward(self, hidden):
        return torch.where(torch.arange(hidden.shape[1])[:, None] % 2 == 0, hidden @ self.both[0].T, hidden @ self.both[1].T)


class StackLayout(Layout):
    def layers(self, module):
        if not isinstance(module, Stack):
            return []
        return [{"only": Projection(module, "both", expert, slice(0, module.both.shape[1]))} for expert in range(2)]

    def forward(self, module, experts, hidden):
        output = torch.empty_like(hidden)
        for expert, layers in enumerate(experts):
            output[:, expert::2] = layers["only"](hidden[:, expert::2])
        return output


class Pairs(nn.Module):
    """An FFN with neurons whose layers have unusual names."""

    def __init__(self, width):
        super().__init__()
        self.enter, self.leave = nn.Linear(width, 12), nn.Linear(12, width)

    def forward(self, hidden):
        return self.leave(self.enter(hidden).relu())


def structures(module, name):
    if not isinstance(module, Pairs):
        return []
    places = torch.arange(12)[:, None]
    parts = [Part(LinearLayer(f"{name}.{key}", getattr(module, key)), places) for key in ("leave", "enter")]
    return [Structure(name, "neurons", module, (parts[0],), (parts[1],))]


MINE = Family("Mine", model_types=("llama",), bos=True, layouts=(StackLayout(),), structures=structures)
'''


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Install a package with an entry point, and make the families forget what they have found before."""

    def install_package(value: str, module: str = MODULE) -> None:
        (tmp_path / "my_families.py").write_text(module)
        metadata = tmp_path / "my_families-1.2.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: my-families\nVersion: 1.2\n")
        (metadata / "entry_points.txt").write_text(f"[rose_exp.families]\nmine = {value}\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        importlib.invalidate_caches()
        plugins.cache_clear()
        installed_families.cache_clear()

    yield install_package
    sys.modules.pop("my_families", None)
    plugins.cache_clear()
    installed_families.cache_clear()


def test_only_built_in_families_without_other_packages():
    assert find_families() == BUILT_IN


def test_a_package_adds_experts_heads_and_bos(install):
    install("my_families:MINE")
    import my_families

    assert [installed.source for installed in installed_families()] == ["my-families 1.2"]
    assert needs_bos(transformers.LlamaConfig())
    assert not needs_bos(transformers.GPT2Config())
    stack = my_families.Stack(8)
    assert [list(layers) for layers in projections(stack)] == [["only"], ["only"]]
    (structure,) = find_structures(my_families.Pairs(8), "mlp")
    assert (structure.name, structure.kind, structure.groups) == ("mlp", "neurons", 12)


def test_layers_of_an_added_layout_are_pruned(install):
    install("my_families:MINE")
    import my_families

    model = build("llama")
    for block in model.model.layers:
        block.mlp = my_families.Stack(model.config.hidden_size)
    reports = prune_model(model, tokens(), PruningPlan(SparseGPT(), Unstructured(0.5), expert_tokens=1))
    experts = [report for report in reports if report.name.endswith(".only")]
    assert len(experts) == 2 * len(model.model.layers)
    for block in model.model.layers:
        assert (block.mlp.both == 0).float().mean() == pytest.approx(0.5, abs=0.01)


def test_neurons_of_an_added_structure_are_removed(install):
    install("my_families:MINE")
    import my_families

    model, sparsity = build("llama"), Structured(0.5, heads=False)
    for block in model.model.layers:
        block.mlp = my_families.Pairs(model.config.hidden_size)
    reports = prune_model(model, tokens(), PruningPlan(SparseGPT(), sparsity))
    with torch.no_grad():
        masked = model(tokens()).logits
    remove_masked(model, find_blocks(model), sparsity, {report.name for report in reports}, configure=False)
    assert all(isinstance(block.mlp.enter, nn.Linear) and block.mlp.enter.out_features == 6 for block in model.model.layers)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens()).logits, masked, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("my_families:Stack", r"entry point mine of rose_exp.families \(my-families 1.2\): expected a Family, got type"),
        ("my_families:NOTHING", r"\(my-families 1.2\): cannot load my_families:NOTHING"),
        ("nothing:MINE", r"\(my-families 1.2\): cannot load nothing:MINE: No module named 'nothing'"),
    ],
)
def test_broken_entry_points_raise_an_error_with_the_package(value, message, install):
    install(value)
    with pytest.raises(RoseExpError, match=message):
        find_families()


def test_installed_families_are_part_of_the_protocol(install, shared):
    from rose_exp.models import load_model
    from rose_exp.settings.schema import ModelSettings

    settings = ModelSettings(path=str(shared / "data" / "models" / "stories260k-llama"))
    assert "families" not in load_model(settings).protocol
    install("my_families:MINE")
    assert load_model(settings).protocol["families"] == ["Mine (my-families 1.2)"]
