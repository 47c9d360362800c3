"""Locating a model and its tokenizer: embedded, in a local folder or GGUF file, or on the hub."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
from ..runtime.fingerprint import WEIGHTS, model_sha256, weights_sha256
from ..runtime.outside import outside_errors, read_json_object
from ..runtime.wheels import WHEELS, fetch
from ..settings.schema import ModelSettings
from .families import installed_families
from .gguf_header import check_gguf
from .unpacked import through_cache

log = logging.getLogger(__name__)

GGUF_PARTS = {AutoConfig: "config", AutoTokenizer: "tokenizer"}
DEEPEST = 10_000  # layers or experts; the largest known models have a few hundred

JSON_FILES = (  # small files of a model that contain one JSON object; transformers ignores repeated keys
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)


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
    _check_depth(config, where)
    kind = class_for(config)
    with outside_errors(
        f"{where}: transformers cannot build a causal language model from its configuration ({config.model_type})"
    ):
        return kind.from_config(config, trust_remote_code=settings.trust_remote_code, **options)


def _check_depth(config: Any, where: str) -> None:
    """Check that building the model ends: a damaged number of layers or experts would run for hours."""
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        for name, value in part.to_dict().items():
            if name.endswith(("layer", "layers", "blocks", "experts")) and isinstance(value, int) and value > DEEPEST:
                raise RoseExpError(f"{where}: expected {name} of at most {DEEPEST} in the configuration, got {value}")


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
    local, name = os.path.exists(source), source if settings.path is not None else settings.embedded
    if local:
        for file in JSON_FILES:
            if os.path.lexists(path := Path(source) / file):
                read_json_object(path, setting_of(settings))
    hint = "" if local else " (no such local folder, and not available from the hub)"

    def load(place: Any = source, **more: Any) -> Any:
        with outside_errors(f"{setting_of(settings)}: cannot load {name!r}{hint}"):
            return auto.from_pretrained(place, **options, **more)

    if not gguf:
        return load()
    path = Path(source) / gguf

    def load_gguf() -> Any:
        check_gguf(path, setting_of(settings))
        return load(gguf_file=gguf)

    return through_cache(GGUF_PARTS[auto], path, load_gguf, load)


def located(settings: ModelSettings) -> tuple[str, str | None]:
    """Return the model's folder or hub ID, and the name of the GGUF file in the folder, if any."""
    path = fetch(settings.embedded) if settings.path is None else Path(os.path.expanduser(settings.path))
    if path.suffix == ".gguf" and os.path.isfile(path):
        return str(path.parent), path.name
    return (str(path) if os.path.exists(path) else settings.path), None


def largest_file(settings: ModelSettings) -> int:
    """Return the size in bytes of the largest weight file of a local model; 0 for a model on the hub."""
    source, gguf = located(settings)
    folder = Path(source)
    with outside_errors(f"{setting_of(settings)}: cannot read {folder}"):
        if gguf:
            return (folder / gguf).stat().st_size
        files = [file for file in folder.iterdir() if file.suffix in WEIGHTS and file.is_file()] if folder.is_dir() else []
        return max((file.stat().st_size for file in files), default=0)


def protocol(settings: ModelSettings, model: nn.Module) -> dict[str, Any]:
    """Return the identity of the weights for the run record.

    ``families`` names the model families of other packages, which may change how a model is pruned. ``sha256`` covers the
    weights of a local model, and ``files_sha256`` all of its files, such as the tokenizer.
    """
    others = [f"{installed.value.name} ({installed.source})" for installed in installed_families()]
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
