r"""TODO."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from captum_intramodal._utils.captum import format_additional_forward_args
from captum_intramodal.attr.pyramids.base import Arguments, Size

__all__ = []


def move_index(at: int | slice, old: int, new: int) -> int | slice:
    """The index, or the range of indices, of the same place along a dimension of another length."""
    if isinstance(at, int):
        return int((at % old + 0.5) * new / old)
    start, stop, _ = at.indices(old)
    first = min(int(start * new / old), new - 1)
    return slice(first, max(first + 1, math.ceil(stop * new / old)))


def spatial_sizes(tensors: Sequence[Tensor]) -> list[Size]:
    """The sizes after examples and channels, of up to three dimensions; empty for tensors that have none."""
    return [tuple(tensor.shape[2:]) if 3 <= tensor.ndim <= 5 else () for tensor in tensors]


def input_sizes(inputs: Sequence[Tensor], chosen: Sequence[int] | None) -> list[Size]:
    """Spatial sizes of the inputs that go to a scale, empty for the others."""
    sizes = spatial_sizes(inputs)
    if chosen is not None:
        sizes = [size if index in chosen else () for index, size in enumerate(sizes)]
    if not any(sizes):
        raise ValueError(
            f"MSEA resizes inputs with spatial dimensions (N, C, ...), got shapes "
            f"{[tuple(tensor.shape) for tensor in inputs]}; use scales=(1.0,) for inputs that have none."
        )
    return sizes


def ends_with(value: Any, size: Size) -> bool:
    return isinstance(value, Tensor) and tuple(value.shape[-len(size) :]) == size


def as_tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def follow_inputs(
    kwargs: Mapping[str, Any], sizes: Sequence[Size], changes: Mapping[str, Callable[[Any, Size], Any]]
) -> Arguments:
    """Arguments that Captum takes one of per input, or bare for a single input, changed with their input's size."""

    def change(name: str, value: Any) -> Any:
        if callable(value):
            # Captum calls baselines with the inputs, or without, as they are written.
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
    kwargs: Arguments, sizes: Sequence[Size], change: Callable[[Any, Size], Any], which: Sequence[int] | None
) -> Arguments:
    """``additional_forward_args`` changed where they look like one of the inputs, or those that were asked for."""
    given = format_additional_forward_args(kwargs.get("additional_forward_args"))
    if given is None:
        return kwargs

    def changed(index: int, value: Any) -> Any:
        if not isinstance(value, Tensor) or (which is not None and index not in which):
            return value
        size = next((s for s in sizes if s and value.ndim > len(s) and ends_with(value, s)), None)
        return value if size is None else change(value, size)

    return kwargs | {"additional_forward_args": tuple(changed(index, value) for index, value in enumerate(given))}
