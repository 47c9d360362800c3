"""Every backend against the slow reference: equal masks, and weights equal up to float32 rounding."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from rose_exp.engine import Ordering, SemiStructured, Unstructured, prune_layer
from rose_exp.engine.kernels import cpu
from rose_exp.engine.kernels.backends import resolve
from rose_exp.engine.selection import smallest

from .. import reference
from .cases import layer, moments_of

PATTERNS = [
    (Unstructured(0.6), reference.Pattern(share=0.6)),
    (SemiStructured(2, 4), reference.Pattern(pruned=2, group=4)),
    (SemiStructured(4, 8), reference.Pattern(pruned=4, group=8)),
    (SemiStructured(3, 5), reference.Pattern(pruned=3, group=5)),
    (SemiStructured(12, 40), reference.Pattern(pruned=12, group=40)),
]
SHAPES = [(3, 1), (70, 33), (9, 100), (130, 64)]


def assert_matches_reference(backend, sparsity, pattern, rows, columns):
    torch.manual_seed(rows * columns)
    weight, inputs = layer(rows, columns, columnar=columns > 2)
    moments = moments_of(inputs)
    ordering = Ordering(threshold=None)
    result = prune_layer(weight, moments, sparsity=sparsity, ordering=ordering, block_size=32, backend=backend)
    widths = reference.rose_order(weight.abs() * moments.mean_square().sqrt(), pattern, 32, None)[1]
    expected, mask = reference.sparsegpt(
        weight.double(), moments.hessian().double(), pattern, block=32, order=result.order, widths=widths
    )
    assert torch.equal(result.mask, mask)
    assert (result.weight[result.mask] == 0).all()
    torch.testing.assert_close(result.weight.double(), expected, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize(("sparsity", "pattern"), PATTERNS, ids=str)
@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_cpu_backends_match_the_reference(backend, sparsity, pattern, rows, columns):
    assert_matches_reference(backend, sparsity, pattern, rows, columns)


def assert_kth_smallest_matches_sort():
    from rose_exp.engine.kernels.kth_smallest import kth_smallest

    scores = torch.randn(2, 3, 5000)
    scores[0] = (scores[0] * 3).round()  # many ties and both signed zeros
    scores[0, 0, :100] = -0.0
    for k in (1, 2, 1234, 4999, 5000):
        assert torch.equal(kth_smallest(scores, k), scores.sort(dim=-1).values[..., k - 1 : k] + 0.0)


def test_triton_interpreter_matches_the_reference():
    """Runs in a separate process because Triton selects its interpreter when the kernels are first imported."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton, which has no wheels for this platform")
    check = "from tests.engine.test_backends import *\n"
    check += "for s, p in PATTERNS:\n    for r, c in SHAPES[1:3]:\n        assert_matches_reference('triton', s, p, r, c)\n"
    check += "assert_kth_smallest_matches_sort()\nprint('agreed')"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", check], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "agreed", done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("sparsity", "pattern"), PATTERNS, ids=str)
def test_cuda_matches_the_cpu(sparsity, pattern):
    weight, inputs = layer(300, 520, columnar=True)
    on_cpu = prune_layer(weight, moments_of(inputs), sparsity=sparsity, ordering=Ordering.rose())
    on_cuda = prune_layer(weight.cuda(), moments_of(inputs.cuda()), sparsity=sparsity, ordering=Ordering.rose())
    assert torch.equal(on_cuda.order.cpu(), on_cpu.order)
    assert (on_cuda.mask.cpu() != on_cpu.mask).float().mean() < 1e-4
    assert on_cuda.error == pytest.approx(on_cpu.error, rel=1e-3)
    assert pattern is not None


def test_resolve_selects_a_backend_or_raises_an_error():
    assert resolve("auto", torch.device("cpu"), torch.float32) == "numba"
    assert resolve("auto", torch.device("cpu"), torch.float64) == "torch"
    assert resolve("auto", torch.device("cuda"), torch.float32) == "triton"
    assert resolve("torch", torch.device("cuda"), torch.float32) == "torch"
    with pytest.raises(ValueError, match="backend: expected one of auto, torch, numba, triton, got 'cuda'"):
        resolve("cuda", torch.device("cpu"), torch.float32)
    with pytest.raises(ValueError, match="backend: expected auto or torch on cpu and float64, got 'numba'"):
        resolve("numba", torch.device("cpu"), torch.float64)
    with pytest.raises(ValueError, match="backend: expected auto, torch or triton on cuda and float32, got 'numba'"):
        resolve("numba", torch.device("cuda"), torch.float32)


@pytest.mark.parametrize("levels", [3, 1000, None])
def test_selection_by_counting_equals_selection_by_sorting(levels):
    """Scores have many ties, negative numbers and both signed zeros, and are long enough for the counting kernel."""
    scores = torch.randn(2, 20_000)
    if levels:
        scores = (scores * levels).round() / levels
    scores[0, ::7] = -0.0
    assert scores.shape[-1] >= 16384
    for count in (1, 5_000, 19_999):
        order = scores.argsort(dim=-1, stable=True)
        expected = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order[:, :count], True)
        assert torch.equal(smallest(scores, count), expected)
        kth = cpu.kth_smallest(scores, count)
        assert torch.equal(kth, scores.sort(dim=-1).values[:, count - 1 : count])


def test_kernels_do_not_change_the_number_of_torch_threads():
    before = torch.get_num_threads()
    weight, inputs = layer(8, 40)
    try:
        torch.set_num_threads(1)
        prune_layer(weight, moments_of(inputs), sparsity=SemiStructured(2, 4))
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_first_kernel_call_respects_omp_num_threads():
    """Runs in a separate process because Numba starts one thread per core at the first kernel call."""
    code = (
        "import torch; from rose_exp.engine import InputMoments, Unstructured, prune_layer;"
        "moments = InputMoments(32); moments.update(torch.randn(64, 32));"
        "prune_layer(torch.randn(8, 32), moments, sparsity=Unstructured(0.5), backend='numba');"
        "print(torch.get_num_threads())"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "1"
