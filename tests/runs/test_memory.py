"""Memory and disk estimates: a run that does not fit is rejected before it starts, with settings that would fit."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, GptOssConfig, LlamaConfig

import rose_exp
from rose_exp.cli.command import check_command
from rose_exp.models import ModelShape, find_blocks, linear_layers, model_shape
from rose_exp.pruning import PruneContext
from rose_exp.pruning.waves import limited_waves
from rose_exp.runs import language
from rose_exp.runs.fitting import check_fits, choose
from rose_exp.runs.memory import Footprint, Placement, _Run, footprint
from rose_exp.runs.preparation import pruning_plan
from rose_exp.runtime.errors import RoseExpError
from rose_exp.settings.schema import Settings
from scripts.measure_memory import CASES, measure

from ..conftest import REPOSITORY

GIB = 2**30
LIMIT = 900 * 2**20  # memory limit of a process, in bytes


@pytest.fixture(scope="module")
def preflight():
    spec = importlib.util.spec_from_file_location("preflight", REPOSITORY / "scripts" / "preflight.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def settings_of(*overrides: str):
    return check_command(list(overrides)).jobs[0].settings


def test_host_memory_grows_with_the_stored_activations(small):
    def bytes_of(*overrides: str) -> int:
        settings = settings_of(*small, *overrides)
        return footprint(settings, model_shape(settings.model), False, Placement("memory", False)).host

    more = bytes_of("calibration.samples=8004") - bytes_of()
    assert more == pytest.approx(8000 * 128 * 64 * 4, rel=0.2)  # hidden states, float32
    assert bytes_of("calibration.samples=8004", "pipeline.activations=disk") < bytes_of("calibration.samples=8004")


def test_second_stream_of_hidden_states_is_counted_once(small):
    """The stream of a regression target and that of an allocation survey never exist at the same time."""

    def bytes_of(*overrides: str) -> int:
        settings = settings_of(*small, "calibration.samples=16000", *overrides)
        return footprint(settings, model_shape(settings.model), False, Placement("memory", False)).host

    stream = 16000 * 128 * 64 * 4
    plain = bytes_of()
    for second in (["allocation=owl"], ["target=residual"], ["allocation=owl", "target=residual"]):
        assert bytes_of(*second) - plain == pytest.approx(stream, rel=0.2)


@pytest.mark.slow
def test_published_models_fit_the_expected_hardware(preflight):
    placed, found = preflight.fitting("LLaMA2-70B", "80 GB GPU, 64 GB host")
    assert placed == Placement("disk", True)
    assert found.device < 80e9
    assert found.host < 64e9
    preflight.fitting("LLaMA2-70B", "24 GB GPU, 64 GB host", "pipeline.batch=1", "pipeline.activations=host")
    preflight.fitting("LLaMA2-70B", "CPU, 24 GB", "pipeline.batch=1", "pipeline.activations=disk")
    table = preflight.table()
    assert "does not fit" not in table
    assert (REPOSITORY / "scripts" / "preflight.md").read_text().rstrip().endswith(table)  # the committed table is current
    assert preflight.shape("LLaMA2-70B").parameters == 68_976_648_192  # as published
    assert preflight.shape("LLaMA3-8B").parameters == 8_030_261_248


def test_run_that_does_not_fit_is_rejected_with_a_working_suggestion(preflight):
    preflight.MACHINES["20 GB GPU, 64 GB host"] = (20e9, 64e9)
    with pytest.raises(RoseExpError) as error:
        preflight.fitting("LLaMA2-70B", "20 GB GPU, 64 GB host")
    text = str(error.value)
    assert "does not fit (device): the run needs" in text
    assert "available: 18.6 GiB on the device" in text
    wanted = text.partition("It would fit with ")[2].partition(". preflight=false")[0].split()
    assert wanted
    preflight.fitting("LLaMA2-70B", "20 GB GPU, 64 GB host", *wanted)  # the suggestion works
    shape, settings = preflight.shape("LLaMA2-70B"), settings_of(*preflight.PROTOCOL)
    with pytest.raises(RoseExpError, match="No settings with an equal result make it fit: they need at least"):
        check_fits(settings, shape, False, Footprint(GIB, None, 10**15))
    with pytest.raises(RoseExpError, match=r"does not fit \(disk\)"):
        check_fits(settings, shape, False, Footprint(10**15, None, GIB))
    check_fits(settings.model_copy(update={"preflight": False}), shape, False, Footprint(GIB, None, GIB))


TARGET = 1.15  # of an estimate, relative to the measured peak
OFTEN = (  # at least one case for each term of the estimates
    *("sparsegpt", "oats", "alps", "wanda refine admm", "rose_plus", "allocation owl", "samples, reconstruction", "permute"),
    *("structured exact", "vocabulary", "evaluation only", "deep, from disk", "deep, saved", "by blocks"),
    *("samples, disk", "samples, target"),
)
assert set(OFTEN) <= set(CASES)


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in OFTEN else pytest.mark.exhaustive) for n in CASES])
def test_estimates_are_close_to_the_peaks_of_real_runs(name, tmp_path):
    measured = measure(CASES[name], tmp_path)
    memory, disk = measured["estimate"] / measured["peak"], measured["disk"] / measured["peak_disk"]
    assert 1.0 <= memory <= TARGET, measured
    assert measured["disk"] - measured["peak_disk"] < 2e6 or 1.0 <= disk <= TARGET, measured


def test_run_record_contains_estimates_close_to_the_measured_peaks(small, tmp_path):
    record = rose_exp.run([*small, "pipeline.weights=disk", "save=true"], tmp_path)
    estimate, peak = record["estimate"], record["peak_memory_bytes"]
    assert (estimate["weights"], estimate["by_blocks"]) == ("disk", True)
    assert estimate["device"] is None
    assert 0.3 < peak["host"] / estimate["host"] < 3  # the process has also run other tests
    assert 0.5 < record["peak_disk_bytes"] / estimate["disk"] < 1.1
    whole = rose_exp.run([*small, "pipeline.weights=memory", "pipeline.by_blocks=false"], tmp_path / "whole")
    assert record["metrics"] == whole["metrics"]  # bitwise equal
    assert [layer["error"] for layer in record["layers"]] == [layer["error"] for layer in whole["layers"]]


def synthetic(folder: Path, blocks: int) -> int:
    """Write a sharded Llama checkpoint with random float32 weights, one block at a time; return its size in bytes."""
    hidden, inner = 1024, 2816
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        dtype="float32",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    weight_map, total = {}, 0
    for block in range(blocks):
        shapes = {f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
        shapes |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
        tensors = {f"model.layers.{block}.{name}.weight": torch.randn(shape) * 0.02 for name, shape in shapes.items()}
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{block}.{name}.weight"] = torch.ones(hidden)
        if block == 0:
            tensors |= {"model.embed_tokens.weight": torch.randn(512, hidden), "model.norm.weight": torch.ones(hidden)}
        shard = f"model-{block:05}.safetensors"
        save_file(tensors, folder / shard, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, shard)
        total += (folder / shard).stat().st_size
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return total


@pytest.mark.slow
def test_checkpoint_four_times_larger_than_memory_is_pruned_and_evaluated(small, shared, tmp_path):
    folder = tmp_path / "large"
    folder.mkdir()
    total = synthetic(folder, 72)
    assert total > 3.9 * LIMIT
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((shared / "data/models/stories260k-llama" / name).read_bytes())
    overrides = [x for x in small if not x.startswith("model.path")]
    overrides += [f"model.path={folder}", "method=wanda", "calibration.window=64", "evaluation.perplexity.local.window=64"]
    overrides += ["evaluation.perplexity.local.windows=4", "pipeline.layers=['*.q_proj']"]
    code = (
        "import resource, json;"
        f"resource.setrlimit(resource.RLIMIT_DATA, ({LIMIT}, {LIMIT}));"
        "import rose_exp;"
        f"print(json.dumps(rose_exp.run({overrides!r}, {str(tmp_path / 'out')!r})))"
    )
    # return freed memory to the system at once: the limit also counts free memory held by the allocator
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2", "MALLOC_MMAP_THRESHOLD_": "131072"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=REPOSITORY, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads(done.stdout.splitlines()[-1])
    assert record["estimate"]["weights"] == "disk"  # selected automatically
    assert record["metrics"]["sparsity"] == 0.5
    assert record["peak_memory_bytes"]["host"] < total / 3.5
    assert len(record["layers"]) == 72


@pytest.fixture(scope="module")
def mixture(tmp_path_factory) -> tuple[Settings, ModelShape]:
    """Settings for a mixture of experts whose moments take more memory than its weights, and its sizes."""
    folder = tmp_path_factory.mktemp("mixture")
    config = GptOssConfig(
        vocab_size=96,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=2,
        head_dim=32,
        num_attention_heads=8,
        num_key_value_heads=2,
        num_local_experts=64,
        max_position_embeddings=128,
    )
    config.save_pretrained(folder)
    settings = settings_of(
        f"model.path={folder}", "model=local", "calibration.window=64", "calibration.samples=4", "evaluation=none"
    )
    return settings, model_shape(settings.model)


def test_moments_are_limited_if_those_of_a_block_do_not_fit(mixture):
    settings, shape = mixture
    whole = footprint(settings, shape, False, Placement("memory", False)).host
    assert choose(settings, shape, False, Footprint(whole, None, 10**15)) == Placement("memory", False)
    placed = choose(settings, shape, False, Footprint(whole - 1, None, 10**15))
    assert placed == Placement("memory", False, moments_bytes=shape.largest * 4)
    assert footprint(settings, shape, False, placed).host < whole - 2**25
    assert choose(settings, shape, False, Footprint(0, None, 10**15)).moments_bytes == shape.largest * 4


def test_estimated_waves_are_those_of_pruning(mixture):
    settings, shape = mixture
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(settings.model.path))
    blocks = find_blocks(model)
    groups: dict[str, list] = {}
    for layer, known in zip(linear_layers(blocks.blocks[0], blocks.block_name(0)), shape.blocks[0].layers, strict=True):
        groups.setdefault(known.group, []).append(layer)
    for limit in (None, 1, 2**21, 2**24, 2**30):
        context = PruneContext(moments_bytes=limit)
        expected = [
            [group[0].name for group in wave] for wave in limited_waves(list(groups.values()), pruning_plan(settings), context)
        ]
        estimate = _Run(settings, shape, False, Placement("memory", False, limit))
        named = {known.group: [] for known in shape.blocks[0].layers}
        for known in shape.blocks[0].layers:
            named[known.group].append(known)
        assert [[named[name][0].name for name in wave] for wave in estimate._waves(named)] == expected


@pytest.mark.slow
def test_a_run_with_little_memory_gives_the_same_result(small, tmp_path, monkeypatch):
    expected = rose_exp.run([*small, "evaluation.perplexity.local.windows=2"], tmp_path / "whole")
    record = expected["estimate"]
    assert record["moments_bytes"] is None
    few = Footprint(record["host"] - 1, None, 10**15)
    monkeypatch.setattr(language, "available", lambda *_: few)
    limited = rose_exp.run([*small, "evaluation.perplexity.local.windows=2"], tmp_path / "limited")
    assert limited["estimate"]["moments_bytes"] is not None
    assert limited["metrics"] == expected["metrics"]
    for one, other in zip(limited["layers"], expected["layers"], strict=True):
        assert one | {"seconds": 0} == other | {"seconds": 0}
