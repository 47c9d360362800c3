"""Composition of configuration files and validation of overrides."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from rose_exp.cli.command import check_command, config_folder
from rose_exp.engine import Ordering, SemiStructured, Unstructured
from rose_exp.runtime.errors import SettingsError
from rose_exp.settings.schema import Settings, read_settings
from rose_exp.settings.tracking import AccelerateSettings
from rose_exp.tracking import read_record

from ..conftest import REPOSITORY
from .test_app import rose_exp as command

CHOICES = [
    (path.parent.name, path.stem)
    for path in sorted(config_folder().glob("*/*.yaml"))
    if not path.stem.startswith("_")
]  # fmt: skip
METHOD_CHOICES = "alps, dense, dsnot, dsnot_sparsegpt, magnitude, oats, rose, rose_plus, sparsegpt, wanda"
TO_BE_SET = {
    ("tracking", "accelerate"): ["tracking.accelerate.tracker=mlflow"],
    ("model", "local"): ["model.path=."],
    ("calibration", "local"): ["calibration.path=README.md"],
    ("evaluation", "local"): ["evaluation.perplexity.local.path=README.md"],
    ("model", "diffusion-local"): ["model.path=."],
    ("calibration", "gcc3m"): ["model=small-sd3", "calibration.path=README.md"],
    ("calibration", "prompts"): ["model=small-sd3"],
    ("evaluation", "images"): ["model=small-sd3"],
    ("evaluation", "digits"): ["model=small-sd3"],
    ("evaluation", "images_paper"): [
        "model=small-sd3",
        "evaluation.images.path=README.md",
        "evaluation.images.metrics=[clip_score]",
        "evaluation.images.reference=.",
    ],
    ("sparsity", "structured"): ["method=sparsegpt"],
}


def settings_of(*overrides: str) -> Settings:
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        config = compose("config", overrides=list(overrides))
    return read_settings(OmegaConf.to_container(config, resolve=True))


def problems_of(*arguments: str) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        check_command(arguments)
    return caught.value.problems


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_config_file_composes(group, choice, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(AccelerateSettings, "package", None)  # no tracker of accelerate is installed
    overrides = [f"{group}={choice}", *TO_BE_SET.get((group, choice), [])]
    settings_of(*overrides)
    text = (config_folder() / group / f"{choice}.yaml").read_text()
    assert text.startswith("#"), "a configuration file starts with a description"


def test_config_groups_match_the_settings():
    assert {group for group, _ in CHOICES} <= {*Settings.model_fields, "experiment", "debug"}


def test_rose_is_sparsegpt_with_reordering():
    rose = settings_of("method=rose")
    assert rose.method.name == "sparsegpt"
    assert rose.reorder == Ordering.rose()
    assert rose.label == "ROSE"
    assert settings_of("method=sparsegpt").label == "SparseGPT"
    assert settings_of("method=rose", "reorder=none").label == "SparseGPT"  # follows the ordering, not the file
    assert settings_of().label == "ROSE"


def test_sparsity_patterns_are_parsed():
    assert settings_of().sparsity.parsed == Unstructured(0.5)
    assert settings_of("sparsity=2:4").sparsity.parsed == SemiStructured(2, 4)
    assert settings_of("sparsity.pattern=3:8", "sparsity.ratio=null").sparsity.parsed == SemiStructured(3, 8)


def test_dsnot_skips_the_mlp_by_default():
    method = settings_of("method=dsnot").method
    assert method.create().max_cycles == 50
    assert method.create(("*mlp*",)).max_cycles == 0


def test_all_errors_are_reported_together():
    assert problems_of(
        "method=sparsgpt", "calibration.sample=3", "engine.damping=-1", "seed=x", "sparsity.pattern=5:4", "device"
    ) == [
        "'device' is no override: expected setting=value (missing EQUAL at '<EOF>')",
        f"method: expected one of {METHOD_CHOICES}, got 'sparsgpt'; did you mean 'sparsegpt'?",
        "calibration.sample: no such setting; did you mean 'calibration.samples'?",
        "engine.damping: expected at least 0, got -1",
        "seed: expected a valid integer, got 'x'",
        "sparsity.pattern: expected N:M with N at most M and M at least 1, got '5:4'",
    ]


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("model=llama2-7", "did you mean 'llama2-7b'?"),
        ("model=meta-llama/Llama-2-7b-hf", "give model=local model.path=meta-llama/Llama-2-7b-hf"),
        ("model=./folder", "give model=local model.path=./folder"),
        ("sparsity=4:2", "did you mean '2:4'?"),
        ("sparsity=8:4", "did you mean '4:8'?"),
        ("sparsity.ratio=70", "sparsity.ratio: expected at most 1, got 70; did you mean 0.7?"),
        ("reorder.threshold=50", "reorder.threshold: expected at most 1, got 50; did you mean 0.5?"),
        ("sparsity.pattern=unstructurd", "did you mean 'unstructured'?"),
        ("sparsity.ratio=1.5", "sparsity.ratio: expected at most 1, got 1.5"),
        ("sparsity.ratio=null", "sparsity.ratio: expected a number from 0 to 1, got null"),
        ("model.embedded=smollm", "model.embedded: expected one of smollm2-135m, got 'smollm'"),
        ("model.path=./nothing", "model.path: expected a folder or file that exists, got './nothing'"),
        ("calibration.path=READMEE.md", "did you mean 'README.md'?"),
        ("calibration.window=1", "calibration.window: expected at least 2, got 1"),
        ("reorder.columns=down", "reorder.columns: expected 'descending', 'ascending' or 'none', got 'down'"),
        ("+engine.dampling=1", "engine.dampling: no such setting, got 1; did you mean 'damping'?"),
        ("+method.options.cycles=3", "method.options.cycles: expected none, because sparsegpt has no options"),
        ("method=dsnot method.options.max_cycles=-3", "method.options.max_cycles: expected at least 0, got -3"),
        ("method=wanda reorder=rose", "reorder: expected none, because method wanda does not prune columns sequentially"),
        ("sparsity=2:4 sparsity.ratio=0.7", "sparsity.ratio: expected null or 0.5, the ratio of pattern 2:4, got 0.7"),
        ("calibration=local", "calibration: expected one of path, embedded, plugin or dataset, got none of them"),
        ("model=local", "model.path: expected a value, got none"),
        ("engine.damping=nan", "engine.damping: expected"),
        ("device=3", "device: expected text or a list of texts, got 3"),
        ("+evaluation.perplexity.embedded.windws=3", "no such setting, got 3; did you mean 'windows'?"),
        ("+evaluation.sped.window=3", "evaluation.sped: no such setting"),
        (
            "allocation=owl sparsity=2:4",
            "allocation.rule: expected uniform with pattern 2:4, which requires equal sparsity in every",
        ),
        ("method=rose_plus sparsity=2:4 allocation=losses", "allocation.rule: expected uniform with pattern 2:4"),
        ("refine=admm refine.relaxation=2", "refine.relaxation: expected below 2, got 2"),
        ("method=oats refine=cg", "refine: expected none with oats, whose result is not sparse, got 8"),
        ("method=oats reconstruction=separate", "reconstruction: expected none with oats, whose result is not sparse, got 4"),
        (
            "model=small-sd3 method=wanda reconstruction=separate",
            "reconstruction.parts: expected together for a diffusion model, whose blocks are trained at once, got separate",
        ),
        ("reconstruction=separate reconstruction.held_out=1", "reconstruction.held_out: expected below 1, got 1"),
        ("reorder.score=wnda", "reorder.score: expected one of magnitude, obs, wanda, got 'wnda'; did you mean 'wanda'?"),
        (
            "engine.backend=nmba",
            "engine.backend: expected 'auto', 'torch', 'numba' or 'triton', got 'nmba'; did you mean 'numba'?",
        ),
    ],
)
def test_invalid_override_raises_an_error_that_names_it(argument, expected, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    found = problems_of(*argument.split())
    assert len(found) == 1
    assert expected in found[0]


def test_every_job_of_a_sweep_is_checked():
    assert problems_of("-m", "method=sparsegpt,wnda", "sparsity.ratio=0.5,1.7") == [
        f"method: expected one of {METHOD_CHOICES}, got 'wnda'; did you mean 'wanda'?",
        "sparsity.ratio: expected at most 1, got 1.7",
    ]
    assert problems_of("-m", "sparsity.ratio=0.5,1.7,2.5") == [
        "sparsity.ratio: expected at most 1, got 1.7",
        "sparsity.ratio: expected at most 1, got 2.5",
    ]
    assert problems_of("-m", "experiment=demo", "reorder=rose")[0].startswith("reorder: expected none, because method dense")


@pytest.mark.parametrize(
    "command",
    ["", "-m experiment=demo", "sparsity=4:8 method=wanda", "-m method=rose,sparsegpt seed=0,1,2", "evaluation=[wikitext2,c4]"],
)
def test_valid_commands_pass(command):
    check_command(command.split())


def test_last_override_of_a_setting_wins():
    jobs = check_command(["-m", "seed=0,1", "method=wanda", "seed=2,3", "method=sparsegpt"]).jobs
    assert [(job.settings.seed, job.settings.method.name) for job in jobs] == [(2, "sparsegpt"), (3, "sparsegpt")]


def test_search_under_torchrun_is_rejected(monkeypatch, capsys):
    from rose_exp.cli import app

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("sys.argv", ["rose-exp", "-m", "hydra/sweeper=optuna"])
    with pytest.raises(SystemExit):
        app.main()
    assert "torchrun: expected a run or a sweep, got a search" in capsys.readouterr().err


STUDIES = sorted(path.stem for path in config_folder().glob("experiment/rose_*.yaml"))
LARGE = ("rose_plus_allocation", "rose_plus_order", "rose_plus_parts", "rose_plus_permute")  # many jobs


@pytest.mark.parametrize("study", [pytest.param(name, marks=[pytest.mark.slow] * (name in LARGE)) for name in STUDIES])
def test_every_paper_experiment_supports_the_smoke_test_settings(study):
    command = ["-m", f"experiment={study}", "model=smollm2-135m", "calibration=embedded", "debug=smoke"]
    jobs = check_command(command).jobs
    assert {job.settings.model.embedded for job in jobs} == {"smollm2-135m"}
    assert {job.settings.calibration.embedded for job in jobs} == {"c4"}
    assert all(job.settings.evaluation.limit == 2 for job in jobs)


@pytest.mark.parametrize(
    ("pattern", "rule"),
    [("unstructured", "owl"), ("2:4", "uniform")],
)
def test_rose_plus_selects_the_allocation_rule_by_pattern(pattern, rule):
    """Runs in a new process without other imports."""
    code = (
        "from rose_exp.cli.command import check_command;"
        f"settings = check_command(['method=rose_plus', 'sparsity={pattern}']).jobs[0].settings;"
        "print(settings.allocation.rule, settings.label)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"{rule} ROSE+")


def conf_with(folder: Path, ratio: float) -> Path:
    """Copy the configuration files and change the ratio of unstructured sparsity."""
    copy = folder / "conf"
    shutil.copytree(config_folder(), copy)
    file = copy / "sparsity" / "unstructured.yaml"
    file.write_text(re.sub("ratio: .*", f"ratio: {ratio}", file.read_text()))
    return copy


def ratios_of(*arguments: str) -> list[float]:
    return [job.settings.sparsity.ratio for job in check_command(arguments).jobs]


def test_hydra_flags_select_other_config_files(tmp_path):
    """Covers every Hydra flag that sets the location of the configuration files."""
    copy = conf_with(tmp_path, 0.9)
    (copy / "mine.yaml").write_text((copy / "config.yaml").read_text().replace("seed: 0", "seed: 7"))
    more = tmp_path / "more"
    (more / "sparsity").mkdir(parents=True)
    (more / "sparsity" / "mine.yaml").write_text("pattern: unstructured\nratio: 0.8\n")
    assert ratios_of() == [0.5]
    assert ratios_of("--config-path", str(copy)) == [0.9]
    assert ratios_of("-cp", str(copy), "-m", "seed=0,1") == [0.9, 0.9]
    assert ratios_of("--config-dir", str(more), "sparsity=mine") == [0.8]
    assert ratios_of(f"hydra.searchpath=[file://{more}]", "sparsity=mine") == [0.8]
    (jobs,) = (check_command(["--config-path", str(copy), "--config-name", "mine"]).jobs,)
    assert [(job.settings.sparsity.ratio, job.settings.seed) for job in jobs] == [(0.9, 7)]
    assert problems_of("sparsity=mine")[0].startswith("sparsity: expected one of 2:4, 4:8, structured, unstructured")
    assert problems_of("--config-dir", str(more), "sparsity=other")[0].startswith("sparsity: expected one of 2:4, 4:8, mine,")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--config-name", "nothing"], "cannot read the configuration nothing: Cannot find primary config 'nothing'"),
        (["--config-path", "/nowhere"], "Primary config directory not found"),
        (["--config-path", "relative"], "Primary config module 'rose_exp.cli.relative' not found"),  # read as a module
        (["--config-dir", "/nowhere"], "--config-dir: expected a folder that exists, got '/nowhere'"),
        (["--experimental-rerun", "a.pickle"], "--experimental-rerun: not supported"),
    ],
)
def test_missing_config_files_raise_an_error(arguments, expected):
    (problem,) = problems_of(*arguments)
    assert expected in problem


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["--config-path", "--config-dir", "hydra.searchpath"])
def test_run_uses_the_validated_config_files(flag, small, tmp_path):
    """Covers the plan and the run record of the command."""
    copy = conf_with(tmp_path, 0.25)
    (copy / "experiment" / "mine.yaml").write_text("# @package _global_\nsparsity: {ratio: 0.25}\n")
    where = [f"{flag}=[file://{copy}]"] if flag == "hydra.searchpath" else [flag, str(copy)]
    own = [*where, *small, *([] if flag == "--config-path" else ["experiment=mine"]), "evaluation=none"]
    own = [argument for argument in own if not argument.startswith("evaluation.perplexity")]
    (job,) = check_command(own).jobs
    assert job.settings.sparsity.ratio == 0.25
    planned = command(*own, "plan=true", folder=tmp_path)
    assert job.run_id in planned.stdout
    done = command(*own, "pipeline.layers=['*.0.mlp.*']", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    (record,) = [read_record(path) for path in tmp_path.glob("outputs/*/run.json")]
    assert record["config"]["sparsity"]["ratio"] == 0.25
    assert record["metrics"]["sparsity"] == pytest.approx(0.25, abs=0.01)


def test_hydra_mode_override_selects_multirun():
    swept = check_command(["hydra.mode=MULTIRUN", "seed=0,1"])
    assert (len(swept.jobs), swept.sweep) == (2, Path("outputs"))


@pytest.mark.parametrize(
    "arguments",
    [
        ["method=[wanda,rose]"],
        ["+method=[wanda,rose]"],
        ["-m", "seed=0,1", "method=[wanda,rose]"],
        ["-m", "method=[wanda,rose],alps"],
        ["experiment=listed", "--config-dir"],
        ["experiment=overridden", "--config-dir"],
        ["experiment=added", "--config-dir"],
        ["-m", "experiment=swept", "--config-dir"],
    ],
)
def test_multiple_choices_of_a_group_are_rejected_everywhere(arguments, tmp_path):
    folder = tmp_path / "experiment"
    folder.mkdir()
    defaults = {
        "listed": "defaults:\n  - override /method: [wanda, rose]\n",
        "overridden": "defaults:\n  - /method@_global_: rose\n  - override /method: wanda\n",
        "added": "defaults:\n  - /method/rose\n  - override /method: wanda\n",
        "swept": "hydra:\n  sweeper:\n    params:\n      method: '[wanda,rose]'\n",
    }
    for name, text in defaults.items():
        (folder / f"{name}.yaml").write_text(f"# @package _global_\n{text}")
    problems = problems_of(*arguments, *([str(tmp_path)] if "--config-dir" in arguments else []))
    assert problems[0].startswith("method: expected one choice, got the list [wanda, rose]"), problems
    assert "-m method=wanda,rose runs one job per choice" in problems[0]


def test_list_with_a_single_choice_is_rejected():
    assert problems_of("method=[wanda]") == ["method: expected one choice, got the list [wanda]; give method=wanda"]


def test_choices_that_extend_another_choice_are_accepted():
    for choice in ("rose_plus", "dsnot_sparsegpt"):
        check_command([f"method={choice}"])
    check_command(["evaluation=[wikitext2,c4]"])


def test_missing_multirun_flag_is_suggested(monkeypatch, capsys):
    from rose_exp.cli import app

    for argument, expected in {
        "method=wanda,rose": "method: expected one value, got several; add -m to run one job per value\n",
        "evaluation=wikitext2,c4": "add -m to run one job per value; evaluation=[a,b] gives one run both\n",
        "plan=true seed=1,2": "seed: expected one value, got several; add -m to run one job per value\n",
    }.items():
        monkeypatch.setattr("sys.argv", ["rose-exp", *argument.split()])
        with pytest.raises(SystemExit) as caught:
            app.main()
        assert caught.value.code == 2
        assert capsys.readouterr().err.endswith(expected)


@pytest.mark.parametrize("multirun", [False, True])
def test_job_that_differs_from_the_validated_one_is_rejected(multirun, small, tmp_path, monkeypatch, capsys):
    """Simulated by changing the configuration files between validation and execution."""
    from rose_exp.cli import app

    monkeypatch.chdir(tmp_path)
    real = app.check_command
    copy = conf_with(tmp_path, 0.9)
    arguments = [*(["-m"] if multirun else []), "--config-path", str(copy), *small, *(["seed=0,1"] if multirun else [])]

    def checked(given):
        found = real(given)
        file = copy / "sparsity" / "unstructured.yaml"
        file.write_text(file.read_text().replace("ratio: 0.9", "ratio: 0.8"))
        return found

    monkeypatch.setattr(app, "check_command", checked)
    monkeypatch.setattr("sys.argv", ["rose-exp", *arguments])
    with pytest.raises(SystemExit) as caught:
        app.main()
    assert caught.value.code == 1
    assert not list(tmp_path.glob("outputs/*/run.json"))
    if multirun:
        assert "2 not run, of 2 jobs" in capsys.readouterr().out


def test_hydra_resolver_can_be_used_in_overrides():
    (job,) = check_command(["tracking=wandb", "tracking.wandb.name=${hydra:job.name}"]).jobs
    assert job.settings.tracking.wandb.name == "rose-exp"
