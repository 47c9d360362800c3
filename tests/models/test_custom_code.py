"""Models with their own code, in a local folder or in the cache of the hub, are saved with their code and load from there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CONFIGURATION = """
from transformers import LlamaConfig


class TinyConfig(LlamaConfig):
    model_type = "tiny_with_code"
"""
MODELING = """
from transformers import LlamaForCausalLM

from .configuration_tiny import TinyConfig
from .scaling_tiny import scale


class TinyForCausalLM(LlamaForCausalLM):
    config_class = TinyConfig

    def forward(self, *arguments, **keywords):
        output = super().forward(*arguments, **keywords)
        output.logits = scale(output.logits)
        return output
"""
SCALING = """
def scale(logits):
    return 0.5 * logits
"""
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def write_model(source: Path, folder: Path) -> None:
    """Write a copy of a trained Llama with its own code, whose logits are half as large."""
    shutil.copytree(source, folder)
    (folder / "configuration_tiny.py").write_text(CONFIGURATION)
    (folder / "modeling_tiny.py").write_text(MODELING)
    (folder / "scaling_tiny.py").write_text(SCALING)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "tiny_with_code", "architectures": ["TinyForCausalLM"]}
    config["auto_map"] = {
        "AutoConfig": "configuration_tiny.TinyConfig",
        "AutoModelForCausalLM": "modeling_tiny.TinyForCausalLM",
    }
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["memory", "disk"])
@pytest.mark.parametrize("place", ["local", "hub"])
def test_saved_models_keep_their_own_code(place, weights, small, shared, tmp_path):
    source, name = shared / "data" / "models" / "stories260k-llama", str(tmp_path / "tiny")
    if place == "local":
        write_model(source, tmp_path / "tiny")
    else:
        name, repository = "someone/tiny", tmp_path / "home" / "hub" / "models--someone--tiny"
        write_model(source, repository / "snapshots" / COMMIT)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(COMMIT)
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    overrides = [text for text in small if not text.startswith("model.path=")]
    overrides += [f"model.path={name}", "model.trust_remote_code=true", f"pipeline.weights={weights}", "save=true"]

    def run(*arguments: str) -> dict:
        command = [sys.executable, "-m", "rose_exp", *overrides, *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads((tmp_path / arguments[-1].partition("=")[2] / "run.json").read_text())

    pruned = run("hydra.run.dir=pruned")
    saved = tmp_path / "pruned" / "model"
    assert {path.name for path in saved.glob("*.py")} == {"configuration_tiny.py", "modeling_tiny.py", "scaling_tiny.py"}
    assert (saved / "generation_config.json").exists()
    shutil.rmtree(tmp_path / "home", ignore_errors=True)
    shutil.rmtree(tmp_path / "tiny", ignore_errors=True)
    again = run(f"model.path={saved}", "method=dense", "save=false", "hydra.run.dir=again")
    assert again["metrics"]["perplexity.local"] == pytest.approx(pruned["metrics"]["perplexity.local"], rel=1e-6)
