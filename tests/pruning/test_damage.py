"""Damaged state files give a warning and the result of an uninterrupted run, or a clear error."""

from __future__ import annotations

import json
import logging
import random
import shutil
import textwrap
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import rose_exp
from rose_exp.engine import Allocation, Target
from rose_exp.models import open_model
from rose_exp.pruning import OnDisk, PassSeconds, PruneContext, RunState, prune_model
from rose_exp.pruning.progress import sealed
from rose_exp.runtime import signals as interruption
from rose_exp.runtime.errors import RoseExpError
from rose_exp.runtime.ranks import Ranks
from rose_exp.runtime.signals import Interrupted
from rose_exp.settings.schema import ModelSettings

from ..conftest import REPOSITORY
from ..diffusion import pipelines
from ..models.families import build, tokens
from ..runtime.test_ranks import two_ranks
from ..runtime.test_signals import untimed as untimed_record
from . import test_state
from .test_state import FINGERPRINT, Cut, cut_after, plan, stopping_after, untimed

FLIPS = 5  # single-bit flips per file
Outcome = tuple[dict[str, torch.Tensor], list[dict]]


@dataclass(frozen=True)
class Kind:
    """A kind of run.

    Attributes:
        run: prunes with a state in a folder, to the end or until ``cut`` interrupts it.
        cut: options that interrupt it.
        resume: value of ``pipeline.resume``.
        files: names of the files of its state after the interruption, besides ``state.json``.
    """

    run: Callable[..., Outcome]
    cut: dict[str, Any]
    resume: str
    files: tuple[str, ...]


def language(resume: str = "activations", **options) -> Callable[..., Outcome]:
    return lambda folder, on_layer=None: test_state.prune(folder, resume, on_layer=on_layer, **options)


def from_disk(folder: Path, on_layer=None) -> Outcome:
    dense = folder.parent / "dense"
    if not dense.exists():
        build("llama").save_pretrained(dense)
    loaded, streamed = open_model(ModelSettings(path=str(dense)))
    of_run = RunState(folder, FINGERPRINT)
    weights = OnDisk(streamed, of_run.block)
    reports = prune_model(
        loaded.model, tokens(), plan(), PruneContext(state=of_run, weights=weights, on_layer=on_layer, seconds=PassSeconds())
    )
    found = {}
    for index in range(3):
        with weights.at(index, "cpu") as block:
            found |= {f"{index}.{name}": value.clone() for name, value in block.state_dict().items()}
    return found, untimed(reports)


def of_diffusion(folder: Path, on_layer=None) -> Outcome:
    options = {} if on_layer is None else {"on_layer": on_layer}
    of = pipelines.sampler("sd3", steps=1)
    pruner = pipelines.pruner_of("sd3", count=3, of=of, state=RunState(folder, FINGERPRINT, "recompute"), **options)
    reports = pruner.run()
    return {name: layer.weight.clone() for name, layer in pruner.layers.items()}, untimed(reports)


def cut_third_package() -> Callable:
    def cut(number, _report):
        if number >= 20:  # 40 layers in three packages, of which two are saved
            raise Cut

    return cut


BLOCKS = ("block-00000.safetensors", "block-00001.safetensors")
STREAMS = ("activations-00002.0.bin", "dense-00002.0.bin")
SHARED = {"target": Target(0.6, 0.4), "allocation": Allocation("losses", 0.15)}
KINDS = {
    "activations": Kind(language(), {"on_layer": cut_after(1)}, "activations", (*BLOCKS, STREAMS[0])),
    "two streams": Kind(language(**SHARED), {"on_layer": cut_after(1)}, "activations", BLOCKS + STREAMS),
    "recompute": Kind(language("recompute", target=SHARED["target"]), {"on_layer": cut_after(1)}, "recompute", BLOCKS),
    "disk": Kind(from_disk, {"on_layer": cut_after(1)}, "activations", (*BLOCKS, STREAMS[0])),
    "part": Kind(language(), {"stop": 10}, "activations", (*BLOCKS, STREAMS[0], "part-00002.safetensors")),
    "diffusion": Kind(of_diffusion, {"on_layer": cut_third_package()}, "recompute", BLOCKS),
}


