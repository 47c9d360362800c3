"""Checks of the engine: selection, moments, and single layers with every method, pattern and backend."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from rose_exp.engine import (
    METHODS,
    CrossMoments,
    InputMoments,
    Ordering,
    Precision,
    PruneResult,
    Refine,
    SemiStructured,
    Sparsity,
    Target,
    Unstructured,
    prune_layer,
    relative_error,
)
from rose_exp.engine.patterns import as_sparsity
from rose_exp.engine.selection import kth_smallest, smallest

from .report import SHARED, Report, Setup, Skip

GOLDEN = SHARED / "golden"

PATTERNS = (Unstructured(0.6), SemiStructured(2, 4), SemiStructured(4, 8))
EXTRAS: dict[str, dict[str, Any]] = {
    "plain": {},
    "order": {"ordering": Ordering(threshold=None)},
    "refine": {"refine": Refine(4, mask_iterations=4)},
    "target": {"target": Target(strength=0.5)},
}

DIFFERENCES = {"mask": 2e-3, "order": 0.01, "error": 3e-3}  # fractions that float32 rounding may change in any case
ITERATIVE = {  # rounding adds up over the iterations of these methods; their masks differ, their errors hardly do
    "alps": {"mask": 0.03, "error": 5e-3},
    "oats": {"mask": 0.1, "error": 0.02},
}
MARGIN = 4  # how much further from float64 than the CPU's float32 a device may be


def check_selection(setup: Setup, report: Report) -> None:
    """Compare the selection of the smallest scores with sorting, with ties and signed zeros."""
    n = 20_000  # more than the threshold above which counting kernels are used
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(3, n, generator=generator)
    scores[0] = (scores[0] * 3).round()
    scores[1, ::7] = -0.0
    on_device, order = scores.to(setup.device), scores.argsort(dim=-1, stable=True)
    for count in (1, 2, 5_000, n - 1):
        with report.case(f"{count} of {n}"):
            mask = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order[:, :count], True)
            assert torch.equal(smallest(on_device, count).cpu(), mask)
            assert torch.equal(kth_smallest(on_device, count).cpu(), scores.sort(dim=-1).values[:, count - 1 : count])


def check_moments(setup: Setup, report: Report) -> None:
    """Compare moments of float32, float16 and bfloat16 inputs, in every precision, with float64."""
    columns, tokens = (40, 300) if setup.tiny else (2200, 6000)  # the wide case splits the triangle into blocks
    bounds = {"float32": 1e-5, "tf32": 1e-3, "bf16x2": 1e-4}  # relative to the norm of the sums
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(tokens, columns, generator=generator) + 0.1
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        values = inputs.to(dtype)
        exact = values.double()
        weights = torch.ones(tokens, 1, dtype=torch.float64)
        weights[tokens // 3 :] = 0.5
        gram, total = exact.T @ (weights * exact), (weights * exact).sum(dim=0)
        for precision in get_args(Precision):
            with report.case(f"{str(dtype).removeprefix('torch.')} inputs, {precision}") as facts:
                moments = InputMoments(columns, device=setup.device, precision=precision)
                moments.update(values[: tokens // 3].to(setup.device))
                moments.update(values[tokens // 3 :].to(setup.device), weight=0.5)
                facts["gram"] = _difference(moments.gram, gram)
                facts["sum"] = _difference(moments.sum, total)
                bound = bounds["float32"] if dtype != torch.float32 else bounds[precision]  # half inputs are exact
                assert facts["gram"] <= bound, f"expected a difference of at most {bound:g}, got {facts['gram']:g}"
                assert facts["sum"] <= bounds["float32"]
                assert torch.equal(moments.gram, moments.gram.T)


def _difference(found: Tensor, expected: Tensor) -> float:
    return float((found.cpu().double() - expected).norm() / expected.norm())


@dataclass(frozen=True)
class Case:
    """A layer: its weight (rows, columns) and inputs (tokens, columns) on the CPU."""

    name: str
    weight: Tensor
    inputs: Tensor

    def moments(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> InputMoments:
        moments = InputMoments(self.weight.shape[1], device=device, dtype=dtype)
        moments.update(self.inputs)
        return moments

    def cross_moments(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> CrossMoments:
        """Return cross moments with inputs of a dense model that differ smoothly from these."""
        cross = CrossMoments(self.weight.shape[1], device=device, dtype=dtype)
        cross.update(self.inputs, self.inputs + 0.1 * self.inputs.roll(1, dims=1))
        cross.finish()
        return cross

    def prune(self, device: torch.device | str, dtype: torch.dtype, **options: Any) -> PruneResult:
        cross = self.cross_moments(device, dtype) if options.get("target") else None
        weight = self.weight.to(device, dtype)
        return prune_layer(weight, self.moments(device, dtype), cross_moments=cross, **options)


def random_case(tiny: bool) -> Case:
    """Return a random layer with correlated inputs and a narrower last block, some of whose inputs are larger."""
    rows, columns = (24, 40) if tiny else (200, 392)
    generator = torch.Generator().manual_seed(0)
    mixing = torch.eye(columns) + torch.randn(columns, columns, generator=generator) / columns**0.5
    inputs = torch.randn(4 * columns, columns, generator=generator) @ mixing
    inputs[:, -(columns // 3) :] *= 6
    return Case("random", torch.randn(rows, columns, generator=generator), inputs)


def check_layers(setup: Setup, report: Report) -> None:
    """Compare every method, pattern and backend, with and without an order, refinement and a target, with float64."""
    case = random_case(setup.tiny)
    for extra, options in EXTRAS.items():
        _compare_methods(setup, report, case, options | {"block_size": 16 if setup.tiny else 128}, extra)


def _compare_methods(setup: Setup, report: Report, case: Case, options: Mapping[str, Any], extra: str) -> None:
    for method, kind in METHODS.items():
        if (extra == "refine" and not kind.sparse) or (extra == "order" and not kind.sequential):
            continue  # refinement needs exact zeros; an order changes only methods that prune column by column
        backends = setup.backends if kind.sequential else ("auto",)  # others have no inner loop
        for sparsity in PATTERNS:
            arguments = {"method": method, "sparsity": sparsity, **options}
            name = f"{case.name}, {method}, {sparsity}, {extra}"
            exact = allowed = None
            with report.case(f"{name}: reference") as facts:
                exact = case.prune("cpu", torch.float64, **arguments)
                allowed = _distance(case.prune("cpu", torch.float32, **arguments), exact)
                facts |= allowed
            if exact is None or allowed is None:
                continue
            for backend in backends:
                with report.case(f"{name}, {backend}") as facts:
                    result = case.prune(setup.device, torch.float32, backend=backend, **arguments)
                    facts |= _distance(result, exact)
                    _assert_close(result, facts, _bounds(method, allowed), sparsity)


def _distance(result: PruneResult, exact: PruneResult) -> dict[str, float]:
    """Return the fraction of the mask and of the order, and the relative output error, that differ from ``exact``."""
    return {
        "mask": float((result.mask.cpu() != exact.mask).double().mean()),
        "order": float((result.order.cpu() != exact.order).double().mean()),
        "error": abs(result.error - exact.error) / max(exact.error, 1e-12),
    }


def _bounds(method: str, allowed: Mapping[str, float]) -> dict[str, float]:
    """Return the largest accepted differences, given those of the CPU's float32."""
    least = DIFFERENCES | ITERATIVE.get(method, {})
    return {name: max(value, MARGIN * allowed[name]) for name, value in least.items()}


