"""Results of every kind of method are bitwise equal for all batch sizes, from memory or disk, as a whole or block by block,
resumed or uninterrupted."""

from __future__ import annotations

import hashlib
import re
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from rose_exp.engine import METHODS, InputMoments, Ordering, Refine, SemiStructured, SparseGPT, Target, Unstructured, Wanda
from rose_exp.engine.allocation import Allocation
from rose_exp.engine.groups import Structured
from rose_exp.engine.targets import CrossMoments
from rose_exp.evaluation import perplexity
from rose_exp.models import all_linear_layers, find_blocks, load_model, open_model, unstacked_experts
from rose_exp.pruning import (
    InMemory,
    OnDisk,
    PassSeconds,
    PruneContext,
    PruningPlan,
    RunState,
    answers_by_blocks,
    check_decoder,
    probe,
    prune_model,
)
from rose_exp.runtime.batches import batch_size
from rose_exp.runtime.errors import RoseExpError
from rose_exp.settings.reconstruction import Reconstruction
from rose_exp.settings.schema import ModelSettings

from ..models.families import CONFIGS, build, tokens

ROSE = {"method": SparseGPT(), "sparsity": Unstructured(0.5), "ordering": Ordering.rose()}
PLANS = {
    "rose": ROSE,
    "rose 2:4": ROSE | {"sparsity": SemiStructured(2, 4)},
    "wanda": {"method": Wanda(), "sparsity": Unstructured(0.5)},
    "dsnot": {"method": METHODS["dsnot"](), "sparsity": Unstructured(0.5)},
    "alps": {"method": METHODS["alps"](), "sparsity": Unstructured(0.6)},
    "oats": {"method": METHODS["oats"](iterations=4), "sparsity": Unstructured(0.5)},
    "refined towards the dense model": ROSE | {"refine": Refine(4, mask_iterations=6), "target": Target(0.5, 0.5)},
    "one group at a time": ROSE | {"true_sequential": True, "target": Target(strength=0.5)},
    "owl": ROSE | {"allocation": Allocation("owl", 0.08)},
    "reconstructed": {"method": Wanda(), "sparsity": Unstructured(0.5), "reconstruction": Reconstruction(2, batch=2)},
    "replicate": ROSE | {"replicate": 3},
    "structured": {"method": SparseGPT(), "sparsity": Structured(0.3)},
    "permuted 2:4": ROSE | {"sparsity": SemiStructured(2, 4), "permute": True},
}
FAMILIES = [family for family in ("llama", "qwen3", "gemma3", "gemma4", "gpt2", "opt", "qwen3_moe") if family in CONFIGS]
WINDOWS = 5


@dataclass(frozen=True)
class Mode:
    """How a run is executed.

    Attributes:
        batch: windows per batch.
        weights: ``memory`` or ``disk``.
        by_blocks: measure perplexity block by block.
        activations: where hidden states are stored.
        cut: number of blocks after which the run is interrupted and resumed; None: uninterrupted.
        resume: value of ``pipeline.resume``.
    """

    batch: int = 2
    weights: str = "memory"
    by_blocks: bool = False
    activations: str = "device"
    cut: int | None = None
    resume: str = "activations"


BASE = Mode()
MODES = [
    Mode(batch=1),
    Mode(batch=WINDOWS),
    Mode(by_blocks=True, activations="disk"),
    Mode(batch=3, weights="disk", by_blocks=True, activations="host"),
    Mode(batch=1, cut=1),
    Mode(weights="disk", by_blocks=True, cut=2, resume="recompute"),
]


class Cut(Exception):
    """Simulates the end of the process."""


def outcome(folder: Path, settings: ModelSettings, options: dict, mode: Mode) -> tuple[list[dict], str, float]:
    """Return layer reports without times, a hash of the pruned weights and the perplexity."""
    plan = PruningPlan(**({"block_size": 16, "batch": mode.batch, "activations": mode.activations} | options))
    if mode.cut is not None:
        with pytest.raises(Cut):
            run(folder, settings, plan, mode, cut_after(mode.cut))
    return run(folder, settings, plan, mode)


