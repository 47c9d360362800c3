"""Which model classes are supported: prunes a small model of every class, and writes the page of the documentation.

``python -m tests.models.support`` prints the page, and ``--write`` stores it. It takes several minutes.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from tqdm import tqdm

from rose_exp.engine import SparseGPT, Structured, Unstructured
from rose_exp.models import (
    check_removable,
    find_blocks,
    load_model,
    open_model,
    projections,
    save_model,
    save_streamed,
)
from rose_exp.models.loading import class_for
from rose_exp.pruning import InMemory, LayerReport, OnDisk, PruneContext, PruningPlan, RunState, answers_by_blocks, prune_model
from rose_exp.runtime.errors import RoseExpError
from rose_exp.settings.schema import ModelSettings

from . import survey
from .whole import prune_whole, whole_logits

PAGE = Path(__file__).parents[2] / "docs" / "supported_models.md"
PLAN = PruningPlan(SparseGPT(), Unstructured(0.5), batch=1)
NOT_BUILT = {
    "Gemma3nConfig": "needs the timm package",
    "Gemma4AssistantConfig": "drafts for another model, whose hidden states it reads",
    "Gemma4UnifiedAssistantConfig": "drafts for another model, whose hidden states it reads",
}


@dataclass
class Support:
    """What is known about a model class.

    Attributes:
        rejected: the error for a class that cannot be pruned.
        warnings: (kind, detail) pairs.
        removes: kinds of groups that can be removed.
    """

    rejected: str | None = None
    experts: bool = False
    warnings: list[tuple[str, str]] = field(default_factory=list)
    removes: list[str] = field(default_factory=list)

    @property
    def notes(self) -> str:
        if self.rejected is not None:
            return ""
        notes = ["experts"] if self.experts else []
        left = sorted({_short(name) for kind, detail in self.warnings if kind == "left_dense" for name in _names(detail)})
        notes += [f"left dense: {', '.join(f'`{name}`' for name in left)}"] if left else []
        return "; ".join(notes + ["whole forward passes" for kind, _ in self.warnings if kind == "whole_passes"])


class NoTokenizer:
    def save_pretrained(self, _folder: Path) -> None:
        pass


def windows() -> Tensor:
    return torch.randint(3, 80, (3, 12), generator=torch.Generator().manual_seed(0))


def examine(name: str, folder: Path) -> Support:
    """Prune a small model of a class in memory and from disk, save and load it, and compare with a reference.

    Raises:
        AssertionError: two ways that must agree do not.
    """
    support = Support()
    try:
        dense = survey.build(name)
        dense.save_pretrained(folder / "dense")
        settings = ModelSettings(path=str(folder / "dense"))
        model, tokens = load_model(settings).model, windows()
        context = PruneContext(on_warning=lambda *warning: support.warnings.append(warning))
        with patch("rose_exp.pruning.context.SHOWN", 10**6):
            reports = prune_model(model, tokens, PLAN, context)
    except RoseExpError as error:
        support.rejected = str(error)
        return support
    check_counts(reports)
    expected = whole_logits(model, tokens)
    prune_whole(dense, tokens, PLAN, {report.name for report in reports})
    check_equal(dense, model)
    answers = answers_by_blocks(model, InMemory(find_blocks(model)), tokens, "cpu", 1, "device", folder, "logits")
    assert torch.equal(torch.cat([logits for _, logits in answers]), expected)
    check_disk(settings, model, folder)
    save_model(model, NoTokenizer(), folder / "from memory")
    for place in ("from memory", "from disk"):
        again = class_for(model.config).from_pretrained(folder / place).eval()
        check_equal(again, model)
        torch.testing.assert_close(whole_logits(again, tokens), expected, rtol=1e-5, atol=1e-6)
    support.experts = any(projections(module) for module in model.modules())
    support.removes = removable(model)
    return support


def check_counts(reports: list[LayerReport]) -> None:
    assert reports
    for report in [report for report in reports if report.fallback is None]:  # others are experts without tokens
        widths = [min(PLAN.block_size, report.columns - start) for start in range(0, report.columns, PLAN.block_size)]
        pruned = sum(int(report.rows * width * 0.5) for width in widths)
        assert round(report.sparsity * report.rows * report.columns) == pruned, report.name


def check_equal(one: nn.Module, other: nn.Module) -> None:
    tensors = other.state_dict()
    assert [name for name, value in one.state_dict().items() if not torch.equal(value, tensors[name])] == []


def check_disk(settings: ModelSettings, model: nn.Module, folder: Path) -> None:
    """Prune from disk, compare with the model pruned in memory, and save to ``folder / "from disk"``."""
    loaded, streamed = open_model(settings)
    state = RunState(folder / "state", {"code": "a"})
    weights = OnDisk(streamed, state.block)
    prune_model(loaded.model, windows(), PLAN, PruneContext(weights=weights, state=state))
    for index, block in enumerate(find_blocks(model).blocks):
        with weights.at(index, "cpu") as own:
            check_equal(own, block)
    save_streamed(streamed, weights.at, NoTokenizer(), folder / "from disk")


def removable(model: nn.Module) -> list[str]:
    """Return the kinds of groups that can be removed from a model, with a configuration that describes the rest."""
    kinds = []
    for kind in ("heads", "neurons"):
        try:
            check_removable(model, find_blocks(model), Structured(0.5, heads=kind == "heads", neurons=kind == "neurons"))
        except RoseExpError:
            continue
        kinds.append(kind)
    return kinds


def page(supports: dict[str, Support]) -> str:
    """Return the documentation page for the results of all classes."""
    import transformers

    pruned = {name: support for name, support in supports.items() if support.rejected is None}
    lines = [
        "# Supported models",
        "",
        f"Every class with a causal language model in transformers {transformers.__version__}, built small with random "
        f"weights: {len(pruned)} of {len(supports) + len(NOT_BUILT)} classes are pruned. For each of them, pruning by blocks "
        "gives the same weights as forward passes of the whole model, and so does pruning from disk; the number of pruned "
        "weights is exact; and the saved model loads with the class it was loaded with, with equal tensors and, up to "
        "rounding, equal logits. "
        "`python -m tests.models.support --write` generates this page.",
        "",
        "*Removable* lists the groups that `sparsity=structured` can remove such that the saved model loads. Tensors *left "
        "dense* are not linear layers, or are shared by several blocks. Models with *whole forward passes* have blocks that do "
        "not form a chain: each block is calibrated by passes of the whole model, which takes longer.",
        "",
        "| Configuration | Removable | Notes |",
        "|---|---|---|",
    ]
    lines += [row(name, support) for name, support in pruned.items()]
    reasons: dict[str, list[str]] = defaultdict(list)
    for name, support in supports.items():
        if support.rejected is not None:
            reasons[reason_of(support.rejected)].append(name)
    for name, reason in NOT_BUILT.items():
        reasons[f"Not examined: {reason}"].append(name)
    lines += ["", "## Not supported", "", "| Reason | Configurations |", "|---|---|"]
    lines += [f"| {reason} | {', '.join(names)} |" for reason, names in sorted(reasons.items())]
    return "\n".join(lines) + "\n"


REASONS = {
    "encoder-decoder": "Encoder-decoder",
    "depend on later tokens": "Not causal: predictions depend on later tokens",
    "encoder_attn": "Decoder half of an encoder-decoder",
}


def reason_of(error: str) -> str:
    """Return the documented reason of a rejection."""
    return next(reason for part, reason in REASONS.items() if part in error)


def _names(detail: str) -> list[str]:
    return detail.partition(": ")[0].split(", ")


def _short(name: str) -> str:
    """Return the name of a tensor inside its block."""
    return re.split(r"\.\d+\.", name, maxsplit=1)[-1].removesuffix(".weight") if re.search(r"\.\d+\.", name) else "whole blocks"


def row(name: str, support: Support) -> str:
    """Return the row of the page for a supported class."""
    return f"| {name} | {', '.join(support.removes) or '—'} | {support.notes or '—'} |"


def main(arguments: list[str]) -> Any:
    results = {}
    for name in tqdm([name for name in survey.classes() if name not in NOT_BUILT], unit="class"):
        with tempfile.TemporaryDirectory() as folder:
            results[name] = examine(name, Path(folder))
    text = page(results)
    if "--write" in arguments:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(text, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
