"""What several tests share. Nothing here reaches a hub."""

from __future__ import annotations

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: a hub call fails at once

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED = REPOSITORY.parent / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of data that stands beside a checkout of the team; not part of the repository."""
    if not SHARED.is_dir():
        pytest.skip("needs the folder ../shared beside the checkout, with golden cases and data")
    return SHARED


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
