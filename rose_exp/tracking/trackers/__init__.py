"""The experiment trackers of this package, one in each file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...settings.tracker_options import read_options
from ...settings.tracking import TrackingSettings
from ..tracker import Tracker
from .accelerate import Accelerate
from .csv import Csv
from .tensorboard import TensorBoard
from .wandb import Wandb

BUILT_IN: dict[str, Callable[[Any], Tracker]] = {
    "wandb": Wandb,
    "tensorboard": TensorBoard,
    "csv": Csv,
    "accelerate": Accelerate,
}
FILES = {"csv": (Csv.LAYERS, Csv.METRICS), "tensorboard": (TensorBoard.FOLDER,)}  # in the run's folder


def create(settings: TrackingSettings, name: str) -> Tracker:
    """Return the tracker that ``name`` names, with its settings."""
    if name in settings.own:
        return BUILT_IN[name](settings.own[name])
    plugin = settings.plugin(name)
    return plugin.value(**read_options(plugin, settings.others[name]))
