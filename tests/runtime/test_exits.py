"""Signals and closed outputs end a command with a short message and the usual status, at any moment."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from rose_exp.runtime.signals import EXIT_STATUS

STARTED = 0.05  # seconds in which Python itself starts, before it can run code of this project
LONGER = ["calibration.samples=96", "calibration.window=256", "figures.draw=false"]
SEARCH = ["-m", "hydra/sweeper=optuna", "method=rose", "hydra.sweeper.metric=perplexity.local"]


def process_of(arguments: Sequence[str], folder: Path, module: str = "rose_exp") -> subprocess.Popen:
    code = "from rose_exp.cli.report import main; main()"
    program = ["-m", module] if module == "rose_exp" else ["-c", code]
    return subprocess.Popen(
        [sys.executable, *program, *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # ignored in background jobs
    )


def check_end(process: subprocess.Popen, number: int, allowed: Sequence[int] = ()) -> str:
    output, errors = process.communicate(timeout=120)
    assert "Traceback" not in output + errors, errors
    assert process.returncode in (128 + number, -number, *allowed), (process.returncode, errors)
    return errors


def wait_for_state(folder: Path, process: subprocess.Popen) -> None:
    end = time.monotonic() + 120
    while not list(folder.glob("outputs/*/state/state.json")):
        assert time.monotonic() < end
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)


def moments(count: int, seconds: float) -> list[tuple[int, float]]:
    draw = random.Random(0)
    return [(draw.choice((signal.SIGINT, signal.SIGTERM)), draw.uniform(2 * STARTED, seconds)) for _ in range(count)]


@pytest.mark.parametrize(
    ("number", "seconds"),
    [
        *moments(3, 1.0),
        *(
            pytest.param(*m, marks=pytest.mark.slow if i < 10 else pytest.mark.exhaustive)
            for i, m in enumerate(moments(30, 6.0))
        ),
    ],
)
@pytest.mark.parametrize("arguments", [[], pytest.param(["-m", "seed=0,1"], marks=pytest.mark.slow)])
def test_signal_at_a_random_moment_ends_the_command(arguments, number, seconds, small, tmp_path):
    process = process_of([*arguments, *small, *LONGER], tmp_path)
    time.sleep(seconds)
    process.send_signal(number)
    check_end(process, number, (0, EXIT_STATUS))


@pytest.mark.parametrize(("number", "seconds"), [(signal.SIGINT, 0.3), (signal.SIGTERM, 0.6)])
def test_signal_ends_a_report(number, seconds, tmp_path):
    process = process_of([str(tmp_path)], tmp_path, "report")
    time.sleep(seconds)
    process.send_signal(number)
    check_end(process, number, (1,))  # the folder has no records


@pytest.mark.parametrize("count", [2, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "arguments",
    [[], pytest.param(["-m", "seed=0,1"], marks=pytest.mark.slow), pytest.param(SEARCH, marks=pytest.mark.slow)],
)
def test_second_interrupt_ends_a_run_at_once(arguments, count, small, tmp_path):
    process = process_of([*arguments, *small, *LONGER], tmp_path)
    wait_for_state(tmp_path, process)
    for _ in range(count):
        process.send_signal(signal.SIGINT)
        time.sleep(0.03)
    errors = check_end(process, signal.SIGINT, (EXIT_STATUS,))  # it may end before the second signal arrives
    assert "SIGINT: finishing the current layer" in errors
    assert "run the same command again to resume" in errors
    (record,) = tmp_path.glob("outputs/*/run.json")
    assert '"status": "interrupted"' in record.read_text()
    assert not list(tmp_path.glob("outputs/*/.run.json-*"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_the_workers_of_a_parallel_sweep(number, small, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    process = process_of(["-m", *small, *LONGER, "seed=0,1,2", "hydra/launcher=joblib"], tmp_path)
    wait_for_state(tmp_path, process)
    process.send_signal(number)
    errors = check_end(process, number)  # reads the output of the workers as well, so they have ended
    assert f"stopped by {signal.Signals(number).name}" in errors
    assert "leaked" not in errors


@pytest.mark.parametrize("arguments", [["--help"], ["--cfg", "job"], ["plan=true"]])
def test_closed_output_ends_the_command_without_a_message(arguments, tmp_path):
    process = process_of(arguments, tmp_path)
    process.stdout.close()  # before the command writes anything
    errors = process.stderr.read()
    assert process.wait(timeout=120) == 128 + signal.SIGPIPE, errors
    assert "Traceback" not in errors
    assert "Exception" not in errors


@pytest.mark.slow
def test_run_without_a_reader_stops_and_can_be_resumed(small, tmp_path):
    process = process_of([*small, *LONGER], tmp_path)
    process.stdout.readline()
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait(timeout=120) == 128 + signal.SIGPIPE, errors
    assert "Traceback" not in errors
    assert process_of([*small, *LONGER], tmp_path).communicate(timeout=120)[1].count("Traceback") == 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_full_disk_behind_the_output_is_one_error(tmp_path):
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "rose_exp", "--help"]
        done = subprocess.run(command, cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "cannot write the output: No space left on device\n")
