"""One run: prepares its inputs, loads the model, prunes, measures and saves it, and writes the run record."""

from __future__ import annotations

import gc
import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar

import torch

from ..pruning import FirstBlock, LayerReport, PruneContext, RunState
from ..pruning.state import Resume
from ..report.figures import draw_figures, write_study
from ..runtime import signals as interruption
from ..runtime.fingerprint import code_sha256
from ..runtime.heap import return_freed_memory
from ..runtime.ranks import Ranks
from ..runtime.redaction import redact
from ..settings.schema import Settings
from ..tracking import Identity, RunRecord, Stopwatch, Trackers, environment
from .exhaustion import explained
from .folder import RunFolder
from .identity import identifying, plugins_of, run_id
from .leftovers import clean
from .preparation import find_device, resolved_backend
from .pruning import layer_events
from .reuse import interrupted_trackers

log = logging.getLogger(__name__)

DETERMINING = ("versions", "device", "threads", "float32_matmul_precision", "ranks", "backend")
"""Facts of the protocol that a state must share with the run that resumes from it, besides its inputs."""


def run_experiment(
    settings: Settings,
    config: dict[str, Any],
    folder: Path,
    identity: Identity | None = None,
    first_block: FirstBlock | None = None,
) -> dict[str, Any]:
    """Run an experiment, and write ``run.json`` (and with ``save`` the model) to ``folder``.

    Resumes from the state of the same run in ``folder``, if there is one.

    Args:
        config: the resolved configuration of the settings, for the record.
        identity: the name of the run for trackers; if None, its method, model and pattern.
        first_block: the moments of the first block that the runs of a sweep share.
    Returns:
        The run record.
    Raises:
        RoseExpError: an error outside the code. The record has status ``failed`` and the error.
        Interrupted: a signal has stopped the run. The record has status ``interrupted``; running again resumes.
    """
    return_freed_memory()
    ranks = Ranks()
    folder = ranks.gather(folder)[0]
    with interruption.handle_signals():
        earlier = interrupted_trackers(settings, folder) if ranks.first else []
        record = RunRecord(folder, config, settings.label, run_id(settings), kept=ranks.first)
        trackers = Trackers(settings, record, folder, identity, earlier=earlier)
        record.write()  # a process that resumes after a kill continues the trackers' runs
        try:
            with explained(record.data):
                run = _kind(settings)(settings, record, RunFolder(folder), ranks, trackers, first_block)
                _execute(run)
        except BaseException as error:
            interruption.leave()
            record.fail(error)
            trackers.finish(failed=True)
            record.write()
            raise
        interruption.leave()
        record.finish()
        model = run.folder.model
        trackers.log("keep", record.path, model if model.exists() else None)
        trackers.finish(failed=False)
        record.write()
        if ranks.first:
            clean(run.folder, finished=True)
        interruption.check()  # the run is finished, but not the sweep
    return record.data


def _execute(run: Run) -> None:
    """Run all stages. A signal stops the run between layers and stages."""
    with ExitStack() as stack:
        run.prepare(stack)
        run.check_signals()
        run.load()
        run.check_signals()
        if run.settings.pruned:
            run.prune()
        run.check_signals()
        run.measure()
        run.finish()


def _kind(settings: Settings) -> type[Run]:
    if settings.model.kind == "diffusion":
        from .diffusion import DiffusionRun  # requires packages that language models do not

        return DiffusionRun
    from .language import LanguageRun

    return LanguageRun


