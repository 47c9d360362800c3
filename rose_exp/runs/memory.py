"""Estimates of a run's peak memory and disk usage from its settings and the model's configuration.

``scripts/measure_memory.py`` compares them with the peaks of real runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass

import torch

from ..engine.footprint import Problem, groups_peak
from ..engine.moments import sums_dtype
from ..engine.pieces import PIECE
from ..models import BlockShape, LayerShape, ModelShape
from ..pruning.collect import narrow
from ..pruning.plan import chosen
from ..pruning.waves import successive_parts
from ..runtime.batches import batch_size
from ..settings.effective import acting
from ..settings.schema import Settings
from .preparation import pruning_plan

EVALUATING = 630 * 2**20  # bytes of a process that has imported all libraries, but loaded no data
PRUNING = 720 * 2**20  # bytes of a process that has also compiled the engine
ITEM = 4  # bytes of a float32
SECOND_STREAM = 48 * 2**20  # bytes added for a target: without them, measured runs exceeded the estimate by up to 39 MB
RECORD = 2**20  # bytes on disk of the record, the log and the figures
UNKNOWN_WINDOWS = 170  # assumed for a whole text; that of WikiText-2 with windows of 2048 tokens


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
        moments_bytes: limit for the moments that are kept at a time, because those of a whole block do not fit; see
            :class:`rose_exp.pruning.PruneContext`.
    """

    weights: str
    by_blocks: bool
    moments_bytes: int | None = None


def footprint(settings: Settings, shape: ModelShape, cuda: bool, placed: Placement) -> Footprint:
    """Estimate the peak usage of a run, the maximum over its stages: loading, pruning, evaluating and saving."""
    return _Run(settings, shape, cuda, placed).footprint()


def gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"


