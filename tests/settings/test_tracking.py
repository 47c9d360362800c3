"""Settings that trackers would reject only when a run starts."""

from __future__ import annotations

import pytest

from rose_exp.cli.command import check_command
from rose_exp.runtime.errors import SettingsError

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
        (f"tracking.name={'x' * 129}", f"tracking.name: expected 1 to 128 characters, got '{'x' * 20}…' with 129 characters"),
        (f"tracking.group={'x' * 129}", "tracking.group: expected 1 to 128 characters, got"),
        ("tracking.job_type=''", "tracking.job_type: expected 1 to 128 characters, got '' with 0 characters"),
        ("tracking.entity=' '", "tracking.entity: expected 1 to 128 characters, got ' ' with 1 characters"),
        ("tracking.project=''", "tracking.project: expected 1 to 128 characters, got"),
        ("tracking.project=a/b", "tracking.project: expected a name without / \\ # ? % :, got 'a/b'"),
    ],
)
def test_names_that_wandb_rejects_are_errors_before_the_run(override, expected):
    with pytest.raises(SettingsError) as error:
        check_command(["tracking=wandb", override])
    (problem,) = error.value.problems
    assert problem.startswith(expected)
    check_command(["tracking=wandb", "tracking.mode=disabled", override])


def test_long_tags_are_allowed_without_wandb():
    for tracking in ("none", "csv", "tensorboard"):
        check_command([f"tracking={tracking}", f"tags=[{'x' * 65}]"])


def test_tags_at_the_limits_are_allowed():
    check_command(["tracking=wandb", f"tags=[a,{'x' * 64},{TOKEN}]", f"tracking.project={'x' * 128}"])


def test_errors_of_secret_settings_do_not_contain_the_value():
    with pytest.raises(SettingsError) as error:
        check_command(["+my.password=hunter2", "+tracking.api_key=abc", f"+x={TOKEN}"])
    assert not any(secret in str(error.value) for secret in ("hunter2", "abc", TOKEN))
