"""Estimates of a run's peak memory and disk usage from the model's configuration, and the check against what is available."""

from __future__ import annotations

import resource
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from ..engine import METHODS, Refine
from ..engine.moments import sums_dtype
from ..models import ModelShape
from ..runtime.batches import batch_size
from ..runtime.errors import RoseExpError
from ..settings.effects import acting
from ..settings.schema import Settings
from ..settings.section import changed

LIBRARIES = 700 * 2**20  # bytes of a process that has imported everything but loaded no data
CONTROL_GROUPS = (  # folder, limit, usage, and the reclaimable file cache within the usage
    ("/sys/fs/cgroup", "memory.max", "memory.current", "file "),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache "),
)


@dataclass(frozen=True)
class Footprint:
    """Peak usage in bytes. ``device`` is None if the run uses the CPU."""

    host: int
    device: int | None
    disk: int

    def as_dict(self) -> dict[str, int | None]:
        return asdict(self)

    def over(self, available: Footprint) -> list[str]:
        """Return the names of the fields that exceed those of ``available``."""
        pairs = [(name, getattr(self, name), getattr(available, name)) for name in ("device", "host", "disk")]
        return [name for name, needed, free in pairs if needed is not None and free is not None and needed > free]

    def __str__(self) -> str:
        device = f"{gib(self.device)} on the device, " if self.device is not None else ""
        return f"{device}{gib(self.host)} on the host, {gib(self.disk)} on disk"


@dataclass(frozen=True)
class Placement:
    """Where a run keeps the model's weights.

    Attributes:
        weights: ``memory``: the whole model on the host; ``disk``: one block at a time.
        by_blocks: whether perplexity is measured one block at a time, because the model does not fit on the device.
    """

    weights: str
    by_blocks: bool


