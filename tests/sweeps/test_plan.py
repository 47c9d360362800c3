"""``plan=true`` lists jobs with estimates of time and memory, and runs none of them."""

from __future__ import annotations

import os

import pytest
import torch

import rose_exp
from rose_exp.cli.command import check_command
from rose_exp.models import model_shape
from rose_exp.settings.schema import ModelSettings
from rose_exp.sweeps.estimate import Rates, Work
from rose_exp.sweeps.plan import format_plan

from ..cli.test_app import rose_exp as command


def test_plan_runs_nothing(small, tmp_path):
    done = command("-m", *small, "method=dense,rose", "seed=0,1", "plan=true", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[0] for line in lines[1:5]] == ["method=dense", "method=dense", "method=rose", "method=rose"]
    assert "3 of 4 jobs to run" in done.stdout  # the dense jobs share one run
    assert "~ rough" in done.stdout
    assert os.listdir(tmp_path) == []


def test_names_and_times_of_jobs_are_readable(small, tmp_path):
    text = format_plan(check_command(["-m", *small, "sparsity=2:4,4:8"]).jobs, tmp_path)
    assert [line.split()[0] for line in text.splitlines()[1:3]] == ["sparsity=2:4", "sparsity=4:8"]
    assert " 0 s" not in text
    assert "~0 s" not in text


def test_unknown_times_are_not_added(small, tmp_path):
    diffusion = check_command(["-m", "model=small-sd3", "method=magnitude,wanda"]).jobs
    text = format_plan(diffusion, tmp_path)
    assert "2 of 2 jobs to run, for an unknown time on" in text
    text = format_plan([*diffusion, *check_command([*small]).jobs], tmp_path)
    assert "s one after the other on" in text
    assert ", without 2 jobs whose time is unknown" in text


def test_finished_runs_are_skipped_and_calibrate_the_estimate(small, tmp_path):
    rose_exp.sweep([*small, "seed=0,1"], tmp_path)
    jobs = check_command(["-m", *small, "seed=0,1,2"]).jobs
    text = format_plan(jobs, tmp_path)
    assert text.count("finished already") == 2
    assert "1 of 3 jobs to run" in text
    assert "~" not in text


def test_model_shape_matches_the_model(shared):
    path = shared / "data/models/stories260k-llama"
    shape = model_shape(ModelSettings(path=str(path)))
    assert (len(shape.blocks), shape.hidden, shape.vocabulary) == (5, 64, 512)
    assert shape.dtype == torch.float32
    assert len(shape.layers) == 35
    layers = shape.blocks[0].layers
    assert [layer.columns for layer in layers] == [64] * 6 + [172]
    assert [layers[0].group == layer.group for layer in layers] == [True] * 3 + [False] * 4  # the output projection is alone


def test_time_estimate_uses_the_rates_of_finished_runs(small, tmp_path):
    record = rose_exp.run(small, tmp_path)
    settings = check_command(small).jobs[0].settings
    shape = model_shape(settings.model)
    planned, done = Work.planned(settings, shape), Work.done(record)
    assert planned.operations == pytest.approx(done.operations)
    rates = Rates.of([record], record["protocol"]["device"], record["protocol"]["model"]["name"])
    seconds, measured = rates.seconds(planned)
    stages = [
        "texts",
        "loading",
        "pruning.calibrating",
        "pruning.moments",
        "pruning.solving",
        "pruning.advancing",
        "evaluation",
    ]
    assert measured
    assert seconds == pytest.approx(sum(record["seconds"][stage] for stage in stages), rel=0.01)
    assert not Rates.of([record], "another device", "stories260k-llama").seconds(planned)[1]
