"""Reading a checkpoint one part at a time: safetensors or PyTorch files, or a GGUF file."""

from __future__ import annotations

import pickle
import re
import reprlib
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..runtime.errors import RoseExpError
from ..runtime.outside import outside_errors, read_json_object
from .gguf_header import check_gguf

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
TORCH_SINGLE, TORCH_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
DTYPES = {  # dtype names in safetensors files
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

Find = Callable[[str], Path | None]


class Checkpoint(ABC):
    """The weights of a model stored in files.

    Attributes:
        where: name and value of the setting that selects the checkpoint, for error messages.
        tensors: dtype and shape of every tensor by its name in the files; None if the shape is unknown before reading.
        unmapped: names of tensors in a GGUF file that transformers does not map to the model.
    """

    where: str
    tensors: dict[str, tuple[torch.dtype, torch.Size | None]]
    unmapped: Sequence[str] = ()

    @property
    def names(self) -> list[str]:
        return list(self.tensors)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the first floating-point tensor."""
        return next((dtype for dtype, _ in self.tensors.values() if dtype.is_floating_point), torch.float32)

    @abstractmethod
    def read(self, names: Sequence[str]) -> Any:
        """Return a context manager that yields the tensors by name, or lazy slices that ``[...]`` reads.

        Raises:
            RoseExpError: a file is missing or damaged.
        """


class FilesCheckpoint(Checkpoint):
    """A single file, or shards and their index in one folder."""

    def __init__(self, find: Find, where: str, single: str, index: str):
        self.where = where
        path = find(single)  # a single file comes first, as in transformers
        if path is not None:
            contents = {path: self._contents(path)}
            files = dict.fromkeys(contents[path], path)
        else:
            files = {name: self._shard(find, shard) for name, shard in self._weight_map(find(index)).items()}
            contents = {path: self._contents(path) for path in dict.fromkeys(files.values())}
        for name, path in files.items():
            if name not in contents[path]:
                raise RoseExpError(f"{where}: {path.name} does not contain {name}, which the index lists there")
        unlisted = sorted(name for path in contents for name in contents[path] if files.get(name) != path)
        if unlisted:
            raise RoseExpError(f"{where}: the index does not list {_few(unlisted)}, which the shards contain")
        self.files = files
        self.tensors = {name: contents[path][name] for name, path in files.items()}

    @abstractmethod
    def _contents(self, path: Path) -> dict[str, tuple[torch.dtype, torch.Size]]:
        """Return dtype and shape of every tensor in a file."""

    def _weight_map(self, index: Path) -> dict[str, str]:
        weight_map = read_json_object(index, self.where).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise RoseExpError(f"{self.where}: {index} is not an index of shards: expected names of files in weight_map")
        if not weight_map:
            raise RoseExpError(f"{self.where}: {index} is not an index of shards: weight_map is empty")
        return weight_map

    def _shard(self, find: Find, shard: str) -> Path:
        if Path(shard).name != shard or shard.startswith("."):  # the fingerprint does not cover hidden files
            raise RoseExpError(f"{self.where}: expected file names in the folder of the index, got {shard!r}")
        path = find(shard)
        if path is None:
            raise RoseExpError(f"{self.where}: the shard {shard} is missing")
        return path


class SafetensorsCheckpoint(FilesCheckpoint):
    """Safetensors files.

    Args:
        find: returns the local path of a file by its name in the checkpoint, or None if it does not exist.
        where: name and value of the setting that selects the checkpoint, for error messages.

    Raises:
        RoseExpError: the index names a file outside the folder, or a file that is missing or damaged.
    """

    def __init__(self, find: Find, where: str):
        super().__init__(find, where, SINGLE, INDEX)

    def _contents(self, path: Path) -> dict[str, tuple[torch.dtype, torch.Size]]:
        with self._open(path) as file, outside_errors(f"{self.where}: {path} is damaged"):
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
            facts = {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}
        return {name: (self._dtype(name, dtype), torch.Size(shape)) for name, (dtype, shape) in facts.items()}

    def _dtype(self, name: str, dtype: str) -> torch.dtype:
        if dtype not in DTYPES:
            raise RoseExpError(f"{self.where}: expected a dtype such as BF16 for {name}, got {dtype}")
        return DTYPES[dtype]

    @contextmanager
    def read(self, names: Sequence[str]) -> Iterator[dict[str, Any]]:
        with ExitStack() as stack:
            opened = {path: stack.enter_context(self._open(path)) for path in {self.files[name] for name in names}}
            with outside_errors(f"{self.where}: cannot read the weights"):
                slices = {name: opened[self.files[name]].get_slice(name) for name in names}
            yield slices

    def _open(self, path: Path) -> Any:
        with outside_errors(f"{self.where}: {path} is missing or damaged"):
            try:
                return safe_open(path, framework="pt", device="cpu")  # rejects a header that does not match the file size
            except RuntimeError as error:
                if "Cannot allocate memory" not in str(error):
                    raise
                raise RoseExpError(  # torch maps files as private memory, which these limits count as a whole
                    f"{self.where}: cannot map {path} into memory, because the memory limit of the process (ulimit -d or "
                    "ulimit -v) is too low for the size of the file; save the model in smaller shards (max_shard_size)"
                ) from error


class TorchCheckpoint(FilesCheckpoint):
    """Files of ``torch.save``, loaded with ``weights_only``. Arguments and errors match :class:`SafetensorsCheckpoint`."""

    def __init__(self, find: Find, where: str):
        super().__init__(find, where, TORCH_SINGLE, TORCH_INDEX)

    def _contents(self, path: Path) -> dict[str, tuple[torch.dtype, torch.Size]]:
        return {name: (value.dtype, value.shape) for name, value in self._load(path).items()}

    @contextmanager
    def read(self, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
        loaded = {path: self._load(path) for path in {self.files[name] for name in names}}
        yield {name: loaded[self.files[name]][name] for name in names}

    def _load(self, path: Path) -> dict[str, Tensor]:
        with outside_errors(f"{self.where}: {path} is missing, damaged or contains more than tensors"):
            try:
                mapped = zipfile.is_zipfile(path)  # the older format cannot be mapped into memory
                state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
            except pickle.UnpicklingError as error:  # torch's message recommends to execute the file
                raise ValueError(_refusal(str(error))) from None
        if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
            raise RoseExpError(f"{self.where}: expected a mapping of names to tensors in {path}, got {type(state).__name__}")
        if wrong := next((name for name in state if not isinstance(name, str)), None):
            raise RoseExpError(f"{self.where}: expected names of tensors in {path}, got {reprlib.repr(wrong)}")
        return {name: self._plain(name, value) for name, value in state.items()}

    def _plain(self, name: str, value: Tensor) -> Tensor:
        kinds = {"nested": value.is_nested, "quantized": value.is_quantized, "meta": value.is_meta}
        kind = next((kind for kind, found in kinds.items() if found), str(value.layout).removeprefix("torch."))
        if kind != "strided":
            raise RoseExpError(f"{self.where}: expected dense tensors, got the {kind} tensor {name}")
        return value


def _refusal(message: str) -> str:
    """Return what torch refuses to load, from its message about a pickle."""
    function = re.search(r"GLOBAL (\S+)", message)
    if function:
        return f"it refers to {function[1]}, which is not executed"
    lines = message.rpartition("WeightsUnpickler error:")[2].split("\n")
    return next((line.strip() for line in lines if line.strip()), "invalid pickle")


class GgufCheckpoint(Checkpoint):
    """A GGUF file, whose tensors are dequantized when they are read.

    Uses private functions of transformers for the layout of each family, because the public one reads the whole file at once.
    """

    def __init__(self, path: Path, model: nn.Module, where: str):
        from gguf import GGUFReader
        from transformers import modeling_gguf_pytorch_utils as gguf_utils

        self.where = where
        check_gguf(path, where)
        with outside_errors(f"{where}: cannot read {path}"):
            self.parsed = gguf_utils.load_gguf_checkpoint(str(path), return_tensors=False)
            reader = GGUFReader(str(path))
            field = reader.fields["general.architecture"]
            architecture = bytes(field.parts[field.data[0]]).decode()
            kind = gguf_utils.TENSOR_PROCESSORS.get(architecture, gguf_utils.TensorProcessor)
            self.processor = kind(config=self.parsed.get("config", {}))
            self.keys = gguf_utils.get_gguf_hf_weights_map(model, self.processor)
        self.sources: dict[str, list[Any]] = {}  # source tensors in the file of each model tensor
        self.unmapped: list[str] = []
        for tensor in reader.tensors:
            name = self.keys.get(tensor.name, self.keys.get(tensor.name.removesuffix(".weight")))
            if name is None:
                self.unmapped.append(tensor.name)
            else:
                self.sources.setdefault(name, []).append(tensor)
        self.tensors = dict.fromkeys(self.sources, (torch.float32, None))

    @contextmanager
    def read(self, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
        import numpy
        from gguf import dequantize

        tensors: dict[str, Tensor] = {}
        merged = self.parsed["tensors"] = {}  # where transformers stores a tensor merged from several
        for name in names:
            for tensor in self.sources[name]:
                with outside_errors(f"{self.where}: cannot read {tensor.name}"):
                    result = self.processor.process(
                        weights=dequantize(tensor.data, tensor.tensor_type),
                        name=tensor.name,
                        tensor_key_mapping=self.keys,
                        parsed_parameters=self.parsed,
                    )
                if result.name is not None:
                    tensors[self.keys[result.name]] = torch.from_numpy(numpy.copy(result.weights))
        tensors |= merged
        self.parsed["tensors"] = {}
        if set(tensors) != set(names):
            lost = _few(sorted(set(names) ^ set(tensors)))
            raise RoseExpError(f"{self.where}: transformers cannot read {lost} of this GGUF file one part at a time")
        yield tensors


def open_checkpoint(find: Find, where: str) -> Checkpoint:
    """Open the checkpoint in a folder: safetensors files, or files of ``torch.save`` as a fallback.

    Raises:
        RoseExpError: the folder contains neither, or the files are damaged.
    """
    if find("adapter_config.json") is not None:
        raise RoseExpError(
            f"{where}: expected the weights of a whole model, got an adapter (adapter_config.json); merge it into its base "
            "model and save the result"
        )
    for kind, names in ((SafetensorsCheckpoint, (SINGLE, INDEX)), (TorchCheckpoint, (TORCH_SINGLE, TORCH_INDEX))):
        if any(find(name) is not None for name in names):
            return kind(find, where)
    raise RoseExpError(
        f"{where}: expected {SINGLE}, {INDEX}, {TORCH_SINGLE}, {TORCH_INDEX} or the path of a GGUF file, got none of them"
    )


def _few(names: Sequence[str], limit: int = 3) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
