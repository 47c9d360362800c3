"""Reading a checkpoint a part at a time: safetensors shards or a GGUF file, of which only what is asked for comes to memory."""

from __future__ import annotations

import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..errors import RoseExpError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Checkpoint(ABC):
    """The weights of a model in files.

    Attributes:
        names: of all tensors, as the files call them.
        dtype: of the first floating-point tensor.
    """

    names: list[str]
    dtype: torch.dtype

    @abstractmethod
    def fill(self, model: nn.Module, names: Sequence[str]) -> None:
        """Put these tensors where ``model`` has empty ones (on the meta device), in the dtype that it has there.

        Raises:
            RoseExpError: a file has gone, or is damaged.
        """


class SafetensorsCheckpoint(Checkpoint):
    """One file, or shards and their index.

    Args:
        find: the local path of a file of the checkpoint by its name, None where it has no such file.
        where: the setting, and what it says, for errors.

    Raises:
        RoseExpError: no safetensors there; the index names a file outside the folder, or one that is missing or damaged.
    """

    def __init__(self, find, where: str):
        self.where = where
        index = find(INDEX)
        if index is not None:
            files = {name: self._checked(find, shard) for name, shard in self._weight_map(index).items()}
        else:
            single = find(SINGLE)
            if single is None:
                raise RoseExpError(
                    f"{where}: expected {SINGLE} or {INDEX} (pipeline.weights=disk reads safetensors and GGUF), found neither"
                )
            files = None
        held: dict[Path, list[str]] = {}
        for path in dict.fromkeys(files.values()) if files is not None else [single]:
            with self._open(path) as file:  # a header that does not fit the file's length is refused
                held[path] = list(file.keys())
                if not hasattr(self, "dtype"):
                    self.dtype = next((t for name in held[path] if (t := _dtype(file, name)).is_floating_point), torch.float32)
        if files is None:
            files = dict.fromkeys(held[single], single)
        for name, path in files.items():
            if name not in held[path]:
                raise RoseExpError(f"{where}: {path.name} has no {name}, though the index says so")
        self.files, self.names = files, list(files)

    def fill(self, model: nn.Module, names: Sequence[str]) -> None:
        with ExitStack() as stack:
            opened = {path: stack.enter_context(self._open(path)) for path in {self.files[name] for name in names}}
            try:
                _convert(model, {name: opened[self.files[name]].get_slice(name) for name in names})
            except (SafetensorError, OSError) as error:
                raise RoseExpError(f"{self.where}: cannot read the weights: {error}") from error

    def _weight_map(self, index: Path) -> dict[str, str]:
        try:
            return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RoseExpError(f"{self.where}: {index} is no index of shards: {error!r}") from error

    def _checked(self, find, shard: str) -> Path:
        if Path(shard).name != shard:
            raise RoseExpError(f"{self.where}: expected names of files beside the index, got {shard!r}, which leads elsewhere")
        path = find(shard)
        if path is None:
            raise RoseExpError(f"{self.where}: the shard {shard} is missing")
        return path

    def _open(self, path: Path):
        try:
            return safe_open(path, framework="pt", device="cpu")
        except (SafetensorError, OSError) as error:
            raise RoseExpError(f"{self.where}: {path} is missing or damaged: {error}") from error


class GgufCheckpoint(Checkpoint):
    """A GGUF file, whose tensors are made whole again as they are read.

    The layout of each family is transformers' own knowledge. It keeps that in functions that are not public, which are used
    here because its public one reads the whole file at once.
    """

    def __init__(self, path: Path, model: nn.Module, where: str):
        from gguf import GGUFReader
        from transformers import modeling_gguf_pytorch_utils as gguf_utils

        self.where = where
        try:
            self.parsed = gguf_utils.load_gguf_checkpoint(str(path), return_tensors=False)
            reader = GGUFReader(str(path))
            field = reader.fields["general.architecture"]
            architecture = bytes(field.parts[field.data[0]]).decode()
            kind = gguf_utils.TENSOR_PROCESSORS.get(architecture, gguf_utils.TensorProcessor)
            self.processor = kind(config=self.parsed.get("config", {}))
            self.keys = gguf_utils.get_gguf_hf_weights_map(model, self.processor)
        except (OSError, ValueError, KeyError, NotImplementedError) as error:
            raise RoseExpError(f"{where}: cannot read {path} a part at a time: {error}") from error
        self.tensors = {self.keys[tensor.name]: tensor for tensor in reader.tensors if tensor.name in self.keys}
        self.names, self.dtype = list(self.tensors), torch.float32

    def fill(self, model: nn.Module, names: Sequence[str]) -> None:
        import numpy
        from gguf import dequantize

        for name in names:
            tensor = self.tensors[name]
            result = self.processor.process(
                weights=dequantize(tensor.data, tensor.tensor_type),
                name=tensor.name,
                tensor_key_mapping=self.keys,
                parsed_parameters=self.parsed,
            )
            if result.name is None or self.keys.get(result.name) != name:
                raise RoseExpError(f"{self.where}: {tensor.name} cannot be read by itself; set pipeline.weights=memory")
            put(model, name, torch.from_numpy(numpy.copy(result.weights)))


def put(model: nn.Module, name: str, value: Tensor) -> None:
    """Put ``value`` in the place of the parameter or buffer ``name``, in the dtype that it has there."""
    owner, _, own = name.rpartition(".")
    module = model.get_submodule(owner)
    if own in module._parameters:
        module._parameters[own] = nn.Parameter(value.to(module._parameters[own].dtype), requires_grad=False)
    else:
        module._buffers[own] = value.to(module._buffers[own].dtype)


def _dtype(file: Any, name: str) -> torch.dtype:
    return file.get_slice(name)[:0].dtype if file.get_slice(name).get_shape() else torch.int64


def _convert(model: nn.Module, tensors: dict[str, Any]) -> None:
    """transformers' own renaming, stacking and casting of checkpoint tensors into a model. The function is not public, and its
    parameters have changed within version 5: each version is given those that it knows."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig
    from transformers.utils import logging

    plan = model._get_dtype_plan(model.dtype) if hasattr(model, "_get_dtype_plan") else model.dtype_plan
    settings = {"dtype": model.dtype, "dtype_plan": plan, "weight_mapping": get_model_conversion_mapping(model)}
    config = LoadStateDictConfig(**_known(LoadStateDictConfig, settings))
    given = {"model": model, "state_dict": tensors, "load_config": config, "tp_plan": None, "dtype_plan": plan}
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # one a block
    try:
        convert_and_load_state_dict_in_model(**_known(convert_and_load_state_dict_in_model, given))
    finally:
        if shown:
            logging.enable_progress_bar()


def _known(function: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters
    return {name: value for name, value in arguments.items() if name in parameters}
