"""TensorBoard."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...runtime.escaping import markdown_block
from ...settings.tracking import TensorBoardSettings
from ..tracker import LAYER_NUMBERS, TrackedRun


class TensorBoard:
    """TensorBoard event files in the run's folder."""

    FOLDER = "tensorboard"

    def __init__(self, settings: TensorBoardSettings):
        pass

    def start(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run.folder / self.FOLDER))
        self.writer.add_text("config", markdown_block(json.dumps(run.config, indent=1)))

    def layer(self, step: int, report: Mapping[str, Any]) -> None:
        for name in LAYER_NUMBERS:
            self.writer.add_scalar(f"layer/{name}", float(report[name]), step)

    def results(self, metrics: Mapping[str, float], layers: Sequence[Mapping[str, Any]]) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value)

    def figure(self, name: str, path: Path) -> None:
        import numpy as np
        from PIL import Image

        with Image.open(path) as image:
            self.writer.add_image(f"figures/{name}", np.asarray(image.convert("RGB")), dataformats="HWC")

    def keep(self, record: Path, model: Path | None) -> None:
        """Do nothing, because the file is already in the run's folder."""

    def finish(self, failed: bool) -> None:
        self.writer.add_text("status", "failed" if failed else "finished")
        self.writer.close()
