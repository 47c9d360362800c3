"""Predictions and images of the dense model, which runs with the same inputs and environment share through the cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from ..runtime.cache import cached
from ..runtime.fingerprint import code_sha256
from ..settings.schema import Settings
from .identity import identifying_dense

FILE = "states.safetensors"
NAME = "states"


def dense_key(protocol: Mapping[str, Any], text: str, batch: int) -> dict[str, Any] | None:
    """Return everything that the dense model's predictions on a text depend on, besides the model's own code.

    Args:
        protocol: the record's protocol.
        text: name of the text.
        batch: windows per forward pass.
    Returns:
        None for a model from the hub, whose files have no fingerprint, and with several processes, each of which has its own
        windows.
    """
    model = {name: value for name, value in protocol["model"].items() if name not in ("name", "source")}
    if "sha256" not in model or protocol["ranks"] > 1:
        return None
    tokens = protocol["evaluation"][text]["tokens_sha256"]
    environment = {name: protocol[name] for name in ("device", "versions")}
    return {"model": model, "tokens": tokens, "batch": batch, "code": code_sha256(), **environment}


def shared_states(key: Mapping[str, Any] | None, size: int, compute: Callable[[], Tensor]) -> Tensor:
    """Return what ``compute`` returns, from the cache if it has been computed before.

    Args:
        key: see :func:`dense_key`; None to compute it.
        size: upper bound of its size in bytes.
    """
    computed: list[Tensor] = []

    def fill(folder: Path) -> None:
        computed.append(compute())
        save_file({NAME: computed[0].contiguous()}, folder / FILE)

    entry = cached("dense_states", key, fill, size) if key is not None else None
    if computed:
        return computed[0]
    return compute() if entry is None else load_file(entry / FILE)[NAME]


def images_key(protocol: Mapping[str, Any], settings: Settings) -> dict[str, Any] | None:
    """Return everything that the images and latents of the dense pipeline depend on.

    Returns:
        None for a pipeline from the hub, whose files have no fingerprint.
    """
    model = {name: value for name, value in protocol["model"].items() if name not in ("name", "source")}
    if "sha256" not in model and settings.model.built is None:
        return None
    environment = {name: protocol[name] for name in ("device", "threads", "versions")}
    return {
        "settings": identifying_dense(settings, "images.psnr"),
        "model": model,
        "prompts": protocol["images"]["sha256"],
        "noise": protocol["images"]["noise_seed"],
        "latents": "distance" in settings.evaluation.images.metrics,
        "code": code_sha256(),
        **environment,
    }
