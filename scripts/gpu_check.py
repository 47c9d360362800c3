"""Run everything that needs a GPU once, and write the results to a JSON file and a table.

    bash scripts/gpu_check.sh --json gpu_check.json             # all checks, limited to eight minutes
    bash scripts/gpu_check.sh --only layers --only moments      # some of them
    bash scripts/gpu_check.sh --device cpu --tiny               # tiny sizes on a CPU, to test the checks themselves

Each check runs in its own process, because an error in a CUDA kernel makes the device unusable for its process. A check that
fails is recorded with its traceback and does not stop the others.

passed    every comparison holds
missed    every comparison holds, but a speed target is missed
failed    a comparison fails, an exception is raised, or the check exceeds its time
skipped   the check cannot run here, for the stated reason

Exit status: 0 if all checks pass or are skipped, 1 if a check fails or misses a target, 2 without a CUDA device.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import published
import torch
from gpu_checks import layers, models
from gpu_checks.report import Check, Report, Setup, run_check

from rose_exp.runtime.files import write_text

MINUTES = 7.5  # for all checks; with the grace of the last one, eight minutes
LINES = 30  # of the output of a process that ends without results
GRACE = 30.0  # seconds that a process may take beyond the deadline of its check


@dataclass(frozen=True)
class Entry:
    """A check, and the seconds that it may take on a GPU, including the start of its process."""

    check: Check
    seconds: float


CHECKS: dict[str, Entry] = {  # the first ones matter most if time is short
    "selection": Entry(layers.check_selection, 40),
    "moments": Entry(layers.check_moments, 40),
    "layers": Entry(layers.check_layers, 120),
    "layer_speed": Entry(layers.check_layer_speed, 100),
    "model": Entry(models.check_model, 120),
    "golden": Entry(layers.check_golden, 90),
    "small_models": Entry(models.check_small_models, 60),
    "activations": Entry(models.check_activations, 40),
    "collectives": Entry(models.check_collectives, 40),
    "sparse_speed": Entry(models.check_sparse_speed, 60),
    "diffusion": Entry(models.check_diffusion, 60),
    "command": Entry(models.check_command, 90),
}


def run_here(name: str, arguments: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """Run a check in this process and return its entry."""
    device = torch.device(arguments.device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())  # NCCL needs the index
    setup = Setup(device, arguments.tiny, time.monotonic() + seconds)
    return run_check(name, CHECKS[name].check, setup)


def run_apart(name: str, arguments: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """Run a check in a new process and return its entry; a process without results counts as failed."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        file, log = Path(folder) / "results.json", Path(folder) / "output.txt"
        command = [sys.executable, __file__, "--only", name, "--here", "--json", str(file), "--device", arguments.device]
        command += ["--minutes", str(seconds / 60), *(["--tiny"] if arguments.tiny else [])]
        with log.open("w", encoding="utf-8") as stream:  # a pipe would stay open until processes of the process end
            try:
                done = subprocess.run(command, stdout=stream, stderr=stream, timeout=seconds + GRACE, check=False)
                reason = f"the process ended with status {done.returncode}"
            except subprocess.TimeoutExpired:
                reason = f"the process was stopped after {seconds + GRACE:.0f} s"
        if file.exists():
            entry = json.loads(file.read_text(encoding="utf-8"))["checks"][0]
            return entry | {"process_seconds": round(time.perf_counter() - start, 3)}
        output = log.read_text(encoding="utf-8", errors="replace")
    trace = "\n".join([reason, *output.splitlines()[-LINES:]])
    seconds = round(time.perf_counter() - start, 3)
    return {"name": name, "status": "failed", "error": reason, "traceback": trace, "seconds": seconds} | vars(Report())


def run_all(names: Sequence[str], arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the checks and return the results, which are written to the JSON file after each check."""
    device, start = torch.device(arguments.device), time.monotonic()
    results: dict[str, Any] = {"hardware": hardware(device), "device": arguments.device, "tiny": arguments.tiny}
    results |= {"seconds": 0.0, "checks": []}
    for name in names:
        print(f"{name} …", file=sys.stderr, flush=True)
        left = 60 * arguments.minutes - (time.monotonic() - start)
        run = run_here if arguments.here else run_apart
        if left > 0:
            seconds = left if arguments.here else min(left, CHECKS[name].seconds)
            entry = run(name, arguments, seconds)
        else:
            reason = f"no time left of {arguments.minutes:g} minutes"
            entry = {"name": name, "status": "skipped", "reason": reason, "seconds": 0.0} | vars(Report())
        results["checks"].append(entry)
        results["seconds"] = round(time.monotonic() - start, 3)
        if arguments.json:
            write_text(arguments.json, json.dumps(results, indent=1) + "\n")
    return results


def hardware(device: torch.device) -> dict[str, Any]:
    """Return the description of the machine that the benchmarks record, with properties of the GPU."""
    found = published.hardware(device) | {"python": sys.version.split()[0], "cuda": torch.version.cuda}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"capability": f"{properties.major}.{properties.minor}", "memory_bytes": properties.total_memory}
    return found


def table(results: dict[str, Any]) -> str:
    """Return one line for each check, followed by its targets and its failures."""
    lines = []
    for entry in results["checks"]:
        passed, cases = sum(case["passed"] for case in entry["cases"]), len(entry["cases"])
        counts = f"{passed} of {cases} cases" if cases else ""
        lines.append(
            f"{entry['name']:<14}{entry['status']:<9}{entry['seconds']:>7.1f} s  {counts:<18}{entry.get('reason', '')}".rstrip()
        )
        for target in entry["targets"]:
            bound = f"at least {target['least']:g}" if target["least"] is not None else f"at most {target['most']:g}"
            met = "met" if target["met"] else "missed"
            lines.append(f"    {target['name']}: {target['value']:g}, target {bound}: {met}")
        failures = [f"{case['name']}: {case['error']}" for case in entry["cases"] if not case["passed"]]
        failures += [entry["error"]] if "error" in entry else []
        lines += [f"    {failure}" for failure in failures]
    return "\n".join([*lines, f"{'total':<23}{results['seconds']:>7.1f} s"])


def main(command: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="output file for the results")
    parser.add_argument("--only", action="append", choices=list(CHECKS), metavar="NAME", help="check to run; can be repeated")
    parser.add_argument("--list", action="store_true", help="list the checks and exit")
    parser.add_argument("--device", default="cuda", help="device to check (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="use tiny sizes, to test the checks without a GPU")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="time for all checks (default: %(default)s)")
    parser.add_argument("--here", action="store_true", help="run the checks in this process instead of one process each")
    arguments = parser.parse_args(command)
    if arguments.list:
        for name, entry in CHECKS.items():
            print(f"{name:<14}{entry.check.__doc__.splitlines()[0]}")
        return 0
    if torch.device(arguments.device).type == "cuda" and not torch.cuda.is_available():
        build = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        reason = f"--device: expected a CUDA device, got none (torch {torch.__version__}, built {build})"
        print(f"{reason}; --device cpu --tiny tests the checks on a CPU", file=sys.stderr)
        return 2
    results = run_all(arguments.only or list(CHECKS), arguments)
    print(table(results))
    return 1 if any(entry["status"] in ("failed", "missed") for entry in results["checks"]) else 0


if __name__ == "__main__":
    sys.exit(main())
