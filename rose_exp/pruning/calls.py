"""The arguments of a block's call, and functions on their tensors and containers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping, MutableSequence, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


@dataclass
class BlockCall:
    """The arguments of one call of a block, without the hidden states.

    Attributes:
        args: positional arguments after the hidden states.
        kwargs: keyword arguments, such as mask, position embeddings and cache.
        by_keyword: whether the hidden states are passed as ``hidden_states=``.
        axis: dimension of the windows in the block's hidden states; not 0 for models with several streams of hidden states in
            the first dimension, such as Gemma 3n.
        received: arguments that the previous block returned, by position in ``args`` or by keyword. They replace those of
            ``args`` and ``kwargs``.
        following: the call of the next block, which receives some of this block's return values.
        passes: places of these values among the arguments of the next call, with their positions in the returned tuple.
    """

    args: tuple = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    by_keyword: bool = False
    axis: int = 0
    received: dict[int | str, Tensor] = field(default_factory=dict)
    following: BlockCall | None = None
    passes: Mapping[int | str, int] = field(default_factory=dict)

    @classmethod
    def split(cls, args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, BlockCall]:
        """Split the arguments of a call into the hidden states and the rest."""
        rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        return (args[0] if args else kwargs["hidden_states"]), cls(args[1:], rest, by_keyword=not args)

    def run(self, block: Callable[..., Any], hidden: Tensor) -> Tensor:
        """Return the block's output hidden states for ``hidden`` (windows, …, width), and pass its other outputs on."""
        output = self.output(block, hidden.movedim(0, self.axis) if self.axis else hidden)
        if self.following is not None:
            self.following.received = {place: output[position] for place, position in self.passes.items()}
        states = first_tensor(output)
        return states.movedim(self.axis, 0) if self.axis else states

    def output(self, block: Callable[..., Any], hidden: Tensor) -> Any:
        """Return everything that the block returns for ``hidden``, whose windows are in dimension :attr:`axis`."""
        positional = tuple(self.received.get(place, value) for place, value in enumerate(self.args))
        keywords = self.kwargs | {place: value for place, value in self.received.items() if isinstance(place, str)}
        args = _moved(positional, hidden.device)
        kwargs = {name: _moved(value, hidden.device) for name, value in keywords.items()}
        if self.by_keyword:
            return block(*args, hidden_states=hidden, **kwargs)
        return block(hidden, *args, **kwargs)

    def isolated(self, copies: dict[int, Any] | None = None) -> BlockCall:
        """Return the same call with copies of its containers, which a block can modify without affecting this call.

        Args:
            copies: copies by ``id`` of the original. Calls that pass the same dictionary share their copies.
        """
        copies = {} if copies is None else copies
        args, kwargs = (_copy_containers(value, copies) for value in (self.args, self.kwargs))
        return replace(self, args=args, kwargs=dict(kwargs))

    def without(self, places: Collection[int | str]) -> tuple[list[Any], dict[str, Any]]:
        """Return the arguments without those at ``places``."""
        args = [value for place, value in enumerate(self.args) if place not in places]
        return args, {name: value for name, value in self.kwargs.items() if name not in places}

    def places_of(self, values: Sequence[Any]) -> dict[int | str, int]:
        """Return the places of the arguments that are one of the tensors in ``values``, with their positions there."""
        places: dict[int | str, int] = {}
        for place, argument in [*enumerate(self.args), *self.kwargs.items()]:
            for position, value in enumerate(values):
                if isinstance(value, Tensor) and value is argument:
                    places[place] = position
        return places

    def contents(self) -> list[tuple[int, tuple[int, ...]]]:
        """Return the ``id`` of every container and of its items, to detect whether a block writes to it."""
        return [(id(container), tuple(map(id, _values(container)))) for container in _containers((self.args, self.kwargs))]


def on_device(calls: list[BlockCall], device: torch.device | str, moved: dict[int, Any] | None = None) -> list[BlockCall]:
    """Return the calls with every tensor on ``device``. Tensors and containers shared between blocks stay shared.

    Args:
        moved: replacements by ``id`` of the original, extended by every object that this function moves.
    """
    moved = {} if moved is None else moved
    pairs = [to_device((call.args, call.kwargs), device, moved) for call in calls]
    return [replace(call, args=args, kwargs=kwargs) for call, (args, kwargs) in zip(calls, pairs, strict=True)]


def share_equal(calls: list[BlockCall], others: list[BlockCall]) -> list[BlockCall]:
    """Return ``calls`` with each tensor replaced by the one in ``others`` if the two are equal, to save memory."""
    seen: dict[int, Any] = {}
    shared = [
        _share((call.args, call.kwargs), (other.args, other.kwargs), seen) for call, other in zip(calls, others, strict=True)
    ]
    return [replace(call, args=args, kwargs=kwargs) for call, (args, kwargs) in zip(calls, shared, strict=True)]


