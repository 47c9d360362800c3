"""Predict the time of pruning on a GPU from operation counts and the limits of the hardware.

    python scripts/cost_model.py                     # prints scripts/cost_model.md

The counts follow the code of ``rose_exp.engine``: floating-point operations, bytes of device memory, kernel launches, and, for
the sweep, barriers per column. Two times follow from the counts of each phase:

limit       the larger of operations / peak rate and bytes / bandwidth (the roofline)
predicted   the largest of the limit, the launches, and the serial steps of the sweep, with assumed latencies

These are predictions. No GPU run has been made. ``gpu_check.py`` compares them with measured times.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from data_sheets import HARDWARE, Hardware, Rate

from rose_exp.engine import SemiStructured, Sparsity, Unstructured
from rose_exp.engine.hessian import CHOLESKY, SOLVE
from rose_exp.engine.products import LEAF, PANELS

BLOCK = 128  # columns of a block, the engine's default
ITEM = 4  # bytes of a float32
THREADS = 32  # of a warp

LAUNCH = 5e-6  # assumed: seconds between two kernels that PyTorch launches one after another
LOAD = 270  # assumed: cycles of a load from the L2 cache
BARRIER = 60  # assumed: cycles of a barrier of a few warps and the access to shared memory next to it


@dataclass(frozen=True)
class Loop:
    """The serial loop over columns of a sweep kernel.

    Attributes:
        columns: columns that all launches sweep one after another.
        programs: programs of one launch, each of which sweeps a tile of rows.
        warps: warps of a program.
        barriers: barriers per column.
        instructions: instructions of a warp per column.
    """

    columns: int
    programs: int
    warps: int
    barriers: int
    instructions: int

    def seconds(self, hardware: Hardware) -> float:
        """Return the time if each column waits for the one before it.

        A program needs at least the latencies of a column. Several programs on a multiprocessor hide each other's latencies,
        but share its units.
        """
        issue = self.instructions * self.warps * THREADS / hardware.lanes  # cycles
        together = math.ceil(self.programs / hardware.processors)
        cycles = max(issue + LOAD + BARRIER * self.barriers, together * issue)
        return self.columns * cycles / hardware.clock


@dataclass
class Phase:
    """Operation counts of one phase.

    Attributes:
        flops: floating-point operations, additions and multiplications.
        bytes: bytes read from and written to device memory. Temporary tensors of one block stay in the L2 cache and are not
            counted.
        launches: number of kernels.
        rate: which peak rate applies.
        loop: loop over columns of the sweep kernel; None for other phases.
    """

    name: str
    flops: float = 0.0
    bytes: float = 0.0
    launches: int = 0
    rate: Rate = "float32"
    loop: Loop | None = None

    def product(self, m: int, k: int, n: int, add: bool = False) -> None:
        """Count an (m, k) x (k, n) product in float32; with ``add``, it is added to the result."""
        self.flops += 2 * m * k * n
        self.bytes += ITEM * (m * k + k * n + (1 + add) * m * n)
        self.launches += 1

    def elementwise(self, elements: int, moved: int, launches: int = 1) -> None:
        """Count operations on tensors of ``elements`` numbers, which move ``moved`` bytes for each."""
        self.bytes += elements * moved
        self.launches += launches

    def limit(self, hardware: Hardware) -> float:
        """Return the roofline in seconds."""
        return max(self.bytes / hardware.bandwidth, self.flops / getattr(hardware, self.rate))

    def predicted(self, hardware: Hardware) -> float:
        """Return the predicted time in seconds."""
        loop = self.loop.seconds(hardware) if self.loop else 0.0
        return max(self.limit(hardware), self.launches * LAUNCH, loop)

    def times(self, count: int) -> Phase:
        """Return the counts of ``count`` repetitions."""
        loop = replace(self.loop, columns=count * self.loop.columns) if self.loop else None
        return replace(self, flops=count * self.flops, bytes=count * self.bytes, launches=count * self.launches, loop=loop)


@dataclass(frozen=True)
class Leaves:
    """Sizes up to which the engine's recursions call a library or compute a whole block."""

    cholesky: int = CHOLESKY["cuda"]
    solve: int = SOLVE
    product: int = LEAF["cuda"]


def upper_areas(n: int, leaf: int) -> list[tuple[int, int]]:
    """Return the shapes of the blocks that cover the upper triangle of an (n, n) matrix, as ``products.upper_blocks``."""
    if n <= leaf:
        return [(n, n)]
    half = n // 2
    return [*upper_areas(half, leaf), (half, n - half), *upper_areas(n - half, leaf)]