class Run(ABC):
    """The stages of a run, and the data that they share. Subclasses supply what depends on the kind of model.

    Attributes:
        state: what an interrupted run resumes from; None if the run keeps none.
        watch: measures the time of each stage.
        protocol: the record's account of everything that the numbers depend on.
    """

    libraries: ClassVar[tuple[str, ...]] = ()
    """Further libraries whose versions the protocol records."""

    def __init__(
        self,
        settings: Settings,
        record: RunRecord,
        folder: RunFolder,
        ranks: Ranks,
        trackers: Trackers,
        first_block: FirstBlock | None = None,
    ):
        self.settings, self.record, self.folder, self.ranks, self.trackers = settings, record, folder, ranks, trackers
        self.first_block = first_block
        self.watch = Stopwatch(record.data["seconds"])
        self.protocol = record.data["protocol"]
        self.device = find_device(settings.device, ranks)
        self.state: RunState | None = None

    def prepare(self, stack: ExitStack) -> None:
        """Record the environment, then check and read the inputs of the run.

        Args:
            stack: removes temporary files at the end of the run.
        """
        settings = self.settings
        self.protocol |= {"seed": settings.seed, "ranks": self.ranks.size} | environment(self.device, self.libraries)
        if used := plugins_of(settings):
            self.protocol["plugins"] = used
        self.protocol["backend"] = resolved_backend(settings, self.device) if settings.pruned else None
        torch.manual_seed(settings.seed)
        self.read_inputs(stack)

    def load(self) -> None:
        """Load the model and the state of an interrupted run."""
        settings = self.settings
        with self.watch.stage("loading"), self.ranks.first_rank_first():
            self.load_model()
        if settings.pruned and settings.pipeline.resume != "none":
            self.state = RunState(self.folder.state, self._fingerprint(), self.resume, self.ranks)
            if self.state.progress.blocks:
                self.record.data["resumed"] = self.state.progress.blocks
        self.after_load()
        self.record.write()

    def prune(self) -> None:
        """Prune the model and record the reports of its layers."""
        settings, record = self.settings, self.record
        context = PruneContext(
            device=self.device,
            ranks=self.ranks,
            scratch=self.folder.root,
            state=self.state,
            on_warning=self.record.warn,
            on_layer=lambda step, report: self.trackers.log("layer", step, report.as_dict()),
            on_study=lambda name, study: write_study(self.folder.root, name, study.as_dict()),
        )
        self.before_pruning()
        log.info("pruning with %s, %s", settings.label, settings.sparsity.parsed)
        with self.watch.stage("pruning"):
            reports = self.prune_layers(context)
        self.watch.seconds |= {f"pruning.{name}": round(value, 3) for name, value in vars(context.seconds).items()}
        record.pruned([report.as_dict() for report in reports], layer_events(reports, settings), bool(settings.reorder))

    def check_signals(self) -> None:
        """Stop here if a signal has requested it, unless other processes would wait for this one."""
        if self.ranks.size == 1:
            interruption.check()

    def finish(self) -> None:
        """Save the model, log the results and draw the figures."""
        settings, record = self.settings, self.record
        if settings.save and self.ranks.first:
            with self.watch.stage("saving"):
                log.info("saved the model to %s", self.save(self.folder.model))
        self.after_saving()
        # activations on disk while a unit is processed are not included
        record.data["peak_disk_bytes"] = (self.state.peak_bytes if self.state is not None else 0) + self.folder.model_bytes()
        self.trackers.log("results", record.data["metrics"], record.data["layers"])
        if settings.figures.draw and self.ranks.first:
            for name, path in draw_figures(record.data, self.folder.root).items():
                self.trackers.log("figure", name, path)
        self.release()
        gc.collect()

    def _fingerprint(self) -> dict[str, Any]:
        """Return everything that the result depends on, for the check that a state belongs to this run."""
        model = {name: value for name, value in self.protocol["model"].items() if name not in ("name", "source")}
        facts = {"settings": identifying(self.settings), "model": model, "code": code_sha256()}
        facts["calibration"] = self.calibration_fingerprint()
        return redact(facts | {name: self.protocol[name] for name in DETERMINING})

    @property
    def resume(self) -> Resume:
        """What the state holds besides the pruned layers."""
        return self.settings.pipeline.resume

    @abstractmethod
    def read_inputs(self, stack: ExitStack) -> None:
        """Read texts or prompts, and check what can be checked without the model."""

    @abstractmethod
    def load_model(self) -> None:
        """Load the model, and check that it supports the settings."""

    def after_load(self) -> None:
        """Called after the model and the state are loaded."""
        return

    @abstractmethod
    def calibration_fingerprint(self) -> Mapping[str, Any] | str:
        """Return the fingerprint of the calibration data."""

    def before_pruning(self) -> None:
        """Called before pruning, with the dense model."""
        return

    @abstractmethod
    def prune_layers(self, context: PruneContext) -> Sequence[LayerReport]:
        """Prune the model and return a report for each layer."""

    @abstractmethod
    def measure(self) -> None:
        """Measure the sparsity and the quality of the model."""

    @abstractmethod
    def save(self, place: Path) -> Path:
        """Save the model to a folder and return it."""

    def after_saving(self) -> None:
        """Called after the model is saved, before it is released."""
        return

    @abstractmethod
    def release(self) -> None:
        """Free the memory of the model."""
