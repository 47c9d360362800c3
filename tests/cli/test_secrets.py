"""No secret in any file or output: each kind of secret is planted in each place, and everything written is searched."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
import urllib.parse
import zipfile
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from rose_exp.cli.command import check_command
from rose_exp.cli.hydra_files import WRITERS, RedactingOmegaConf, redact_hydra, without_secrets
from rose_exp.cli.report import main as report
from rose_exp.runtime.errors import SettingsError

from ..runtime.test_redaction import secrets_of

SECRETS = secrets_of(7)
VALUES = {
    "MY_SECRET": "correct-horse-battery",
    "DB_PASSWORD": 'p"a\\ss wörd',
    "SHORT_PASSWD": "hunt3r",
    "WANDB_API_KEY": "ab12" * 10,
}
ASSIGNED = {"OTHER_TOKEN": "assigned-in-an-override-1", "OTHER_PASSWORD": "pw12345"}
TEXTS = [*SECRETS.values(), *VALUES.values(), *ASSIGNED.values()]


def rose_exp(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "rose_exp", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, timeout=300, check=False, env=os.environ | VALUES)


def contents(path: Path) -> bytes:
    """Return the bytes of a file, and those of what it contains in compressed form."""
    data = path.read_bytes()
    if data.startswith(b"\x1f\x8b"):
        data += gzip.decompress(data)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            data += b"".join(archive.read(name) for name in archive.namelist())
    return data


def leaks(folder: Path, *outputs: bytes) -> list[tuple[str, str]]:
    """Return the places and texts of all secrets in the outputs and in the files below a folder."""
    written = {str(path): contents(path) for path in folder.rglob("*") if path.is_file()}
    written |= {f"output {i}": output for i, output in enumerate(outputs)} | {"names": repr(sorted(written)).encode()}
    found = []
    for text in TEXTS:
        forms = {text, repr(text)[1:-1], text.replace('"', '\\"'), urllib.parse.quote(text)}
        forms |= {form.replace("_", r"\_") for form in forms}
        found += [(place, text) for place, data in written.items() if any(form.encode() in data for form in forms)]
    return found


def planted() -> list[str]:
    """Return overrides with secrets in tags and names, and in variables for the run."""
    tags = ",".join(
        repr(text) for text in [*SECRETS.values(), *(VALUES[n] for n in ("MY_SECRET", "SHORT_PASSWD", "WANDB_API_KEY"))]
    )
    variables = [f"+hydra.job.env_set.{name}={value}" for name, value in ASSIGNED.items()]
    return [f"tags=[{tags}]", *variables]


NAMES = [
    f"tracking.wandb.{name}={SECRETS[kind]}" for name, kind in {"name": "openai", "group": "aws", "entity": "github"}.items()
]
COMMANDS = {
    "wandb": ["method=wanda", "tracking=wandb", *NAMES, f"tracking.wandb.project=a-{SECRETS['hugging_face']}"],
    "sweep": ["-m", "method=wanda", "tracking=csv,tensorboard", "hydra.sweep.dir=sweep"],
    "verbose": ["method=magnitude", "hydra.verbose=true"],
    "failing": ["method=wanda", "calibration.window=4000"],
    "raising": ["method=wanda", "pipeline.blocks=x", f"model.path=https://me:{SECRETS['npm']}@hub/x/y/z"],
    "invalid": [
        f"+x.password={VALUES['SHORT_PASSWD']}",
        f"model.path=https://me:{SECRETS['npm']}@hub/x/y/z",
        f"seed={SECRETS['jwt']}",
    ],
    "unparsable": [f"tags=[{SECRETS['slack']}"],
    "unknown_option": [f"--api-key={SECRETS['gitlab']}"],
    "plan": ["-m", "method=wanda,rose", "plan=true"],
    "configuration": ["method=wanda", "--cfg", "all"],
    "information": ["method=wanda", "--info", "all"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_no_secret_is_written(name, small, tmp_path, monkeypatch, capsys):
    options = COMMANDS[name]
    arguments = [option for option in options if option.startswith("-m")]
    done = rose_exp(tmp_path, *arguments, *small, *planted(), *(option for option in options if not option.startswith("-m")))
    finished = name in ("wandb", "sweep", "verbose", "plan", "configuration", "information")
    assert (done.returncode == 0) == finished, done.stderr.decode()
    if name in ("wandb", "sweep", "verbose"):
        assert b"***" in next(tmp_path.rglob("run.json")).read_bytes()
        assert next(tmp_path.rglob("overrides.yaml")).read_text().count("***") > len(SECRETS)
        for variable, value in VALUES.items():
            monkeypatch.setenv(variable, value)
        report([str(tmp_path)])
    assert not leaks(tmp_path, done.stdout, done.stderr, capsys.readouterr().out.encode())


@pytest.mark.slow
def test_secrets_in_records_of_earlier_versions_are_not_in_reports(small, tmp_path, capsys):
    done = rose_exp(tmp_path, *small, "method=wanda", "hydra.run.dir=out")
    assert done.returncode == 0, done.stderr.decode()
    path = tmp_path / "out" / "run.json"
    path.write_text(path.read_text().replace('"Wanda"', f'"Wanda {SECRETS["hugging_face"]}"'))
    report([str(tmp_path), "--output", str(tmp_path / "report")])
    assert "Wanda \\*\\*\\*" in capsys.readouterr().out
    assert not leaks(tmp_path / "report")


def test_hydra_writes_all_configurations_without_secrets(tmp_path):
    """Hydra calls OmegaConf by this name in these modules."""
    config = OmegaConf.create({"a": {"password": "x", "b": ["${a.c}", f"t {SECRETS['aws']}"], "c": 1, "d": None}})
    redact_hydra()
    for module in WRITERS:
        assert module.OmegaConf is RedactingOmegaConf
    expected = {"a": {"password": "***", "b": ["${a.c}", "t ***"], "c": 1, "d": None}}
    RedactingOmegaConf.save(config, tmp_path / "x.yaml")
    for text in (RedactingOmegaConf.to_yaml(config), (tmp_path / "x.yaml").read_text()):
        assert OmegaConf.to_container(OmegaConf.create(text)) == expected
    assert RedactingOmegaConf.to_yaml(config, resolve=True).count("t ***") == 1
    assert config.a.password == "x"


def test_only_names_and_tags_are_redacted_in_the_command_line():
    key = SECRETS["github"]
    arguments = [
        "-m",
        f"tags=[a,'{key}']",
        f"+tracking.wandb.name={key}",
        f"model.path=https://me:{key}@hub/x",
        "method=rose",
        f"tags=[{key}",
    ]
    expected = ["-m", "tags=[a,'***']", "+tracking.wandb.name=***", *arguments[3:]]
    assert without_secrets(arguments) == expected


def test_secrets_that_a_launcher_would_store_are_an_error():
    arguments = ["-m", "method=wanda,rose", f"+hydra.job.env_set.HF_TOKEN={SECRETS['hugging_face']}"]
    with pytest.raises(SettingsError, match=r"\+hydra.job.env_set.HF_TOKEN: expected no secret on the command line") as error:
        check_command([*arguments, "hydra/launcher=submitit_slurm"])
    assert SECRETS["hugging_face"] not in str(error.value)
    assert len(check_command([*arguments, "hydra/launcher=joblib"]).jobs) == 2
    assert len(check_command(arguments).jobs) == 2
