"""End-to-end runs of diffusion models."""

from __future__ import annotations

import pytest
from diffusers import DiffusionPipeline

import rose_exp
from rose_exp.cli.command import check_command
from rose_exp.engine.weighting import StepWeighting
from rose_exp.report.files import write_report
from rose_exp.runs import diffusion as experiment
from rose_exp.runs import pipelines
from rose_exp.runtime.errors import RoseExpError, SettingsError
from rose_exp.tracking import read_record

from ..diffusion.pipelines import NAMES

OTHERS = (
    [],
    ["diffusion.weighting=uniform"],
    ["diffusion.packages=1"],
    ["diffusion.alpha_min=0.1"],
    ["diffusion.alpha_max=9"],
    ["diffusion.guidance=2"],
)
FAST = ["calibration.samples=1", "diffusion.steps=2", "evaluation=none", "figures.draw=false"]
FEW = ["calibration.samples=3", "evaluation.images.samples=2", "diffusion.steps=3"]


def run(folder, *overrides):
    return rose_exp.run(["model=small-sd3", *FEW, "method=sparsegpt", *overrides], folder)


@pytest.mark.parametrize("name", NAMES)
def test_every_pipeline_runs(name, tmp_path):
    record = run(tmp_path, f"model=small-{name}")
    assert record["status"] == "finished"
    assert record["label"] == "OBS-Diff"
    assert record["metrics"]["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert {"images.latent_mse", "images.psnr", "images.ssim"} <= set(record["metrics"])
    assert "images.speedup" not in record["metrics"]  # stored zeros give no speedup
    assert record["images"]["denoiser_ms"] > 0
    assert ("images.vae_distance" in record["metrics"]) == (name != "ddpm")
    assert len(record["images"]["latent_mse"]) == 3
    assert len(record["packages"]) == 4
    assert [layer for package in record["packages"] for layer in package["layers"]] == [x["name"] for x in record["layers"]]
    protocol = record["protocol"]
    assert protocol["versions"]["diffusers"]
    assert protocol["calibration"]["prompts"] == 3
    assert protocol["images"]["noise_seed"] == 24432
    assert (tmp_path / record["run_id"] / "figures" / "contact_sheet.png").exists()
    assert not (tmp_path / record["run_id"] / "state").exists()


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_sparsity_accounts_for_the_stored_low_rank_part(tmp_path, pattern):
    sparsity = [] if pattern == "unstructured" else [f"sparsity='{pattern}'"]
    record = rose_exp.run([*FAST, "model=small-sd3", "method=oats", "method.options.iterations=2", *sparsity], tmp_path)
    layers = record["layers"]
    assert any(layer["rank"] for layer in layers)
    weights = [layer["rows"] * layer["columns"] for layer in layers]
    total = sum(layer["sparsity"] * weight for layer, weight in zip(layers, weights, strict=True))
    assert record["metrics"]["sparsity"] == pytest.approx(total / sum(weights))
    differs = {event["layer"] for event in record["events"] if event["kind"] == "sparsity_differs"}
    if pattern == "unstructured":
        assert record["metrics"]["sparsity"] == pytest.approx(0.5, abs=0.03)
        assert not differs
    else:
        assert 0.2 < record["metrics"]["sparsity"] < 0.5
        assert differs == {layer["name"] for layer in layers if layer["rank"]}


@pytest.mark.parametrize("model", ["sd3", "flux"])
def test_structured_sparsity_equals_the_fraction_of_zeros(model, tmp_path, monkeypatch):
    counted, real = [], pipelines.saved_and_total

    def count(layers, reports):
        counted.append((sum(int((layer.weight == 0).sum()) for layer in layers), sum(layer.weight.numel() for layer in layers)))
        return real(layers, reports)

    monkeypatch.setattr(pipelines, "saved_and_total", count)
    own = [f"model=small-{model}", "method=sparsegpt", "sparsity=structured", "sparsity.ratio=0.4"]
    record = rose_exp.run([*FAST, *own], tmp_path)
    assert record["metrics"]["sparsity"] == counted[0][0] / counted[0][1] > 0.3


@pytest.mark.slow
def test_step_weighting_and_packages_change_the_result_and_the_run_id(tmp_path):
    records = [run(tmp_path, *own) for own in OTHERS]
    assert len({record["run_id"] for record in records}) == len(OTHERS)
    assert len({record["metrics"]["images.latent_mse"] for record in records}) == len(OTHERS)
    assert run(tmp_path)["ended"] == records[0]["ended"]  # a finished run is reused
    assert StepWeighting().weights(3)[0] != StepWeighting().weights(3)[-1]


def test_seed_changes_the_calibration_noise_and_not_the_evaluation_noise(tmp_path, monkeypatch):
    measured, calibrated = [], []
    real_render, real_pruner = experiment.render, pipelines.PackagePruner

    def render(of, prompts, seeds, *others):
        measured.append(list(seeds))
        return real_render(of, prompts, seeds, *others)

    def prune(of, layers, parts, plan, prompts, seeds, *others):
        calibrated.append(list(seeds))
        return real_pruner(of, layers, parts, plan, prompts, seeds, *others)

    monkeypatch.setattr(experiment, "render", render)
    monkeypatch.setattr(pipelines, "PackagePruner", prune)
    monkeypatch.setenv("ROSE_EXP_CACHE", str(tmp_path / "cache"))
    first, second = run(tmp_path), run(tmp_path, "seed=1")
    assert len(measured) == 3  # the pruned model of each run, and the dense model once
    assert all(seeds == measured[0] for seeds in measured)
    assert len({*measured[0], *calibrated[0], *calibrated[1]}) == 2 + 3 + 3  # all distinct
    assert first["protocol"]["calibration"]["noise_sha256"] != second["protocol"]["calibration"]["noise_sha256"]
    assert first["protocol"]["images"] == second["protocol"]["images"]


def test_images_of_the_dense_model_are_cached(tmp_path, monkeypatch):
    rendered = []
    real = experiment.render
    monkeypatch.setattr(experiment, "render", lambda *arguments: rendered.append(arguments[3]) or real(*arguments))
    monkeypatch.setenv("ROSE_EXP_CACHE", str(tmp_path / "cache"))
    changes = [
        "",
        "diffusion.steps=4",
        "diffusion.guidance=2",
        "diffusion.text_length=8",
        "diffusion.height=64 diffusion.width=64",
    ]
    changes += ["evaluation.images.samples=3", "evaluation.images.embedded=calibration_prompts", "model.omit=[text_encoder_3]"]
    changes += [
        "model.dtype=bfloat16",
        "evaluation.images.metrics=[]",
        "model=small-sd",
        "diffusion.scheduler=FlowMatchHeunDiscreteScheduler",
    ]
    for change in changes:  # each renders the dense model once
        rendered.clear()
        records = [run(tmp_path / f"with {cached}", *change.split(), f"seed={cached}") for cached in (False, True)]
        assert rendered == ["images of the dense model", *["images of the pruned model"] * 2], change
    monkeypatch.setenv("ROSE_EXP_CACHE_GB", "0")
    first, second = (run(tmp_path / f"{place}", "seed=1", "method=wanda") for place in ("without", "again"))
    monkeypatch.delenv("ROSE_EXP_CACHE_GB")
    third = run(tmp_path / "from the cache", "seed=1", "method=wanda")
    assert first["metrics"] == second["metrics"] == third["metrics"]
    assert first["images"]["latent_mse"] == third["images"]["latent_mse"]
    assert records[0]["status"] == "finished"


def test_speedup_is_measured_in_the_same_run(tmp_path, monkeypatch):
    monkeypatch.setenv("ROSE_EXP_CACHE", str(tmp_path / "cache"))
    for seed in (0, 1):
        record = run(tmp_path, "sparsity=structured", f"seed={seed}")
        assert record["images"]["dense_denoiser_ms"] > 0
    assert not (tmp_path / "cache" / "derived").exists()


def test_saved_pipeline_has_the_recorded_parameters(tmp_path):
    overrides = ["sparsity=structured", "sparsity.ratio=0.4", "save=true", "pipeline.skip=['transformer_blocks.0.*']"]
    record = run(tmp_path, *overrides)
    assert record["parameters"]["pruned"] < record["parameters"]["dense"]
    own = record["images"]
    assert record["metrics"]["images.speedup"] == pytest.approx(own["dense_denoiser_ms"] / own["denoiser_ms"])
    folder = tmp_path / record["run_id"] / "model"
    loaded = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    assert sum(p.numel() for p in loaded.transformer.parameters()) == record["parameters"]["pruned"]
    assert loaded.transformer.transformer_blocks[0].attn.heads == 4  # skipped
    assert loaded.transformer.transformer_blocks[1].attn.heads == 2
    (folder / "transformer" / "modeling_narrowed.py").write_text("raise RuntimeError", encoding="utf-8")  # not executed here
    own = ["model=diffusion-local", f"model.path={folder}", "diffusion.height=32", "diffusion.width=32"]
    dense = rose_exp.run([*own, "method=dense", "evaluation.images.samples=2", "diffusion.text_length=16"], tmp_path)
    assert dense["parameters"]["dense"] == record["parameters"]["pruned"]
    again = run(tmp_path, *own, "diffusion.text_length=16", "sparsity.ratio=0.25")
    assert again["metrics"]["sparsity"] == pytest.approx(0.25, abs=0.01)


def test_pipelines_with_nothing_to_remove_are_rejected(tmp_path):
    own = ["model=small-ddpm", "sparsity=structured"]
    with pytest.raises(RoseExpError, match=r"sparsity\.neurons: expected a model with neurons to prune in a known layout"):
        run(tmp_path, *own)
    with pytest.raises(RoseExpError, match=r"sparsity\.ratio: expected a ratio that removes at least one of 4 heads"):
        run(tmp_path, *own, "sparsity.neurons=false", "sparsity.ratio=0.05")
    record = run(tmp_path, *own, "sparsity.neurons=false", "sparsity.ratio=0.5")
    assert record["parameters"]["pruned"] < record["parameters"]["dense"]


@pytest.mark.slow
def test_scheduler_can_be_replaced(tmp_path):
    record = run(tmp_path, "model=small-sd", "diffusion.scheduler=EulerDiscreteScheduler")
    assert record["protocol"]["model"]["scheduler"] == "EulerDiscreteScheduler"
    with pytest.raises(RoseExpError, match=r"diffusion\.scheduler: .*did you mean 'DDIMScheduler'"):
        run(tmp_path, "model=small-sd", "diffusion.scheduler=DDIMSheduler")
    heun = run(tmp_path, "model=small-sd", "diffusion.scheduler=HeunDiscreteScheduler")
    assert len(heun["images"]["latent_mse"]) == 2 * 3 - 1  # one per denoiser call


@pytest.mark.slow
def test_report_of_several_runs(tmp_path):
    for overrides in (["seed=0"], ["seed=1"], ["method=magnitude"], ["method=magnitude", "seed=1"], ["method=rose"]):
        run(tmp_path, *overrides)
    run(tmp_path, "method=dense")
    text = write_report([tmp_path], baseline="OBS-Diff")
    assert "## small-sd3: images.psnr" in text
    psnr = text.partition("## small-sd3: images.psnr")[2].partition("##")[0]
    best = next(line for line in psnr.splitlines() if "**" in line)
    assert not best.startswith("| Magnitude")  # higher is better
    assert "calibrated on 3 prompts; 3 steps, guidance 5; steps weighted log_decrease, 4 packages" in text
    assert "seeds 0, 1" in text
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert page.count("images of the dense model above those of pruned models") == 1  # of all runs
    assert "contact_sheet_1.png" in text


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["calibration=embedded"], "calibration.draw: expected prompts for a diffusion model, got windows"),
        (["evaluation=embedded"], "evaluation.perplexity: expected none for a diffusion model"),
        (["target=residual"], "target: expected none for a diffusion model"),
        (["allocation=owl"], "allocation: expected none for a diffusion model"),
        (["model.path=./nowhere"], "model: expected at most one of path and built, got both"),
        (["diffusion.alpha_min=2"], "diffusion.alpha_min: expected at most alpha_max, 1.2, got 2"),
        (["diffusion.height=null"], "diffusion.height: expected null exactly if width is null"),
        (["diffusion.weighting=log"], "diffusion.weighting: expected"),
        (["diffusion.height=30"], "diffusion.height: expected"),
        (["calibration.embedded=calibration_promts"], "did you mean 'calibration_prompts'?"),
        (["evaluation.images.metrics=[distance,psnr]"], "evaluation.images.metrics: expected some of distance"),
        (["pipeline.permute=true", "sparsity=2:4"], "pipeline.permute: expected false for a diffusion model"),
        (["pipeline.true_sequential=true"], "pipeline.true_sequential: expected false for a diffusion model"),
        (["sparsity=2:4", "sparsity_config=true", "save=true"], "sparsity_config: expected false for a diffusion model"),
    ],
)
def test_incompatible_options_raise_an_error_that_names_them(overrides, message, tmp_path):
    with pytest.raises(SettingsError) as caught:
        run(tmp_path, *overrides)
    assert any(message in problem for problem in caught.value.problems), caught.value.problems


