"""Runs commands in child processes that are killed at chosen moments: ``python -m tests.runs.kills JSON``.

The argument holds ``arguments`` of ``rose-exp``, the ``folder`` of the results, the number of ``kills``, and a ``seed``. A
first command runs undisturbed, and its file operations in its folder are counted. The others are killed before one of these
operations, which the seed draws. The processes are forked from this one, which has imported everything but has not started
threads.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from pathlib import Path

EVENTS = ("open", "os.", "shutil.rmtree", "tempfile.")


def run_and_kill(arguments: list[str], watched: Path, kill_at: int | None, report: int | None = None) -> int:
    """Run a command in a child process, and kill it before its file operation number ``kill_at`` below ``watched``.

    Args:
        report: file descriptor to which the child writes its number of operations.
    Returns:
        The exit status; negative for a signal.
    """
    child = os.fork()
    if child == 0:
        count = 0

        def watch(name: str, values: tuple) -> None:
            nonlocal count
            if name.startswith(EVENTS) and any(str(watched) in str(value) for value in values):
                count += 1
                if count == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        status = _command(arguments)
        if report is not None:
            os.write(report, str(count).encode())
        os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _command(arguments: list[str]) -> int:
    from rose_exp.cli import app

    sys.argv = ["rose-exp", *arguments]
    try:
        app.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    sys.stdout.flush()
    return 0


def undisturbed(arguments: list[str], folder: Path) -> int:
    """Run a command without a kill, and return its number of file operations in its folder."""
    reader, writer = os.pipe()
    status = run_and_kill(placed(arguments, folder), folder, None, writer)
    assert status == 0, status
    return int(os.read(reader, 100))


def placed(arguments: list[str], folder: Path) -> list[str]:
    """Return the arguments with the folder in place of ``FOLDER``."""
    return [argument.replace("FOLDER", str(folder)) for argument in arguments]


def main() -> None:
    request = json.loads(sys.argv[1])
    import torch

    torch.set_num_threads(1)
    from rose_exp.cli import app  # noqa: F401
    from rose_exp.runs import execution  # noqa: F401

    arguments, folder, kills = request["arguments"], Path(request["folder"]), request["kills"]
    total = undisturbed(arguments, folder / "whole")
    draw = random.Random(request["seed"])
    for number in range(kills):
        place = folder / f"killed-{number}"
        while True:  # kill the command again and again, later each time, until it finishes
            status = run_and_kill(placed(arguments, place), place, draw.randrange(1, total))
            if status == 0 or draw.random() < 0.5:
                break
            assert status == -signal.SIGKILL, status
        assert run_and_kill(placed(arguments, place), place, None) == 0


if __name__ == "__main__":
    main()
