"""The model card of saved models, and the permissions of their files."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

import rose_exp
from rose_exp.cli.command import check_settings
from rose_exp.runs.card import license_of
from rose_exp.runtime.files import written

from ..models.families import build


def permissions(folder: Path) -> set[tuple[bool, int]]:
    return {(path.is_dir(), stat.S_IMODE(path.stat().st_mode)) for path in [folder, *folder.rglob("*")]}


@pytest.fixture(params=[0o022, 0o002, 0o077], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.parametrize("weights", ["memory", "disk"])
def test_saved_models_have_a_card_and_the_permissions_of_the_umask(weights, umask, small, tmp_path):
    record = rose_exp.run([*small, "method=wanda", "save=true", "figures.draw=false", f"pipeline.weights={weights}"], tmp_path)
    folder = tmp_path / record["run_id"] / "model"
    assert permissions(folder) == {(True, 0o777 & ~umask), (False, 0o666 & ~umask)}
    card = ModelCard.load(folder / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag, card.data.license) == ("transformers", "text-generation", None)
    assert "stories260k-llama pruned by rose_exp with Wanda (50% unstructured" in card.text
    for name, value in record["metrics"].items():
        assert f"| `{name}` | {value:.6g} |" in card.text
    assert "| `method.name` | `wanda` |" in card.text
    assert "| `calibration.path` | `wikitext2_raw_train_first1MB.jsonl` |" in card.text
    assert "8 windows of 128 tokens" in card.text
    assert str(Path.home()) not in card.text
    assert check_usage(card.text, folder)["model"].config.model_type == "llama"


def check_usage(text: str, folder: Path) -> dict:
    """Execute the example of a card."""
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len([line for line in code.splitlines() if line]) <= 4
    variables: dict = {}
    exec(code.replace("FOLDER", str(folder)), variables)
    return variables


@pytest.mark.parametrize("options", [[], ["sparsity=structured", "sparsity.ratio=0.25"]], ids=["unstructured", "structured"])
def test_cards_of_pipelines(options, tmp_path):
    pytest.importorskip("diffusers")
    overrides = [
        "model=small-sd3",
        "method=sparsegpt",
        "evaluation=none",
        "save=true",
        "calibration.samples=2",
        "diffusion.steps=2",
    ]
    record = rose_exp.run([*overrides, *options], tmp_path)
    folder = tmp_path / record["run_id"] / "model"
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "diffusers"
    assert ("trust_remote_code=True" in card.text) == bool(options)
    assert "lm_eval" not in card.text
    assert type(check_usage(card.text, folder)["pipeline"]).__name__ == "StableDiffusion3Pipeline"


def test_license_of_the_base_model(tmp_path):
    build("llama").save_pretrained(tmp_path)
    local = check_settings(["model=local", f"model.path={tmp_path}"]).model
    assert license_of(local) is None
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    assert license_of(local) == "mit"
    for text in ("# A model without metadata\n", "---\nlicense: [mit\n---\n", "---\n- a\n---\n"):
        (tmp_path / "README.md").write_text(text)
        assert license_of(local) is None
    (tmp_path / "README.md").write_bytes(b"---\nlicense: \xff\n---\n")
    assert license_of(local) is None
    assert license_of(check_settings(["model=smollm2-135m"]).model) == "apache-2.0"
    assert license_of(check_settings(["model=llama2-7b"]).model) is None


def test_text_in_a_card_is_escaped(small, shared, tmp_path):
    source = tmp_path / "a|b`c"
    source.symlink_to(shared / "data/models/stories260k-llama")
    overrides = [o for o in small if not o.startswith("model.path")] + [f'model.path="{source}"']
    record = rose_exp.run([*overrides, "method=magnitude", "save=true", "figures.draw=false"], tmp_path)
    text = (tmp_path / record["run_id"] / "model/README.md").read_text()
    assert "a\\|b\\`c, pruned" in text


def test_card_of_a_dense_model(small, tmp_path):
    record = rose_exp.run([*small, "method=dense", "save=true"], tmp_path)
    text = (tmp_path / record["run_id"] / "model/README.md").read_text()
    assert "stories260k-llama saved by rose_exp without pruning (run" in text
    assert "pruned" not in text
    assert "sparsity.ratio" not in text


def test_permissions_are_only_added(tmp_path):
    """The group of a shared folder, and executable files, remain."""
    before = os.umask(0o022)
    try:
        tmp_path.chmod(0o2775)
        with written(tmp_path / "model") as place:
            place.mkdir()
            (place / "script.sh").write_text("")
            (place / "script.sh").chmod(0o700)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "model/script.sh").stat().st_mode) == 0o744
    assert (tmp_path / "model").stat().st_mode & stat.S_ISGID == tmp_path.stat().st_mode & stat.S_ISGID
