"""Pipelines in float16 and bfloat16 on a CPU."""

from __future__ import annotations

import pytest
import torch

import rose_exp
from rose_exp.engine import DSnoT, Magnitude, Ordering, Refine, SparseGPT, Structured, Wanda
from rose_exp.engine.moments import InputMoments, sums_dtype
from rose_exp.runtime.errors import RoseExpError

from .pipelines import NAMES, images, pruner_of, sampler

HALF = (torch.float16, torch.bfloat16)
FAST = {("sd3", torch.float16), ("ddpm", torch.bfloat16)}


def cases() -> list:
    return [
        pytest.param(name, dtype, marks=[] if (name, dtype) in FAST else pytest.mark.slow) for name in NAMES for dtype in HALF
    ]


@pytest.mark.parametrize(("name", "dtype"), cases())
def test_mean_error_is_close_to_that_of_float32(name, dtype, monkeypatch):
    sums = []
    update = InputMoments.update
    monkeypatch.setattr(InputMoments, "update", lambda self, *a, **k: update(self, *a, **k) or sums.append(self.gram.dtype))
    expected = pruner_of(name).run()
    of = sampler(name)
    of.pipeline.to(dtype)
    reports = pruner_of(name, of=of).run()
    assert set(sums) == {sums_dtype("cpu", torch.float32)}
    for report, other in zip(reports, expected, strict=True):
        assert report.name == other.name
        assert report.sparsity == other.sparsity
        assert of.denoiser.get_submodule(report.name).weight.dtype == dtype
    assert sum(report.error for report in reports) == pytest.approx(sum(report.error for report in expected), rel=0.05)
    assert torch.isfinite(images(of)).all()


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "sd3" else pytest.mark.exhaustive) for name in NAMES]
)
@pytest.mark.parametrize(
    ("method", "sparsity", "options"),
    [
        (Magnitude(), 0.5, {}),
        (Wanda(), "2:4", {}),
        (DSnoT(), 0.5, {}),
        (SparseGPT(), 0.5, {"ordering": "rose"}),
        (SparseGPT(), 0.5, {"refine": "cg"}),
        (SparseGPT(), "structured", {}),
    ],
    ids=["magnitude", "wanda", "dsnot", "rose", "cg", "structured"],
)
def test_every_method(method, sparsity, options, name, dtype):
    found = {"ordering": Ordering.rose()} if "ordering" in options else {}
    found |= {"refine": Refine(steps=3)} if "refine" in options else {}
    if sparsity == "structured":
        sparsity = Structured(0.3, neurons=name != "ddpm")
    errors = []
    for each in (torch.float32, dtype):
        of = sampler(name)
        of.pipeline.to(each)
        reports = pruner_of(name, of=of, method=method, sparsity=sparsity, **found).run()
        errors.append(sum(report.error for report in reports))
    assert errors[1] == pytest.approx(errors[0], rel=0.05)


@pytest.mark.parametrize("model", ["small-sd3", pytest.param("digits-sd3", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [pytest.param("float16", marks=pytest.mark.slow), "bfloat16"])
def test_runs_are_close_to_those_of_float32(model, dtype, tmp_path):
    own = [f"model={model}", "method=sparsegpt", "calibration.samples=2", "diffusion.steps=2", "figures.draw=false"]
    own += ["evaluation.images.samples=2", "evaluation.images.metrics=[distance]"]
    half, full = (rose_exp.run([*own, f"model.dtype={name}"], tmp_path) for name in (dtype, "float32"))
    assert half["protocol"]["model"]["dtype"] == dtype
    assert half["run_id"] != full["run_id"]
    assert [package["moments_bytes"] for package in half["packages"]] == [p["moments_bytes"] for p in full["packages"]]
    assert half["metrics"]["sparsity"] == full["metrics"]["sparsity"]
    assert half["metrics"]["images.psnr"] == pytest.approx(full["metrics"]["images.psnr"], abs=3)  # dB
    assert half["metrics"]["images.ssim"] == pytest.approx(full["metrics"]["images.ssim"], abs=0.02)


@pytest.mark.parametrize("decode", [False, True])
def test_images_that_are_not_finite_are_refused(decode):
    of = sampler("sd3")
    of.pipeline.to(torch.float16)
    of.denoiser.proj_out.weight.data.fill_(6e4)
    message = r"StableDiffusion3Pipeline: expected finite images, got NaN or infinity in float16, whose maximum is 6\.55e\+04"
    with pytest.raises(RoseExpError, match=message):
        of.rehearse(decode)
    with pytest.raises(RoseExpError, match=message), torch.no_grad():
        list(of.run(["a red fox"], [0], "images", decode))
