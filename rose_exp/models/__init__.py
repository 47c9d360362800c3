"""Loading and saving models, and locating their prunable layers."""

from .blocks import BlockList, LinearLayer, all_linear_layers, find_blocks, linear_layers, shared_layers
from .bos import needs_bos, resolve_bos
from .experts import Layout, Projection, check_layouts, projections, unstacked_experts
from .families import Family, families
from .heads_and_neurons import Part, Structure, find_structures
from .loading import LoadedModel, class_for, largest_file, load_tokenizer
from .matching import own_memory, own_weights, tie_again
from .narrowing import check_removable, remove_masked
from .saving import check_savable, save_model, save_streamed, sparsity_description
from .shapes import BlockShape, LayerShape, ModelShape, model_shape, shape_of
from .streaming import StreamedModel, extra_files, let_go, load_model, open_model

__all__ = [
    "BlockList",
    "BlockShape",
    "Family",
    "LayerShape",
    "Layout",
    "LinearLayer",
    "LoadedModel",
    "ModelShape",
    "Part",
    "Projection",
    "StreamedModel",
    "Structure",
    "all_linear_layers",
    "check_layouts",
    "check_removable",
    "check_savable",
    "class_for",
    "extra_files",
    "families",
    "find_blocks",
    "find_structures",
    "largest_file",
    "let_go",
    "linear_layers",
    "load_model",
    "load_tokenizer",
    "model_shape",
    "needs_bos",
    "open_model",
    "own_memory",
    "own_weights",
    "projections",
    "remove_masked",
    "resolve_bos",
    "save_model",
    "save_streamed",
    "shape_of",
    "shared_layers",
    "sparsity_description",
    "tie_again",
    "unstacked_experts",
]
