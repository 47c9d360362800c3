"""Checks for settings that are incompatible with the kind of model or with structured sparsity."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..engine import METHODS
from ..engine.groups import METHODS_OF_GROUPS

STRUCTURED = "structured"


def kind_problems(sections: Mapping[str, Any]) -> list[str]:
    """Return the errors of settings that the kind of model does not support.

    Args:
        sections: the sections without errors of their own, by name.
    """
    model = sections.get("model")
    if model is None:
        return []
    problems = []
    diffusion = model.kind == "diffusion"
    calibration, evaluation, method = (sections.get(name) for name in ("calibration", "evaluation", "method"))
    dense = method is not None and method.name == "dense"
    if calibration is not None and (calibration.draw == "prompts") != diffusion and not dense:
        expected = "prompts for a diffusion model" if diffusion else "windows or documents for a language model"
        problems.append(f"calibration.draw: expected {expected}, got {calibration.draw}")
    if diffusion and calibration is not None and calibration.replicate and not dense:
        problems.append(f"calibration.replicate: expected 0 for a diffusion model, got {calibration.replicate}")
    if evaluation is not None:
        language_metrics = [name for name in ("perplexity", "speed") if getattr(evaluation, name)]
        language_metrics += ["zero_shot"] if evaluation.zero_shot.tasks else []
        if diffusion and evaluation.divergence:
            problems.append("evaluation.divergence: expected false for a diffusion model, got true")
        if diffusion and language_metrics:
            problems.append(
                f"evaluation.{language_metrics[0]}: expected none for a diffusion model, got some; use evaluation.images"
            )
        if not diffusion and evaluation.images is not None:
            problems.append("evaluation.images: expected null for a language model, got some")
    if diffusion:
        for name in ("target", "allocation"):
            section = sections.get(name)
            if section:
                problems.append(
                    f"{name}: expected none for a diffusion model, whose steps share all layers, got {values_of(section)}"
                )
        options = sections.get("reconstruction")
        if options and options.parts == "separate":
            reason = "whose blocks are trained at once"
            problems.append(f"reconstruction.parts: expected together for a diffusion model, {reason}, got separate")
        if sections.get("sparsity_config"):
            problems.append("sparsity_config: expected false for a diffusion model, got true")
        pipeline, figures = sections.get("pipeline"), sections.get("figures")
        for name in ("permute", "true_sequential"):
            if pipeline is not None and getattr(pipeline, name):
                problems.append(f"pipeline.{name}: expected false for a diffusion model, got true")
        if figures is not None and figures.study:
            problems.append(f"figures.study: expected none for a diffusion model, got {figures.study}")
    return problems


def structured_problems(sections: Mapping[str, Any]) -> list[str]:
    """Return the errors of settings that structured sparsity does not support.

    Args:
        sections: the sections without errors of their own, by name.
    """
    sparsity, method = sections.get("sparsity"), sections.get("method")
    if sparsity is None or method is None or sparsity.pattern != STRUCTURED or method.name not in METHODS:
        return []
    problems = []
    if method.name not in METHODS_OF_GROUPS:
        problems.append(f"method: expected one of {', '.join(METHODS_OF_GROUPS)} with structured sparsity, got {method.name}")
    for name in ("reorder", "refine", "target", "allocation"):
        section = sections.get(name)
        if section:
            reason = "which updates the weights itself"
            problems.append(f"{name}: expected none with structured sparsity, {reason}, got {values_of(section)}")
    pipeline, figures = sections.get("pipeline"), sections.get("figures")
    if pipeline is not None and pipeline.permute:
        problems.append("pipeline.permute: expected false with structured sparsity, got true")
    if figures is not None and figures.study:
        problems.append(f"figures.study: expected none with structured sparsity, got {figures.study}")
    if method.layer_options:
        problems.append(f"method.layer_options: expected none with structured sparsity, got {method.layer_options}")
    if sections.get("sparsity_config"):
        problems.append("sparsity_config: expected false with structured sparsity, which leaves no zeros, got true")
    model = sections.get("model")
    language = model is not None and model.kind == "language"
    if language and sections.get("save") and pipeline is not None and (pipeline.layers != ["*"] or pipeline.skip):
        problems.append(
            "save: expected false if structured sparsity excludes layers (pipeline.layers, pipeline.skip), because a language "
            "model's configuration has one width for all blocks, got true"
        )
    return problems


def values_of(options: Any) -> str:
    """Return the values of an option class as text, such as "strength=0.5, residual=0.0"."""
    return ", ".join(f"{name}={value}" for name, value in vars(options).items())