@pytest.fixture(scope="module", params=sorted(KINDS))
def stopped(request, tmp_path_factory) -> tuple[Kind, Path, Outcome]:
    """Return a kind of run, the state of an interrupted run and the outcome of an uninterrupted one."""
    kind, folder = KINDS[request.param], tmp_path_factory.mktemp("run")
    expected = kind.run(folder / "whole")
    with pytest.MonkeyPatch.context() as patch:
        if "stop" in kind.cut:
            stopping_after(kind.cut["stop"], patch)
        with pytest.raises((Cut, Interrupted)):
            kind.run(folder / "stopped", **{name: value for name, value in kind.cut.items() if name != "stop"})
        interruption._stop.signal = None
    return kind, folder / "stopped", expected


def flip(file: Path, position: int) -> None:
    """Flip one bit."""
    data = bytearray(file.read_bytes())
    data[position // 8] ^= 1 << position % 8
    file.write_bytes(data)


def damages(folder: Path) -> list[tuple[str, str, Callable[[Path], None]]]:
    """Return damages to the files of a state as file name, description and function, with fixed seeds."""
    found = []
    for file in sorted(folder.iterdir()):
        name, size = file.name, file.stat().st_size
        generator = random.Random(name)
        positions = [generator.randrange(8 * size) for _ in range(FLIPS)]
        found += [(name, f"bit {p}", lambda to, name=name, p=p: flip(to / name, p)) for p in [0, 8 * size - 1, *positions]]
        for left in (0, generator.randrange(1, size), size - 1):
            found.append((name, f"cut to {left}", lambda to, name=name, left=left: _truncate(to / name, left)))
        found.append((name, "longer", lambda to, name=name: _append(to / name)))
        found.append((name, "deleted", lambda to, name=name: (to / name).unlink()))
    found.append((BLOCKS[0], "swapped", lambda to: _swap(to / BLOCKS[0], to / BLOCKS[1])))
    return found


def _truncate(file: Path, left: int) -> None:
    file.write_bytes(file.read_bytes()[:left])


def _append(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")


def _swap(one: Path, other: Path) -> None:
    first = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(first)


def assert_equal(found: Outcome, expected: Outcome) -> None:
    assert found[1] == expected[1]
    assert found[0].keys() == expected[0].keys()
    for name, value in expected[0].items():
        assert torch.equal(found[0][name], value), name


def opened(folder: Path, kind: Kind, name: str, caplog) -> RunState | None:
    """Return the damaged state, or None if loading it fails; a warning or the error names the file."""
    caplog.clear()
    found, error_message = None, ""
    with caplog.at_level(logging.WARNING):
        try:
            found = RunState(folder, FINGERPRINT, kind.resume)
        except RoseExpError as error:
            error_message = str(error)
    assert any(name in message for message in (*caplog.messages, error_message))
    assert found is not None or f"delete {folder} to begin anew" in error_message
    return found


def damaged_copy(folder: Path, to: Path, damage: Callable[[Path], None]) -> Path:
    shutil.copytree(folder, to)
    damage(to)
    return to


def test_damage_is_detected_and_gives_identical_results(stopped, tmp_path, caplog):
    kind, folder, expected = stopped
    assert {file.name for file in folder.iterdir()} == {*kind.files, "state.json"}
    whole, seen = RunState(folder, FINGERPRINT, kind.resume), {}
    for number, (name, what, damage) in enumerate(damages(folder)):
        copy = damaged_copy(folder, tmp_path / f"{number}", damage)
        found = opened(copy, kind, name, caplog)
        if name == "state.json":
            assert (found is None) == (what != "deleted"), what
        else:
            assert found.progress.files.items() < whole.progress.files.items(), (name, what)
            assert name not in found.progress.files
        if found is not None:
            seen.setdefault(json.dumps(vars(found.progress)), (copy, name, what))
    for copy, name, what in seen.values():  # the outcome depends only on the restored progress, so each is run once
        print(name, what)
        assert_equal(kind.run(copy), expected)


@pytest.mark.slow
def test_every_damage_is_detected_and_gives_identical_results(stopped, tmp_path, caplog):
    kind, folder, expected = stopped
    for number, (name, what, damage) in enumerate(damages(folder)):
        copy = damaged_copy(folder, tmp_path / f"{number}", damage)
        if opened(copy, kind, name, caplog) is not None:
            print(name, what)
            assert_equal(kind.run(copy), expected)
        shutil.rmtree(copy)


def test_restored_state_is_consistent(tmp_path, caplog):
    """Reports, times and generators are those of the last restored block."""
    seconds = []

    def note(_step, report):
        seconds.append(json.loads((tmp_path / "state.json").read_text())["progress"]["after"][-1]["seconds"])
        if ".2." in report.name:
            raise Cut

    with pytest.raises(Cut):
        test_state.prune(tmp_path, on_layer=note)
    whole = RunState(tmp_path, FINGERPRINT)
    assert whole.progress.blocks == 3
    assert whole.progress.seconds == seconds[-1]
    flip(tmp_path / BLOCKS[1], 12345)
    found = opened(tmp_path, KINDS["activations"], BLOCKS[1], caplog)
    assert "1 whole blocks are kept" in caplog.text
    assert [report.name.split(".")[2] for report in found.reports] == ["0"] * 7
    assert found.progress.seconds == seconds[0]
    assert found.progress.generators == whole.progress.generators  # nothing draws from torch's global generator
    assert found.block(0) is not None
    assert found.block(1) is None
    assert found.part() == ([], {})


def test_generator_states_are_saved_after_each_block(tmp_path):
    kept, block, run = [], torch.nn.Linear(2, 2).requires_grad_(False), RunState(tmp_path, FINGERPRINT)
    for index in range(3):
        if index != 1:
            torch.rand(3)
        kept.append(torch.get_rng_state())
        run.commit(index, block, [], [], {})
    assert torch.equal(kept[0], kept[1])
    for left in (3, 2, 1):
        torch.manual_seed(5)
        found = RunState(tmp_path, FINGERPRINT)
        assert found.progress.blocks == left
        found.restore_generators()
        assert torch.equal(torch.get_rng_state(), kept[left - 1])
        flip(tmp_path / f"block-{left - 1:05}.safetensors", 5)


def test_damage_during_the_run_raises_an_error(tmp_path):
    found = RunState(tmp_path, FINGERPRINT)
    found.commit(0, torch.nn.Linear(8, 8).requires_grad_(False), [], [], {})
    flip(tmp_path / BLOCKS[0], 8 * (tmp_path / BLOCKS[0]).stat().st_size - 3)
    with pytest.raises(RoseExpError, match=r"block-00000.safetensors is damaged: .* SHA-256; start the run again"):
        found.block(0)


def test_state_of_another_format_raises_an_error(tmp_path):
    RunState(tmp_path, FINGERPRINT).keep_shares({})
    file = tmp_path / "state.json"
    content = json.loads(file.read_text())
    older = {"fingerprint": FINGERPRINT, "progress": {"blocks": 1, "files": {"block-00000.safetensors": 12}}}
    file.write_text(json.dumps(older, indent=1))
    with pytest.raises(RoseExpError, match=r"state.json: expected a state of format 2, got one of an older version; delete"):
        RunState(tmp_path, FINGERPRINT)
    del content["sha256"]
    file.write_text(sealed(content | {"format": 3}))
    with pytest.raises(RoseExpError, match=r"state.json: expected a state of format 2, got 3; delete"):
        RunState(tmp_path, FINGERPRINT)
    file.write_text("[]")
    with pytest.raises(RoseExpError, match=r"state.json is damaged"):
        RunState(tmp_path, FINGERPRINT)


class ThreadRank(Ranks):
    """A rank that runs in a thread of this process."""

    def __init__(self, rank: int, answers: list, barrier: threading.Barrier):
        self.rank, self.size, self.answers, self.barrier = rank, len(answers), answers, barrier

    def gather(self, value: Any) -> list[Any]:
        self.answers[self.rank] = value
        self.barrier.wait(timeout=20)
        found = list(self.answers)
        self.barrier.wait(timeout=20)
        return found


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("activations-00001.0.bin", [BLOCKS[0]]),
        ("activations-00001.1.bin", [BLOCKS[0]]),
        (BLOCKS[0], []),
        ("state.json", None),
        (None, [BLOCKS[0], "activations-00001.0.bin", "activations-00001.1.bin"]),
    ],
)
def test_all_ranks_restore_the_same_state(tmp_path, name, files):
    def on_ranks(act: Callable[[Ranks], Any]) -> list[Any]:
        answers, barrier, found = [None] * 2, threading.Barrier(2), [None] * 2

        def run(rank: int) -> None:
            try:
                found[rank] = act(ThreadRank(rank, answers, barrier))
            except RoseExpError as error:
                found[rank] = str(error)

        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=30)
        return found

    class Stream:
        def __init__(self, rank: int):
            self.rank = rank

        def write(self, file: str) -> None:
            Path(file).write_bytes(bytes([self.rank]) * 100)

    def start(ranks: Ranks) -> None:
        found = RunState(tmp_path, FINGERPRINT, ranks=ranks)
        found.commit(0, torch.nn.Linear(4, 4).requires_grad_(False), [Stream(ranks.rank)], [], {})

    on_ranks(start)
    if name is not None:
        flip(tmp_path / name, 77)
    found = on_ranks(lambda ranks: sorted(RunState(tmp_path, FINGERPRINT, ranks=ranks).progress.files))
    assert found[0] == found[1]
    assert found[0] == sorted(files) if files is not None else "state.json is damaged" in found[0]
    other = {0: FINGERPRINT, 1: FINGERPRINT | {"code": "b"}}
    if name != "state.json":
        errors = on_ranks(lambda ranks: RunState(tmp_path, other[ranks.rank], ranks=ranks))
        assert errors[0] == errors[1]
        assert "code: a, now b" in errors[0]


