"""Shared fixtures. Tests run offline."""

from __future__ import annotations

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # set before transformers is imported: hub calls fail immediately

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED = REPOSITORY.parent / "shared"


UNIT = ("engine", "settings", "models", "data", "pruning", "diffusion", "report")
"""Folders whose tests, except the slow ones, are unit tests: they neither execute whole runs nor start commands."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("exhaustive") is not None:
            item.add_marker(pytest.mark.slow)
        if item.path.parent.name in UNIT and item.get_closest_marker("slow") is None:
            item.add_marker(pytest.mark.unit)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Data folder next to the checkout; not part of the repository."""
    if not SHARED.is_dir():
        pytest.skip("needs the folder ../shared beside the checkout, with golden cases and data")
    return SHARED


@pytest.fixture
def small(shared) -> list[str]:
    return small_overrides(shared)


def small_overrides(shared: Path) -> list[str]:
    """Overrides for a run of a few seconds with a small trained model and local texts."""
    data = shared / "data"
    return [
        "model=local",
        f"model.path={data}/models/stories260k-llama",
        "calibration=local",
        f"calibration.path={data}/text/wikitext2_raw_train_first1MB.jsonl",
        "calibration.rows=300",  # tokenizing the whole texts would dominate the run time
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
