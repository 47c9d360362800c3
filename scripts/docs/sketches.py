"""Draw the sketches of docs/methods.md: what orders do to columns and blocks, and what methods do to weights.

    python scripts/docs/sketches.py            # writes docs/figures/orders.png and docs/figures/methods.png

Both show results of the engine on a small layer with correlated inputs, whose size differs between the blocks.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from rose_exp.engine import InputMoments, Ordering, PruneResult, Unstructured, prune_layer
from rose_exp.engine.ordering import expected_losses

FOLDER = Path(__file__).resolve().parents[2] / "docs/figures"
COLORS = ("#4477aa", "#ee6677", "#228833", "#ccbb44")  # one for each block, safe for color blindness
ROWS, WIDTH = 8, 4
COLUMNS = WIDTH * len(COLORS)
SPARSITY = Unstructured(0.5)
SCALES = (0.5, 1.0, 2.0, 0.7)  # size of the inputs of each block
ORDERS = {
    "none": None,
    "column_only": Ordering("descending", "none", None),
    "block_only": Ordering("none", "descending", None),
    "rose": Ordering.rose(),
}
METHODS = ("magnitude", "wanda", "sparsegpt")


def layer() -> tuple[Tensor, InputMoments]:
    """Return a random weight, (rows, columns), and the moments of correlated inputs."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(ROWS, COLUMNS, generator=generator)
    mixing = torch.eye(COLUMNS) + 0.6 * torch.randn(COLUMNS, COLUMNS, generator=generator)
    scales = torch.tensor(SCALES).repeat_interleave(WIDTH)
    moments = InputMoments(COLUMNS)
    moments.update(torch.randn(512, COLUMNS, generator=generator) @ mixing * scales)
    return weight, moments


def solve(method: str, ordering: Ordering | None = None, block_size: int = WIDTH) -> PruneResult:
    weight, moments = layer()
    return prune_layer(weight, moments, method=method, sparsity=SPARSITY, ordering=ordering, block_size=block_size)


def draw_orders() -> Figure:
    """Draw the loss of each column in pruning order, for each order."""
    weight, moments = layer()
    losses = expected_losses(weight.abs().T * moments.mean_square().sqrt()[:, None], SPARSITY, WIDTH).columns
    figure = Figure(figsize=(7.5, 5), layout="constrained")
    for axes, (name, ordering) in zip(figure.subplots(2, 2, sharey=True).flat, ORDERS.items(), strict=True):
        order = solve("sparsegpt", ordering).order
        axes.bar(range(COLUMNS), losses[order], color=[COLORS[column // WIDTH] for column in order])
        axes.set_xticks(range(COLUMNS), [str(column) for column in order.tolist()], fontsize=8)
        for boundary in range(WIDTH, COLUMNS, WIDTH):
            axes.axvline(boundary - 0.5, color="black", linewidth=0.6, linestyle=":")
        axes.set_title(f"reorder={name}", family="monospace", fontsize=11)
        axes.set_xlabel("columns in pruning order")
        axes.set_ylabel("expected loss")
        axes.spines[["top", "right"]].set_visible(False)
    labels = [Patch(color=color, label=f"block {number}") for number, color in enumerate(COLORS)]
    figure.legend(handles=labels, ncols=len(COLORS), loc="outside lower center", frameon=False)
    return figure


def draw_methods() -> Figure:
    """Draw the dense weight and that of each method; pruned weights are marked."""
    dense, _ = layer()
    results = {name: solve(name, block_size=COLUMNS) for name in METHODS}
    figure = Figure(figsize=(7.5, 4.4), layout="constrained")
    weights = {"dense": (dense, torch.zeros_like(dense, dtype=torch.bool))}
    weights |= {name: (result.weight, result.mask) for name, result in results.items()}
    limit = float(dense.abs().max())
    for axes, (title, (weight, mask)) in zip(figure.subplots(2, 2).flat, weights.items(), strict=True):
        image = axes.imshow(weight.masked_fill(mask, torch.nan), cmap="RdBu_r", vmin=-limit, vmax=limit)
        rows, columns = mask.nonzero(as_tuple=True)
        axes.scatter(columns, rows, marker="x", s=14, color="#999999", linewidths=0.8)
        axes.set_title(title, fontsize=11)
        axes.set_xticks(range(0, COLUMNS, WIDTH))
        axes.set_yticks([])
        axes.set_xlabel("columns")
        axes.set_ylabel("rows")
    figure.colorbar(image, ax=figure.axes, label="weight")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER, help="folder of the figures")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in {"orders": draw_orders(), "methods": draw_methods()}.items():
        figure.savefig(folder / f"{name}.png", dpi=130, metadata={"Software": None})


if __name__ == "__main__":
    main()
