"""The run ID depends on exactly the settings that can change the result."""

from __future__ import annotations

import hashlib
import shutil

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from rose_exp.cli.paths import config_folder
from rose_exp.runs.identity import run_id
from rose_exp.runtime import fingerprint
from rose_exp.settings.schema import read_settings


def identity(*overrides: str, folder=None) -> str:
    with initialize_config_dir(str(folder or config_folder()), version_base="1.3"):
        config = compose("config", overrides=list(overrides))
    return run_id(read_settings(OmegaConf.to_container(config, resolve=True)))


@pytest.mark.parametrize(
    "override",
    [
        "seed=1",
        "method=wanda",
        "method=sparsegpt",
        "sparsity=2:4",
        "sparsity.ratio=0.51",
        "reorder.threshold=0.4",
        "engine.damping=0.02",
        "engine.backend=torch",
        "pipeline.batch=2",
        "pipeline.skip=['*.0.*']",
        "calibration.samples=33",
        "calibration.embedded=wiki",
        "evaluation.perplexity.embedded.windows=47",
        "evaluation.batch=2",
        "model.dtype=bfloat16",
        "allocation=owl",
        "refine=admm",
        "target=residual",
    ],
)
def test_settings_that_affect_the_result_change_the_run_id(override):
    assert identity(override) != identity()


def test_run_id_depends_on_options_only_where_they_take_effect():
    assert identity("refine=admm", "refine.relaxation=1.5") != identity("refine=admm")
    assert identity("refine=cg", "refine.relaxation=1.5") == identity("refine=cg")


@pytest.mark.parametrize(
    "override",
    [
        "device=cpu",
        "device=[cuda:0,cuda:1]",
        "tracking=wandb",
        "tags=[a]",
        "save=true",
        "figures.draw=false",
        "pipeline.activations=disk",
        "plan=true",
        "rerun=true",
        "calibration.dataset=ignored",  # the embedded text takes precedence
        "seed=0",
        "sparsity.ratio=0.50",
        "pipeline.permute=true",  # no effect on unstructured sparsity
        "allocation.spread=0.1",  # no effect on uniform allocation
    ],
)
def test_settings_without_effect_keep_the_run_id(override):
    assert identity(override) == identity()


IMAGES = ("model=small-sd3", "method=sparsegpt")


@pytest.mark.parametrize(
    "override",
    [
        "diffusion.steps=9",
        "diffusion.packages=2",
        "diffusion.weighting=uniform",
        "diffusion.scheduler=DDIMScheduler",
        "model=small-sd",
        "calibration.samples=9",
        "evaluation.images.samples=9",
        "evaluation.images.metrics=[distance,clip_score]",
        "evaluation.limit=3",
        "sparsity=structured",
        "reorder=rose",
        "seed=1",
    ],
)
def test_settings_that_affect_images_change_the_run_id(override):
    assert identity(*IMAGES, override) != identity(*IMAGES)


@pytest.mark.parametrize("override", ["pipeline.batch=2", "evaluation.batch=2", "evaluation.images.clip=./elsewhere"])
def test_settings_without_effect_on_images_keep_the_run_id(override):
    assert identity(*IMAGES, override) == identity(*IMAGES)


def test_settings_of_the_other_model_kind_keep_the_run_id():
    assert identity("diffusion.steps=9") == identity()
    dense = ("model=small-sd3", "method=dense")
    assert identity(*dense, "diffusion.packages=2", "seed=3") == identity(*dense)
    assert identity(*dense, "diffusion.steps=9") != identity(*dense)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
def test_run_id_covers_tokenizer_files_next_to_a_gguf(name, tmp_path):
    """transformers prefers a tokenizer in the folder of a GGUF file over the one in the file."""
    model = tmp_path / "model.gguf"
    model.write_bytes(b"GGUF")
    overrides = ("model=local", f"model.path={model}")
    before = identity(*overrides)
    (tmp_path / "notes.txt").write_text("of no effect")
    assert identity(*overrides) == before
    (tmp_path / name).write_text("{}")
    assert identity(*overrides) != before


def test_run_id_depends_on_the_content_of_scoring_models(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "image.png").write_bytes(b"the same")
    clip = [
        (*IMAGES, "evaluation.images.metrics=[clip_score]", f"evaluation.images.clip={tmp_path}/{n}") for n in ("one", "two")
    ]
    assert identity(*clip[0]) == identity(*clip[1])
    (tmp_path / "two" / "image.png").write_bytes(b"another")
    assert identity(*clip[0]) != identity(*clip[1])


def test_structured_pruning_options_change_the_run_id():
    own = ("method=sparsegpt", "sparsity=structured")
    others = (
        "sparsity.heads=false",
        "sparsity.neurons=false",
        "sparsity.saliency=exact",
        "sparsity.at_once=8",
        "sparsity.ratio=0.3",
    )
    assert len({identity(*own), *(identity(*own, other) for other in others)}) == 6


