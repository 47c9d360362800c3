"""Which denoiser classes are supported: prunes a small model of every class, and writes the page of the documentation.

``python -m tests.diffusion.support`` prints the page, and ``--write`` stores it. It takes two minutes.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from rose_exp.diffusion import PackagePruner, Unit, candidate_layers, find_units
from rose_exp.diffusion.denoiser import DenoiserCall, Layout, check_recurrent, check_stacked
from rose_exp.engine import InputMoments, SolverOptions, SparseGPT, Unstructured, prune_layers
from rose_exp.pruning import PruningPlan
from rose_exp.runtime.errors import RoseExpError

from . import survey
from .survey_inputs import inputs_of

PAGE = Path(__file__).parents[2] / "docs" / "supported_denoisers.md"
PLAN = PruningPlan(SparseGPT(), Unstructured(0.5), block_size=32)
NOT_EXAMINED = {
    "AnyFlowFARTransformer3DModel": "not examined: the survey has no inputs for it",
    "Cosmos3OmniTransformer": "not examined: the survey has no small version of it",
    "MiniMaxMusic3RVQDepthDecoder": "not a denoiser: predicts the tokens of a sound",
    "MotionAdapter": "not a denoiser: a part that is inserted into U-Nets",
    "RFD4ProteinaTransformer": "not examined: the survey has no small version of it",
    "SanaWMLTX2RefinerTransformer3DModel": "not examined: the survey has no inputs for it",
    "SanaWMTransformer3DModel": "not examined: the survey has no inputs for it",
    "WanAnimate2Transformer3DModel": "not examined: the survey has no inputs for it",
}


@dataclass
class Support:
    """What is known about a class.

    Attributes:
        rejected: the error for a class that cannot be pruned.
        layers: number of pruned layers.
        left: places of other layers of repeated modules whose inputs are tokens, or that are not called.
    """

    rejected: str | None = None
    layers: int = 0
    left: list[str] = field(default_factory=list)


class Steps:
    """Stands in for a pipeline: the same calls of the denoiser for each batch of prompts."""

    def __init__(self, denoiser: nn.Module, calls: Sequence[DenoiserCall]):
        self.denoiser, self.calls = denoiser, calls
        self.on_step: Callable[[int, int], None] = lambda _step, _steps: None

    @contextmanager
    def steps(self, on_step: Callable[[int, int], None]) -> Iterator[None]:
        self.on_step = on_step
        yield

    def run(self, *_arguments: Any, **_options: Any) -> Iterator[None]:
        for step, call in enumerate(self.calls):
            self.on_step(step, len(self.calls))
            self.denoiser(*call.args, **call.kwargs)
        yield


def examine(name: str) -> Support:
    """Prune a small denoiser, and compare the order of its layers and their new weights with a reference.

    Raises:
        AssertionError: they differ.
    """
    denoiser = survey.build(name)
    calls = [inputs_of(name, denoiser, seed) for seed in (1, 2)]
    layers = candidate_layers(denoiser, convolutions=False)
    try:
        check_stacked(denoiser, lambda _name: True)
        layout = find_units(denoiser, calls[0], layers)
        check_recurrent(layout, lambda _name: True)
    except RoseExpError as error:
        return Support(rejected=str(error))
    with torch.no_grad():
        check_order(denoiser, calls[0], layout.units)
        dense = {key: value.clone() for key, value in denoiser.state_dict().items()}
        known = {layer.name: layer for layer in layers}
        names = [layer for unit in layout.units for layer in unit.names]
        packages = [[unit] for unit in layout.units]
        pruner = PackagePruner(
            Steps(denoiser, calls), {layer: known[layer] for layer in names}, packages, PLAN, ["a"], [0], lambda *_step: 1.0
        )
        for place, unit in enumerate(layout.units):
            expected = pruned_by_reference(denoiser, calls, unit)
            with pruner.unit(place) as part:
                reports = pruner.prune_unit(part)
            assert {report.name for report in reports} == set(unit.names)
            for layer, weight in expected.items():
                check_weight(denoiser.get_submodule(layer).weight, weight, layer)
        output = denoiser(*calls[0].args, **calls[0].kwargs)
    for layer in names:
        weight = denoiser.get_submodule(layer).weight
        widths = [min(PLAN.block_size, weight.shape[1] - start) for start in range(0, weight.shape[1], PLAN.block_size)]
        assert int((weight == 0).sum()) == sum(int(weight.shape[0] * width * 0.5) for width in widths), layer
    changed = {key for key, value in denoiser.state_dict().items() if not torch.equal(value, dense[key])}
    assert changed == {f"{layer}.weight" for layer in names}
    assert all(tensor.isfinite().all() for tensor in _tensors(output))
    return Support(layers=len(names), left=left_dense(denoiser, calls[0], layout))


def check_order(denoiser: nn.Module, call: DenoiserCall, units: Sequence[Unit]) -> None:
    """Check that changing a unit changes no input of this unit or of an earlier one, and that units change the output.

    A layer may be without effect, such as the queries of a text of one token.
    """
    places = {name: place for place, unit in enumerate(units) for name in unit.names}
    before, output = layer_inputs(denoiser, call, places)
    for group in (group for unit in units for group in unit.groups):
        for other in group[1:]:
            assert all(torch.equal(*pair) for pair in zip(before[group[0]], before[other], strict=True)), (group[0], other)
    effects = 0
    for place, unit in enumerate(units):
        kept = {name: denoiser.get_submodule(name).weight.clone() for name in unit.names}
        for name in unit.names:
            denoiser.get_submodule(name).weight.mul_(1.5)
        after, changed_output = layer_inputs(denoiser, call, places)
        for name, weight in kept.items():
            denoiser.get_submodule(name).weight.copy_(weight)
        early = [name for name, own in places.items() if own <= place]
        assert [n for n in early if not all(torch.equal(*pair) for pair in zip(before[n], after[n], strict=True))] == []
        effects += not all(torch.equal(*pair) for pair in zip(output, changed_output, strict=True))
    assert effects > len(units) / 2


def pruned_by_reference(denoiser: nn.Module, calls: Sequence[DenoiserCall], unit: Unit) -> dict[str, Tensor]:
    """Return the pruned weights of a unit, with moments collected for each layer."""
    moments = {name: InputMoments(denoiser.get_submodule(name).in_features) for name in unit.names}
    for call in calls:
        for name, inputs in layer_inputs(denoiser, call, moments)[0].items():
            for tensor in inputs:
                moments[name].update(tensor)
    weights = {}
    for group in unit.groups:
        assert all(torch.equal(moments[name].gram, moments[group[0]].gram) for name in group)
        dense = [denoiser.get_submodule(name).weight for name in group]
        options, methods = SolverOptions(block_size=PLAN.block_size), [PLAN.method] * len(group)
        results = prune_layers(dense, moments[group[0]], methods=methods, sparsity=PLAN.sparsity, options=options)
        weights |= {name: result.weight for name, result in zip(group, results, strict=True)}
    return weights


def check_weight(found: Tensor, expected: Tensor, name: str) -> None:
    """Check that weights are equal up to rounding, which moves at most a few entries of the mask, and so changes their rows."""
    moved = (found == 0) != (expected == 0)
    assert moved.float().mean() < 0.01, name
    same = ~moved.any(dim=1)
    torch.testing.assert_close(found[same], expected[same], rtol=1e-3, atol=1e-3, msg=name)


def layer_inputs(denoiser: nn.Module, call: DenoiserCall, names: Any) -> tuple[dict[str, list[Tensor]], list[Tensor]]:
    """Return the inputs of layers in all their calls, and the denoiser's outputs."""
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    hooks = []
    for name in names:
        module = denoiser.get_submodule(name)
        hooks.append(module.register_forward_pre_hook(lambda _m, args, name=name: found[name].append(args[0].clone())))
    output = denoiser(*call.args, **call.kwargs)
    for hook in hooks:
        hook.remove()
    return found, _tensors(output)


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def left_dense(denoiser: nn.Module, call: DenoiserCall, layout: Layout) -> list[str]:
    """Return the places of repeated linear layers that are not pruned although they process tokens, or are not called."""
    used = {name for unit in layout.units for name in unit.names} | set(layout.per_image)
    linear = (name for name, module in denoiser.named_modules() if isinstance(module, nn.Linear))
    others = [name for name in linear if name not in used and re.search(r"\.\d+\.", name)]
    shapes: dict[str, list[torch.Size]] = {name: [] for name in others}
    hooks = []
    for name in others:  # outputs, because a caller may pass the input by keyword
        module = denoiser.get_submodule(name)
        hooks.append(module.register_forward_hook(lambda _m, _args, output, name=name: shapes[name].append(output.shape)))
    with torch.no_grad():
        denoiser(*call.args, **call.kwargs)
    for hook in hooks:
        hook.remove()
    left = [name for name, found in shapes.items() if not found or any(len(shape) > 2 for shape in found)]
    return sorted({re.sub(r"\.\d+(?=\.)", "", name) for name in left})