def _assert_close(result: PruneResult, found: Mapping[str, float], bounds: Mapping[str, float], sparsity: Sparsity) -> None:
    for name, bound in bounds.items():
        assert found[name] <= bound, f"{name}: expected a difference of at most {bound:.3g}, got {found[name]:.3g}"
    if result.rank == 0:
        assert (result.weight[result.mask] == 0).all(), "expected exact zeros where pruned"
    if isinstance(sparsity, SemiStructured) and result.weight.shape[1] % sparsity.group == 0:
        counts = result.mask.unflatten(1, (-1, sparsity.group)).sum(dim=2)
        assert (counts == sparsity.pruned).all(), f"expected {sparsity.pruned} pruned weights in every group"


def check_golden(setup: Setup, report: Report) -> None:
    """Compare the golden layers with the released code, and every method and pattern on them with float64."""
    for name, golden in _golden_cases(setup.tiny):
        case = Case(name, golden["weight"], golden["inputs"])
        for key in sorted(golden):
            method, _, pattern = key.partition(".")
            if method not in ("sparsegpt", "rose"):
                continue
            for backend in setup.backends:
                with report.case(f"{name}, {key}, {backend}: released code") as facts:
                    _compare_released(setup, case, golden, method, pattern, backend, facts)
        _compare_methods(setup, report, case, {}, "plain")


