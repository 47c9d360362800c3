"""The pruning plan for the layers of a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from fnmatch import fnmatchcase

from torch import nn

from ..engine import (
    CrossMoments,
    InputMoments,
    Magnitude,
    Method,
    NotPositiveDefiniteError,
    PruneResult,
    SemiStructured,
    SolverOptions,
    Sparsity,
    Structured,
    Unstructured,
    prune_layers,
)
from ..engine.allocation import Allocation
from ..engine.patterns import as_sparsity
from ..models import BlockList, LinearLayer, all_linear_layers, projections
from ..runtime.errors import RoseExpError, suggest
from ..settings.pruning import LayerOptions
from ..settings.reconstruction import Reconstruction

SUBSTANTIAL = 0.05  # share of a block's weights up to which what cannot be pruned stays dense with a warning


@dataclass(frozen=True)
class PruningPlan(LayerOptions, SolverOptions):
    """How to prune each layer of a model.

    With a regression target, the hidden states of the dense model are kept alongside those of the pruned model. Experts always
    use the dense layer as their target, because the two models route different tokens to them.

    Attributes:
        method: pruning method for layers that match no pattern in ``methods``.
        sparsity: a pattern, the ratio of unstructured sparsity such as 0.7, or an N:M pattern as text such as ``"2:4"``.
        methods: pruning methods by pattern of full layer names; the first matching pattern wins.
        allocation: sparsity allocation across layers; None prunes all layers to the same sparsity.
        shares: sparsity of each layer that the allocation chose after surveying the model.
        reconstruction: training of each pruned block; None for none.
        replicate: number of the perturbation of the calibration data, see :func:`rose_exp.pruning.perturbation.perturbed`.
        blocks: name of the list of blocks; None detects it from the model's structure.
        study: patterns of full layer names to study before pruning, see :func:`rose_exp.engine.study.study_layer`.
    """

    method: Method
    sparsity: Sparsity | Structured | float | str
    _: KW_ONLY
    methods: Mapping[str, Method] = field(default_factory=dict)
    allocation: Allocation | None = None
    shares: Mapping[str, float] = field(default_factory=dict)
    reconstruction: Reconstruction | None = None
    replicate: int = 0
    blocks: str | None = None
    study: Sequence[str] = ()

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.sparsity, Structured):
            object.__setattr__(self, "sparsity", as_sparsity(self.sparsity))

    def wants(self, name: str) -> bool:
        return chosen(name, self.layers, self.skip)

    @property
    def structured(self) -> bool:
        """Whether heads and neurons are removed instead of single weights."""
        return isinstance(self.sparsity, Structured)

    @property
    def dense_stream(self) -> bool:
        """Whether the hidden states of the dense model are kept, too."""
        return bool(self.target or self.reconstruction)

    @property
    def staged(self) -> bool:
        """Whether attention and MLP are reconstructed one after the other."""
        return bool(self.reconstruction and self.reconstruction.parts == "separate")

    @property
    def permutes(self) -> bool:
        return self.permute and isinstance(self.sparsity, SemiStructured)

    def solve(
        self,
        layers: Sequence[LinearLayer],
        moments: InputMoments,
        cross_moments: CrossMoments | None = None,
        by_magnitude: bool = False,
    ) -> list[PruneResult]:
        """Prune layers that share their inputs, and update their weights in place.

        Args:
            cross_moments: cross moments of the dense and the pruned model's inputs, if the plan's regression target applies.
            by_magnitude: whether to prune by magnitude instead of the plan's method.
        Raises:
            RoseExpError: the layers cannot be pruned; the message names them.
        """
        try:
            results = prune_layers(
                [layer.weight for layer in layers],
                moments,
                methods=[Magnitude() if by_magnitude else self.method_for(layer.name) for layer in layers],
                sparsity=[self.sparsity_of(layer.name) for layer in layers],
                options=self if cross_moments is not None else replace(self, target=None),
                cross_moments=cross_moments,
            )
        except (ValueError, NotPositiveDefiniteError) as error:
            raise RoseExpError(f"{', '.join(layer.name for layer in layers)}: {error}") from error
        for layer, result in zip(layers, results, strict=True):
            layer.set_weight(result.weight)
        return results

    def sparsity_of(self, name: str) -> Sparsity:
        return Unstructured(self.shares[name]) if name in self.shares else self.sparsity

    def method_for(self, name: str) -> Method:
        return next((method for pattern, method in self.methods.items() if fnmatchcase(name, pattern)), self.method)


def concerns(plan: PruningPlan, layers: Iterable[LinearLayer]) -> dict[str, list[str]]:
    """Return the names of the layers for which the plan's method is unlikely to work well, by the reason."""
    found: dict[str, list[str]] = {}
    for layer in layers:
        reason = None if plan.structured else plan.method_for(layer.name).concern(layer.columns, plan.sparsity)
        if reason is not None:
            found.setdefault(reason, []).append(layer.name)
    return found


