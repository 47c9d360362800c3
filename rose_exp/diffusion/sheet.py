"""The contact sheet: images of the dense and of the pruned model from the same noise, one above the other."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from torch import Tensor

INCHES = 1.9  # an image
LETTERS = 26  # of a prompt on a line


def draw_sheet(dense: Tensor, pruned: Tensor, prompts: Sequence[str], label: str, path: Path) -> Path:
    """Write a PNG of a column for each prompt.

    Args:
        dense, pruned: (images, channels, height, width) uint8.
        label: of the pruned model.
    """
    count = len(prompts)
    figure = Figure(figsize=(INCHES * count + 0.5, 2 * INCHES + 0.9), dpi=130, layout="constrained")
    axes = figure.subplots(2, count, squeeze=False)
    for row, (name, images) in enumerate((("Dense", dense), (label, pruned))):
        for column in range(count):
            place = axes[row][column]
            image = images[column].permute(1, 2, 0)
            place.imshow(image.squeeze(-1).numpy(), cmap="gray" if image.shape[-1] == 1 else None, vmin=0, vmax=255)
            place.set_xticks([])
            place.set_yticks([])
            for edge in place.spines.values():
                edge.set_visible(False)
            if row == 0:
                place.set_title("\n".join(textwrap.wrap(prompts[column], LETTERS)[:3]), fontsize=7)
            if column == 0:
                place.set_ylabel("\n".join(textwrap.wrap(name, LETTERS)), fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
