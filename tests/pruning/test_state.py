"""A run interrupted at any time resumes from its last complete block and gives identical results."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import signal
import time
from pathlib import Path

import pytest
import torch

from rose_exp.engine import Ordering, SparseGPT, Unstructured, prune_layers
from rose_exp.models import open_model
from rose_exp.pruning import OnDisk, PassSeconds, PruneContext, PruningPlan, RunState, prune_model
from rose_exp.pruning import plan as planning
from rose_exp.pruning.calls import BlockCall
from rose_exp.runtime import signals as interruption
from rose_exp.runtime.errors import RoseExpError
from rose_exp.runtime.signals import Interrupted
from rose_exp.settings.schema import ModelSettings

from ..models.families import build, tokens

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["rose_exp.pruning", "tests.models.families"])
FINGERPRINT = {"settings": {"seed": 0}, "code": "a"}


def plan(**options) -> PruningPlan:
    return PruningPlan(SparseGPT(), Unstructured(0.5), ordering=Ordering.rose(), **({"block_size": 16, "batch": 2} | options))


def prune(folder: Path, resume: str = "activations", family: str = "llama", on_layer=None, **options):
    """Prune with a state in ``folder``; return the weights and the reports without times."""
    model = build(family)
    state = RunState(folder, FINGERPRINT, resume)
    reports = prune_model(model, tokens(), plan(**options), PruneContext(state=state, seconds=PassSeconds(), on_layer=on_layer))
    return {name: value.clone() for name, value in model.state_dict().items()}, untimed(reports)


def untimed(reports) -> list[dict]:
    return [{k: v for k, v in report.as_dict().items() if k != "seconds"} for report in reports]


def assert_equal(found, expected) -> None:
    assert found[1] == expected[1]
    for name, value in expected[0].items():
        assert torch.equal(found[0][name], value), name


class Cut(Exception):
    """Simulates the end of the process."""


def cut_after(number: int):
    def cut(_step, report):
        if report.name.split(".")[2] == str(number):  # model.layers.1.…, transformer.h.1.…
            raise Cut

    return cut


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("resume", ["activations", "recompute"])
def test_resuming_after_any_block_gives_identical_weights(tmp_path, resume, family):
    expected = prune(tmp_path / "whole", resume, family)
    for after in (1, 2, 3):  # complete blocks
        folder = tmp_path / f"{after}"
        with pytest.raises(Cut):
            prune(folder, resume, family, on_layer=cut_after(after - 1))  # called after the block is saved
        assert json.loads((folder / "state.json").read_text())["progress"]["blocks"] == after
        steps = []
        assert_equal(prune(folder, resume, family, on_layer=lambda step, _, to=steps: to.append(step)), expected)
        assert steps == list(range(len(expected[1])))  # trackers receive every layer


def stopping_after(number: int, monkeypatch) -> list[int]:
    """Simulate a signal while the ``number``-th group of layers is solved; return a list with one entry per solved group."""
    solved, real = [], prune_layers

    def counted(*arguments, **options):
        solved.append(1)
        if len(solved) == number:
            interruption._stop.signal = "SIGTERM"
        return real(*arguments, **options)

    monkeypatch.setattr(planning, "prune_layers", counted)
    return solved


@pytest.mark.parametrize(("sequential", "groups"), [(False, (1, 2, 4, 7, 11)), (True, (2, 8))])
def test_interrupted_run_saves_the_solved_layers_of_its_block(tmp_path, sequential, groups, monkeypatch):
    expected = prune(tmp_path / "whole", true_sequential=sequential)
    for stop_at in groups:  # groups of layers with the same input, four per block
        folder = tmp_path / f"{stop_at}"
        solved = stopping_after(stop_at, monkeypatch)
        with pytest.raises(Interrupted):
            prune(folder, true_sequential=sequential)
        interruption._stop.signal = None
        assert len(solved) == stop_at
        assert_equal(prune(folder, true_sequential=sequential), expected)
        assert len(solved) == 12  # no group was solved twice


def test_state_of_another_run_raises_an_error_with_the_differences(tmp_path):
    prune(tmp_path)
    RunState(tmp_path, FINGERPRINT)
    with pytest.raises(RoseExpError, match=r"of a run with another result: code: a, now b; delete .* anew"):
        RunState(tmp_path, FINGERPRINT | {"code": "b"})
    with pytest.raises(RoseExpError, match=r"settings.seed: 0, now 1"):
        RunState(tmp_path, {"settings": {"seed": 1}, "code": "a"})


def test_failed_write_keeps_the_last_valid_state(tmp_path):
    expected = prune(tmp_path / "whole")
    folder = tmp_path / "full"
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_up(_step, report):
        if ".0." in report.name:  # the first block is saved: limit the size of all later files
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limit[1]))

    try:
        with pytest.raises(RoseExpError, match=r"cannot write the run's state: .*; 1 whole blocks are kept in"):
            prune(folder, on_layer=fill_up)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]  # no partially written file
    assert_equal(prune(folder), expected)


def _killed(folder: Path, delay: float | None, at_rename: int | None) -> None:
    """Prune in a child process that is killed after a delay, or before or after a file is renamed."""
    if at_rename is not None:
        seen, real = [], os.replace

        def replace(*arguments):
            seen.append(1)
            if at_rename % 2 and len(seen) == (at_rename + 1) // 2:
                os.kill(os.getpid(), signal.SIGKILL)  # before the rename
            real(*arguments)
            if not at_rename % 2 and len(seen) == at_rename // 2:
                os.kill(os.getpid(), signal.SIGKILL)  # after the rename

        os.replace = replace
    else:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # without a handler, it ends the process like SIGKILL
        signal.setitimer(signal.ITIMER_REAL, delay)
    prune(folder)


def in_child(folder: Path, delay: float | None = None, at_rename: int | None = None) -> bool:
    """Return whether the process finished. It is forked from a process without threads, which do not survive a fork."""
    child = PROCESSES.Process(target=_killed, args=(folder, delay, at_rename))
    child.start()
    child.join()
    assert child.exitcode in (0, -signal.SIGKILL if at_rename is not None else -signal.SIGALRM)
    return child.exitcode == 0


def test_run_killed_around_a_write_can_be_resumed(tmp_path):
    expected = prune(tmp_path / "whole")
    for moment in (1, 2, 3, 4, 5, 6, 11, 16):  # before or after one of the eight renames of a complete run
        folder = tmp_path / f"{moment}"
        assert not in_child(folder, at_rename=moment), moment
        assert_equal(prune(folder), expected)


def test_run_killed_at_random_times_can_be_resumed(tmp_path):
    expected = prune(tmp_path / "warm")
    start = time.perf_counter()
    prune(tmp_path / "timed")
    whole = time.perf_counter() - start
    generator, folder, kills = random.Random(0), tmp_path / "killed", 0
    for number in range(40):
        if in_child(folder, delay=generator.uniform(0.01, 1.0) * whole):
            folder = tmp_path / f"killed-{number}"  # it finished: start another run
            continue
        kills += 1
        if kills % 5 == 0:  # the state so far can be resumed
            assert_equal(prune(folder), expected)
            folder = tmp_path / f"killed-{number}"
    assert kills >= 15
    assert_equal(prune(folder), expected)


def test_blocks_on_disk_give_the_same_results_as_blocks_in_memory(tmp_path):
    """Prunes one block at a time, is interrupted once and resumes."""
    build("llama").save_pretrained(tmp_path / "dense", max_shard_size="40KB")
    expected = prune(tmp_path / "whole")
    settings = ModelSettings(path=str(tmp_path / "dense"))

    def once(on_layer=None):
        loaded, streamed = open_model(settings)
        state = RunState(tmp_path / "state", FINGERPRINT)
        weights = OnDisk(streamed, state.block)
        return weights, prune_model(
            loaded.model, tokens(), plan(), PruneContext(state=state, weights=weights, on_layer=on_layer)
        )

    with pytest.raises(Cut):
        once(cut_after(1))
    weights, reports = once()
    assert untimed(reports) == expected[1]
    for index in range(3):
        with weights.at(index, "cpu") as held:
            for name, value in held.state_dict().items():
                assert torch.equal(value, expected[0][f"model.layers.{index}.{name}"]), name


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGXCPU"])  # schedulers send the last three
def test_termination_signals_are_handled(name):
    number = getattr(signal, name)
    default = signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL
    before = signal.signal(number, default)
    try:
        with interruption.handle_signals():
            assert signal.getsignal(number) is not default
            signal.raise_signal(number)
            with pytest.raises(Interrupted, match=name):
                interruption.check()
        assert signal.getsignal(number) is default
    finally:
        signal.signal(number, before)


def test_first_signal_requests_a_stop_and_second_sigint_raises():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore it
    try:
        with interruption.handle_signals():
            assert not interruption.stop_requested()
            os.kill(os.getpid(), signal.SIGTERM)
            assert interruption.stop_requested()
            with pytest.raises(Interrupted, match="SIGTERM"):
                interruption.check()
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert not interruption.stop_requested()
    finally:
        signal.signal(signal.SIGINT, before)


def test_existing_signal_handler_is_kept():
    def own(*_):
        """Simulates the handler of submitit, which requeues the job."""

    before = signal.signal(signal.SIGUSR2, own)
    try:
        with interruption.handle_signals():
            assert signal.getsignal(signal.SIGUSR2) is own
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_overflow_raises_an_error_that_names_the_block():
    model = build("llama").half()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(3e4)
    with pytest.raises(RoseExpError, match=r"model.layers.1.*(infin|finite)"):
        prune_model(model, tokens(), plan())


def test_infinite_output_of_a_pruned_block_raises_an_error(monkeypatch):
    real, calls = BlockCall.run, []

    def run(self, block, hidden):
        answer = real(self, block, hidden)  # does not return while moments are collected
        calls.append(1)
        return answer * float("inf")

    monkeypatch.setattr(BlockCall, "run", run)
    with pytest.raises(
        RoseExpError, match=r"model.layers.0: expected finite outputs with pruned weights, got NaN or infinity in"
    ):
        prune_model(build("llama"), tokens(), plan())
    assert len(calls) == len(tokens())
