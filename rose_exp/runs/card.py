"""The model card of a saved model: ``README.md`` in the format of the Hugging Face Hub."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ..runtime.errors import RoseExpError
from ..runtime.escaping import markdown, markdown_code
from ..runtime.outside import outside_errors
from ..runtime.redaction import redact
from ..settings.effective import effective
from ..settings.schema import ModelSettings, Settings

log = logging.getLogger(__name__)

CARD = "README.md"
SETTINGS = (  # groups of settings that a card lists: those that can change the weights
    "model",
    *("method", "sparsity", "allocation", "reorder", "refine", "target", "reconstruction", "engine", "calibration", "seed"),
    *("diffusion", "pipeline"),
)
EMBEDDED_LICENSES = {"smollm2-135m": "apache-2.0", "digits-sd3": "cc-by-sa-3.0"}

LANGUAGE_USAGE = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
"""
MULTIMODAL_USAGE = LANGUAGE_USAGE.replace("AutoModelForCausalLM", "AutoModelForImageTextToText")
PIPELINE_USAGE = """\
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("FOLDER")
"""
EVALUATION = "```bash\nlm_eval --model hf --model_args pretrained=FOLDER --tasks piqa,winogrande\n```"
NARROWED_USAGE = """\
from diffusers import DiffusionPipeline

# executes modeling_narrowed.py in the folder of the denoiser, which removes heads and neurons
pipeline = DiffusionPipeline.from_pretrained("FOLDER", trust_remote_code=True)
"""


def model_card(record: Mapping[str, Any], settings: Settings, multimodal: bool = False, narrowed: bool = False) -> str:
    """Return the card of a saved model: its base model and license, method, settings, results and how to load it.

    Args:
        record: the run record, with results.
        multimodal: whether transformers loads the model with its class for text and images.
        narrowed: whether diffusers needs the code that is saved with the model to load it.
    """
    record = redact(record)
    diffusion = settings.model.kind == "diffusion"
    data = ModelCardData(
        base_model=_hub_id(settings.model),
        license=license_of(settings.model),
        library_name="diffusers" if diffusion else "transformers",
        pipeline_tag=None if diffusion or multimodal else "text-generation",
        tags=["pruning", "sparsity", "rose_exp"],
    )
    name, sparsity = record["protocol"]["model"]["name"], settings.sparsity.parsed
    usage = PIPELINE_USAGE if diffusion else MULTIMODAL_USAGE if multimodal else LANGUAGE_USAGE
    usage = NARROWED_USAGE if narrowed else usage
    values = [(key, value) for key, value in effective(record["config"]).items() if key.split(".")[0] in SETTINGS]
    chosen = [(markdown_code(key), markdown_code(_shown(key, value))) for key, value in values if value is not None]
    facts = [(markdown(key), markdown(str(value))) for key, value in _protocol(record["protocol"]).items() if value is not None]
    done = f"pruned by rose_exp with {markdown(record['label'])} ({markdown(str(sparsity))}, run"
    if not settings.pruned:
        done = "saved by rose_exp without pruning (run"
    parts = [
        f"# {markdown(name)}{', pruned' if settings.pruned else ''}",
        f"{markdown(name)} {done} {markdown_code(record['run_id'])}).",
        _license_note(data.license),
        "## Results",
        _table(("metric", "value", "standard error"), _results(record)),
        "## Usage",
        f"Replace FOLDER by the name or the folder of this model.\n\n```python\n{usage}```",
        *([] if diffusion or multimodal else [EVALUATION]),
        "## Settings",
        _table(("setting", "value"), chosen),
        "## Protocol",
        _table(("", ""), facts),
    ]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(filter(None, parts)) + "\n"


def _shown(setting: str, value: Any) -> str:
    """Format a value. Of a local path, only the name is shown."""
    if not isinstance(value, str):
        return str(value)
    place = Path(value).expanduser()
    local = place.is_absolute() or (setting.endswith(".path") and place.exists())
    return place.name if local else value


def _protocol(protocol: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts of the protocol that a card lists."""
    texts = {
        f"perplexity.{name}": f"{text['windows']} windows of {text['window']} tokens"
        for name, text in (protocol.get("evaluation") or {}).items()
    }
    facts = texts | {name: protocol.get(name) for name in ("device", "backend", "threads")} | protocol["versions"]
    facts |= {"revision of rose_exp": protocol.get("revision"), "revision of the model": protocol["model"].get("revision")}
    return facts | (protocol.get("plugins") or {})


def license_of(settings: ModelSettings) -> str | None:
    """Return the license of a local or embedded model, as its own card states it; None if it is not known.

    A damaged card is logged.
    """
    if settings.path is None:
        return EMBEDDED_LICENSES.get(settings.embedded or "")
    card = Path(settings.path).expanduser() / CARD
    if not card.is_file():
        return None
    try:
        with outside_errors(f"cannot read the model card {card}"):
            return ModelCard.load(card, ignore_metadata_errors=True).data.license
    except RoseExpError as error:  # a card is not needed for anything else
        log.warning("the license of the base model is not known: %s", error)
        return None


def _hub_id(settings: ModelSettings) -> str | None:
    """Return the hub ID of the base model; None for a local, embedded or built one."""
    local = settings.path is None or Path(settings.path).expanduser().exists()
    return None if local else settings.path


def _license_note(license: str | None) -> str:
    known = f"The license of the base model applies: {license}." if license else "The license of the base model applies."
    return markdown(known)


def _results(record: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    errors = record.get("standard_errors", {})
    return [
        (markdown_code(name), f"{value:.6g}", f"{errors[name]:.3g}" if name in errors else "")
        for name, value in record["metrics"].items()
    ]


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