def _golden_cases(tiny: bool) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield the name and the tensors of each golden layer, or of the smallest one."""
    from safetensors.torch import load_file

    files = sorted(GOLDEN.glob("*.safetensors"), key=lambda file: file.stat().st_size)
    if not files:
        raise Skip("needs the golden cases in the folder ../shared/golden beside the checkout")
    for file in files[:1] if tiny else files:
        yield file.stem, load_file(file)


def _compare_released(
    setup: Setup, case: Case, golden: Mapping[str, Tensor], method: str, pattern: str, backend: str, facts: dict[str, Any]
) -> None:
    """Compare with the released code, which prunes one more weight per block."""
    ordering = Ordering.rose() if method == "rose" else None
    sparsity = as_sparsity(pattern.removeprefix("unstructured."))
    result = case.prune(setup.device, torch.float32, sparsity=sparsity, ordering=ordering, backend=backend)
    expected = golden[f"{method}.{pattern}"]
    error = relative_error(case.weight, expected, case.moments("cpu").hessian())
    facts["mask"] = float(((expected == 0) != result.mask.cpu()).double().mean())
    facts["error"] = abs(result.error - error) / error
    if method == "rose":
        facts["order"] = float((result.order.cpu() != golden[f"rose_order.{pattern}"]).double().mean())
        recorded = json.loads((GOLDEN / f"{case.name}.json").read_text(encoding="utf-8"))
        ratio = pattern.removeprefix("unstructured.")
        assert abs(result.relative_range - recorded[f"relative_range.{ratio}"]) <= 1e-4
        assert facts["order"] <= 0.01
    assert facts["mask"] <= 3e-3
    assert facts["error"] <= 0.01


def check_layer_speed(setup: Setup, report: Report) -> None:
    """Time the published loop, the engine and the limit of the hardware on the layers of LLaMA2-7B."""
    import benchmark_engine
    import cost_model
    import data_sheets

    shapes = [(24, 40)] if setup.tiny else [(4096, 4096), (4096, 11008)]
    hardware = data_sheets.of_device(setup.device)
    report.details["limits"] = hardware.name if hardware else "none: no data sheet of this device is included"
    report.details["layers"] = []
    for rows, columns in shapes:
        for sparsity in (Unstructured(0.7), SemiStructured(2, 4)):
            with report.case(f"{rows} x {columns}, {sparsity}") as facts:
                found = benchmark_engine.measure(rows, columns, sparsity, setup.device, repeats=3)
                report.details["layers"].append(found)
                facts |= {name: found[name] for name in ("published/engine", "engine/limit", "rose/sparsegpt")}
                if hardware:
                    phases = cost_model.layer(rows, columns, sparsity)
                    seconds = found["milliseconds"][f"engine.{setup.backends[1]}"] / 1000
                    facts["engine/roofline"] = round(seconds / cost_model.limit(phases, hardware), 2)
                    facts["engine/predicted"] = round(seconds / cost_model.predicted(phases, hardware), 2)
                if setup.cuda and not setup.tiny:
                    report.target(f"published/engine, {facts['name']}", facts["published/engine"], least=50)
                    ratio = "engine/roofline" if hardware else "engine/limit"
                    report.target(f"{ratio}, {facts['name']}", facts[ratio], most=1.5)
