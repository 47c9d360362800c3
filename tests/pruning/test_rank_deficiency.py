"""The warning of a rank-deficient Hessian appears only if pruning uses the Hessian."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rose_exp.engine import METHODS, InputMoments, Ordering, Refine, SemiStructured, Target, Unstructured
from rose_exp.engine.targets import CrossMoments
from rose_exp.pruning import PruningPlan, events
from rose_exp.pruning.report import report_of, saved_numbers

from .test_plan import make_layers

USE_HESSIAN = {"alps", "sparsegpt"}
OPTIONS = {"alps": {"max_iterations": 3, "steps": 1}, "oats": {"iterations": 2}}
VARIANTS = [(name, {}) for name in METHODS] + [("dsnot", {"initial": initial}) for initial in ("magnitude", "sparsegpt")]
OTHERS = {
    "plain": {},
    "refine": {"refine": Refine(steps=2)},
    "admm": {"refine": Refine(steps=2, mask_iterations=3)},
    "target": {"target": Target(strength=0.5)},
    "study": {"study": ["*.q_proj"]},
    "ordering": {"ordering": Ordering.rose()},
    "ordering by obs": {"ordering": replace(Ordering.rose(), score="obs")},
}


def warned(plan: PruningPlan, tokens: int) -> list[str]:
    """Return the layers with the warning after pruning two layers that share ``tokens`` calibration tokens."""
    layers, _ = make_layers()
    columns = layers[0].weight.shape[1]
    inputs = torch.randn(tokens, columns)
    moments, cross_moments = InputMoments(columns), CrossMoments(columns)
    moments.update(inputs)
    cross_moments.update(inputs, torch.randn(tokens, columns))
    results = plan.solve(layers, moments, cross_moments if plan.target else None)
    reports = [
        report_of(layer.name, result, tokens, 0.0, saved)
        for layer, result, saved in zip(layers, results, saved_numbers(results), strict=True)
    ]
    found = [event for report in reports for event in events(report, plan.damping, plan.block_size, plan.study)]
    return [event["layer"] for event in found if event["kind"] == "rank_deficient"]


@pytest.mark.parametrize("sparsity", [Unstructured(0.5), SemiStructured(2, 4)], ids=str)
@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_only_uses_of_the_hessian_give_a_warning(name, options, other, sparsity):
    method = METHODS[name](**OPTIONS.get(name, {}), **options)
    if other in ("refine", "admm") and not method.sparse:
        pytest.skip(f"{name} cannot be refined")
    plan = PruningPlan(method, sparsity, **OTHERS[other])
    columns = make_layers()[0][0].weight.shape[1]
    assert warned(plan, 2 * columns) == []
    if name in USE_HESSIAN or options.get("initial") == "sparsegpt" or other in ("refine", "admm", "target"):
        assert warned(plan, columns - 1) == ["block.q_proj", "block.k_proj"]
    else:
        assert warned(plan, columns - 1) == (["block.q_proj"] if other == "study" else [])


def test_layers_that_share_inputs_are_judged_separately():
    sparsegpt, wanda = METHODS["sparsegpt"](), METHODS["wanda"]()
    for method, special, expected in ((sparsegpt, wanda, "q_proj"), (wanda, sparsegpt, "k_proj")):
        plan = PruningPlan(method, Unstructured(0.5), methods={"*.k_proj": special})
        assert warned(plan, 2) == [f"block.{expected}"]
