"""Whatever a run needs of its inputs is checked before the model is pruned."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers

from rose_exp.cli import command
from rose_exp.runs import pruning
from rose_exp.runtime.errors import SettingsError

from ..data.small_tokenizers import build_tokenizer
from .odd_inputs import SIZES, execute, language, write_inputs, zero_shot


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


@pytest.fixture
def error(monkeypatch, tmp_path):
    """Return the error of a command that must fail before pruning."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")

    def fail(*_args, **_kwargs):
        raise AssertionError("the model was pruned")

    monkeypatch.setattr(pruning, "prune_model", fail)

    def run(overrides: list[str]) -> str:
        outcome = execute(overrides, tmp_path / "out")
        assert outcome.status in (1, 2)
        (line,) = outcome.lines
        return line

    return run


def model_with(folder: Path, **config) -> Path:
    made = transformers.LlamaConfig(**SIZES | {"num_key_value_heads": 1, "max_position_embeddings": 64} | config)
    transformers.LlamaForCausalLM(made).save_pretrained(folder / "whole")
    build_tokenizer().save_pretrained(folder / "whole")
    return folder


def with_model(overrides: list[str], folder: Path) -> list[str]:
    return [*overrides, f"model.path={folder / 'whole'}"]


@pytest.mark.parametrize("command", [language, zero_shot])
def test_token_ids_beyond_the_embedding_are_named(command, inputs, error, tmp_path):
    line = error(with_model(command(inputs), model_with(tmp_path, vocab_size=12)))
    assert "calibration: expected token IDs below 12, the number of rows of the model's embedding, got 28" in line


def test_token_ids_of_questions_alone_are_checked(inputs, error, tmp_path):
    overrides = [*with_model(zero_shot(inputs), model_with(tmp_path, vocab_size=28)), f"calibration.path={tmp_path}/a.txt"]
    (tmp_path / "a.txt").write_text("a b c d e " * 20)
    (tmp_path / "questions").mkdir()
    (tmp_path / "questions/piqa_validation.jsonl").write_text(
        json.dumps({"goal": "a", "sol1": "b z", "sol2": "c", "label": 0}) + "\n"
    )
    line = error([*overrides, f"evaluation.zero_shot.data_dir={tmp_path}/questions"])
    assert "evaluation.zero_shot: expected token IDs below 28, the number of rows of the model's embedding, got 28" in line


def test_windows_longer_than_the_context_are_named_before_weights_are_read(inputs, error, tmp_path):
    folder = model_with(tmp_path, max_position_embeddings=8)
    (folder / "whole/model.safetensors").write_bytes(b"damaged")
    assert "window: expected at most 8, the model's maximum sequence length, got 16" in error(
        with_model(language(inputs), folder)
    )


def test_a_tokenizer_that_cannot_encode_the_text_is_named(inputs, error, tmp_path):
    folder = model_with(tmp_path)
    path = folder / "whole/tokenizer.json"
    data = json.loads(path.read_text())
    data["model"]["unk_token"] = "<absent>"
    data["model"]["vocab"].pop("q")
    path.write_text(json.dumps(data))
    assert "calibration: the model's tokenizer cannot encode the text: " in error(with_model(language(inputs), folder))


def test_unreadable_files_are_errors_of_the_configuration(inputs, tmp_path):
    (tmp_path / "unreadable.txt").symlink_to("/proc/self/mem")
    with pytest.raises(SettingsError) as caught:
        command.check_command([*language(inputs), f"calibration.path={tmp_path}/unreadable.txt", "seed=-1"])
    assert caught.value.problems == ["seed: expected at least 0, got -1"]  # the run ID is unknown
    with pytest.raises(SettingsError, match=r"calibration\.path: cannot read .*unreadable\.txt: .*Input/output error"):
        command.check_command([*language(inputs), f"calibration.path={tmp_path}/unreadable.txt"])


@pytest.mark.parametrize("path", ["x" * 5000, "a\0b", "~nobody-has-this-name/x", "/proc/self/mem/x", "/dev/null/x"])
@pytest.mark.parametrize("setting", ["model.path", "calibration.path", "evaluation.zero_shot.data_dir"])
def test_impossible_paths_are_errors_of_the_configuration(setting, path):
    from rose_exp.settings.schema import ModelSettings, ZeroShotSettings
    from rose_exp.settings.texts import TextSettings

    if setting == "model.path":
        problems = ModelSettings(path=f"./{path}" if path[0] not in "~/" else path).problems("model")
    elif setting == "calibration.path":
        problems = TextSettings(path=path).problems("calibration")
    else:
        problems = ZeroShotSettings(data_dir=path).problems("evaluation.zero_shot")
    (problem,) = problems
    assert problem.startswith(f"{setting}: expected a f")
