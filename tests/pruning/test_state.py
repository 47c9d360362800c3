"""A run that is cut off, at any moment, goes on from its last whole block and ends as if it had not been."""

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
    """The model after pruning with a state in ``folder``, and its reports without times."""
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
    """Stands for anything that ends a process."""


def cut_after(number: int):
    def cut(_step, report):
        if report.name.split(".")[2] == str(number):  # model.layers.1.…, transformer.h.1.…
            raise Cut

    return cut


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("resume", ["activations", "recompute"])
def test_a_run_goes_on_after_any_block(tmp_path, resume, family):
    expected = prune(tmp_path / "whole", resume, family)
    for after in (1, 2, 3):  # whole blocks
        folder = tmp_path / f"{after}"
        with pytest.raises(Cut):
            prune(folder, resume, family, on_layer=cut_after(after - 1))  # told of a block when it is kept
        assert json.loads((folder / "state.json").read_text())["progress"]["blocks"] == after
        told = []
        assert_equal(prune(folder, resume, family, on_layer=lambda step, _, to=told: to.append(step)), expected)
        assert told == list(range(len(expected[1])))  # trackers hear of every layer


def stopping_after(number: int, monkeypatch) -> list[int]:
    """From here on a signal comes while the ``number``-th group of layers is solved; what is answered has one entry a group."""
    solved, real = [], prune_layers

    def counted(*arguments, **options):
        solved.append(1)
        if len(solved) == number:
            interruption._stop.signal = "SIGTERM"
        return real(*arguments, **options)

    monkeypatch.setattr(planning, "prune_layers", counted)
    return solved


@pytest.mark.parametrize(("sequential", "groups"), [(False, (1, 2, 4, 7, 11)), (True, (2, 8))])
def test_a_run_that_is_told_to_stop_keeps_the_layers_of_its_block(tmp_path, sequential, groups, monkeypatch):
    expected = prune(tmp_path / "whole", true_sequential=sequential)
    for stop_at in groups:  # of layers with the same input, four a block
        folder = tmp_path / f"{stop_at}"
        solved = stopping_after(stop_at, monkeypatch)
        with pytest.raises(Interrupted):
            prune(folder, true_sequential=sequential)
        interruption._stop.signal = None
        assert len(solved) == stop_at
        assert_equal(prune(folder, true_sequential=sequential), expected)
        assert len(solved) == 12  # no group was solved twice


def test_a_state_of_something_else_is_refused_with_the_difference(tmp_path):
    prune(tmp_path)
    RunState(tmp_path, FINGERPRINT)
    with pytest.raises(RoseExpError, match=r"3 blocks of a run that would end differently: code: a, now b; delete .* anew"):
        RunState(tmp_path, FINGERPRINT | {"code": "b"})
    with pytest.raises(RoseExpError, match=r"settings.seed: 0, now 1"):
        RunState(tmp_path, {"settings": {"seed": 1}, "code": "a"})


def test_a_disk_that_refuses_leaves_the_last_good_state(tmp_path):
    expected = prune(tmp_path / "whole")
    folder = tmp_path / "full"
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_up(_step, report):
        if ".0." in report.name:  # the first block is kept: now no file may grow over a few bytes
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limit[1]))

    try:
        with pytest.raises(RoseExpError, match=r"cannot write the run's state: .*; 1 whole blocks are kept in"):
            prune(folder, on_layer=fill_up)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]  # nothing half-written
    assert_equal(prune(folder), expected)


def _killed(folder: Path, delay: float | None, at_rename: int | None) -> None:
    """In a process of its own: prune, and be killed after a time, or around a file's taking its place."""
    if at_rename is not None:
        seen, real = [], os.replace

        def replace(*arguments):
            seen.append(1)
            if at_rename % 2 and len(seen) == (at_rename + 1) // 2:
                os.kill(os.getpid(), signal.SIGKILL)  # before it
            real(*arguments)
            if not at_rename % 2 and len(seen) == at_rename // 2:
                os.kill(os.getpid(), signal.SIGKILL)  # after it

        os.replace = replace
    else:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # not handled, it ends a process as SIGKILL does
        signal.setitimer(signal.ITIMER_REAL, delay)
    prune(folder)


def in_child(folder: Path, delay: float | None = None, at_rename: int | None = None) -> bool:
    """Whether the process came to its end. It is forked from one that has used no threads, which do not survive a fork."""
    child = PROCESSES.Process(target=_killed, args=(folder, delay, at_rename))
    child.start()
    child.join()
    assert child.exitcode in (0, -signal.SIGKILL if at_rename is not None else -signal.SIGALRM)
    return child.exitcode == 0


def test_killed_around_every_write(tmp_path):
    expected = prune(tmp_path / "whole")
    for moment in (1, 2, 3, 4, 5, 6, 11, 16):  # before and after each of eight files takes its place in a whole run
        folder = tmp_path / f"{moment}"
        assert not in_child(folder, at_rename=moment), moment
        assert_equal(prune(folder), expected)


def test_killed_at_many_random_moments(tmp_path):
    expected = prune(tmp_path / "warm")
    start = time.perf_counter()
    prune(tmp_path / "timed")
    whole = time.perf_counter() - start
    generator, folder, kills = random.Random(0), tmp_path / "killed", 0
    for number in range(40):
        if in_child(folder, delay=generator.uniform(0.01, 1.0) * whole):
            folder = tmp_path / f"killed-{number}"  # it came to its end: another run
            continue
        kills += 1
        if kills % 5 == 0:  # what is there by now goes on to the right end
            assert_equal(prune(folder), expected)
            folder = tmp_path / f"killed-{number}"
    assert kills >= 15
    assert_equal(prune(folder), expected)


def test_blocks_on_disk_end_as_blocks_in_memory(tmp_path):
    """Pruned a block at a time, cut off in between, and gone on with."""
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
def test_every_signal_that_announces_the_end_is_handled(name):
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


def test_a_signal_is_noted_and_a_second_one_of_a_person_is_not_waited_for():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
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


def test_a_handler_that_is_there_already_is_left():
    def own(*_):
        """As submitit's, which puts the job back in the queue."""

    before = signal.signal(signal.SIGUSR2, own)
    try:
        with interruption.handle_signals():
            assert signal.getsignal(signal.SIGUSR2) is own
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_numbers_that_overflow_stop_the_run_by_name():
    model = build("llama").half()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(3e4)
    with pytest.raises(RoseExpError, match=r"model.layers.1.*(infin|finite)"):
        prune_model(model, tokens(), plan())


def test_a_pruned_block_that_returns_infinity_stops_the_run(monkeypatch):
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