def footprint(settings: Settings, shape: ModelShape, cuda: bool, placed: Placement) -> Footprint:
    """Estimate the peak usage of a run, the maximum over its stages.

    Pruning a block requires memory for the block, the hidden states of all windows (of one batch, if they are kept elsewhere),
    the moments of its layers, and the larger of a forward pass and of solving a group of layers (see :attr:`Method.working`;
    moments of solved layers are freed). Evaluation requires memory for the whole model, or a block and the hidden states of a
    text, and for the logits of a batch.
    """
    width, kind = torch.finfo(shape.dtype).bits // 8, "cuda" if cuda else "cpu"
    whole, block, outside = (count * width for count in (shape.parameters, shape.largest, shape.outside))
    on_disk, place = placed.weights == "disk", settings.pipeline.activations
    pruning, states, saved_state = 0, 0, 0
    if settings.pruned:
        calibration = settings.calibration
        batch = batch_size(settings.pipeline.batch, kind)
        forward = calibration.window * batch * shape.widest * (4 * width + 4)
        streams = 2 if settings.target else 1  # the second stream has the dense model's hidden states and layer inputs
        forward *= streams
        pruning = _solving_bytes(settings, shape, forward, sums_dtype(kind, torch.float32).itemsize)
        if streams > 1 and settings.pipeline.true_sequential:
            pruning += block  # a dense copy of the block
        copies = 2 if streams > 1 or settings.allocation else 1  # the survey's copy is freed before the dense stream's
        states = copies * calibration.samples * calibration.window * shape.hidden * width
        saved_state = _state_bytes(settings, shape, states // copies * streams, width)
    evaluating, texts = _evaluation_bytes(settings, shape, width, kind)
    texts = texts if placed.by_blocks else 0
    large = max(states, texts)
    if place == "device":
        pruning, evaluating = pruning + states, evaluating + texts
    disk = saved_state + (large if place == "disk" else 0) + (whole if settings.save else 0)
    host = LIBRARIES + (outside + block if on_disk else whole)
    if settings.pruned and on_disk:
        host += block  # a copy of the block while it is written
    if cuda:
        device = max(block + pruning, (block + outside if placed.by_blocks else whole) + evaluating)
        return Footprint(host + (large if place == "host" else 0), device, disk)
    return Footprint(host + max(pruning, evaluating) + (large if place == "host" else 0), None, disk)


def _solving_bytes(settings: Settings, shape: ModelShape, forward: int, sums: int) -> int:
    """Return the peak bytes of moments plus the larger of a forward pass and of solving, over the groups of a block.

    Args:
        forward: bytes of a forward pass.
        sums: bytes per element of the moments.
    """
    groups: dict[str, list[tuple[int, int]]] = {}
    for layer in shape.block:
        groups.setdefault(layer.group, []).append((layer.rows, layer.columns))
    # attention's output projection has the width of the other projections in its module, but its own input
    moments = {name: (1 + (len(layers) > 2)) * layers[0][1] ** 2 * sums for name, layers in groups.items()}
    if settings.target:  # cross moments have the size of the moments, plus a product with the hidden states
        moments = {name: 2 * size + shape.hidden * groups[name][0][1] * sums for name, size in moments.items()}
    square, flat = METHODS[settings.method.name].working
    if settings.refine:
        square, flat = max(square, Refine.working[0]), max(flat, Refine.working[1])
    if settings.target:
        square, flat = square + 2, flat + 2  # the damped Hessian, its factor, the targets and their changes
    if "permutation" in acting(settings.model_dump(mode="json")):
        square += 1  # a permuted copy of the input statistics
    peak, remaining = forward + sum(moments.values()), sum(moments.values())
    for name, layers in groups.items():
        solving = square * layers[0][1] ** 2 * 4 + flat * 4 * sum(rows * columns for rows, columns in layers)
        rounded = moments[name] * 4 // sums  # see InputMoments.finish
        peak = max(peak, remaining + rounded, remaining - moments[name] + rounded + int(solving))
        remaining -= moments[name]
    return peak


def _state_bytes(settings: Settings, shape: ModelShape, states: int, width: int) -> int:
    """Return the bytes of the run's state: all pruned blocks, and the inputs of two blocks while it is updated."""
    if settings.pipeline.resume == "none" and settings.pipeline.weights != "disk":
        return 0
    blocks = (shape.parameters - shape.outside) * width
    return blocks + (2 * states if settings.pipeline.resume == "activations" else 0)


def _evaluation_bytes(settings: Settings, shape: ModelShape, width: int, kind: str) -> tuple[int, int]:
    """Return the bytes of evaluation beyond the model, and of the longest text's hidden states, for evaluation by blocks."""
    evaluation = settings.evaluation
    windows = [text.window for text in evaluation.perplexity.values()] + ([512] if evaluation.zero_shot.tasks else [])
    token = shape.vocabulary * (width + 8) + shape.widest * width * 4
    logits = batch_size(evaluation.batch, kind) * max(windows, default=0) * token
    limits = [(t.window, [n for n in (t.windows, evaluation.limit) if n]) for t in evaluation.perplexity.values()]
    texts = [window * min(counts or [UNKNOWN_WINDOWS]) * shape.hidden * width for window, counts in limits]
    return logits, max(texts, default=0)


UNKNOWN_WINDOWS = 170  # assumed for a whole text; that of WikiText-2 with windows of 2048 tokens


def choose(settings: Settings, shape: ModelShape, cuda: bool, available: Footprint) -> Placement:
    """Choose the placement: as the settings request; for ``auto``, in memory if it fits."""
    requested, by_blocks = settings.pipeline.weights, settings.pipeline.by_blocks
    weights = [requested] if requested != "auto" else ["memory", "disk"]
    by_blocks_choices = [by_blocks] if by_blocks != "auto" else [False, True]
    placements = [Placement(w, b or w == "disk") for w in weights for b in by_blocks_choices]
    fitting = [p for p in placements if not footprint(settings, shape, cuda, p).over(available)]
    return (fitting or placements[-1:])[0]


def check_fits(settings: Settings, shape: ModelShape, cuda: bool, available: Footprint) -> tuple[Placement, Footprint]:
    """Return the placement of the weights and the estimated peak usage.

    Raises:
        RoseExpError: the estimate exceeds what is available. The message suggests settings with which the run fits.
    """
    placement = choose(settings, shape, cuda, available)
    estimate = footprint(settings, shape, cuda, placement)
    over = estimate.over(available)
    if not over or not settings.preflight:
        return placement, estimate
    suggestion = _suggestion(settings, shape, cuda, available)
    raise RoseExpError(
        f"{settings.model.name} does not fit ({' and '.join(over)}): the run needs {estimate}; available: {available}. "
        f"{suggestion}. preflight=false skips this check"
    )


def _suggestion(settings: Settings, shape: ModelShape, cuda: bool, available: Footprint) -> str:
    """Return a suggestion of settings with which the run fits. None of them is redundant."""
    changes: list[tuple[str, dict[str, Mapping[str, Any]]]] = []
    candidate = settings
    for name, value in (
        ("pipeline.weights", "disk"),
        ("pipeline.by_blocks", True),
        ("pipeline.activations", "host" if cuda else "disk"),
        ("pipeline.activations", "disk"),
        ("pipeline.batch", 1),
        ("evaluation.batch", 1),
        ("pipeline.resume", "recompute"),
        ("save", False),
    ):
        candidate = _changed(candidate, name, value)
        changes = [change for change in changes if change[0] != name] + [(name, value)]
        if not footprint(candidate, shape, cuda, choose(candidate, shape, cuda, available)).over(available):
            needed = [(n, v) for n, v in changes if not _fits_without(settings, changes, n, shape, cuda, available)]
            return "It would fit with " + " ".join(f"{n}={str(v).lower()}" for n, v in needed or changes)
    least = footprint(candidate, shape, cuda, choose(candidate, shape, cuda, available))
    return f"No settings with an equal result make it fit: they need at least {least}. Reduce calibration.samples"


def _fits_without(settings, changes, left_out: str, shape: ModelShape, cuda: bool, available: Footprint) -> bool:
    for name, value in changes:
        if name != left_out:
            settings = _changed(settings, name, value)
    return not footprint(settings, shape, cuda, choose(settings, shape, cuda, available)).over(available)


def _changed(settings: Settings, name: str, value: Any) -> Settings:
    section, _, key = name.rpartition(".")
    if not section:
        return settings.model_copy(update={key: value})
    return settings.model_copy(update={section: changed(getattr(settings, section), **{key: value})})


def available(folder: Path, device: torch.device) -> Footprint:
    """Return the bytes available to this process, including the memory that it already uses.

    For the host, this is the minimum of the machine's free memory and all limits on the process or its control group. For the
    disk of ``folder``, it is the free space.
    """
    process = psutil.Process()
    used = process.memory_info()
    host = [psutil.virtual_memory().available + used.rss]
    for group, limit, current, cache in CONTROL_GROUPS:
        try:
            maximum = Path(group, limit).read_text().strip()
            lines = Path(group, "memory.stat").read_text().splitlines()
            cached = sum(int(line.split()[1]) for line in lines if line.startswith(cache))
            if maximum.isdigit():
                host.append(int(maximum) - int(Path(group, current).read_text()) + cached + used.rss)
        except OSError:  # no such control group
            continue
    for kind, used_bytes in (
        (resource.RLIMIT_AS, used.vms - used.rss),
        (resource.RLIMIT_DATA, getattr(used, "data", 0) - used.rss),
    ):
        soft = resource.getrlimit(kind)[0]
        if soft != resource.RLIM_INFINITY:
            host.append(soft - used_bytes)
    on_device = None
    if device.type == "cuda":
        on_device = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_allocated(device)
    while not folder.exists():
        folder = folder.parent
    return Footprint(min(host), on_device, shutil.disk_usage(folder).free)


def gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
