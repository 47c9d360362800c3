"""Locating a model and its tokenizer: embedded, in a local folder or GGUF file, or on the hub."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from ..runtime.errors import RoseExpError
from ..runtime.fingerprint import model_sha256, weights_sha256
from ..runtime.wheels import WHEELS, fetch
from ..settings.schema import ModelSettings
from .families import installed_families

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode on the CPU.

    Attributes:
        protocol: identity of the weights: source, revision or fingerprint, dtype, number of parameters.
        warnings: (kind, detail) pairs for the run record about unused weights and deviations from the configuration.
    """

    model: nn.Module
    protocol: dict[str, Any]
    warnings: list[tuple[str, str]] = field(default_factory=list)


def load_tokenizer(settings: ModelSettings) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer.

    Raises:
        RoseExpError: the tokenizer cannot be loaded.
    """
    return from_pretrained(AutoTokenizer, settings.model_copy(update={"revision": revision(settings)}))


def revision(settings: ModelSettings) -> str | None:
    """Resolve a branch or tag on the hub to its current commit, so that all parts of a model have the same revision.

    For models that are not on the hub, returns ``model.revision`` unchanged.

    Raises:
        RoseExpError: the configuration cannot be loaded.
    """
    source, _ = located(settings)
    if settings.path is None or Path(source).exists():
        return settings.revision
    return getattr(from_pretrained(AutoConfig, settings), "_commit_hash", None) or settings.revision


def build_empty(config: Any, settings: ModelSettings, **options: Any) -> nn.Module:
    """Build the causal language model that a configuration describes, on the current default device.

    Multimodal models are built whole. Without images or sound, they are causal language models.

    Raises:
        RoseExpError: the model is not a decoder, is quantized, or cannot be built by transformers.
    """
    where = f"{setting_of(settings)}: {settings.path or settings.embedded}"
    if getattr(config, "is_encoder_decoder", False):
        raise RoseExpError(f"{where}: expected a decoder, got {config.model_type}, an encoder-decoder, which is not supported")
    if getattr(config, "quantization_config", None) is not None:
        quantization = config.quantization_config
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
        raise RoseExpError(
            f"{where}: expected plain weights, got a checkpoint quantized with {getattr(method, 'value', method)}, which "
            "cannot be pruned"
        )
    try:
        return class_for(config).from_config(config, trust_remote_code=settings.trust_remote_code, **options)
    except (ValueError, TypeError, KeyError, AttributeError, ImportError, OSError, RuntimeError, StrictDataclassError) as error:
        raise RoseExpError(
            f"{where}: transformers cannot build a causal language model from its configuration ({config.model_type}): "
            f"{_first_lines(error)}"
        ) from error


def class_for(config: Any) -> Any:
    """Return the automatic class for a configuration: for text and images if transformers has one, else for text."""
    whole = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and not getattr(config, "auto_map", None)
    return AutoModelForImageTextToText if whole else AutoModelForCausalLM


def setting_of(settings: ModelSettings) -> str:
    """Return the name of the setting that selects the model."""
    return "model.path" if settings.path is not None else "model.embedded"


def from_pretrained(auto: Any, settings: ModelSettings, **options: Any) -> Any:
    """Call ``from_pretrained`` of ``auto``, a transformers class, for the model's folder, file or hub ID.

    Raises:
        RoseExpError: loading fails.
    """
    options |= {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code}
    source, gguf = located(settings)
    options |= {"gguf_file": gguf} if gguf else {}
    try:
        return auto.from_pretrained(source, **options)
    except (OSError, ValueError, TypeError, KeyError, ImportError, SafetensorError, StrictDataclassError) as error:
        model_name = source if settings.path is not None else settings.embedded
        hint = "" if Path(source).exists() else " (no such local folder, and not available from the hub)"
        raise RoseExpError(f"{setting_of(settings)}: cannot load {model_name!r}{hint}: {_first_lines(error)}") from error


def located(settings: ModelSettings) -> tuple[str, str | None]:
    """Return the model's folder or hub ID, and the name of the GGUF file in the folder, if any."""
    path = fetch(settings.embedded) if settings.path is None else Path(settings.path).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return str(path.parent), path.name
    return (str(path) if path.exists() else settings.path), None


def _first_lines(error: Exception, limit: int = 400) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= limit else text[:limit] + " …"


def protocol(settings: ModelSettings, model: nn.Module) -> dict[str, Any]:
    """Return the identity of the weights for the run record.

    ``families`` names the model families of other packages, which may change how a model is pruned. ``sha256`` covers the
    weights of a local model, and ``files_sha256`` all of its files, such as the tokenizer.
    """
    others = [f"{installed.family.name} ({installed.source})" for installed in installed_families()]
    facts: dict[str, Any] = {"families": others} if others else {}
    facts |= {
        "name": settings.name,
        "architecture": type(model).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    if settings.path is None:
        wheel_file = WHEELS[settings.embedded]
        return facts | {"source": wheel_file.source, "sha256": wheel_file.sha256}
    path = Path(settings.path).expanduser()
    if path.exists():
        return facts | {"source": str(path), "sha256": weights_sha256(path), "files_sha256": model_sha256(path)}
    return facts | {
        "source": settings.path,
        "revision": getattr(model.config, "_commit_hash", None) or settings.revision,
    }
