"""Writing files whole or not at all, wherever a process is killed, and removal of what killed processes leave behind."""

from __future__ import annotations

import ast
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rose_exp.runtime.errors import RoseExpError
from rose_exp.runtime.files import PREFIX, left_behind, remove, remove_left_behind, scratch_folder, write_text, written

PACKAGE = Path(sys.modules["rose_exp"].__file__).parent
EVENTS = ("open", "os.", "shutil.", "tempfile.", "fcntl.")


def killed_at(event: int, act: Callable[[], object]) -> bool:
    """Run ``act`` in a child process that is killed before its file operation number ``event``; return whether it was."""
    child = os.fork()
    if child == 0:
        count = 0

        def watch(name: str, _arguments: tuple) -> None:
            nonlocal count
            if name.startswith(EVENTS) and not name.startswith("os.fork"):
                count += 1
                if count == event:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        act()
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0


def tree(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def write_model(folder: Path) -> None:
    with written(folder / "model") as place:
        place.mkdir()
        (place / "a").write_text("new a")
        (place / "b").write_text("new b")


OLD = {"run.json": "old", "user.txt": "kept", "state/part": "old"}
MODEL = {"model/a": "new a", "model/b": "new b"}
ACTS = {
    "replaced file": (lambda folder: write_text(folder / "run.json", "new"), [OLD, OLD | {"run.json": "new"}]),
    "new folder": (write_model, [OLD, OLD | MODEL]),
    "removed folder": (lambda folder: remove(folder / "state"), [OLD, {k: v for k, v in OLD.items() if "/" not in k}]),
}


@pytest.mark.parametrize("name", ACTS)
def test_kill_at_any_moment_leaves_the_old_or_the_new_files(name, tmp_path):
    act, allowed = ACTS[name]
    event, seen = 0, []
    while True:
        event += 1
        folder = tmp_path / str(event)
        for path, text in OLD.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text)
        killed = killed_at(event, lambda folder=folder: act(folder))
        with scratch_folder(folder):  # removes what the child left behind
            assert len([path for path in folder.iterdir() if path.name.startswith(PREFIX)]) == 1
        found = tree(folder)
        assert found in allowed, event
        seen.append(found)
        if not killed:
            break
    assert event > 10
    assert found == allowed[1]
    assert all(state in seen for state in allowed)


def test_scratch_folders_of_live_processes_are_not_removed(tmp_path):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        with scratch_folder(tmp_path) as folder:
            (folder / "data").write_text("in use")
            os.write(writer, b"x")
            signal.pause()
    os.read(reader, 1)
    try:
        assert left_behind(tmp_path) == []
        with scratch_folder(tmp_path):
            pass
        (folder,) = [path for path in tmp_path.iterdir() if path.name.startswith(PREFIX)]
        remove_left_behind(folder)
        assert (folder / "data").read_text() == "in use"
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert left_behind(tmp_path) == [folder]
    with scratch_folder(tmp_path):
        assert not folder.exists()
    assert list(tmp_path.iterdir()) == []


def test_creation_and_removal_of_scratch_folders_do_not_disturb_each_other(tmp_path):
    """Several processes create scratch folders in one folder while others remove what was left behind."""
    children = []
    for number in range(4):
        child = os.fork()
        if child == 0:
            for round_ in range(25):
                with written(tmp_path / f"{number}-{round_}") as place:
                    place.write_text("whole")
            os._exit(0)
        children.append(child)
    for child in children:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert tree(tmp_path) == {f"{number}-{round_}": "whole" for number in range(4) for round_ in range(25)}


def test_failure_leaves_the_earlier_file(tmp_path):
    path = tmp_path / "run.json"
    path.write_text("old")

    def fail() -> None:
        with written(path) as place:
            place.write_text("half")
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        fail()
    assert tree(tmp_path) == {"run.json": "old"}
    blocked = tmp_path / "file"
    blocked.write_text("x")
    with pytest.raises(RoseExpError, match="cannot write"):
        write_text(blocked / "run.json", "new")


def test_links_and_files_of_users_are_not_removed(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "data").write_text("kept")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / f"{PREFIX}link").symlink_to(outside)
    (folder / f"{PREFIX}file").write_text("kept")
    (folder / ".activations-mine").mkdir()
    before = tree(tmp_path)
    with scratch_folder(folder):
        pass
    assert tree(tmp_path) == before
    assert (folder / f"{PREFIX}link").is_symlink()


WRITERS = {"mkdtemp", "mkstemp", "TemporaryDirectory", "NamedTemporaryFile", "replace", "rename", "rmtree"}
ELSEWHERE = {
    ("zero_shot.py", "rename"),  # inside scratch folders
    ("wheels.py", "replace"),
}


def test_no_other_module_creates_temporary_files_or_renames_them():
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr in WRITERS:
                module = node.value.id if isinstance(node.value, ast.Name) else None
                if module in ("os", "shutil", "tempfile") or node.attr == "rename":
                    found.add((path.name, node.attr))
    assert {name for name in found if name[0] != "files.py"} == ELSEWHERE