def link(calls: Sequence[BlockCall], passes: Sequence[Mapping[int | str, int]]) -> None:
    """Make each call pass values that its block returns on to the next call.

    Args:
        passes: for each call, :attr:`BlockCall.passes`.
    """
    for call, following, places in zip(calls, calls[1:], passes, strict=False):
        call.following, call.passes = (following, places) if places else (None, {})


def first_tensor(output: Any) -> Tensor:
    """Return the hidden states from a block's output, which is a tensor or a tuple that starts with it."""
    return output[0] if isinstance(output, (tuple, list)) else output


def to_device(value: Any, device: torch.device | str, moved: dict[int, Any]) -> Any:
    if isinstance(value, Tensor):
        if id(value) not in moved:
            moved[id(value)] = value.to(device)
        return moved[id(value)]
    if type(value) is tuple:
        return tuple(to_device(item, device, moved) for item in value)
    if type(value) in (list, dict):
        if id(value) not in moved:  # shared containers stay shared
            items = value if type(value) is list else value.values()
            moved_items = [to_device(item, device, moved) for item in items]
            moved[id(value)] = moved_items if type(value) is list else dict(zip(value, moved_items, strict=True))
        return moved[id(value)]
    return value


def _share(value: Any, other: Any, seen: dict[int, Any]) -> Any:
    """Return ``value`` with tensors taken from ``other`` if equal; shared containers stay shared."""
    if isinstance(value, Tensor):
        return other if isinstance(other, Tensor) and equal(value, other) else value
    if type(value) is tuple and type(other) is tuple and len(value) == len(other):
        return tuple(_share(a, b, seen) for a, b in zip(value, other, strict=True))
    if type(value) is dict and type(other) is dict:
        if id(value) not in seen:
            seen[id(value)] = {name: _share(item, other.get(name), seen) for name, item in value.items()}
        return seen[id(value)]
    return value


def equal(value: Any, other: Any) -> bool:
    """Return whether two arguments are equal. Values other than tensors, numbers, strings and containers match by type."""
    if isinstance(value, Tensor) or isinstance(other, Tensor):
        alike = isinstance(value, Tensor) and isinstance(other, Tensor) and value.dtype == other.dtype
        return alike and value.shape == other.shape and torch.equal(value, other)
    if isinstance(value, Mapping) and isinstance(other, Mapping):
        return value.keys() == other.keys() and all(equal(item, other[name]) for name, item in value.items())
    if isinstance(value, (tuple, list)) and isinstance(other, (tuple, list)):
        return len(value) == len(other) and all(map(equal, value, other))
    plain = (int, float, str, type(None))
    return value == other if isinstance(value, plain) and isinstance(other, plain) else type(value) is type(other)


def shifted(value: Any, shift: float) -> Any:
    """Return ``value`` with ``shift`` added to its floating-point tensors."""
    if isinstance(value, Tensor):
        return value + shift if value.is_floating_point() else value
    if isinstance(value, (tuple, list)):
        return type(value)(shifted(item, shift) for item in value)
    return value


def _containers(value: Any) -> Iterator[Any]:
    """Yield the mutable containers inside ``value``, which blocks may write to."""
    if isinstance(value, (MutableMapping, MutableSequence)):
        yield value
    if isinstance(value, (Mapping, tuple, list)):
        for item in _values(value):
            yield from _containers(item)


def _values(container: Any) -> list[Any]:
    return list(container.values() if isinstance(container, Mapping) else container)


def _copy_containers(value: Any, copies: dict[int, Any]) -> Any:
    if type(value) is tuple:
        return tuple(_copy_containers(item, copies) for item in value)
    if not isinstance(value, (MutableMapping, MutableSequence)):
        return value
    if id(value) not in copies:
        copies[id(value)] = copied = copy.copy(value)
        for place, item in copied.items() if isinstance(copied, Mapping) else enumerate(copied):
            copied[place] = _copy_containers(item, copies)
    return copies[id(value)]


def _moved(value: Any, device: torch.device) -> Any:
    """Return ``value`` with its tensors on ``device``; containers that need no change are returned as they are."""
    if isinstance(value, Tensor):
        return value.to(device)
    if type(value) in (tuple, list):
        items = [_moved(item, device) for item in value]
        return value if all(a is b for a, b in zip(items, value, strict=True)) else type(value)(items)
    if type(value) is dict:
        moved = {name: _moved(item, device) for name, item in value.items()}
        return value if all(moved[name] is item for name, item in value.items()) else moved
    return value