class _Run:
    """The estimates of one run.

    Attributes:
        width: bytes of a weight.
        pruned: the blocks up to the last one with a layer to prune, and for each the layers to prune.
    """

    def __init__(self, settings: Settings, shape: ModelShape, cuda: bool, placed: Placement):
        self.settings, self.shape, self.cuda, self.placed = settings, shape, cuda, placed
        self.kind = "cuda" if cuda else "cpu"
        self.width = torch.finfo(shape.dtype).bits // 8
        self.on_disk = placed.weights == "disk"
        self.whole = shape.parameters * self.width
        self.block = shape.largest * self.width
        self.outside = shape.outside * self.width
        self.pruned = self._pruned() if settings.pruned else []
        self.plan = pruning_plan(settings) if settings.pruned else None

    def footprint(self) -> Footprint:
        pruning = max((self._block_bytes(block, layers) for block, layers in self._kinds_of_blocks()), default=0)
        evaluating = self._evaluation_bytes()
        states = self._stream_bytes() * self._copies()
        texts = self._text_bytes() if self.placed.by_blocks else 0
        place = self.settings.pipeline.activations
        libraries = PRUNING if self.settings.pruned else EVALUATING
        weights = self.outside + self.block if self.on_disk else self.whole
        held = weights + self._dense_bytes()
        mapped = self.block if self.on_disk else max(self.block, self.outside)  # of the files, which are mapped while read
        loading = EVALUATING + weights + mapped  # the engine is compiled after the model is loaded
        saving = self.block if self.settings.save and self.on_disk else 0  # a model in memory is written without a copy
        if not self.cuda:
            pruning, evaluating = (
                work + (stored if place != "disk" else 0) for work, stored in ((pruning, states), (evaluating, texts))
            )
            reread = self.block if self.on_disk else 0  # a block as it is read or written
            working = libraries + held + max(pruning + reread, evaluating + reread, saving)
            return Footprint(max(loading, working), None, self._disk_bytes(states, texts))
        if place == "device":
            pruning, evaluating = pruning + states, evaluating + texts
        working = libraries + held + max(saving, max(states, texts) if place == "host" else 0)
        whole = self.block + self.outside if self.placed.by_blocks else self.whole
        device = max(self.block + pruning, whole + evaluating)
        return Footprint(max(loading, working), device, self._disk_bytes(states, texts))

    def _pruned(self) -> list[tuple[BlockShape, list[LayerShape]]]:
        pipeline = self.settings.pipeline
        found = []
        for block in self.shape.blocks:
            layers = [layer for layer in block.layers if chosen(layer.name, pipeline.layers, pipeline.skip)]
            if self.settings.removes:  # only layers that read heads or neurons are calibrated
                groups = [layer.group for layer in block.layers]
                layers = [x for x in layers if x.rows == self.shape.hidden and groups.count(x.group) == 1]
            found.append((block, layers))
        while found and not found[-1][1]:
            found.pop()
        return found

    def _kinds_of_blocks(self) -> Iterator[tuple[BlockShape, list[LayerShape]]]:
        """Yield one block of each kind: most blocks of a model are equal."""
        kinds = {}
        for block, layers in self.pruned:
            kinds[block.parameters, *((layer.rows, layer.columns) for layer in layers)] = block, layers
        yield from kinds.values()

    def _stream_bytes(self) -> int:
        """Return the bytes of the hidden states of all windows."""
        calibration = self.settings.calibration
        if not self.settings.pruned:
            return 0
        return calibration.samples * calibration.window * self.shape.hidden * self.width

    def _streams(self) -> int:
        """Number of streams of hidden states: with a target, the dense model has its own."""
        return 2 if self.settings.target or self.settings.reconstruction else 1

    def _copies(self) -> int:
        """Largest number of streams at a time; the copy for the allocation is freed before the dense stream is created."""
        if self.plan is not None and self.plan.reconstruction:  # the targets of one or two stages are stored, too
            return 4 if self.plan.staged else 3
        return 2 if self.settings.target or self.settings.allocation else 1

    def _forward_bytes(self, block: BlockShape, tokens: int) -> int:
        """Return the bytes of the activations in a block: three of the MLP's or eight of the hidden states' width."""
        hidden = self.shape.hidden
        inner = max((max(layer.rows, layer.columns) for layer in block.layers), default=hidden)
        return tokens * self.width * max(3 * inner + 2 * hidden, 8 * hidden)

    def _block_bytes(self, block: BlockShape, layers: list[LayerShape]) -> int:
        """Return the peak bytes of pruning a block, besides its weights and the hidden states of all windows."""
        settings, hidden = self.settings, self.shape.hidden
        tokens = batch_size(settings.pipeline.batch, self.kind) * settings.calibration.window
        forward = self._forward_bytes(block, tokens) + tokens * hidden * self.width
        groups: dict[str, list[LayerShape]] = {}
        for layer in layers:
            groups.setdefault(layer.group, []).append(layer)
        if not groups:
            return forward
        waves = self._waves(groups)
        training = self._training_bytes(block, tokens) if settings.reconstruction else 0
        copied = block.parameters * self.width if settings.target and len(waves) > 1 else 0
        return max(training, copied + max(self._wave_bytes([groups[name] for name in wave], forward, tokens) for wave in waves))

    def _training_bytes(self, block: BlockShape, tokens: int) -> int:
        """Return the bytes of training a block: copies of its parameters, and the activations of a batch."""
        converted = ITEM if self.width < ITEM else 0
        copies = 4 * ITEM + converted + 3 * self.width  # float32: values, sums of gradients, and Adam's two moments
        inner = sum(layer.rows + layer.columns for layer in block.layers)
        return block.parameters * copies + tokens * ITEM * (inner + 8 * self.shape.hidden)

    def _waves(self, groups: Mapping[str, list[LayerShape]]) -> list[list[str]]:
        """Return the names of the groups that are calibrated together, see :func:`rose_exp.pruning.waves.limited_waves`."""
        settings, limit = self.settings, self.placed.moments_bytes
        if settings.pipeline.true_sequential:
            return [[name] for name in groups]
        if limit is None or settings.removes or "permutation" in acting(settings.model_dump(mode="json")):
            return [list(groups)]
        item = sums_dtype(self.kind, torch.float32).itemsize
        names, sizes = list(groups), [group[0].columns ** 2 * item for group in groups.values()]
        return [[names[place] for place in part] for part in successive_parts(sizes, limit)]

    def _wave_bytes(self, groups: list[list[LayerShape]], forward: int, tokens: int) -> int:
        """Return the peak bytes of calibrating groups together and pruning them one after another."""
        columns = [group[0].columns for group in groups]
        moments = [self._moments_bytes(group, tokens) for group in groups]
        product = max(columns) ** 2 * (ITEM if self.settings.target else ITEM // 4)  # of a piece, before it is added
        recorded = 2 * tokens * sum(columns) * self.width if self.settings.target else 0
        remaining = sum(moments)
        peak = remaining + max(forward + recorded, recorded + product)
        for group, width, size in zip(groups, columns, moments, strict=True):
            peak = max(peak, remaining + width**2 * ITEM)
            peak = max(peak, remaining - size + self._finished_bytes(group) + self._solving_bytes(group))
            remaining -= size
        return peak + (SECOND_STREAM if self.settings.target else 0)

    def _moments_bytes(self, group: list[LayerShape], tokens: int) -> int:
        """Return the bytes of the sums of a group, and of the piece of tokens that waits to be added."""
        columns, hidden = group[0].columns, self.shape.hidden
        item = sums_dtype(self.kind, torch.float32).itemsize
        piece = PIECE * ITEM if not self.cuda and tokens % PIECE else 0
        size = item * columns**2 + piece * columns
        if self.settings.target:
            rows = self._cross_rows(group)
            size += item * columns * rows + 2 * piece * columns
            if rows < columns and self.width < ITEM:  # the weight in float32
                size += ITEM * columns * rows
            if self._adds(group):
                size += (item * columns + piece) * hidden
        return size

    def _finished_bytes(self, group: list[LayerShape]) -> int:
        """Return the bytes of the sums of a group in float32."""
        columns = group[0].columns
        size = columns**2
        if self.settings.target:
            size += columns * self._cross_rows(group) + (columns * self.shape.hidden if self._adds(group) else 0)
        if "permutation" in acting(self.settings.model_dump(mode="json")):
            size += 2 * columns**2  # in their original order and in that of the permutation
        return size * ITEM

    def _cross_rows(self, group: list[LayerShape]) -> int:
        """Return the rows of the cross moments of a group's inputs."""
        rows, columns = group[0].rows, group[0].columns
        return rows if len(group) == 1 and narrow(rows, columns) else columns

    def _adds(self, group: list[LayerShape]) -> bool:
        """Return whether the output of a group is added to the hidden states."""
        return len(group) == 1 and group[0].rows == self.shape.hidden

    def _solving_bytes(self, group: list[LayerShape]) -> int:
        settings = self.settings
        columns, rows = group[0].columns, [layer.rows for layer in group]
        if settings.removes:
            return groups_peak(settings.method.name, settings.sparsity.ratio, columns, max(rows))
        methods = [self.plan.method_for(layer.name) for layer in group]
        refine = settings.refine
        return max(
            Problem(
                method,
                settings.sparsity.parsed,
                half=self.width < ITEM,
                ordered=bool(settings.reorder),
                conjugate_gradient=bool(refine and refine.steps),
                admm=bool(refine and refine.mask_iterations),
                target=bool(settings.target),
            ).peak(columns, rows)
            for method in methods
        )

    def _evaluation_bytes(self) -> int:
        """Return the bytes of a forward pass of a batch, or of its logits and their logarithms.

        A comparison adds the dense model's logits, a tensor of both, and that of the batch before.
        """
        evaluation, shape = self.settings.evaluation, self.shape
        windows = [text.window for text in evaluation.perplexity.values()] + ([512] if evaluation.zero_shot.tasks else [])
        window = max(windows, default=0)
        tokens = batch_size(evaluation.batch, self.kind) * window
        logarithms = 2 * ITEM if self.width < ITEM else ITEM  # half precision is converted to float32 first
        logits = tokens * shape.vocabulary * self.width * (5 if self._compared else 1) + window * shape.vocabulary * logarithms
        forward = max((self._forward_bytes(block, tokens) for block in shape.blocks), default=0)
        return max(logits, forward)

    def _text_bytes(self) -> int:
        """Return the bytes of the hidden states of the longest text, for evaluation by blocks."""
        return max(self._texts(), default=0)

    def _texts(self) -> list[int]:
        """Return the bytes of the hidden states of each text."""
        evaluation = self.settings.evaluation
        limits = [(t.window, [n for n in (t.windows, evaluation.limit) if n]) for t in evaluation.perplexity.values()]
        return [w * min(counts or [UNKNOWN_WINDOWS]) * self.shape.hidden * self.width for w, counts in limits]

    @property
    def _compared(self) -> bool:
        """Whether predictions are compared with those of the dense model."""
        return self.settings.pruned and self.settings.evaluation.divergence

    def _dense_bytes(self) -> int:
        """Return the bytes of the dense model's predictions, which the pruned model is compared with."""
        return sum(self._texts()) if self._compared else 0

    def _removed_bytes(self) -> int:
        """Return the bytes of the heads and neurons that the saved model lacks."""
        if not self.settings.removes:
            return 0
        sparsity, pipeline = self.settings.sparsity.parsed, self.settings.pipeline
        removed = 0
        for block, _ in self.pruned:
            for structure in block.structures:
                wanted = all(chosen(name, pipeline.layers, pipeline.skip) for name in structure.consumers)
                if structure.kind in sparsity.kinds and wanted:
                    removed += sparsity.count(structure.groups) * structure.parameters
        return removed * self.width

    def _disk_bytes(self, states: int, texts: int) -> int:
        """Return the peak size of the run's folder: its state, hidden states on disk, and the saved model."""
        pipeline = self.settings.pipeline
        sizes = [block.parameters * self.width for block, _ in self.pruned]
        if pipeline.resume == "none" and not self.on_disk:
            sizes = []
        blocks, kept = sum(sizes), 0
        stream = self._stream_bytes() * self._streams() if pipeline.resume == "activations" else 0
        if len(sizes) > 1:  # the last block has no inputs of a next one; before it, old and new inputs exist together
            kept = max(blocks + stream, blocks - sizes[-1] + (2 if len(sizes) > 2 else 1) * stream)
        elif sizes:
            kept = blocks
        hidden, hidden_texts = (states, texts) if pipeline.activations == "disk" else (0, 0)
        saved = self.whole - self._removed_bytes() if self.settings.save else 0
        return RECORD + max(kept + hidden, blocks + hidden_texts, blocks + saved)
