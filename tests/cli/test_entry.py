"""Help, shell completion, configuration display and smoke test settings."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version

import pytest

from rose_exp.cli.help import GROUPS, help_text
from rose_exp.cli.paths import config_folder

from ..conftest import REPOSITORY
from .test_app import rose_exp

SCRIPTS = os.path.dirname(sys.executable)


def test_help_describes_every_group_and_choice():
    text = help_text()
    for path in config_folder().glob("**/*.yaml"):
        group = str(path.parent.relative_to(config_folder()))
        if group == "." or path.stem.startswith("_"):
            continue
        assert f"\n{group}: {GROUPS[group]}\n" in text
        line = next(line for line in text.splitlines() if line.split()[:1] == [path.stem])
        assert len(line.split()) > 3, line  # has a description
    for setting in ("pipeline:", "seed: 0 #", "plan: false #", "rerun: false #"):
        assert setting in text


def test_version_is_that_of_this_package():
    done = subprocess.run([sys.executable, "-m", "rose_exp", "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"rose_exp {version('rose_exp')}\n")


def test_help_does_not_import_torch():
    code = (
        "import sys; sys.argv = ['', '--help']; from rose_exp.cli.entry import main; main(); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("rose-exp: one-shot pruning")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("rose-exp meth", "method="),
        ("rose-exp method=spar", "method=sparsegpt"),
        ("rose-exp engine.da", "engine.damping="),
        ("rose-exp experiment=rose_table", "experiment=rose_table3"),
    ],
)
def test_shell_completion(line, expected):
    environment = os.environ | {"COMP_LINE": line, "COMP_POINT": str(len(line)), "PATH": f"{SCRIPTS}:{os.environ['PATH']}"}
    done = subprocess.run(
        [f"{SCRIPTS}/rose-exp", "-sc", "query=bash"], capture_output=True, text=True, env=environment, check=False
    )
    assert expected in done.stdout.split(), done.stderr


def test_showing_the_config_writes_no_files(tmp_path):
    done = rose_exp("--cfg", "job", "method=wanda", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "name: wanda" in done.stdout
    assert os.listdir(tmp_path) == []


def test_smoke_settings_shrink_any_run():
    from .test_command import settings_of

    settings = settings_of("experiment=rose_table3", "evaluation=[wikitext2,zero_shot]", "debug=smoke", "tracking=wandb")
    assert (settings.calibration.samples, settings.calibration.window) == (2, 64)
    assert settings.evaluation.limit == 2
    assert settings.pipeline.layers == ["*.0.*"]
    assert not settings.tracking.names
    assert not settings.figures.draw


@pytest.mark.parametrize("study", ["", "table9", "table2 --model x"])
def test_reproduce_script_reports_invalid_arguments(study):
    script = REPOSITORY / "scripts" / "reproduce.sh"
    done = subprocess.run(["bash", str(script), *study.split()], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    expected = {
        "": "usage",
        "table9": "expected one of obsdiff_fig3 obsdiff_rose obsdiff_table1",
        "table2 --model x": "expected --models, --seeds",
    }[study]
    assert expected in done.stderr
