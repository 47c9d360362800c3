"""Settings that trackers would reject only when a run starts."""

from __future__ import annotations

import pytest

from rose_exp.cli.command import check_command
from rose_exp.runtime.errors import SettingsError
from rose_exp.settings.tracking import TrackingSettings, WandbSettings, current

TOKEN = "github_pat_" + "a1B2c3D4e5" * 8


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            f"tags=[ok,{'x' * 65}]",
            f"tags: expected tags of 1 to 64 characters with tracking=wandb, got '{'x' * 20}…' with 65 characters",
        ),
        ("tags=['']", "tags: expected tags of 1 to 64 characters with tracking=wandb, got '' with 0 characters"),
        ("tags=['  ']", "tags: expected tags of 1 to 64 characters with tracking=wandb, got '  ' with 2 characters"),
        (
            f"tracking.wandb.name={'x' * 129}",
            f"tracking.wandb.name: expected 1 to 128 characters, got '{'x' * 20}…' with 129 characters",
        ),
        (f"tracking.wandb.group={'x' * 129}", "tracking.wandb.group: expected 1 to 128 characters, got"),
        ("tracking.wandb.job_type=''", "tracking.wandb.job_type: expected 1 to 128 characters, got '' with 0 characters"),
        ("tracking.wandb.entity=' '", "tracking.wandb.entity: expected 1 to 128 characters, got ' ' with 1 characters"),
        ("tracking.wandb.project=''", "tracking.wandb.project: expected 1 to 128 characters, got"),
        ("tracking.wandb.project=a/b", "tracking.wandb.project: expected a name without / \\ # ? % :, got 'a/b'"),
    ],
)
def test_names_that_wandb_rejects_are_errors_before_the_run(override, expected):
    with pytest.raises(SettingsError) as error:
        check_command(["tracking=wandb", override])
    (problem,) = error.value.problems
    assert problem.startswith(expected)
    check_command(["tracking=wandb", "tracking.wandb.mode=disabled", override])


def test_long_tags_are_allowed_without_wandb():
    for tracking in ("none", "csv", "tensorboard"):
        check_command([f"tracking={tracking}", f"tags=[{'x' * 65}]"])


def test_tags_at_the_limits_are_allowed():
    check_command(["tracking=wandb", f"tags=[a,{'x' * 64},{TOKEN}]", f"tracking.wandb.project={'x' * 128}"])


def test_errors_of_secret_settings_do_not_contain_the_value():
    with pytest.raises(SettingsError) as error:
        check_command(["+my.password=hunter2", "+tracking.api_key=abc", f"+x={TOKEN}"])
    assert not any(secret in str(error.value) for secret in ("hunter2", "abc", TOKEN))


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["tracking=[csv,csv]"], "tracking: expected each choice once, got [csv, csv]"),
        (["tracking=[none,csv]"], "tracking: expected none alone or trackers, got [none, csv]"),
        (
            ["tracking=[csv,wandbb]"],
            "tracking: expected one of accelerate, csv, none, tensorboard, wandb, got 'wandbb'; did you",
        ),
        (["tracking.project=x"], "tracking.project: no such setting; use tracking.wandb.project"),
        (["+tracking.kind=wandb"], "tracking.kind: no such setting; use tracking=wandb, or tracking=[csv,wandb] for several"),
        (
            ["tracking=csv", "tracking.wandb.project=x"],
            "tracking.wandb.project: no such setting; it requires tracking=wandb, or",
        ),
        (["tracking=accelerate"], "tracking.accelerate.tracker: expected a value, got none"),
        (["tracking=csv,wandb"], "tracking: expected one value, got several; add -m to run one job per value; tracking=[a,b]"),
    ],
)
def test_wrong_choices_of_trackers_are_one_error(overrides, expected):
    with pytest.raises(SettingsError) as error:
        check_command(overrides)
    (problem,) = error.value.problems
    assert problem.startswith(expected)


def test_several_trackers_have_their_own_settings():
    """The order of the list does not matter. null removes a tracker."""
    jobs = check_command(["-m", "tracking=[csv,wandb],[wandb,csv],none"]).jobs
    assert [job.settings.tracking.names for job in jobs] == [["wandb", "csv"], ["wandb", "csv"], []]
    assert len({job.run_id for job in jobs}) == 1
    (job,) = check_command(["tracking=[csv,wandb]", "tracking.wandb.project=x", "tracking.csv=null"]).jobs
    assert job.settings.tracking.names == ["wandb"]
    assert job.settings.tracking.wandb.project == "x"


def test_settings_of_wandb_have_equal_defaults_in_files():
    (job,) = check_command(["tracking=wandb"]).jobs
    assert job.config["tracking"] == {"wandb": WandbSettings().model_dump()}


@pytest.mark.parametrize(
    ("earlier", "expected"),
    [
        ({"kind": "none"}, {}),
        ({"kind": "csv"}, {"csv": {}}),
        ({"kind": "wandb", "mode": "offline", "project": "x"}, {"wandb": {"mode": "offline", "project": "x"}}),
        ({"csv": {}, "wandb": {"project": "x"}}, {"csv": {}, "wandb": {"project": "x"}}),
    ],
)
def test_trackers_in_records_of_earlier_versions(earlier, expected):
    assert current(earlier) == expected
    assert not TrackingSettings(**current(earlier)).problems("tracking")
