"""Contact sheets: images of the dense model above those of the pruned model, from the same noise."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from torch import Tensor

from ..runtime.files import written

INCHES = 1.9  # size of an image
LETTERS = 26  # maximum line length of prompts and labels


def draw_sheet(dense: Tensor, pruned: Tensor, prompts: Sequence[str], label: str, path: Path) -> Path:
    """Write a PNG with one column per prompt, and return its path.

    Args:
        dense, pruned: (images, channels, height, width) uint8.
        label: name of the pruned model.
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
    with written(path) as place:
        figure.savefig(place)
    return path
