"""Reading a model and its tokenizer: the embedded one, a local folder or GGUF file, or the hub."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from ..errors import RoseExpError
from ..fingerprint import weights_sha256
from ..settings import ModelSettings
from ..wheels import WHEELS, fetch

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode on the CPU.

    Attributes:
        protocol: what the weights are: source, revision or fingerprint, dtype, number of parameters.
    """

    model: nn.Module
    protocol: dict[str, Any]


def load_tokenizer(settings: ModelSettings) -> PreTrainedTokenizerBase:
    """The model's own tokenizer.

    Raises:
        RoseExpError: it cannot be had.
    """
    return from_pretrained(AutoTokenizer, settings.model_copy(update={"revision": revision(settings)}))


def revision(settings: ModelSettings) -> str | None:
    """The commit that a branch or tag of the hub stands for just now, so that all parts of a model are of one; what the
    settings say where the model is not the hub's.

    Raises:
        RoseExpError: its configuration cannot be had.
    """
    source, _ = located(settings)
    if settings.path is None or Path(source).exists():
        return settings.revision
    return getattr(from_pretrained(AutoConfig, settings), "_commit_hash", None) or settings.revision


def load_model(settings: ModelSettings) -> LoadedModel:
    """The model, every weight as the checkpoint has it (of a GGUF: made whole again, float32).

    Raises:
        RoseExpError: it cannot be had, or is no causal language model.
    """
    log.info("loading %s", settings.name)
    dtype = settings.dtype if settings.dtype == "auto" else getattr(torch, settings.dtype)
    pinned = settings.model_copy(update={"revision": revision(settings)})
    model = from_pretrained(AutoModelForCausalLM, pinned, dtype=dtype).eval()
    forget_quantization(model)
    return LoadedModel(model, protocol(settings, model))


def forget_quantization(model: nn.Module) -> None:
    """transformers marks a model read from GGUF as quantised, though its weights are whole: take the mark away, or the
    model cannot be saved."""
    quantization = getattr(model.config, "quantization_config", None)
    if quantization is None:
        return
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
    if str(getattr(method, "value", method)) != "gguf":
        raise RoseExpError(f"model: expected plain weights, got a checkpoint quantised with {method}: it cannot be pruned")
    del model.config.quantization_config
    model.hf_quantizer = None


def from_pretrained(auto: Any, settings: ModelSettings, **options: Any) -> Any:
    """What ``auto``, a class of transformers, makes of the model's folder, file or hub id.

    Raises:
        RoseExpError: it cannot be had.
    """
    options |= {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code}
    source, gguf = located(settings)
    options |= {"gguf_file": gguf} if gguf else {}
    try:
        return auto.from_pretrained(source, **options)
    except (OSError, ValueError, ImportError, SafetensorError) as error:  # missing, unreachable, unknown or damaged
        setting = "model.path" if settings.path is not None else "model.embedded"
        what = source if settings.path is not None else settings.embedded
        hint = "" if Path(source).exists() else " (no such folder here, and not to be had from the hub)"
        raise RoseExpError(f"{setting}: cannot load {what!r}{hint}: {_first_lines(error)}") from error


def located(settings: ModelSettings) -> tuple[str, str | None]:
    """The model's folder or hub id, and the name of the GGUF file in it, if it is one."""
    where = fetch(settings.embedded) if settings.path is None else Path(settings.path).expanduser()
    if where.suffix == ".gguf" and where.is_file():
        return str(where.parent), where.name
    return (str(where) if where.exists() else settings.path), None


def _first_lines(error: Exception, limit: int = 400) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= limit else text[:limit] + " …"


def protocol(settings: ModelSettings, model: nn.Module) -> dict[str, Any]:
    """What the weights are, for the record."""
    found: dict[str, Any] = {
        "name": settings.name,
        "architecture": type(model).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    if settings.path is None:
        wheel_file = WHEELS[settings.embedded]
        return found | {"source": wheel_file.source, "sha256": wheel_file.sha256}
    path = Path(settings.path).expanduser()
    if path.exists():
        return found | {"source": str(path), "sha256": weights_sha256(path)}
    return found | {
        "source": settings.path,
        "revision": getattr(model.config, "_commit_hash", None) or settings.revision,
    }
