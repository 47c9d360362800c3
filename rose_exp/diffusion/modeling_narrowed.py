"""Denoisers with fewer attention heads and neurons than the configurations of diffusers can express.

``NarrowedX`` is the diffusers class X with layers shrunk to the sizes in its configuration's entry ``narrowed``. A saved model
contains a copy of this file, which needs nothing but diffusers:

>>> pipeline = diffusers.DiffusionPipeline.from_pretrained("FOLDER", trust_remote_code=True)
"""

import inspect
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
from torch import nn

PREFIX = "Narrowed"
MODULE = "modeling_narrowed"  # name of this file in the folder of a saved model


def narrow(model: nn.Module, layers: dict[str, tuple[int, int]], attributes: dict[str, dict[str, int]]) -> None:
    """Shrink linear layers to the first rows and columns of their weights, which from_pretrained replaces.

    Args:
        layers: rows and columns of each layer's weight, by name.
        attributes: values of each module's attributes that depend on them, such as the number of heads, by name.
    Raises:
        ValueError: a layer or attribute does not exist, or the layer is smaller.
    """
    modules = dict(model.named_modules())
    for name, (rows, columns) in layers.items():
        layer = modules.get(name)
        if not isinstance(layer, nn.Linear) or not 1 <= rows <= layer.out_features or not 1 <= columns <= layer.in_features:
            raise ValueError(f"narrowed.layers.{name}: expected a linear layer with at least {rows} rows and {columns} columns")
        layer.weight = nn.Parameter(layer.weight.detach()[:rows, :columns].clone())
        if layer.bias is not None:
            layer.bias = nn.Parameter(layer.bias.detach()[:rows].clone())
        layer.out_features, layer.in_features = rows, columns
    for name, values in attributes.items():
        for attribute, value in values.items():
            if type(value) is not int or type(getattr(modules.get(name), attribute, None)) is not int:
                raise ValueError(f"narrowed.attributes.{name}.{attribute}: expected an existing integer, got {value!r}")
            setattr(modules[name], attribute, value)


@cache
def narrowed_class(original: str) -> type:
    """Return the ``Narrowed`` class for the diffusers class named ``original``."""
    base = getattr(diffusers, original)

    def __init__(self, narrowed: dict[str, Any] | None = None, **options: Any) -> None:  # noqa: N807
        base.__init__(self, **options)
        if narrowed is not None:
            narrow(self, **narrowed)
        self.register_to_config(narrowed=narrowed)

    def save_config(self, save_directory: Any, *arguments: Any, **options: Any) -> None:
        base.save_config(self, save_directory, *arguments, **options)
        shutil.copyfile(__file__, Path(save_directory) / f"{MODULE}.py")

    parameters = list(inspect.signature(base.__init__).parameters.values())
    parameter = inspect.Parameter("narrowed", inspect.Parameter.KEYWORD_ONLY, default=None)
    # diffusers derives the valid configuration entries from the signature
    __init__.__signature__ = inspect.Signature([*parameters, parameter])
    # diffusers stores __module__ in model_index.json, and loads the class from the file of this name
    members = {"__init__": __init__, "save_config": save_config, "__module__": MODULE}
    return type(f"{PREFIX}{original}", (base,), members)


def __getattr__(name: str) -> type:
    if name.startswith(PREFIX) and hasattr(diffusers, name.removeprefix(PREFIX)):
        return narrowed_class(name.removeprefix(PREFIX))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