def factorization(columns: int, leaves: Leaves | None = None) -> Phase:
    """Count ``hessian.factorize`` of (columns, columns), including the copy of the Hessian."""
    leaves = leaves or Leaves()
    phase = Phase("factorization")
    phase.elementwise(columns**2, 2 * ITEM)
    _invert_factor(phase, columns, leaves)
    return phase


def _invert_factor(phase: Phase, n: int, leaves: Leaves) -> None:
    if n <= leaves.cholesky:
        phase.flops += n**3 / 3
        phase.elementwise(n**2, 8 * ITEM, launches=4)  # two flips, the library's factor, and a copy
        _invert_upper(phase, n, leaves)
        return
    half = n // 2
    _invert_factor(phase, n - half, leaves)
    _triangular(phase, half, n - half)
    for rows, columns in upper_areas(half, leaves.product):
        phase.product(rows, n - half, columns, add=True)
    _invert_factor(phase, half, leaves)
    _join(phase, n, half)


def _invert_upper(phase: Phase, n: int, leaves: Leaves) -> None:
    if n <= leaves.solve:
        phase.flops += n**3  # a solve with n right-hand sides
        phase.elementwise(n**2, 5 * ITEM, launches=3)
        return
    half = n // 2
    _invert_upper(phase, half, leaves)
    _invert_upper(phase, n - half, leaves)
    _join(phase, n, half)


def _join(phase: Phase, n: int, half: int) -> None:
    _triangular(phase, half, n - half)
    _triangular(phase, n - half, half)
    phase.elementwise(half * (n - half), 3 * ITEM, launches=2)


