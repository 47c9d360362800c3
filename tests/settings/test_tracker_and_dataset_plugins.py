"""Experiment trackers and data sets of other packages are choices and options, and are checked like the built-in ones."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from rose_exp.data import load_text
from rose_exp.data.prompts import load_prompts
from rose_exp.report.conditions import variant
from rose_exp.runs.identity import plugins_of
from rose_exp.runtime.errors import RoseExpError, SettingsError
from rose_exp.runtime.plugins import _package_sha256
from rose_exp.settings.schema import Settings
from rose_exp.settings.texts import CalibrationSettings, PromptSettings
from rose_exp.settings.tracking import TrackingSettings
from rose_exp.tracking import RunRecord, Trackers

from .packages import Points, command, installing, write_package

MODULE = """
import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge


class Log:
    def __init__(
        self, *, level: Annotated[int, Ge(0)] = 1, mode: Literal["a", "w"] = "a", place: Path = Path("log"), token=None
    ):
        self.options = (level, mode, place, token)

    def start(self, run):
        self.file = (run.folder / f"{self.options[2]}.txt").open(self.options[1])
        print("start", self.options, run.identity.name, run.tags, run.resumed, file=self.file)
        return "log-1"

    def layer(self, step, report):
        print("layer", step, report["name"], file=self.file)

    def results(self, metrics, layers):
        print("results", *metrics, len(layers), file=self.file)

    def figure(self, name, path): ...
    def keep(self, record, model): ...

    def finish(self, failed):
        self.file.close()


@dataclass
class Boxes(Log):
    size: int
    names: list[str] = field(default_factory=lambda: ["x"])


class Anything(Log):
    def __init__(self, **options): ...


class Incomplete:
    def start(self, run): ...


def stories():
    return [f"Story {number} of a series, with a few words." for number in range(400)]


def endless():
    return (str(number) for number in itertools.count())


def nothing(): ...
def one_text(): return "text"
def numbers(): return ["a", 2]
def mapping(): return {"a": "b"}
def empty(): return []
def failing(): raise KeyError("gone")


def failing_late():
    yield "a"
    raise OSError("disk")


def with_argument(split): return [split]
"""
DATASETS = ("stories", "endless", "nothing", "one_text", "numbers", "mapping", "empty", "failing", "failing_late")
POINTS = {
    "rose_exp.trackers": {"log": "my_parts:Log", "boxes": "my_parts:Boxes"},
    "rose_exp.datasets": {name: f"my_parts:{name}" for name in DATASETS},
}


def write_parts(folder: Path, points: Points = POINTS) -> None:
    write_package(folder, "my_parts", "2.0", MODULE, points)


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Install a package with entry points in this process."""
    with installing(write_parts, tmp_path, "my_parts", monkeypatch) as installed:
        yield installed


def settings_of(*overrides: str) -> Settings:
    from rose_exp.cli.command import check_command

    return check_command(list(overrides)).jobs[0].settings


@pytest.mark.slow
def test_a_run_with_a_tracker_and_a_data_set_of_a_package(small, tmp_path):
    write_parts(tmp_path)
    model = [text for text in small if text.startswith("model")]
    texts = ["calibration=stories", "evaluation=stories", *(f"{n}.window=64" for n in ("calibration", PERPLEXITY))]
    limits = ["calibration.samples=4", f"{PERPLEXITY}.windows=4", "figures.draw=false", "method=wanda"]
    options = [*model, *texts, *limits, "hydra.run.dir=out"]
    done = command(tmp_path, *options, "tracking=[csv,log]", "tracking.log.level=3")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out/run.json").read_text())
    used = record["protocol"]["plugins"]["rose_exp.datasets"]
    assert list(used) == ["stories"]
    assert used["stories"].startswith("my-parts 2.0, SHA-256 ")
    assert record["protocol"]["calibration"]["source"] == "stories of my-parts 2.0"
    assert record["metrics"]["perplexity.stories"] > 1
    assert [entry["failure"] for entry in record["tracking"]] == [None, None]
    lines = (tmp_path / "out/log.txt").read_text().splitlines()
    assert lines[0].startswith("start (3, 'a', PosixPath('log'), None)")
    assert len(lines) == len(record["layers"]) + 2
    again = command(tmp_path, *options, "tracking=[log,csv]", "tracking.log.level=3")
    assert again.returncode == 0, again.stderr
    assert len((tmp_path / "out/log.txt").read_text().splitlines()) == len(lines)  # has the results already