def test_image_options_are_rejected_for_language_models(tmp_path):
    with pytest.raises(SettingsError) as caught:
        rose_exp.run(["evaluation=images", "calibration=prompts"], tmp_path)
    message = " ".join(caught.value.problems)
    assert "calibration.draw: expected windows or documents for a language model, got prompts" in message
    assert "evaluation.images: expected null for a language model" in message


def test_unsupported_settings_and_invalid_pipeline_folders_are_rejected(tmp_path):
    with pytest.raises(RoseExpError, match="expected null for guidance_scale, which DDPMPipeline does not support"):
        run(tmp_path, "model=small-ddpm", "diffusion.guidance=3")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(RoseExpError, match=r"model\.path: cannot read .*model_index\.json"):
        run(tmp_path, "model=diffusion-local", f"model.path={empty}")
    with pytest.raises(RoseExpError, match=r"pipeline\.skip: expected a pattern of layer names"):
        run(tmp_path, "pipeline.skip=['*nothing*']")


def test_resuming_an_interrupted_run_gives_identical_metrics(tmp_path, monkeypatch):
    from rose_exp.diffusion import packages
    from rose_exp.runtime.signals import Interrupted

    whole = run(tmp_path / "whole")
    real = packages.PackagePruner.prune_unit

    def interrupt(self, unit):
        if unit.index == 2:
            raise Interrupted("stop")
        return real(self, unit)

    monkeypatch.setattr(packages.PackagePruner, "prune_unit", interrupt)
    with pytest.raises(Interrupted):
        run(tmp_path / "cut")
    folder = tmp_path / "cut" / whole["run_id"]
    assert read_record(folder / "run.json")["status"] == "interrupted"
    monkeypatch.setattr(packages.PackagePruner, "prune_unit", real)
    again = run(tmp_path / "cut")
    assert again["resumed"] == 2
    assert again["metrics"]["images.latent_mse"] == whole["metrics"]["images.latent_mse"]
    assert [layer["name"] for layer in again["layers"]] == [layer["name"] for layer in whole["layers"]]


def test_plan_lists_the_jobs_without_an_estimate(tmp_path, monkeypatch):
    from rose_exp.sweeps.plan import format_plan

    monkeypatch.chdir(tmp_path)
    sweep = ["calibration=prompts", "evaluation=images", "model=small-sd3,small-sd", "method=magnitude,sparsegpt"]
    command = check_command(["-m", *sweep, "plan=true"])
    text = format_plan(command.jobs, command.sweep)
    assert "4 of 4 jobs to run" in text
    assert "memory and time unknown: no estimate is made for diffusion models" in text