def _triangular(phase: Phase, others: int, n: int) -> None:
    """Count a product with an (n, n) triangular matrix in panels; the other dimension of the result is ``others``."""
    step = max(SOLVE, -(-n // PANELS))
    for start in range(0, n, step):
        phase.product(others, n - start, min(step, n - start))
        phase.elementwise(others * min(step, n - start), 2 * ITEM)  # the copy into place


def tile(size: int, groups: bool) -> tuple[int, int]:
    """Return the rows of a tile and the warps of a program, as ``kernels.gpu.launch``, which only imports with Triton."""
    if groups:
        return max(4, min(16, 2048 // size)), 8 if size <= 64 else 4
    return max(4, min(32, 4096 // size)), 4


# counted in the PTX code of the kernels, for blocks of 128 columns and compute capability 9.0; tests/test_cost_model.py counts
# the barriers again
TRITON = "3.9.0"  # the compiler of this code
BARRIERS = {"chosen": 6, "groups": 14}
INSTRUCTIONS = {"chosen": 400, "groups": 490}


def sweep_loop(rows: int, columns: int, groups: bool) -> Loop:
    rows_of_tile, warps = tile(BLOCK, groups)
    kind = "groups" if groups else "chosen"
    return Loop(columns, math.ceil(rows / rows_of_tile), warps, BARRIERS[kind], INSTRUCTIONS[kind])


def sweep(rows: int, columns: int, groups: bool, block: int = BLOCK) -> Phase:
    """Count the sweep kernels of all blocks.

    Each element is read and written once, its error is written, and its mask is read or, for N:M, written. Per column, the
    kernel computes on its whole tile: a masked sum (one addition) and an update (two operations); for N:M, the sum twice.
    """
    blocks = math.ceil(columns / block)
    phase = Phase("sweep", loop=sweep_loop(rows, columns, groups))
    phase.flops = rows * columns * block * (4 if groups else 3)
    phase.bytes = rows * columns * (3 * ITEM + 1) + blocks * block * block * ITEM
    phase.launches = blocks * (3 if groups else 2)  # the factor of the block is copied, for N:M also the plan of its groups
    return phase


def compensation(rows: int, columns: int, block: int = BLOCK) -> Phase:
    """Count the products that subtract the errors of each block from the columns after it, and sum their squares."""
    phase = Phase("compensation")
    for start in range(0, columns, block):
        width = min(block, columns - start)
        rest = columns - start - width
        if rest:
            phase.product(rest, width, rows, add=True)
        phase.flops += 2 * rows * width
        phase.elementwise(rows * width, ITEM)
    return phase


def selection(rows: int, columns: int, block: int = BLOCK) -> Phase:
    """Count the selection of each block's mask: the saliency, its k-th smallest value in four passes, and the mask."""
    phase = Phase("selection")
    for start in range(0, columns, block):
        elements = rows * min(block, columns - start)
        phase.flops += 2 * elements
        phase.elementwise(elements, ITEM + 1, launches=20)  # other tensors stay in the L2 cache
    return phase


def losses(rows: int, columns: int, sparsity: Sparsity) -> Phase:
    """Count the expected column losses, which follow from the Wanda scores of the whole layer."""
    phase = Phase("losses")
    phase.flops = 2 * rows * columns
    phase.elementwise(rows * columns, 8 * ITEM, launches=5)  # scores, in the order of the columns
    if isinstance(sparsity, SemiStructured):
        pairs = sparsity.group * (sparsity.group - 1) // 2
        phase.elementwise(rows * columns // sparsity.group, pairs * 17, launches=4 * pairs)  # a comparison and two counts
        phase.elementwise(rows * columns, 3 * ITEM + 2, launches=3)
    else:
        phase.elementwise(rows * columns, 4 * ITEM, launches=7)  # four passes over the scores
        phase.elementwise(rows * columns, 4 * ITEM + 1, launches=3)
    return phase


def finish(rows: int, columns: int, leaves: Leaves | None = None) -> Phase:
    """Count copies, checks of finite numbers, the change of the weight, and the layer's output power."""
    leaves = leaves or Leaves()
    phase = Phase("copies, error")
    phase.elementwise(columns**2, 5 * ITEM, launches=5)  # the Hessian, and two checks
    phase.elementwise(rows * columns, 20 * ITEM, launches=20)
    for height, width in upper_areas(columns, leaves.product):
        phase.product(rows, height, width)
        phase.elementwise(rows * width, 4 * ITEM, launches=3)
    return phase


def layer(rows: int, columns: int, sparsity: Sparsity) -> list[Phase]:
    """Count ``prune_layer`` with SparseGPT, from finished moments."""
    groups = isinstance(sparsity, SemiStructured)
    return [
        losses(rows, columns, sparsity),
        factorization(columns),
        *([] if groups else [selection(rows, columns)]),
        sweep(rows, columns, groups),
        compensation(rows, columns),
        finish(rows, columns),
    ]


def moments(columns: int, tokens: int, updates: int, rate: Rate = "float16") -> Phase:
    """Count ``moments.update`` of ``tokens`` tokens in ``updates`` batches; half-precision products are added to the sums."""
    phase, size = Phase("moments", rate=rate), 2 if rate == "float16" else ITEM
    for height, width in upper_areas(columns, LEAF["cuda"]):
        phase.flops += 2 * tokens * height * width
        phase.bytes += size * tokens * (width if height == width else height + width)
        phase.bytes += updates * height * width * ITEM * (4 if rate == "float16" else 2)
        phase.launches += updates * (2 if rate == "float16" else 1)
    phase.elementwise(tokens * columns, size, launches=2 * updates)
    return phase


@dataclass(frozen=True)
class Decoder:
    """Sizes of a decoder, and of its calibration set.

    Attributes:
        groups: layers that share their inputs: their columns, and the rows of each layer.
    """

    name: str
    hidden: int
    blocks: int
    groups: Sequence[tuple[int, Sequence[int]]]
    windows: int = 128
    window: int = 2048
    batch: int = 4

    @property
    def weights(self) -> int:
        """Number of weights of a block."""
        return sum(columns * sum(rows) for columns, rows in self.groups)


LLAMA2_7B = Decoder("LLaMA2-7B", 4096, 32, [(4096, [4096] * 3), (4096, [4096]), (4096, [11008] * 2), (11008, [4096])])


def model(decoder: Decoder, sparsity: Sparsity) -> list[Phase]:
    """Count ``prune_model`` with ROSE if every layer is reordered, so that each has its own factorization.

    Two forward passes of each block compute moments and outputs; the last block needs only the first. Copies of weights between
    host and device are not counted.
    """
    tokens, updates = decoder.windows * decoder.window, math.ceil(decoder.windows / decoder.batch)
    forward = Phase("forward passes", rate="float16")
    attention = 2 * decoder.window * decoder.hidden  # scores and their products with values, half of them masked
    forward.flops = tokens * (2 * decoder.weights + attention)
    forward.bytes = updates * 2 * decoder.weights + 2 * 2 * tokens * decoder.hidden
    forward.launches = updates * 30
    phases = [forward.times(2 * decoder.blocks - 1)]
    groups = [moments(columns, tokens, updates) for columns, _ in decoder.groups]
    phases.append(merged("moments", groups).times(decoder.blocks))
    for parts in zip(*(layer(r, columns, sparsity) for columns, rows in decoder.groups for r in rows), strict=True):
        phases += [replace(part.times(decoder.blocks), name=part.name) for part in parts]
    return phases


def merged(name: str, phases: Sequence[Phase]) -> Phase:
    """Return the sum of phases without loops."""
    return replace(
        phases[0],
        name=name,
        flops=sum(phase.flops for phase in phases),
        bytes=sum(phase.bytes for phase in phases),
        launches=sum(phase.launches for phase in phases),
    )


def limit(phases: Sequence[Phase], hardware: Hardware) -> float:
    """Return the sum of the phases' rooflines in seconds."""
    return sum(phase.limit(hardware) for phase in phases)


def predicted(phases: Sequence[Phase], hardware: Hardware) -> float:
    """Return the sum of the phases' predicted times in seconds."""
    return sum(phase.predicted(hardware) for phase in phases)


def table(phases: Sequence[Phase], unit: float, unit_name: str) -> str:
    """Return a Markdown table of the phases, with the limit and the predicted time for each GPU.

    Args:
        unit: seconds in the unit of the times.
    """
    rows: dict[str, list[Phase]] = {}
    for phase in phases:
        rows.setdefault(phase.name, []).append(phase)
    rows["total"] = list(phases)
    names = [f"{hardware.name}, {unit_name}" for hardware in HARDWARE]
    lines = [
        f"| phase | GFLOP | GB | launches | barriers per column | {' | '.join(names)} |",
        "|---|---:|---:|---:|---:|" + "---:|" * len(names),
    ]
    for name, row in rows.items():
        barriers = {phase.loop.barriers for phase in row if phase.loop and name != "total"}
        counts = [f"{sum(p.flops for p in row) / 1e9:,.1f}", f"{sum(p.bytes for p in row) / 1e9:,.2f}"]
        counts += [f"{sum(p.launches for p in row):,}", ", ".join(map(str, barriers))]
        times = [f"{limit(row, h) / unit:.2f} / {predicted(row, h) / unit:.2f}" for h in HARDWARE]
        lines.append(f"| {name} | {' | '.join([*counts, *times])} |")
    return "\n".join(lines)


INTRODUCTION = """\
# Cost model of pruning on a GPU

All times below are predictions. No GPU run has been made. `python scripts/cost_model.py` computes them from the operation
counts of the engine and the data sheets of the GPUs. `scripts/gpu_check.sh` measures the same cases on a GPU.

Each time is given as limit / predicted:

* **Limit**: the larger of operations / peak rate and bytes / bandwidth (the roofline), summed over the phases. Float32
  products use the float32 rate, because the engine does not use TF32 to solve layers. Forward passes and moments of
  half-precision inputs use the float16 rate of tensor cores.
* **Predicted**: the largest of the limit, the launches and, for the sweep, the serial loop over columns. It assumes
  {launch:g} µs per kernel launch, {load} cycles per load from the L2 cache, and {barrier} cycles per barrier with its access
  to shared memory. These three numbers are assumptions. Barriers and instructions per column are counted in the PTX code of
  the kernels.

Operations of matrix products follow the engine's recursions exactly. Bytes and launches of other operations are estimates from
reading the code. Bytes count device memory only: temporary tensors of one block of {block} columns stay in the L2 cache.
"""

LIMITS = "| GPU | memory, GB/s | float32, TFLOP/s | TF32, TFLOP/s | float16, TFLOP/s |\n|---|---:|---:|---:|---:|"


def report() -> str:
    """Return the contents of cost_model.md."""
    parts = [INTRODUCTION.format(launch=LAUNCH * 1e6, load=LOAD, barrier=BARRIER, block=BLOCK)]
    rates = [(h.bandwidth / 1e9, h.float32 / 1e12, h.tf32 / 1e12, h.float16 / 1e12) for h in HARDWARE]
    limits = [f"| {h.name} | {' | '.join(f'{rate:g}' for rate in row)} |" for h, row in zip(HARDWARE, rates, strict=True)]
    parts.append("\n".join(["## Limits of the hardware\n", LIMITS, *limits]) + "\n")
    for rows, columns in ((4096, 4096), (4096, 11008)):
        for sparsity in (Unstructured(0.7), SemiStructured(2, 4)):
            parts.append(f"## {rows} x {columns}, {sparsity}\n\n{table(layer(rows, columns, sparsity), 1e-3, 'ms')}\n")
    decoder = LLAMA2_7B
    title = f"## {decoder.name}, {decoder.windows} x {decoder.window} tokens, ROSE at 70 %"
    note = (
        "Every layer is assumed to be reordered, so that each has its own factorization. Copies of weights between host and\n"
        "device are not included.\n"
    )
    parts.append(f"{title}\n\n{note}\n{table(model(decoder, Unstructured(0.7)), 1.0, 's')}\n")
    return "\n".join(parts)


if __name__ == "__main__":
    print(report(), end="")
