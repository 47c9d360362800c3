"""Where a model and its tokenizer are: embedded, in a local folder or GGUF file, or on the hub."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from ..runtime.errors import RoseExpError
from ..runtime.fingerprint import model_sha256, weights_sha256
from ..runtime.wheels import WHEELS, fetch
from ..settings.schema import ModelSettings

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode on the CPU.

    Attributes:
        protocol: what the weights are: source, revision or fingerprint, dtype, number of parameters.
        warnings: for the record, (kind, detail): what of the checkpoint is not used, or not as the configuration says.
    """

    model: nn.Module
    protocol: dict[str, Any]
    warnings: list[tuple[str, str]] = field(default_factory=list)


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


def build_empty(config: Any, settings: ModelSettings, **options: Any) -> nn.Module:
    """The causal language model that a configuration describes, on the default device or wherever the caller has set.

    Raises:
        RoseExpError: it describes no decoder, a quantized model, or one that transformers cannot build.
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
        return AutoModelForCausalLM.from_config(config, trust_remote_code=settings.trust_remote_code, **options)
    except (ValueError, TypeError, KeyError, AttributeError, ImportError, OSError, RuntimeError, StrictDataclassError) as error:
        raise RoseExpError(
            f"{where}: transformers cannot build a causal language model from its configuration ({config.model_type}): "
            f"{_first_lines(error)}"
        ) from error


def setting_of(settings: ModelSettings) -> str:
    """The name of the setting that says where the model is."""
    return "model.path" if settings.path is not None else "model.embedded"


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
    except (OSError, ValueError, TypeError, KeyError, ImportError, SafetensorError, StrictDataclassError) as error:
        what = source if settings.path is not None else settings.embedded
        hint = "" if Path(source).exists() else " (no such folder here, and not to be had from the hub)"
        raise RoseExpError(f"{setting_of(settings)}: cannot load {what!r}{hint}: {_first_lines(error)}") from error


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
    """Return what the weights are, for the record.

    ``sha256`` covers the weights of a local model, and ``files_sha256`` all of its files, such as the tokenizer.
    """
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
        return found | {"source": str(path), "sha256": weights_sha256(path), "files_sha256": model_sha256(path)}
    return found | {
        "source": settings.path,
        "revision": getattr(model.config, "_commit_hash", None) or settings.revision,
    }
