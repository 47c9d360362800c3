"""`rose-exp-runs` lists, shows and compares runs, and copies their settings."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from rose_exp.cli.command import check_command
from rose_exp.cli.runs import main
from rose_exp.report.runs import find_run, find_runs

from ..report.records import record


def write(folder: Path, made: dict, run_id: str, started: str = "2026-01-01T12:00:00.000+00:00", **fields) -> Path:
    place = folder / run_id
    place.mkdir(parents=True)
    (place / "run.json").write_text(json.dumps(made | {"run_id": run_id, "started": started} | fields))
    return place


@pytest.fixture
def outputs(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "outputs"
    write(folder, record("ROSE", 20.0, seed=1), "aaa111", "2026-01-03T10:00:00.000+00:00", standard_errors={METRIC: 0.5})
    write(folder, record("SparseGPT", 21.0, config__calibration__replicate=2), "aab222", "2026-01-02T10:00:00.000+00:00")
    write(folder, record("Wanda", 30.0, pattern="2:4", config__tags=["old", "ablation"]), "bcd333")
    failed = record("DSnoT", 1.0) | {"status": "failed", "error": "RoseExpError: no disk", "metrics": {}}
    failed["protocol"].pop("model")
    write(folder, failed, "eee444", "2026-01-04T10:00:00.000+00:00")
    write(folder, record("Dense", 5.0), "fff555")
    monkeypatch.chdir(tmp_path)
    return folder


METRIC = "perplexity.wikitext2"


def output(capsys, *arguments: str) -> str:
    main(list(arguments))
    return capsys.readouterr().out


def error(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    assert stopped.value.code in (1, 2)
    return capsys.readouterr().err


def listed(text: str) -> list[str]:
    return [line.split()[0] for line in text.splitlines()[2:]]


@pytest.mark.usefixtures("outputs")
def test_runs_are_listed_newest_first(capsys):
    text = output(capsys, "list")
    assert listed(text) == ["eee444", "aaa111", "aab222", "bcd333", "fff555"]
    assert re.search(r"aaa111 +finished +2026-01-03 10:00 +ROSE +Llama-2-7b-hf +0.7 +1 +20.00 ± 0.5 +1.6", text)
    assert re.search(r"aab222 .* 0\.7 +0\.2 +21.00 ", text)
    assert re.search(r"eee444 +failed .* DSnoT +meta-llama/Llama-2-7b-hf +0.7 +0 +- ", text)
    assert re.search(r"fff555 .* Dense +Llama-2-7b-hf +- +0 +5.00 ", text)


@pytest.mark.usefixtures("outputs")
@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        (["--method", "rose"], ["aaa111"]),
        (["--method", "SPARSEGPT"], ["aaa111", "aab222"]),  # ROSE is SparseGPT in another order
        (["--method", "*a*"], ["aaa111", "aab222", "bcd333"]),
        (["--sparsity", "2:4"], ["bcd333"]),
        (["--status", "failed"], ["eee444"]),
        (["--tag", "abl*"], ["bcd333"]),
        (["--model", "*llama*", "--status", "finished"], ["aaa111", "aab222", "bcd333", "fff555"]),
        (["--method", "wanda", "--status", "failed"], []),
        (["--last", "2"], ["eee444", "aaa111"]),
    ],
)
def test_filters(capsys, filters, expected):
    assert listed(output(capsys, "list", *filters)) == expected


@pytest.mark.usefixtures("outputs")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["list", "--method", "wnda"], "--method: expected one of DSnoT, Dense, ROSE, .*, got 'wnda'; did you mean 'wanda'"),
        (["list", "--status", "done"], "--status: expected one of failed, finished, got 'done'"),
        (["list", "--last", "0"], "argument --last: expected a number of at least 1, got '0'"),
        (["list", "--last", "-1"], "--last"),
        (["list", "--in", "nowhere"], "DIR: expected a folder that exists, got nowhere"),
        (["show", "zzz"], "RUN: expected a run ID, the start of one, or a folder, got 'zzz'"),
        (["show", "aa"], "RUN: expected the start of one run ID, got 'aa', which 2 runs have"),
        (["copy", "aaa", "mine.yml"], "FILE: expected a name that ends in .yaml, got mine.yml"),
        ([], "COMMAND"),
    ],
)
def test_wrong_arguments(capsys, arguments, message):
    assert re.search(message, error(capsys, *arguments))


def test_folder_without_runs(tmp_path, capsys):
    message = "DIR: expected folders with run.json in them, got none in"
    assert message in error(capsys, "list", "--in", str(tmp_path))


def test_damaged_records_are_skipped(outputs, capsys, caplog):
    (outputs / "fff555/run.json").write_text("{")
    write(outputs, record("ROSE", 1.0) | {"config": {"method": {"name": "sparsegpt"}}}, "ggg666")
    assert listed(output(capsys, "list")) == ["eee444", "aaa111", "aab222", "bcd333"]
    assert len([r for r in caplog.records if r.message.startswith("skipped")]) == 2


@pytest.mark.usefixtures("outputs")
def test_a_run_is_shown_by_id_start_and_folder(capsys):
    text = output(capsys, "show", "aaa")
    assert text == output(capsys, "show", "aaa111") == output(capsys, "show", "outputs/aaa111")
    for line in (
        r"method +ROSE",
        r"perplexity.wikitext2 +20.00 ± 0.5",
        r"reorder.columns +descending",
        r"versions.torch +2.13.0",
    ):
        assert re.search(f"^{line}$", text, re.MULTILINE), line
    failed = output(capsys, "show", "eee")
    assert re.search(r"^error +RoseExpError: no disk$", failed, re.MULTILINE)


def test_a_folder_of_a_run_needs_no_folder_of_runs(outputs, capsys, monkeypatch):
    monkeypatch.chdir(outputs)
    assert "method    ROSE" in output(capsys, "show", "aaa111")


@pytest.mark.usefixtures("outputs")
def test_comparison_shows_what_differs(capsys):
    text = output(capsys, "compare", "aaa", "aab")
    for line in (
        r"label +ROSE +SparseGPT",
        r"perplexity.wikitext2 +20.00 ± 0.5 +21.00",
        r"seed +1 +0",
        r"calibration.replicate +0 +2",
        r"reorder.columns +descending +none",
        r"calibration.tokens_sha256 +drawn with 1 +drawn with 0",
    ):
        assert re.search(f"^{line}$", text, re.MULTILINE), line
    assert "engine.damping" not in text
    assert "versions.torch" not in text
    same = output(capsys, "compare", "aaa", "aaa")
    assert "settings: equal" in same
    assert "protocol: equal" in same


def test_terminal_sequences_in_records_are_shown_as_text(outputs, capsys):
    write(outputs, record("ROSE", 1.0) | {"label": "a\x1b[2Jb"}, "hhh777")
    for arguments in (["list"], ["show", "hhh"], ["compare", "hhh", "aaa"], ["copy", "hhh", "mine.yaml"]):
        assert "\x1b" not in output(capsys, *arguments)
    assert "\x1b" not in Path("mine.yaml").read_text()


COMMANDS = [
    "",
    "method=rose_plus sparsity=2:4 seed=3 tags=[one,two]",
    "method=dsnot_sparsegpt sparsity.ratio=0.6 refine=cg reconstruction=separate",
    "method=alps pipeline.layers=['*.mlp.*'] allocation=owl",
    "evaluation=[wikitext2,c4,zero_shot] calibration=c4 model=llama2-7b",
    "evaluation=none model.bos=windows pipeline.skip=['*.0.*']",
    "model=small-sd3 method=sparsegpt sparsity=structured",
    "model=small-ddpm evaluation=images",
    "experiment=noise hydra.sweeper.params=null debug=smoke",
    'model=local model.path=owner/name \'model.revision="123456789e12"\' \'tags=["1e5","0x1F","on"]\'',
    "method=dense evaluation.perplexity.embedded.windows=3",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_copied_settings_have_the_same_run_id(command, tmp_path, monkeypatch, capsys):
    """A copied file replaces all groups, so nothing of the default configuration is mixed in."""
    monkeypatch.chdir(tmp_path)
    (job,) = check_command(shlex.split(command)).jobs
    made = record("ROSE", 20.0) | {"label": job.settings.label, "config": job.config}
    write(tmp_path / "outputs", made, job.run_id)
    printed = output(capsys, "copy", job.run_id[:6], "mine.yaml").split()
    assert printed == ["rose-exp", "--config-dir", str(tmp_path), "--config-name", "mine"]
    (copied,) = check_command(printed[1:]).jobs
    assert copied.run_id == job.run_id
    assert copied.folder(None) == job.folder(None)
    assert copied.config == job.config
    (other,) = check_command([*printed[1:], "seed=17"]).jobs
    assert (other.run_id == job.run_id) == (not job.settings.pruned)


@pytest.mark.usefixtures("outputs")
def test_an_existing_file_is_not_overwritten(capsys):
    Path("mine.yaml").write_text("mine")
    assert "FILE: expected a new file, got mine.yaml, which exists" in error(capsys, "copy", "aaa", "mine.yaml")
    assert Path("mine.yaml").read_text() == "mine"


def test_the_same_folder_given_twice_counts_once(outputs):
    assert len(find_runs([outputs, outputs])) == 5
    assert find_run("fff", [outputs]).label == "Dense"
