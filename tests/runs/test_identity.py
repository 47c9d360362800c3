"""A run is called by all settings that can change its result, and by no other."""

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
def test_what_can_change_a_number_makes_another_run(override):
    assert identity(override) != identity()


def test_options_count_where_they_act():
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
        "calibration.dataset=ignored",  # the embedded text stands before it
        "seed=0",
        "sparsity.ratio=0.50",
        "pipeline.permute=true",  # unstructured sparsity has no groups
        "allocation.spread=0.1",  # the same share of every layer
    ],
)
def test_what_cannot_does_not(override):
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
def test_what_can_change_images_makes_another_run(override):
    assert identity(*IMAGES, override) != identity(*IMAGES)


@pytest.mark.parametrize("override", ["pipeline.batch=2", "evaluation.batch=2", "evaluation.images.clip=./elsewhere"])
def test_what_cannot_change_images_does_not(override):
    assert identity(*IMAGES, override) == identity(*IMAGES)


def test_settings_of_one_kind_of_model_are_nothing_to_the_other():
    assert identity("diffusion.steps=9") == identity()
    dense = ("model=small-sd3", "method=dense")
    assert identity(*dense, "diffusion.packages=2", "seed=3") == identity(*dense)
    assert identity(*dense, "diffusion.steps=9") != identity(*dense)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
def test_a_gguf_counts_with_the_tokenizer_beside_it(name, tmp_path):
    """transformers reads a tokenizer from the folder of a GGUF file, in place of the one in the file."""
    model = tmp_path / "model.gguf"
    model.write_bytes(b"GGUF")
    overrides = ("model=local", f"model.path={model}")
    before = identity(*overrides)
    (tmp_path / "notes.txt").write_text("of no effect")
    assert identity(*overrides) == before
    (tmp_path / name).write_text("{}")
    assert identity(*overrides) != before


def test_real_images_and_scoring_models_count_by_their_content(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "image.png").write_bytes(b"the same")
    clip = [
        (*IMAGES, "evaluation.images.metrics=[clip_score]", f"evaluation.images.clip={tmp_path}/{n}") for n in ("one", "two")
    ]
    assert identity(*clip[0]) == identity(*clip[1])
    (tmp_path / "two" / "image.png").write_bytes(b"another")
    assert identity(*clip[0]) != identity(*clip[1])


def test_how_heads_and_neurons_are_removed_makes_another_run():
    own = ("method=sparsegpt", "sparsity=structured")
    others = (
        "sparsity.heads=false",
        "sparsity.neurons=false",
        "sparsity.saliency=exact",
        "sparsity.at_once=8",
        "sparsity.ratio=0.3",
    )
    assert len({identity(*own), *(identity(*own, other) for other in others)}) == 6


def test_equal_patterns_are_one_run():
    assert identity("sparsity=2:4") == identity("sparsity.pattern=2:4", "sparsity.ratio=0.5")


def test_what_has_no_effect_on_one_pattern_or_rule_has_on_another():
    assert identity("sparsity=2:4", "pipeline.permute=true") != identity("sparsity=2:4")
    assert identity("allocation=owl", "allocation.outlier=7") != identity("allocation=owl")
    assert identity("allocation=losses", "allocation.outlier=7") == identity("allocation=losses")


def test_of_a_dense_model_only_the_measurement_counts():
    assert identity("method=dense", "reorder=none", "seed=3", "sparsity.ratio=0.9", "calibration=c4") == identity(
        "method=dense"
    )
    assert identity("method=dense", "refine=admm", "target=residual", "allocation=owl") == identity("method=dense")
    assert identity("method=dense", "evaluation.perplexity.embedded.window=512") != identity("method=dense")


def test_another_default_in_a_file_makes_another_run(tmp_path):
    copy = tmp_path / "conf"
    shutil.copytree(config_folder(), copy)
    assert identity(folder=copy) == identity()
    engine = copy / "engine" / "default.yaml"
    engine.write_text(engine.read_text().replace("damping: 0.01", "damping: 0.011"))
    assert identity(folder=copy) == identity("engine.damping=0.011") != identity()


def test_files_count_by_what_is_in_them(tmp_path):
    def of(name: str) -> str:
        return identity("calibration=local", f"calibration.path={tmp_path / name}")

    (tmp_path / "a.txt").write_text("some text")
    (tmp_path / "b.txt").write_text("some text")
    (tmp_path / "c.txt").write_text("other text")
    assert of("a.txt") == of("b.txt") != of("c.txt")
    (tmp_path / "a.txt").write_text("changed")
    assert of("a.txt") != of("b.txt")


def test_folders_of_models_count_by_their_files(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    model = [f"model.path={tmp_path}/one", f"model.path={tmp_path}/two"]
    assert identity(model[0]) == identity(model[1])
    (tmp_path / "two" / "model.safetensors").write_text("weights")
    assert identity(model[0]) != identity(model[1])


def test_the_fingerprint_of_a_large_file_is_kept_until_the_file_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("ROSE_EXP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fingerprint, "LARGE", 1)
    file = tmp_path / "weights"
    file.write_text("a")
    first = fingerprint.content_sha256(file)
    monkeypatch.setattr(fingerprint, "file_sha256", lambda _: "read again")
    assert fingerprint.content_sha256(file) == first
    file.write_text("bb")
    assert fingerprint.content_sha256(file) == "read again"


def test_a_damaged_fingerprint_in_the_cache_is_computed_again(tmp_path, monkeypatch):
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


def test_the_order_of_layer_options_counts_as_the_first_that_fits_does():
    orders = [
        {"*mlp*": {"max_cycles": 0}, "*down*": {"max_cycles": 9}},
        {"*down*": {"max_cycles": 9}, "*mlp*": {"max_cycles": 0}},
    ]
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        config = OmegaConf.to_container(compose("config", overrides=["method=dsnot"]), resolve=True)
    first, second = (run_id(read_settings(config | {"method": config["method"] | {"layer_options": o}})) for o in orders)
    assert first != second


def test_folders_in_folders_and_how_a_text_is_read_count(tmp_path):
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


def test_an_order_that_is_none_has_no_threshold():
    assert identity("method=sparsegpt", "reorder=none", "reorder.threshold=0.1") == identity("method=sparsegpt")
