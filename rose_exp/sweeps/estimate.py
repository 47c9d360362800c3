"""Estimates of run times, from rates measured on this machine."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..models import ModelShape
from ..settings.effective import acting, effective
from ..settings.schema import Settings

log = logging.getLogger(__name__)

PROBE = 1024  # rows and columns of the matrix product that is timed if no record has a rate
PROBE_SECONDS = 0.3


@dataclass(frozen=True)
class Work:
    """Floating-point operations of a run, by stage. Stages are named as in ``seconds`` of run records."""

    operations: dict[str, float]

    @classmethod
    def planned(cls, settings: Settings, shape: ModelShape) -> Work:
        """Return the work of a run that has not started, from its settings."""
        operations: dict[str, float] = {}
        if settings.pruned:
            tokens = settings.calibration.samples * settings.calibration.window
            layers = [(rows, columns, tokens) for rows, columns in shape.layers]
            operations |= _pruning(settings.model_dump(mode="json"), layers)
        if settings.evaluation.perplexity:
            limit = settings.evaluation.limit
            counts = [
                (t.window, [n for n in (t.windows, limit) if n is not None]) for t in settings.evaluation.perplexity.values()
            ]
            tokens = sum(window * min(limits) for window, limits in counts if limits)  # the length of a whole text is unknown
            operations["evaluation"] = 2 * shape.parameters * tokens
        return cls(operations)

    @classmethod
    def done(cls, record: Mapping[str, Any]) -> Work:
        """Return the work of a finished run, from its record."""
        layers = [(layer["rows"], layer["columns"], layer["tokens"]) for layer in record["layers"]]
        operations = _pruning(record["config"], layers) if layers else {}
        windows = record["protocol"]["evaluation"].values()
        tokens = sum(text["window"] * text["windows"] for text in windows)
        return cls(operations | {"evaluation": 2 * record["protocol"]["model"]["parameters"] * tokens})


def _pruning(config: Mapping[str, Any], layers: Sequence[tuple[int, int, int]]) -> dict[str, float]:
    """Return the operations of pruning layers of (rows, columns, tokens), by stage.

    Counts only the largest matrix products of a method. Each combination of method and options has its own rate, which accounts
    for the rest.
    """
    parts, values = acting(config), effective(config)
    products = values["refine.steps"] + values["refine.mask_iterations"] if "refinement" in parts else 0
    streams = 2 if "target" in parts else 1
    solving = f"pruning.solving {config['method']['name']}" + (f" refined {products}" if products else "")
    if "permutation" in parts:
        solving += " permuted"  # with its own rate, because assigning channels is not a matrix product
    operations = dict.fromkeys(("pruning.calibrating", "pruning.moments", solving, "pruning.advancing"), 0.0)
    if "allocation" in parts:
        operations["pruning.surveying"] = 2.0 * sum(rows * columns * tokens for rows, columns, tokens in layers)
    if "reconstruction" in parts:  # a forward and a backward pass for each epoch
        operations["pruning.reconstructing"] = (
            values["reconstruction.epochs"] * 6.0 * sum(rows * columns * tokens for rows, columns, tokens in layers)
        )
    for rows, columns, tokens in layers:
        operations["pruning.calibrating"] += 2 * rows * columns * tokens * streams
        operations["pruning.advancing"] += 2 * rows * columns * tokens
        operations["pruning.moments"] += columns**2 * tokens * (2 * streams - 1)  # the matrix of cross moments is not symmetric
        operations[solving] += columns**3 + 2 * rows * columns**2 * (1 + products)
    return operations


@dataclass
class Rates:
    """Operations per second by stage, for one model on this device.

    Attributes:
        product: rate of a float32 matrix product, for stages without records.
        measured: rates of stages in records.
        starting: seconds to read texts and the model, if records have them, else 0.
    """

    product: float
    measured: dict[str, float] = field(default_factory=dict)
    starting: float = 0.0

    @classmethod
    def of(cls, records: Sequence[Mapping[str, Any]], device: str, model: str) -> Rates:
        """Return the median rate of each stage over finished runs of the same model on the same device."""
        rates_by_stage: dict[str, list[float]] = {}
        starting = []
        for record in records:
            protocol = record["protocol"]
            if record["status"] != "finished" or (protocol.get("device"), protocol["model"]["name"]) != (device, model):
                continue
            try:
                started = record["seconds"]["texts"] + record["seconds"]["loading"]
                done = Work.done(record).operations
            except (LookupError, TypeError, AttributeError) as error:
                log.warning("the estimate ignores the damaged record of run %s: %r", record.get("run_id"), error)
                continue
            starting.append(started)
            for stage, operations in done.items():
                seconds = record["seconds"].get(stage.split()[0], 0)
                if operations and seconds:
                    rates_by_stage.setdefault(stage, []).append(operations / seconds)
        measured = {stage: statistics.median(rates) for stage, rates in rates_by_stage.items()}
        return cls(_product_rate(device), measured, statistics.median(starting or [0.0]))

    def seconds(self, work: Work) -> tuple[float, bool]:
        """Return the estimated seconds of a run, and whether all rates are from records."""
        total = sum(operations / self.measured.get(stage, self.product) for stage, operations in work.operations.items())
        return self.starting + total, set(work.operations) <= set(self.measured)


def _product_rate(device: str) -> float:
    place = "cuda" if device.startswith("cuda") else "cpu"
    matrix = torch.ones(PROBE, PROBE, device=place)
    matrix @ matrix
    start, products = time.perf_counter(), 0
    while time.perf_counter() - start < PROBE_SECONDS:
        (matrix @ matrix)[0, 0].item()  # waits for the product
        products += 1
    return 2 * PROBE**3 * products / (time.perf_counter() - start)
