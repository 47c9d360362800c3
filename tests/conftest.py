"""What several tests share. Nothing here reaches a hub."""

from __future__ import annotations

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: a hub call fails at once

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED = REPOSITORY.parent / "shared"


UNIT = ("engine", "settings", "models", "data", "pruning", "diffusion", "report")
"""Folders whose tests, except the slow ones, are unit tests: they neither execute whole runs nor start commands."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent.name in UNIT and item.get_closest_marker("slow") is None:
            item.add_marker(pytest.mark.unit)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of data that stands beside a checkout of the team; not part of the repository."""
    if not SHARED.is_dir():
        pytest.skip("needs the folder ../shared beside the checkout, with golden cases and data")
    return SHARED


@pytest.fixture
def small(shared) -> list[str]:
    return small_overrides(shared)


def small_overrides(shared: Path) -> list[str]:
    """For a run of seconds: a small trained model and local texts."""
    data = shared / "data"
    return [
        "model=local",
        f"model.path={data}/models/stories260k-llama",
        "calibration=local",
        f"calibration.path={data}/text/wikitext2_raw_train_first1MB.jsonl",
        "calibration.rows=300",  # tokenising all of both texts would take longer than the run
        "calibration.samples=4",
        "calibration.window=128",
        "evaluation=local",
        f"evaluation.perplexity.local.path={data}/text/wikitext2_raw_test.jsonl",
        "evaluation.perplexity.local.rows=300",
        "evaluation.perplexity.local.window=128",
        "evaluation.perplexity.local.windows=8",
    ]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