@pytest.mark.slow
def test_two_processes_give_identical_results_after_damage(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(f"""
        import sys; sys.path.insert(0, {str(REPOSITORY)!r})
        from tests.pruning.test_damage import *
        from rose_exp.runtime.ranks import process_group

        def run(folder, on_layer=None):
            model, ranks, of_run = build("llama"), Ranks(), plan(target=Target(0.5, 0.5))
            kept = RunState(folder, FINGERPRINT, ranks=ranks)
            reports = prune_model(model, tokens(), of_run, PruneContext(ranks=ranks, state=kept, on_layer=on_layer))
            return {{name: value.clone() for name, value in model.state_dict().items()}}, untimed(reports)

        with process_group():
            folder, ranks = Path(sys.argv[1]), Ranks()
            expected = run(folder / "whole")
            for name in (*BLOCKS, "activations-00002.1.bin", "dense-00002.0.bin"):
                with pytest.raises(Cut):
                    run(folder / name, cut_after(1))
                with ranks.first_rank_first():
                    if ranks.first:
                        flip(folder / name / name, 4001)
                assert_equal(run(folder / name), expected)
        """)
    )
    done = two_ranks(str(script), str(tmp_path))
    assert done.returncode == 0, done.stderr


def test_resuming_from_a_damaged_state_gives_the_same_record(small, tmp_path, monkeypatch, caplog):
    overrides = [*small, "calibration.samples=2", "evaluation.perplexity.local.windows=2", "figures.draw=false"]
    whole = rose_exp.run(overrides, tmp_path / "whole")
    real = RunState.commit

    def commit(self, index, *others):
        real(self, index, *others)
        if index == 2:
            raise Interrupted("stop requested")

    with monkeypatch.context() as patch:
        patch.setattr(RunState, "commit", commit)
        with pytest.raises(Interrupted):
            rose_exp.run(overrides, tmp_path / "cut")
    flip(tmp_path / "cut" / whole["run_id"] / "state" / BLOCKS[1], 100_001)
    again = rose_exp.run([*overrides, "pipeline.weights=disk"], tmp_path / "cut")
    assert again["resumed"] == 1
    assert {name: again[name] for name in ("metrics", "events")} == {name: whole[name] for name in ("metrics", "events")}
    assert untimed_record(again)["layers"] == untimed_record(whole)["layers"]
    assert f"{BLOCKS[1]} is damaged: its content does not match its SHA-256; 1 whole blocks are kept" in caplog.text
