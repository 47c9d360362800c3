"""The cost model's counts agree with a hand-computed case, with the engine's products, and with the compiled kernels."""

from __future__ import annotations

import re
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from rose_exp.engine import SemiStructured, Unstructured
from rose_exp.engine.hessian import CHOLESKY, SOLVE, factorize
from rose_exp.engine.products import LEAF

from .conftest import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "scripts"))

import cost_model
import data_sheets

H100 = data_sheets.HARDWARE[2]


def test_counts_of_a_layer_of_two_blocks_agree_with_a_count_by_hand():
    """4 rows and 8 columns in blocks of 4."""
    swept = cost_model.sweep(4, 8, groups=False, block=4)
    assert (
        swept.flops == 4 * 8 * 4 * 3
    )  # 32 weights, each updated by the 4 columns of its block: an addition, and two for the update
    assert swept.bytes == 32 * (4 + 4 + 4 + 1) + 2 * 16 * 4  # weight in and out, error and mask; two 4 x 4 factors
    assert swept.launches == 4

    compensated = cost_model.compensation(4, 8, block=4)
    assert compensated.flops == 2 * 4 * 4 * 4 + 2 * 32  # one product, for the second block; squares of 32 errors
    product = 4 * (16 + 16 + 16 + 16)  # both factors, and the result read and written
    assert compensated.bytes == product + 32 * 4
    assert compensated.launches == 3

    chosen = cost_model.selection(4, 8, block=4)
    assert (chosen.flops, chosen.bytes) == (2 * 32, 32 * 5)

    summed = cost_model.moments(8, tokens=10, updates=1)
    assert summed.flops == 2 * 10 * 8 * 8  # too narrow to split
    assert summed.bytes == 10 * 8 * 2 + 8 * 8 * 4 * 4 + 10 * 8 * 2  # inputs, product and sums, inputs for the sum


def test_factorization_counts_the_products_of_the_engine():
    columns = 1300
    square = torch.randn(columns, columns)
    hessian = square @ square.T / columns + torch.eye(columns)
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_flops}) as counter:
        factorize(hessian, 0.01)
    leaves = cost_model.Leaves(CHOLESKY["cpu"], SOLVE, LEAF["cpu"])
    library = 4 * (325**3 / 3 + solve_flops(325, leaves))  # halved twice
    assert counter.get_total_flops() + library == pytest.approx(cost_model.factorization(columns, leaves).flops, rel=1e-9)


def addmm_flops(_total, left, right, **_options) -> int:
    """Return the operations of the in-place product, which torch's counter does not include."""
    return 2 * left[0] * left[1] * right[1]