def run(folder: Path, settings: ModelSettings, plan: PruningPlan, mode: Mode, on_layer=None) -> tuple[list[dict], str, float]:
    torch.manual_seed(0)
    state = RunState(folder, {"settings": {"seed": 0}}, mode.resume) if mode.cut or mode.weights == "disk" else None
    if mode.weights == "disk":
        loaded, streamed = open_model(settings)
        weights = OnDisk(streamed, state.block)
    else:
        loaded = load_model(settings)
        weights = InMemory(find_blocks(loaded.model))
    model, windows = loaded.model, tokens(WINDOWS)
    reports = prune_model(
        model,
        windows,
        plan,
        PruneContext(state=state, weights=weights, seconds=PassSeconds(), on_layer=on_layer, scratch=folder.parent),
    )
    digest = hashlib.sha256()
    for index in range(len(weights.blocks.blocks)):
        with weights.at(index, "cpu") as block:
            for name, value in sorted(block.state_dict().items()):
                digest.update(name.encode() + value.contiguous().numpy().tobytes())

    def answers(own):
        return answers_by_blocks(model, weights, own, "cpu", mode.batch, mode.activations, folder.parent, "test")

    value = perplexity(model, tokens(3, seed=9), mode.batch, answers=answers if mode.by_blocks else None).value
    return [{k: v for k, v in report.as_dict().items() if k != "seconds"} for report in reports], digest.hexdigest(), value


def cut_after(blocks: int):
    seen = set()

    def cut(_step, report):
        seen.add(re.search(r"\.(\d+)\.", report.name)[1])
        if len(seen) == blocks:
            raise Cut

    return cut


def saved(folder: Path, family: str) -> ModelSettings:
    build(family).save_pretrained(folder, max_shard_size="30KB")
    return ModelSettings(path=str(folder))


KNOWN_HEADS = ("llama", "qwen3", "gemma3")  # families whose heads can be removed
FEW = {(family, "refined towards the dense model") for family in FAMILIES} | {("gemma3", name) for name in PLANS}
ALL = [
    pytest.param(family, name, marks=() if (family, name) in FEW else pytest.mark.slow)
    for family in FAMILIES
    for name in PLANS
    if name != "structured" or family in KNOWN_HEADS
]


@pytest.mark.parametrize(("family", "name"), ALL)
def test_every_mode_gives_identical_results(family, name, tmp_path):
    settings = saved(tmp_path / "model", family)
    expected = outcome(tmp_path / "base", settings, PLANS[name], BASE)
    for number, mode in enumerate(MODES):
        assert outcome(tmp_path / f"{number}", settings, PLANS[name], mode) == expected, mode


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_perplexity_by_blocks_equals_that_of_the_whole_model(family, tmp_path):
    """Includes blocks with inputs besides hidden states: per-layer embeddings, or keys and values of earlier blocks."""
    model, windows = build(family), tokens(WINDOWS)
    whole = [perplexity(model, windows, batch).value for batch in (1, 2, WINDOWS)]
    for batch in (1, 3):
        found = answers_by_blocks(model, InMemory(find_blocks(model)), windows, "cpu", batch, "device", tmp_path, "test")
        whole.append(perplexity(model, windows, answers=lambda _, found=found: found).value)
    assert len(set(whole)) == 1


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_moments_equal_those_of_the_whole_model(family, monkeypatch):
    """With nothing pruned, every layer gets the inputs of the model's forward pass."""
    windows, whole, found = tokens(WINDOWS), {}, {}
    model = build(family)
    layers = all_linear_layers(find_blocks(model))
    with ExitStack() as stack, torch.no_grad(), unstacked_experts(model):
        for layer in layers:
            whole[layer.name] = InputMoments(layer.columns)
            hook = lambda _m, args, to=whole[layer.name]: to.update(args[0])  # noqa: E731
            stack.callback(layer.module.register_forward_pre_hook(hook).remove)
        for window in windows.split(1):
            model(input_ids=window, use_cache=False)

    def solve(_plan, group, moments, *arguments):
        found.update({layer.name: moments.hessian() for layer in group})
        return real(_plan, group, moments, *arguments)

    real = PruningPlan.solve
    monkeypatch.setattr(PruningPlan, "solve", solve)
    for batch in (1, WINDOWS):
        found.clear()
        prune_model(model, windows, PruningPlan(method=Wanda(), sparsity=Unstructured(0.0), batch=batch))
        reached = {name for name, moments in whole.items() if moments.tokens}
        assert reached <= set(found)
        for name in reached:
            whole[name].finish()  # as before solving
            assert torch.equal(found[name], whole[name].hessian()), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("columns", [24, 200, 300])
