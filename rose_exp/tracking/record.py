"""The run record, ``run.json``: everything needed to trust and reproduce a number."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from ..runtime.files import write_text
from ..runtime.redaction import redact
from ..runtime.signals import Interrupted

log = logging.getLogger(__name__)

FILE_NAME = "run.json"
REORDERED = "reordered_layers"  # metric: number of layers that an ordering reordered
LIBRARIES = ("rose_exp", "torch", "transformers", "tokenizers", "datasets", "safetensors", "numpy", "hydra-core", "lm-eval")


class RunRecord:
    """``run.json`` of one run, written at the start and rewritten at each step.

    Fields: ``status`` (running, finished, failed, interrupted), ``run_id``, ``label``, ``config``, ``metrics``,
    ``standard_errors``, ``windows`` (values of each evaluation window), ``layers``, ``events``, ``protocol``, ``seconds`` by
    stage, ``estimate`` and ``peak_memory_bytes``, ``error``, ``started`` and ``ended``; with trackers, ``tracking`` (all
    that were used, with their failures) and ``tracked`` (those that have the results of the finished run).

    Args:
        kept: whether to write the file; if several processes share a run, only the first one does.
    """

    def __init__(self, folder: Path, config: dict[str, Any], label: str, run_id: str, kept: bool = True):
        self.kept = kept
        self.path = folder / FILE_NAME
        self.data: dict[str, Any] = {
            "status": "running",
            "run_id": run_id,
            "label": label,
            "started": now(),
            "ended": None,
            "error": None,
            "metrics": {},
            "standard_errors": {},
            "windows": {},
            "seconds": {},
            "peak_memory_bytes": {},
            "protocol": {},
            "config": config,
            "layers": [],
            "events": [],
        }
        _reset_peak_memory()
        self.write()

    def write(self) -> None:
        """Write the file atomically.

        Raises:
            RoseExpError: the file cannot be written.
        """
        self.data["peak_memory_bytes"] = peak_memory()
        if not self.kept:
            return
        write_record(self.path, self.data)

    def measured(
        self, name: str, value: float, standard_error: float | None = None, windows: Sequence[float] | None = None
    ) -> None:
        """Record a metric, and its standard error and the values of the windows under the same name if they are known.

        Args:
            windows: value of each evaluation window; for perplexity, its mean negative log-likelihood.
        """
        self.data["metrics"][name] = value
        if standard_error is not None:
            self.data["standard_errors"][name] = standard_error
        if windows is not None:
            self.data["windows"][name] = list(windows)

    def warn(self, kind: str, detail: str) -> None:
        """Record and log a warning that concerns the whole run instead of a layer."""
        self.data["events"].append({"kind": kind, "layer": None, "detail": detail})
        log.warning("%s: %s", kind, detail)

    def pruned(self, layers: Sequence[dict[str, Any]], events: Sequence[dict[str, Any]], ordered: bool = False) -> None:
        """Record layer reports and their warnings, and log one line per kind of warning.

        Args:
            ordered: whether the run has an ordering. If so, the number of reordered layers is recorded and logged.
        """
        self.data["layers"] = list(layers)
        self.data["events"] += events
        for kind in dict.fromkeys(event["kind"] for event in events):
            kind_events = [event for event in events if event["kind"] == kind]
            log.warning(
                "%s in %d layers, such as %s: %s", kind, len(kind_events), kind_events[0]["layer"], kind_events[0]["detail"]
            )
        if ordered:
            self._reordered(sum(bool(layer["reordered"]) for layer in layers), len(layers))
        self.write()

    def _reordered(self, count: int, layers: int) -> None:
        self.data["metrics"][REORDERED] = count
        label = self.data["label"]
        if count:
            log.info("%s: %d of %d layers reordered", label, count, layers)
        else:
            log.warning("%s: 0 of %d layers reordered; the result equals that of reorder=none", label, layers)

    def finish(self) -> None:
        self.data |= {"status": "finished", "ended": now()}
        self.write()

    def fail(self, error: BaseException) -> None:
        status = "interrupted" if isinstance(error, (Interrupted, KeyboardInterrupt)) else "failed"
        self.data |= {"status": status, "ended": now(), "error": f"{type(error).__name__}: {error}"}
        self.write()


class Stopwatch:
    """Accumulates seconds by stage in a dictionary."""

    def __init__(self, seconds: dict[str, float]):
        self.seconds = seconds

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - start, 3)


def write_record(path: Path, data: Mapping[str, Any]) -> None:
    """Write a run record atomically, without secrets.

    Raises:
        RoseExpError: the file cannot be written.
    """
    write_text(path, json.dumps(redact(data), indent=1, allow_nan=True) + "\n")


def environment(device: torch.device, libraries: Iterable[str] = ()) -> dict[str, Any]:
    """Return the versions, hardware and revision that a number may depend on.

    Args:
        libraries: further libraries whose versions to include.
    """
    return {
        "versions": versions() | library_versions(libraries),
        "revision": _git_revision(),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }


def versions() -> dict[str, str | None]:
    """Return the versions of this package, of the libraries that a number may depend on, and of Python."""
    return library_versions(LIBRARIES) | {"python": platform.python_version()}


def library_versions(names: Iterable[str]) -> dict[str, str | None]:
    return {name: _version(name) for name in names}


def now() -> str:
    """Return the current time in the format of the records."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    """Return the commit of the checkout with this package, with '+changes' if files differ; None without a checkout."""
    folder = Path(__file__).resolve().parent
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        tracked = _git(folder, "ls-files", Path(__file__).name)
        changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return None
    return None if not tracked else commit + ("+changes" if changes else "")


def _git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


def device_name(device: torch.device) -> str:
    """Return the type and name of a device, without its index; for a CPU with the instructions that determine rounding."""
    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(device)}"
    name = platform.processor() or platform.machine()
    return f"{device.type}: {name}, {torch.backends.cpu.get_cpu_capability()}"


def _reset_peak_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux only: the peak of the process then starts with this run
    except OSError:
        return


def peak_memory() -> dict[str, int | None]:
    """Return the peak resident memory of this process and the peak allocation on the CUDA device, in bytes.

    Linux: ``VmHWM``, because ``ru_maxrss`` starts with the size of the parent process.
    """
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    status = Path("/proc/self/status")
    if status.exists():
        high_water = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        host = int(high_water[0].split()[1]) * 1024 if high_water else host
    return {"host": host, "device": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None}
