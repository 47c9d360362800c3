"""What a check receives, and what it records."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

SHARED = Path(__file__).resolve().parents[3] / "shared"  # golden cases and data beside the checkout, which may be missing


class Skip(Exception):
    """Raised by a check that cannot run here; the message is the reason."""


@dataclass(frozen=True)
class Setup:
    """Where the checks run.

    Attributes:
        device: device to compare with the CPU.
        tiny: whether to use tiny sizes, for which speed has no meaning.
        deadline: time of ``time.monotonic`` at which a check should stop early.
    """

    device: torch.device
    tiny: bool
    deadline: float

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def backends(self) -> tuple[str, str]:
        """Backends of the sweep on this device."""
        return ("torch", "triton") if self.cuda else ("torch", "numba")

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()


@dataclass
class Report:
    """Results of one check.

    Attributes:
        details: measurements by name.
        cases: name, result and error of each case. A failed case does not stop the others.
        targets: measured values with a bound.
    """

    details: dict[str, Any] = field(default_factory=dict)
    cases: list[dict[str, Any]] = field(default_factory=list)
    targets: list[dict[str, Any]] = field(default_factory=list)

    @contextmanager
    def case(self, name: str) -> Iterator[dict[str, Any]]:
        """Record a case, and the traceback if it fails. The body adds its measurements to the yielded mapping."""
        facts: dict[str, Any] = {"name": name, "passed": True}
        self.cases.append(facts)
        try:
            yield facts
        except Exception as error:  # reported: other cases must still run
            facts |= {"passed": False, **failure(error)}

    def target(self, name: str, value: float, *, least: float | None = None, most: float | None = None) -> None:
        """Record a value that is expected to be at least or at most a bound."""
        met = (least is None or value >= least) and (most is None or value <= most)
        self.targets.append({"name": name, "value": value, "least": least, "most": most, "met": met})


Check = Callable[[Setup, Report], None]


def failure(error: Exception) -> dict[str, str]:
    """Return an error in one line, and its traceback; an assertion without a message is quoted."""
    lines = str(error).strip().splitlines() or [traceback.extract_tb(error.__traceback__)[-1].line]
    trace = "".join(traceback.format_exception(error))
    return {"error": f"{type(error).__name__}: {lines[0]}", "traceback": trace}


def run_check(name: str, check: Check, setup: Setup) -> dict[str, Any]:
    """Run a check and return its entry of the results; exceptions are recorded, not raised."""
    report, start = Report(), time.perf_counter()
    entry: dict[str, Any] = {"name": name, "status": "passed"}
    try:
        check(setup, report)
        if setup.cuda:
            torch.cuda.synchronize()  # errors of kernels appear here at the latest
    except Skip as reason:
        entry |= {"status": "skipped", "reason": str(reason)}
    except Exception as error:  # reported: other checks must still run
        entry |= {"status": "failed", **failure(error)}
    if not all(case["passed"] for case in report.cases):
        entry["status"] = "failed"
    elif entry["status"] == "passed" and not all(target["met"] for target in report.targets):
        entry["status"] = "missed"
    return entry | {"seconds": round(time.perf_counter() - start, 3)} | vars(report)