def check_plan(blocks: BlockList, plan: PruningPlan) -> list[str]:
    """Check the plan's patterns against the model's layers.

    Returns:
        The names of small tensors that are not linear layers, such as the weights of depthwise convolutions and recurrences.
        They stay dense.
    Raises:
        RoseExpError: a pattern matches no layer, no layer is left to prune, or a tensor that is not a linear layer holds a
            substantial share of its block's weights.
    """
    names = [layer.name for layer in all_linear_layers(blocks)]
    others = other_tensors(blocks)
    check_patterns("pipeline.layers", plan.layers, [*names, *others])
    check_patterns("pipeline.skip", plan.skip, [*names, *others])
    to_prune = [name for name in names if plan.wants(name)]
    if not to_prune:
        raise RoseExpError("pipeline.layers, pipeline.skip: expected at least one layer to prune, got none")
    check_patterns("figures.study", plan.study, to_prune)
    wanted = {name: share for name, share in others.items() if plan.wants(name)}
    for name, share in wanted.items():
        if share > SUBSTANTIAL:
            raise RoseExpError(
                f"{name} holds {share:.0%} of its block's weights and is neither a linear layer nor a stack of experts in a "
                "known layout, so it cannot be pruned; add it to pipeline.skip to leave it dense"
            )
    return list(wanted)


def other_tensors(blocks: BlockList) -> dict[str, float]:
    """Return the tensors with more than two dimensions that are not stacks of experts, and their shares of the block.

    The share of a depthwise convolution is 0, because it stays dense at any size: its weights act on single channels.
    """
    shares = {}
    for index, block in enumerate(blocks.blocks):
        stacked = {id(parameter) for module in block.modules() if projections(module) for parameter in module.parameters(False)}
        size = sum(parameter.numel() for parameter in block.parameters())
        depthwise = {id(m.weight) for m in block.modules() if isinstance(m, nn.Conv1d) and m.groups == m.in_channels}
        for name, parameter in block.named_parameters():
            if parameter.ndim > 2 and id(parameter) not in stacked:
                share = 0.0 if id(parameter) in depthwise else parameter.numel() / size
                shares[f"{blocks.block_name(index)}.{name}"] = share
    return shares


def check_patterns(setting: str, patterns: Sequence[str], names: Sequence[str]) -> None:
    """Check that every pattern matches at least one layer name.

    Raises:
        RoseExpError: a pattern matches none.
    """
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            expected = f"a pattern of layer names such as {names[0]!r}"
            raise RoseExpError(f"{setting}: expected {expected}, got {pattern!r}, which matches none{suggest(pattern, names)}")


def chosen(name: str, layers: Sequence[str], skip: Sequence[str]) -> bool:
    """Return whether a full layer name matches a pattern in ``layers`` and none in ``skip``."""
    return any(fnmatchcase(name, p) for p in layers) and not any(fnmatchcase(name, p) for p in skip)
