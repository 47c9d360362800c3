"""Loading and saving models, and where a model keeps its prunable layers."""

from .loading import LoadedModel, load_model, load_tokenizer
from .saving import save_model
from .shapes import ModelShape, model_shape
from .structure import BlockList, LinearLayer, all_linear_layers, find_blocks, linear_layers

__all__ = [
    "BlockList",
    "LinearLayer",
    "LoadedModel",
    "ModelShape",
    "all_linear_layers",
    "find_blocks",
    "linear_layers",
    "load_model",
    "load_tokenizer",
    "model_shape",
    "save_model",
]