def solve_flops(n: int, leaves: cost_model.Leaves) -> float:
    """Return the operations of the library's triangular solves in the inversion of an (n, n) matrix."""
    return n**3 if n <= leaves.solve else solve_flops(n // 2, leaves) + solve_flops(n - n // 2, leaves)


def test_factorization_without_products_has_the_counts_of_the_library():
    assert cost_model.factorization(6).flops == 6**3 / 3 + 6**3  # a Cholesky factor and a solve


def test_limit_and_predicted_time_of_a_phase_by_hand():
    hardware = data_sheets.Hardware("test", bandwidth=100.0, float32=640.0, tf32=1.0, float16=1.0, processors=2, lanes=32)
    assert hardware.clock == 5.0
    phase = cost_model.Phase("products", flops=1280.0, bytes=100.0)
    assert phase.limit(hardware) == 2.0
    assert cost_model.Phase("copies", flops=1.0, bytes=300.0).limit(hardware) == 3.0

    # 4 warps issue 10 instructions each, in 40 cycles, and wait for a load and two barriers
    one = cost_model.Loop(columns=7, programs=2, warps=4, barriers=2, instructions=10)
    assert one.seconds(hardware) == 7 * (40 + cost_model.LOAD + 2 * cost_model.BARRIER) / 5
    full = cost_model.Loop(columns=7, programs=40, warps=4, barriers=2, instructions=10)
    assert full.seconds(hardware) == 7 * 20 * 40 / 5


@pytest.mark.parametrize("sparsity", [Unstructured(0.7), SemiStructured(2, 4)], ids=str)
def test_predicted_time_is_at_least_the_limit(sparsity):
    for phases in (cost_model.layer(4096, 4096, sparsity), cost_model.model(cost_model.LLAMA2_7B, sparsity)):
        for hardware in data_sheets.HARDWARE:
            assert 0 < cost_model.limit(phases, hardware) <= cost_model.predicted(phases, hardware)


def test_llama2_7b_has_the_weights_of_its_blocks():
    assert cost_model.LLAMA2_7B.weights == 4 * 4096**2 + 3 * 4096 * 11008


@pytest.mark.parametrize(
    ("name", "memory", "expected"),
    [
        ("NVIDIA H200", 141e9, "H200"),
        ("NVIDIA H100 80GB HBM3", 80e9, "H100 SXM"),
        ("NVIDIA H100 PCIe", 80e9, None),
        ("NVIDIA H100 NVL", 94e9, None),
        ("NVIDIA A100-SXM4-80GB", 80e9, "A100 80 GB"),
        ("NVIDIA A100-SXM4-40GB", 40e9, "A100 40 GB"),
        ("NVIDIA GeForce RTX 4090", 24e9, None),
    ],
)
def test_limits_are_found_by_the_name_of_the_device(name, memory, expected):
    found = data_sheets.of_name(name, int(memory))
    assert (found and found.name) == expected


def test_clock_of_an_h100_follows_from_its_peak():
    assert pytest.approx(1.98e9, rel=0.01) == H100.clock


def test_committed_table_is_current():
    assert (REPOSITORY / "scripts" / "cost_model.md").read_text(encoding="utf-8") == cost_model.report()


def test_tiles_are_those_of_the_kernels():
    pytest.importorskip("triton")
    from rose_exp.engine.kernels.gpu import launch

    for size in (16, 32, 64, 128, 256, 512):
        for groups in (False, True):
            assert cost_model.tile(size, groups) == launch(size, groups)


@pytest.mark.slow
@pytest.mark.parametrize("groups", [False, True], ids=["chosen", "groups"])
def test_barriers_per_column_are_those_of_the_compiled_kernels(groups):
    triton = pytest.importorskip("triton")
    if triton.__version__ != cost_model.TRITON:
        pytest.skip(f"the barriers are counted in code of Triton {cost_model.TRITON}, not {triton.__version__}")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from rose_exp.engine.kernels import available, gpu

    if available.interpreted():
        pytest.skip("the kernels are interpreted, so they cannot be compiled")
    types = {"w": "*fp32", "upper": "*fp32", "mask": "*i1", "errors": "*fp32", "plan": "*i32"}
    names = ["w", "upper", "mask", "errors", *(["plan", "groups"] if groups else []), "width", "rows"]
    rows, warps = gpu.launch(cost_model.BLOCK, groups)
    constants = {"WIDTH": cost_model.BLOCK, "TILE": rows}
    source = ASTSource(
        fn=gpu._sweep_groups if groups else gpu._sweep_chosen,
        signature={name: types.get(name, "i32") for name in names} | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
    )
    code = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps}).asm["ptx"]
    # columns are swept in the innermost loops: one for a given mask; one to select and one to prune for groups
    assert sum(innermost_barriers(code)) == cost_model.BARRIERS["groups" if groups else "chosen"]


def innermost_barriers(code: str) -> list[int]:
    """Return the number of barriers in each innermost loop of PTX code."""
    lines = code.splitlines()
    labels = {found[1]: i for i, line in enumerate(lines) if (found := re.match(r"(\$L\w+):", line))}
    jumps = [(i, found[1]) for i, line in enumerate(lines) if (found := re.search(r"\bbra(?:\.uni)?\s+(\$L\w+)", line))]
    loops = [(labels[label], end) for end, label in jumps if labels[label] <= end]
    inner = [a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    return [sum("bar.sync" in line for line in lines[start:end]) for start, end in inner]
