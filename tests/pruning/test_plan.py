"""Plans pass all of their options to the engine, and reports warn of unmet requests."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rose_exp
from rose_exp.engine import (
    METHODS,
    Allocation,
    DSnoT,
    InputMoments,
    Magnitude,
    Ordering,
    Refine,
    SemiStructured,
    SolverOptions,
    SparseGPT,
    Structured,
    Unstructured,
    Wanda,
    prune_layer,
    prune_layers,
)
from rose_exp.models import LinearLayer, all_linear_layers, find_blocks
from rose_exp.pruning import LayerReport, PruneContext, PruningPlan, events, prune_model, saved_and_total
from rose_exp.pruning.report import report_of, saved_numbers
from rose_exp.runtime.errors import RoseExpError

from ..engine.cases import layer, moments_of
from ..models.families import build, tokens

OPTIONS = {
    "refine": Refine(4),
    "damping": 0.3,
    "ordering": Ordering("descending", "descending", threshold=None),
    "block_size": 5,
    "backend": "torch",
}


def make_layers() -> tuple[list[LinearLayer], InputMoments]:
    torch.manual_seed(5)
    weight, inputs = layer(6, 16, columnar=True)
    layers = [LinearLayer(f"block.{name}", nn.Linear(16, 6, bias=False)) for name in ("q_proj", "k_proj")]
    for number, of in enumerate(layers):
        of.set_weight(weight * (1 + number) + number * torch.randn_like(weight))
    return layers, moments_of(inputs)


def solved(**options) -> list[torch.Tensor]:
    layers, moments = make_layers()
    by_magnitude = options.pop("by_magnitude", False)
    results = PruningPlan(SparseGPT(), Unstructured(0.5), **options).solve(layers, moments, by_magnitude=by_magnitude)
    for of, result in zip(layers, results, strict=True):
        assert torch.equal(of.weight, result.weight)
    return [of.weight.clone() for of in layers]


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_is_passed_to_the_engine(name):
    layers, moments = make_layers()
    option = {name: OPTIONS[name]}
    weights, options = [of.weight for of in layers], SolverOptions(**option)
    expected = prune_layers(weights, moments, methods=[SparseGPT()] * 2, sparsity=Unstructured(0.5), options=options)
    found = solved(**option)
    for weight, result in zip(found, expected, strict=True):
        assert torch.equal(weight, result.weight)
    if name != "backend":  # the backend decides near-ties only
        assert not torch.equal(found[0], solved()[0])


def test_layers_can_have_their_own_method_and_sparsity():
    layers, moments = make_layers()
    plan = PruningPlan(SparseGPT(), Unstructured(0.5), methods={"*.k_proj": Wanda()}, shares={"block.q_proj": 0.25})
    plan.solve(layers, moments)
    assert [int((of.weight == 0).sum()) for of in layers] == [24, 48]
    untouched = make_layers()[0][1].weight
    kept = layers[1].weight != 0
    assert torch.equal(layers[1].weight[kept], untouched[kept])  # Wanda does not update weights
    by_magnitude, dense = solved(by_magnitude=True)[0], make_layers()[0][0].weight
    assert dense[by_magnitude == 0].abs().max() <= dense[by_magnitude != 0].abs().min()


def test_solver_errors_name_the_layers():
    layers, moments = make_layers()
    layers[1].module.weight.data[0, 0] = float("nan")
    with pytest.raises(RoseExpError, match=r"block\.q_proj, block\.k_proj: weight: expected finite numbers"):
        PruningPlan(SparseGPT(), Unstructured(0.5)).solve(layers, moments)


def differs(report: LayerReport, block_size: int = 128) -> str | None:
    """Return the detail of the warning that the sparsity differs from the requested one."""
    found = [event for event in events(report, 0.01, block_size) if event["kind"] == "sparsity_differs"]
    assert all(event["layer"] == report.name for event in found)
    return found[0]["detail"] if found else None


def report_on(method: str, sparsity, rows: int, columns: int, block_size: int = 128, weight=None) -> LayerReport:
    weight = torch.randn(rows, columns) if weight is None else weight
    moments = moments_of(torch.randn(2 * columns, columns))
    method = METHODS["oats"](iterations=2) if method == "oats" else method
    method = METHODS["alps"](max_iterations=3, steps=1) if method == "alps" else method
    result = prune_layer(weight, moments, method=method, sparsity=sparsity, block_size=block_size)
    return report_of("layer", result, moments.tokens, 0.0, *saved_numbers([result]))


@pytest.mark.parametrize("method", sorted(METHODS))
def test_exact_counts_give_no_warning(method):
    patterns = [Unstructured(ratio) for ratio in (0.0, 0.3, 0.5, 0.7, 0.99, 1.0)]
    patterns += [] if method == "oats" else [SemiStructured(*of) for of in ((2, 4), (4, 8), (1, 4), (3, 4), (0, 4), (4, 4))]
    shapes = ((48, 172, 128), (64, 67, 16)) if method == "oats" else ((16, 172, 128), (24, 67, 16), (9, 64, 128))
    for sparsity in patterns:
        for rows, columns, block_size in shapes:
            report = report_on(method, sparsity, rows, columns, block_size)
            assert report.requested == sparsity.ratio
            assert differs(report, block_size) is None, (sparsity, rows, columns)
    assert differs(report_on("wanda", SemiStructured(4, 8), 4, 576)) is None
    assert differs(report_on("magnitude", Unstructured(0.7), 4, 576)) is None


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize(
    ("sparsity", "columns", "reached"),
    [
        (SemiStructured(2, 128), 63, 0.0),
        (SemiStructured(1, 128), 64, 0.0),
        (SemiStructured(2, 128), 172, 2 / 172),
        (SemiStructured(3, 4), 1, 0.0),
        (SemiStructured(5, 100), 35, 1 / 35),
    ],
)
def test_patterns_that_do_not_fit_a_layer_give_a_warning(method, sparsity, columns, reached):
    report = report_on(method, sparsity, 8, columns)
    assert differs(report).startswith(f"requested {sparsity.ratio:.4g}, reached ")
    if method != "oats":
        assert report.sparsity == pytest.approx(reached)
        assert differs(report) == f"requested {sparsity.ratio:.4g}, reached {reached:.4g}"


def test_sparsity_that_rounds_to_zero_gives_a_warning():
    assert differs(report_on("wanda", Unstructured(0.01), 8, 64)) == "requested 0.01, reached 0"
    assert differs(report_on("magnitude", Unstructured(0.01), 8, 64)) is None


def test_more_zeros_than_requested_give_a_warning():
    weight = torch.randn(16, 64)
    weight[:, :48] = 0
    assert differs(report_on("wanda", Unstructured(0.5), 16, 64, weight=weight)) == "requested 0.5, reached 0.75"
    assert differs(report_on("wanda", Unstructured(0.75), 16, 64, weight=weight)) is None


def test_low_rank_part_with_semi_structured_sparsity_gives_a_warning():
    report = report_on("oats", SemiStructured(2, 4), 64, 64)
    assert report.rank > 0
    assert differs(report) == f"requested 0.5, reached {report.sparsity:.4g}; a matrix of rank {report.rank} is added"
    assert report.sparsity == 0.5 - report.rank * 128 / 64**2
    assert differs(report_on("oats", Unstructured(0.5), 64, 64)) is None


@pytest.mark.parametrize(
    ("ratio", "groups", "removed", "warned"),
    [(0.5, 4, 2, False), (0.4, 4, 2, False), (0.3, 4, 1, False), (0.1, 4, 0, True), (0.9, 2, 1, True), (0.5, 4, 1, True)],
)
def test_group_counts_round_to_nearest_without_a_warning(ratio, groups, removed, warned):
    assert (removed == Structured(ratio).count(groups)) or warned
    facts = {"name": "layer", "rows": 8, "columns": 32, "tokens": 99, "error": 0.1, "relative_range": 0.0, "reordered": False}
    report = LayerReport(
        **facts, sparsity=removed / groups, damping=0.01, rank=0, seconds=0.0, removed=removed, groups=groups, requested=ratio
    )
    assert (differs(report) is not None) == warned


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("mixtral", {}),
        ("llama", {"allocation": Allocation("losses", 0.2)}),
        ("llama", {"sparsity": SemiStructured(2, 4), "permute": True}),
        ("llama", {"sparsity": Structured(0.5), "ordering": None}),
    ],
)
def test_pruned_models_have_the_requested_sparsity(family, options):
    plan = {"method": SparseGPT(), "sparsity": Unstructured(0.5), "batch": 2, "block_size": 16} | options
    model = build(family)
    reports = prune_model(model, tokens(), PruningPlan(**plan))
    assert [report.name for report in reports if differs(report, 16)] == []
    assert all(report.requested is not None for report in reports if report.fallback != "dense")
    if "allocation" in options:
        assert len({report.requested for report in reports}) > 3


@pytest.mark.parametrize("starved", ["dense", "magnitude"])
def test_starved_experts_give_a_single_warning(starved):
    plan = {"sparsity": Unstructured(0.5), "batch": 2, "expert_tokens": 10**6, "starved_experts": starved}
    reports = prune_model(build("mixtral"), tokens(), PruningPlan(Magnitude(), **plan))
    experts = [report for report in reports if report.fallback]
    assert {report.fallback for report in experts} == {starved}
    for report in experts:
        assert [event["kind"] for event in events(report, 0.01)] == ["starved_expert"]


def test_saved_counts_include_the_storage_of_low_rank_parts():
    layers, moments = make_layers()
    plan = PruningPlan(SparseGPT(), Unstructured(0.5), methods={"*.k_proj": METHODS["oats"](iterations=2)})
    results = plan.solve(layers, moments)
    names, saved = [of.name for of in layers], saved_numbers(results)
    of_results = zip(names, results, saved, strict=True)
    reports = {name: report_of(name, r, moments.tokens, 0.0, s).as_dict() for name, r, s in of_results}
    assert saved == [48, 96 - results[1].stored]
    assert saved_and_total(layers, reports) == (sum(saved), 192)
    layers[0].module.weight.data[0] = 0
    zeros = int((layers[0].weight == 0).sum())
    assert saved_and_total(layers, {names[1]: reports[names[1]]}) == (zeros + saved[1], 192)
    assert saved_and_total([], {}) == (0, 0)


@pytest.mark.parametrize(
    ("pattern", "warned"), [("2:128", 5), ("1:128", 35), ("4:8", 0)]
)  # layers have 64 columns, except for one per block with 172
def test_run_record_lists_layers_whose_sparsity_differs(small, tmp_path, pattern, warned, caplog):
    few = ["calibration.samples=1", "evaluation=none", "method=wanda", "figures.draw=false"]
    small = [override for override in small if not override.startswith("evaluation")]
    record = rose_exp.run([*small, *few, f"sparsity.pattern={pattern}", "sparsity.ratio=null"], tmp_path)
    found = [event for event in record["events"] if event["kind"] == "sparsity_differs"]
    assert len(found) == warned
    assert ("sparsity_differs in" in caplog.text) == bool(warned)
    pruned, group = map(int, pattern.split(":"))
    assert {layer["requested"] for layer in record["layers"]} == {pruned / group}
    if pattern == "2:128":
        assert {event["layer"].rpartition(".")[2] for event in found} == {"down_proj"}
        assert {event["detail"] for event in found} == {"requested 0.01562, reached 0.01163"}


@pytest.mark.parametrize("sparsity", [Unstructured(0.5), SemiStructured(2, 4), Unstructured(0.9)], ids=str)
@pytest.mark.parametrize("cycles", [0, 1, 2, 50])
def test_cycles_that_can_replace_much_of_the_mask_give_a_warning(sparsity, cycles):
    """The warning names exactly the narrow layers, except those whose options leave the initial mask."""
    model, warnings = build("llama"), []
    plan = PruningPlan(DSnoT(max_cycles=cycles), sparsity, methods={"*.q_proj": DSnoT(max_cycles=0)})
    prune_model(model, tokens(2), plan, PruneContext(on_warning=lambda *warning: warnings.append(warning)))
    layers = [x for x in all_linear_layers(find_blocks(model)) if not x.name.endswith("q_proj")]
    narrow = [x.name for x in layers if cycles > 0.25 * x.columns * (1 - float(sparsity.ratio))]
    found = [detail for kind, detail in warnings if kind == "unsuitable_method"]
    assert bool(found) == bool(narrow)
    assert all(
        narrow[0] in "".join(found) and f"{cycles} cycles can replace more than 25% of the" in detail for detail in found
    )
    assert "q_proj" not in "".join(found)