PERPLEXITY = "evaluation.perplexity.stories"


def test_trackers_and_data_sets_of_packages_are_listed_in_the_help(tmp_path):
    write_parts(tmp_path)
    text = command(tmp_path, "--help").stdout
    assert len(re.findall("^  stories +of my-parts 2.0$", text, re.MULTILINE)) == 2
    assert re.search("^  log +of my-parts 2.0$", text, re.MULTILINE)


def test_options_of_trackers_of_packages_are_checked(install):
    install()
    settings = settings_of("tracking=[log,boxes]", "tracking.log.level=2", "tracking.boxes.size=3")
    assert settings.tracking.others == {
        "log": {"level": 2, "mode": "a", "place": "log", "token": None},
        "boxes": {"size": 3, "names": ["x"]},
    }
    for overrides, message in {
        "tracking=log tracking.log.levl=1": "tracking.log.levl: no such setting; did you mean 'tracking.log.level'",
        "tracking=boxes": "tracking.boxes.size: expected a value, got none",
        "tracking=csv tracking.log.level=1": r"tracking.log.level: no such setting; it requires tracking=log, or .*\[a,log\]",
        "tracking=[log,logg]": "tracking: expected one of .*log.*got 'logg'; did you mean 'log'",
    }.items():
        with pytest.raises(SettingsError, match=message) as caught:
            settings_of(*overrides.split())
        assert len(caught.value.problems) == 1
    for name, options, expected in (
        ("log", {"level": -1}, "log.level: expected at least 0, got -1"),
        ("log", {"levl": 1}, "log.levl: no such setting, got 1; did you mean 'level'?"),
        ("log", {"mode": "x"}, "log.mode: expected 'a' or 'w', got 'x'"),
        ("log", 3, "log: expected a group of settings, got 3"),
        ("boxes", {}, "boxes.size: expected a value, got none"),
    ):
        (problem,) = TrackingSettings(**{name: options}).problems("tracking")
        assert problem.startswith(f"tracking.{expected}")
    (problem,) = TrackingSettings(lg={}).problems("tracking")
    assert problem.startswith(
        "tracking.lg: no such tracker; expected one of wandb, tensorboard, csv, accelerate, boxes, log; did"
    )


def test_trackers_of_packages_receive_their_options_and_keep_their_id(install, tmp_path):
    install()
    settings = settings_of("tracking=[csv,log]", "tracking.log.token=hf_" + "a1B2" * 8, "tags=[t]")
    record = RunRecord(tmp_path, {}, "ROSE", "0")
    trackers = Trackers(settings, record, tmp_path)
    entry = record.data["tracking"][-1]
    resumed = Trackers(settings, record, tmp_path, earlier=[dict(entry)])
    for opened in (trackers, resumed):
        opened.finish(failed=False)
    first, second = (tmp_path / "log.txt").read_text().splitlines()
    assert "hf_a1B2" in first  # a tracker can need a secret
    assert first.endswith("['t'] None")
    assert second.endswith("['t'] log-1")
    assert (entry["kind"], entry["id"], entry["options"]["token"]) == ("log", "log-1", "***")
    assert [place["kind"] for place in record.data["tracked"]] == ["csv", "log"]


def test_trackers_do_not_change_the_run_id(install):
    from rose_exp.cli.command import check_command

    install()
    ids = {check_command(text.split()).jobs[0].run_id for text in ("seed=0", "tracking=[log,csv] tracking.log.level=7")}
    assert len(ids) == 1