def test_equivalent_patterns_have_the_same_run_id():
    assert identity("sparsity=2:4") == identity("sparsity.pattern=2:4", "sparsity.ratio=0.5")


def test_run_id_depends_on_options_that_apply_to_the_pattern_or_rule():
    assert identity("sparsity=2:4", "pipeline.permute=true") != identity("sparsity=2:4")
    assert identity("allocation=owl", "allocation.outlier=7") != identity("allocation=owl")
    assert identity("allocation=losses", "allocation.outlier=7") == identity("allocation=losses")


def test_run_id_of_a_dense_model_depends_only_on_the_evaluation():
    assert identity("method=dense", "reorder=none", "seed=3", "sparsity.ratio=0.9", "calibration=c4") == identity(
        "method=dense"
    )
    assert identity("method=dense", "refine=admm", "target=residual", "allocation=owl") == identity("method=dense")
    assert identity("method=dense", "evaluation.perplexity.embedded.window=512") != identity("method=dense")


def test_changed_default_in_a_config_file_changes_the_run_id(tmp_path):
    copy = tmp_path / "conf"
    shutil.copytree(config_folder(), copy)
    assert identity(folder=copy) == identity()
    engine = copy / "engine" / "default.yaml"
    engine.write_text(engine.read_text().replace("damping: 0.01", "damping: 0.011"))
    assert identity(folder=copy) == identity("engine.damping=0.011") != identity()


def test_run_id_depends_on_file_content_and_not_on_the_path(tmp_path):
    def of(name: str) -> str:
        return identity("calibration=local", f"calibration.path={tmp_path / name}")

    (tmp_path / "a.txt").write_text("some text")
    (tmp_path / "b.txt").write_text("some text")
    (tmp_path / "c.txt").write_text("other text")
    assert of("a.txt") == of("b.txt") != of("c.txt")
    (tmp_path / "a.txt").write_text("changed")
    assert of("a.txt") != of("b.txt")


def test_run_id_depends_on_the_files_of_a_model_folder(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    model = [f"model.path={tmp_path}/one", f"model.path={tmp_path}/two"]
    assert identity(model[0]) == identity(model[1])
    (tmp_path / "two" / "model.safetensors").write_text("weights")
    assert identity(model[0]) != identity(model[1])


def test_fingerprint_of_a_large_file_is_cached_until_the_file_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("ROSE_EXP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fingerprint, "LARGE", 1)
    file = tmp_path / "weights"
    file.write_text("a")
    first = fingerprint.content_sha256(file)
    monkeypatch.setattr(fingerprint, "file_sha256", lambda _: "read again")
    assert fingerprint.content_sha256(file) == first
    file.write_text("bb")
    assert fingerprint.content_sha256(file) == "read again"


def test_corrupted_cache_entries_are_recomputed(tmp_path, monkeypatch):
    monkeypatch.setenv("ROSE_EXP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fingerprint, "LARGE", 1)
    file = tmp_path / "weights"
    file.write_text("a")
    expected = hashlib.sha256(b"a").hexdigest()
    assert fingerprint.content_sha256(file) == expected
    (entry,) = (tmp_path / "cache" / "sha256").iterdir()
    whole = entry.read_bytes()
    flipped = [bytes([*whole[:place], whole[place] ^ 1, *whole[place + 1 :]]) for place in (0, 1, 63, 64, 65, 128)]
    for damaged in (b"", whole[:63], whole[:64], whole + b"0", b"\xff" * 129, b"0" * 64, *flipped):
        entry.write_bytes(damaged)
        assert fingerprint.content_sha256(file) == expected
        assert entry.read_bytes() == whole


def test_run_id_depends_on_the_order_of_layer_options():
    orders = [
        {"*mlp*": {"max_cycles": 0}, "*down*": {"max_cycles": 9}},
        {"*down*": {"max_cycles": 9}, "*mlp*": {"max_cycles": 0}},
    ]
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        config = OmegaConf.to_container(compose("config", overrides=["method=dsnot"]), resolve=True)
    first, second = (run_id(read_settings(config | {"method": config["method"] | {"layer_options": o}})) for o in orders)
    assert first != second


def test_run_id_depends_on_nested_folders_and_the_text_format(tmp_path):
    tasks = tmp_path / "tasks" / "mine"
    tasks.mkdir(parents=True)
    (tasks / "task.yaml").write_text("a")
    override = f"evaluation.zero_shot.include_path={tmp_path / 'tasks'}"
    before = identity("evaluation=zero_shot", override)
    (tasks / "task.yaml").write_text("b")
    assert identity("evaluation=zero_shot", override) != before
    for name in ("a.txt", "a.jsonl"):
        (tmp_path / name).write_text('{"text": "x"}')
    assert len({identity("calibration=local", f"calibration.path={tmp_path / name}") for name in ("a.txt", "a.jsonl")}) == 2


def test_threshold_is_ignored_without_reordering():
    assert identity("method=sparsegpt", "reorder=none", "reorder.threshold=0.1") == identity("method=sparsegpt")
