r"""Adapt the arguments of an attribution method to inputs of another size."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from captum_intramodal._utils.captum import format_additional_forward_args
from captum_intramodal.attr.pyramids.base import Arguments, Size
from captum_intramodal.errors import InvalidInputError

__all__ = [
    "as_tuple",
    "ends_with",
    "follow_forward_args",
    "follow_inputs",
    "input_sizes",
    "move_index",
    "spatial_sizes",
]


def move_index(at: int | slice, old: int, new: int) -> int | slice:
    """Convert an index or slice along a dimension of length ``old`` to the same place along one of length ``new``."""
    if isinstance(at, int):
        return int((at % old + 0.5) * new / old)
    start, stop, _ = at.indices(old)
    first = min(int(start * new / old), new - 1)
    return slice(first, max(first + 1, math.ceil(stop * new / old)))


def spatial_sizes(tensors: Sequence[Tensor]) -> list[Size]:
    """Return each tensor's size after examples and channels, up to three dimensions; empty for other tensors."""
    return [tuple(tensor.shape[2:]) if 3 <= tensor.ndim <= 5 else () for tensor in tensors]


def input_sizes(inputs: Sequence[Tensor], chosen: Sequence[int] | None) -> list[Size]:
    """Return the spatial sizes of the inputs to be scaled (None: all that have one), empty for the others."""
    sizes = spatial_sizes(inputs)
    if chosen is not None:
        sizes = [size if index in chosen else () for index, size in enumerate(sizes)]
    if not any(sizes):
        raise InvalidInputError(
            f"MSEA resizes inputs with spatial dimensions (N, C, ...), got shapes "
            f"{[tuple(tensor.shape) for tensor in inputs]}; use scales=(1.0,) for inputs that have none."
        )
    return sizes


def ends_with(value: object, size: Size) -> bool:
    """Return whether a value is a tensor whose last dimensions have this size."""
    return isinstance(value, Tensor) and tuple(value.shape[-len(size) :]) == size


def as_tuple(value: Any) -> tuple[Any, ...]:
    """Wrap a value in a tuple, unless it is one."""
    return value if isinstance(value, tuple) else (value,)


def follow_inputs(
    kwargs: Mapping[str, Any], sizes: Sequence[Size], changes: Mapping[str, Callable[[Any, Size], Any]]
) -> Arguments:
    """Apply ``changes`` to the arguments of these names, which are tuples of one value per input, or a bare value for a
    single input. Each value is changed given its input's size."""

    def change(name: str, value: Any) -> Any:
        if callable(value):
            # Captum calls baselines with or without the inputs, depending on their signature.
            takes_inputs = bool(inspect.signature(value).parameters)
            return (lambda inputs: change(name, value(inputs))) if takes_inputs else (lambda: change(name, value()))
        each = value if isinstance(value, tuple) and len(value) == len(sizes) else (value,)
        if len(each) != len(sizes):
            return value
        changed = tuple(changes[name](v, size) if size else v for v, size in zip(each, sizes, strict=True))
        return changed if each is value else changed[0]

    return {
        name: change(name, value) if name in changes and value is not None else value for name, value in kwargs.items()
    }


def follow_forward_args(
    kwargs: Arguments, sizes: Sequence[Size], change: Callable[[Any, Size], Any], chosen: Sequence[int] | None
) -> Arguments:
    """Change the chosen ``additional_forward_args`` that end with an input's size (None: all that do)."""
    given = format_additional_forward_args(kwargs.get("additional_forward_args"))
    if given is None:
        return kwargs

    def changed(index: int, value: Any) -> Any:
        if not isinstance(value, Tensor) or (chosen is not None and index not in chosen):
            return value
        size = next((s for s in sizes if s and value.ndim > len(s) and ends_with(value, s)), None)
        return value if size is None else change(value, size)

    return kwargs | {"additional_forward_args": tuple(changed(index, value) for index, value in enumerate(given))}