def test_run_id_depends_on_the_code_of_data_sets_that_are_used(install, tmp_path):
    from rose_exp.cli.command import check_command

    def ids() -> dict[str, str]:
        commands = ("seed=0", "calibration=stories", "evaluation=[embedded,stories]", "method=dense calibration=stories")
        return {text: check_command(text.split()).jobs[0].run_id for text in commands}

    install()
    before = ids()
    assert len(set(before.values())) == 4
    (tmp_path / "my_parts.py").write_text(MODULE + "\n# another version\n")
    _package_sha256.cache_clear()
    after = ids()
    assert [text for text in before if before[text] != after[text]] == ["calibration=stories", "evaluation=[embedded,stories]"]


def test_data_sets_of_packages_do_not_identify_rows(install):
    """The fingerprint of a text is a condition of the table."""
    from rose_exp.cli.command import check_command

    install()
    (job,) = check_command(["calibration=stories"]).jobs
    protocol = {"plugins": plugins_of(job.settings) | {"rose_exp.scores": "a 1"}}
    found = variant({"config": job.config, "protocol": protocol})
    assert [name for name in found if "plugins" in name] == ["protocol.plugins.rose_exp.scores"]


def test_documents_of_packages_are_read_like_other_texts(install):
    install()
    settings = settings_of("calibration=stories", "calibration.rows=3", "evaluation=[embedded,stories]")
    text = load_text(settings.calibration, "calibration")
    assert (len(text.documents), text.source) == (3, "stories of my-parts 2.0")
    assert set(settings.evaluation.perplexity) == {"embedded", "stories"}
    endless = CalibrationSettings(plugin="endless", rows=5, samples=1, window=8)
    assert load_text(endless, "calibration").documents == ["0", "1", "2", "3", "4"]
    assert load_prompts(PromptSettings(plugin="stories", samples=2), "calibration").texts[1].startswith("Story 1")
    with pytest.raises(
        SettingsError, match="calibration.plugin: expected one of .*stories.*got 'stores'; did you mean 'stories'"
    ):
        settings_of("calibration=stories", "calibration.plugin=stores")


@pytest.mark.parametrize(
    ("name", "message"),
    {
        "nothing": "expected a list or iterable of texts from entry point nothing of .*my-parts 2.0.*, got None",
        "one_text": "expected a list or iterable of texts .*, got str",
        "mapping": "expected a list or iterable of texts .*, got dict",
        "numbers": "expected text from .* in document 2, got 2",
        "failing": r"entry point failing of rose_exp.datasets \(my-parts 2.0\) failed: KeyError: 'gone'",
        "failing_late": "entry point failing_late .* failed: disk",
        "empty": "expected text, got none from empty of my-parts 2.0",
    }.items(),
)
def test_anything_but_text_is_one_error(install, name, message):
    install()
    settings = CalibrationSettings(plugin=name, samples=1, window=8)
    with pytest.raises(RoseExpError, match=rf"^calibration(\.plugin)?: {message}"):
        load_text(settings, "calibration")


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ({"rose_exp.trackers": {"wandb": "my_parts:Log"}}, "expected a new name, got wandb, which exists"),
        ({"rose_exp.trackers": {"none": "my_parts:Log"}}, "expected a new name, got none, which exists"),
        ({"rose_exp.trackers": {"mine": "my_parts:Incomplete"}}, "mine of .*: expected a class with the methods start, layer"),
        ({"rose_exp.trackers": {"mine": "my_parts:stories"}}, "expected a class with the methods .*, got function stories"),
        ({"rose_exp.trackers": {"mine": "my_parts:Anything"}}, r"expected keyword options, got \*\*options"),
        ({"rose_exp.datasets": {"mine": "my_parts:DATASETS"}}, "cannot load my_parts:DATASETS"),
        ({"rose_exp.datasets": {"mine": "my_parts:with_argument"}}, "without required arguments, got one with .*split"),
        (
            {"rose_exp.datasets": {"c4": "my_parts:stories"}},
            "expected a new name, got c4, which exists in the group calibration",
        ),
        ({"rose_exp.datasets": {"my-own": "my_parts:stories"}}, "expected a name of letters, digits and underscores"),
    ],
)
def test_broken_entry_points_are_one_error(install, points, message):
    install(points)
    with pytest.raises(SettingsError, match=message) as caught:
        settings_of("method=wanda")
    assert len(caught.value.problems) == 1