def row(name: str, support: Support) -> str:
    """Return the row of the page for a supported class."""
    left = ", ".join(f"`{place}`" for place in support.left) or "—"
    return f"| {name} | {support.layers} | {left} |"


def page(supports: dict[str, Support]) -> str:
    """Return the documentation page for the results of all classes."""
    import diffusers

    pruned = {name: support for name, support in supports.items() if support.rejected is None}
    lines = [
        "# Supported denoisers",
        "",
        f"Every class of transformer and U-Net in diffusers {diffusers.__version__}, built small with random weights: "
        f"{len(pruned)} of {len(supports) + len(NOT_EXAMINED)} are pruned. For each of them, changing a layer does not change "
        "the input of any layer that is pruned before it or with it, and pruning gives, up to rounding, the same weights as a "
        "loop that collects the inputs of each layer separately. This covers the denoiser, not the other parts of a pipeline. "
        "Runs need a pipeline that generates images, from prompts or from noise alone: those of videos and sounds, and those "
        "that need other inputs, such as class labels, are rejected. "
        "`python -m tests.diffusion.support --write` generates this page.",
        "",
        "Runs prune the linear layers of transformer blocks, except those whose input is one vector per image, such as the "
        "modulation by the time step. *Left dense* lists other linear layers of repeated modules: those outside transformer "
        "blocks, and those that the examined call does not use. A run warns about layers of transformer blocks that the first "
        "denoising step does not call. Convolutions are pruned with `diffusion.convolutions=true`; in Sana, they form the "
        "feed-forward part.",
        "",
        "| Class | Pruned layers of the small model | Left dense |",
        "|---|---:|---|",
    ]
    lines += [row(name, support) for name, support in pruned.items()]
    lines += ["", "## Not supported or not examined", "", "| Class | Reason |", "|---|---|"]
    others = {name: support.rejected for name, support in supports.items() if support.rejected is not None} | NOT_EXAMINED
    lines += [f"| {name} | {reason} |" for name, reason in sorted(others.items())]
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> Any:
    names = [name for name in survey.classes() if name not in NOT_EXAMINED]
    text = page({name: examine(name) for name in tqdm(names, unit="class")})
    if "--write" in arguments:
        PAGE.write_text(text, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
