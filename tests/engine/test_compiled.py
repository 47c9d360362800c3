"""The Triton kernels compile for GPUs without one, without spilled registers and within their shared memory."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from rose_exp.engine.kernels import available, gpu, kth_smallest  # noqa: E402

pytestmark = pytest.mark.skipif(available.interpreted(), reason="the kernels are interpreted, so they cannot be compiled")

SHARED = {80: 163, 90: 227, 100: 227}  # KiB of shared memory that a program can use, by compute capability (CUDA C++ guide)
REGISTERS = 255  # of a thread
WIDTHS = (16, 32, 64, 128, 256, 512)
POINTERS = {"w": "*fp32", "upper": "*fp32", "mask": "*i1", "errors": "*fp32", "plan": "*i32"}


@dataclass
class Resources:
    registers: int
    spilled: int
    shared: int


def compiled(
    kernel, signature: dict[str, str], constants: dict[str, int], capability: int, warps: int, folder: Path
) -> Resources:
    """Compile a kernel to machine code and return what ptxas reports.

    Args:
        spilled: bytes that are stored and loaded.
        shared: bytes of shared memory.
    """
    source = ASTSource(fn=kernel, signature=signature | dict.fromkeys(constants, "constexpr"), constexprs=constants)
    result = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    code = folder / "kernel.ptx"
    code.write_text(result.asm["ptx"])
    architecture = re.search(r"\.target (\w+)", result.asm["ptx"])[1]
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    tool = tools / ("ptxas-blackwell" if capability >= 90 and (tools / "ptxas-blackwell").exists() else "ptxas")
    command = [tool, "-v", f"--gpu-name={architecture}", code, "-o", folder / "kernel.o"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    stores, loads = map(int, re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr).groups())
    registers = int(re.search(r"Used (\d+) registers", done.stderr)[1])
    return Resources(registers, stores + loads, result.metadata.shared)


def check(resources: Resources, capability: int) -> None:
    assert resources.registers <= REGISTERS
    assert resources.spilled == 0, resources
    assert resources.shared <= SHARED[capability] * 1024, resources


def cases():
    for capability in SHARED:
        for width in WIDTHS:
            fast = (capability, width) == (80, 128)
            yield pytest.param(capability, width, marks=[] if fast else pytest.mark.slow)


@pytest.mark.parametrize(("capability", "width"), cases())
@pytest.mark.parametrize("groups", [False, True], ids=["chosen", "groups"])
def test_sweeps_do_not_spill(groups, capability, width, tmp_path):
    kernel = gpu._sweep_groups if groups else gpu._sweep_chosen
    names = ["w", "upper", "mask", "errors", *(["plan", "groups"] if groups else []), "width", "rows"]
    rows, warps = gpu.launch(width, groups)
    constants = {"WIDTH": width, "TILE": rows}
    signature = {name: POINTERS.get(name, "i32") for name in names}
    check(compiled(kernel, signature, constants, capability, warps, tmp_path), capability)


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED)
@pytest.mark.parametrize("digit", range(4))
def test_selection_does_not_spill(digit, capability, tmp_path):
    signature = {"scores": "*fp32", "counts": "*i32", "state": "*i64", "n": "i32", "k": "i32"}
    constants = {"DIGIT": digit, "TILE": kth_smallest.COUNTED}
    check(compiled(kth_smallest._count_digit, signature, constants, capability, kth_smallest.WARPS, tmp_path), capability)


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED)
def test_last_digit_does_not_spill(capability, tmp_path):
    signature = {"counts": "*i32", "state": "*i64", "values": "*fp32"}
    check(compiled(kth_smallest._last_digit, signature, {}, capability, 1, tmp_path), capability)