def test_sums_do_not_depend_on_the_split_into_batches(columns, dtype):
    x, dense = torch.randn(2, 7, 411, columns, dtype=dtype).unbind()
    missing = torch.randn(7, 411, 8, dtype=dtype)
    found = []
    for cuts in ([7], [1] * 7, [2, 3, 2]):
        moments, cross_moments = InputMoments(columns, dtype=dtype), CrossMoments(columns, 8, dtype=dtype)
        for a, b, c in zip(x.split(cuts), dense.split(cuts), missing.split(cuts), strict=True):
            moments.update(a)
            cross_moments.update(a, b, c)
        found.append((moments, cross_moments))
    flat = InputMoments(columns, dtype=dtype)
    for part in x.flatten(0, 1).split(100):
        flat.update(part)
    first, sums = found[0]
    for moments in [flat, *(moments for moments, _ in found)]:
        assert torch.equal(moments.gram, first.gram)
        assert torch.equal(moments.sum, first.sum)
        assert moments.tokens == 7 * 411
    for _, cross_moments in found:
        assert torch.equal(cross_moments.gram, sums.gram)
        assert torch.equal(cross_moments.residual, sums.residual)
    exact = x.double().flatten(0, 1)
    torch.testing.assert_close(first.gram.double(), exact.T @ exact, rtol=1e-6, atol=1e-3)


def test_merged_moments_equal_whole_moments_up_to_float32_rounding():
    """Each process sums its share of the windows; the merged Hessian differs only in the last digits of float32."""
    x = torch.randn(16, 300, 48)
    whole = InputMoments(48)
    whole.update(x)
    parts = [InputMoments(48) for _ in range(3)]
    for part, own in zip(parts, x.tensor_split(3), strict=True):
        part.update(own)
        if part is not parts[0]:
            parts[0].merge(part)
    h, other = whole.hessian(), parts[0].hessian()
    scale = h.diagonal().sqrt().outer(h.diagonal().sqrt())
    assert ((h - other).abs() <= 2 * torch.finfo(torch.float32).eps * scale).all()


def test_only_gpus_run_several_windows_at_once():
    assert batch_size(8, "cpu") == 1
    assert batch_size(8, torch.device("cuda", 1)) == 8


class _Irregular(torch.nn.Module):
    """A decoder-like model that cannot be run block by block."""

    def __init__(self, what: str):
        super().__init__()
        torch.manual_seed(0)
        self.what = what
        self.embed = torch.nn.Embedding(96, 12)
        self.layers = torch.nn.ModuleList(_Block() for _ in range(3))
        self.head = torch.nn.Linear(12, 96)

    def forward(self, input_ids, **_):
        hidden = self.embed(input_ids)
        first = hidden
        for index, layer in enumerate(self.layers):
            beside = hidden if self.what == "argument" and index == 2 else None
            hidden = layer(hidden, beside)
            first = hidden if index == 0 else first
        hidden = hidden + first if self.what == "output" else hidden
        hidden = hidden + hidden.flip(1) if self.what == "future" else hidden
        hidden = hidden + hidden.mean(1, keepdim=True) if self.what == "mean" else hidden
        return self.head(hidden)


class _Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(12, 12)

    def forward(self, hidden, beside=None):
        return hidden + torch.tanh(self.linear(hidden)) + (0 if beside is None else 2 * beside)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("argument", "layers.2: expected arguments that depend on the tokens alone"),
        ("output", "expected a model that reads only the output of its last block"),
        ("future", "expected a causal decoder"),
        ("mean", "expected a causal decoder"),
    ],
)
def test_models_that_cannot_run_block_by_block_raise_an_error(what, message):
    model = _Irregular(what)
    with pytest.raises(RoseExpError, match=message):
        probe(model, find_blocks(model), tokens())
    plain = _Irregular("nothing")
    probe(plain, find_blocks(plain), tokens())


@pytest.mark.parametrize("name", ["BertConfig", "RobertaConfig", "ElectraConfig"])
def test_encoders_raise_an_error(name):
    import transformers

    sizes = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = getattr(transformers, name)(**sizes, max_position_embeddings=64)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(RoseExpError, match=f"expected a causal decoder, got {type(model).__name__}"):
        check_decoder(model, tokens())
    config.is_decoder = True
    check_decoder(transformers.AutoModelForCausalLM.from_config(config).eval(), tokens())


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_every_family_is_a_causal_decoder(family):
    check_decoder(build(family), tokens())
