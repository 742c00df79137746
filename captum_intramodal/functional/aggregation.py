r"""Aggregation over scales: which scales, with which weights, and how their maps become one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from captum_intramodal.errors import InvalidInputError, InvalidOptionError

__all__ = ["AGGREGATIONS", "DEFAULT_SCALES", "Aggregation", "aggregate", "check_scales", "normalized_weights"]

# Chosen by benchmarks/sensitivity.py.
DEFAULT_SCALES: tuple[float, ...] = (1.0, 1.5, 2.0)

Aggregation = Literal["mean", "max", "geometric_mean"]

AGGREGATIONS: tuple[str, ...] = get_args(Aggregation)


def check_scales(scales: Sequence[float]) -> tuple[float, ...]:
    """Return the scales as a tuple of floats, after checking that they are positive, finite and distinct."""
    if not isinstance(scales, Iterable):
        raise TypeError(f"scales must be a sequence of factors such as (1, 1.5, 2), got {scales!r}.")
    result = tuple(float(scale) for scale in scales)
    if not result:
        raise InvalidOptionError("scales is empty; pass at least one, such as (1.0,).")
    if bad := [scale for scale in result if not (math.isfinite(scale) and scale > 0)]:
        raise InvalidOptionError(f"scales must be positive and finite, got {bad}.")
    if len(set(result)) < len(result):
        raise InvalidOptionError(f"scales must be distinct, got {result}.")
    return result


def normalized_weights(scales: Sequence[float], weights: Sequence[float] | None) -> Tensor:
    """Return one weight per scale, float32, non-negative and summing to 1; equal weights for None."""
    if weights is None:
        return torch.full((len(scales),), 1 / len(scales))
    result = torch.as_tensor(list(weights), dtype=torch.float32)
    if result.shape != (len(scales),):
        raise InvalidOptionError(f"Got {result.numel()} weights for {len(scales)} scales; pass one weight per scale.")
    if not bool(result.isfinite().all()) or bool((result < 0).any()) or float(result.sum()) <= 0:
        raise InvalidOptionError(f"Weights must be non-negative, finite and not all zero, got {list(weights)}.")
    return result / result.sum()


def aggregate(maps: Iterable[Tensor], weights: Tensor, aggregation: Aggregation = "mean") -> Tensor:
    r"""
    Combine maps of the same shape, one per scale (arXiv 2509.22415, Eq. 4).

    Args:

        maps (Iterable[Tensor]): One map per scale, (N, ...), all of the same shape, in the frame of the original
                    input. The mean takes them one at a time, so a generator saves memory.
        weights (Tensor): float32 (scales,), summing to 1; or (scales, N), with separate weights for each of the N
                    entries of a map. A scale of weight 0 is ignored.
        aggregation (str, optional): ``'mean'`` is the weighted mean; ``'max'`` the largest weighted value, times the
                    number of scales; ``'geometric_mean'`` the weighted geometric mean of non-negative maps, which keeps
                    what all scales agree on (negative values count as 0).
                    Default: ``'mean'``

    Returns:
        **map** (*Tensor*): of the shape of one map, contiguous; float32, or float64 for float64 maps.

    Raises:
        InvalidOptionError: if ``aggregation`` is unknown.
        InvalidInputError: if there are no maps.

    Examples::

        >>> from captum_intramodal.functional.aggregation import aggregate
        >>> aggregate([torch.tensor([1.0, 4.0]), torch.tensor([3.0, 0.0])], torch.tensor([0.5, 0.5]))
        tensor([2., 2.])
    """
    if aggregation not in AGGREGATIONS:
        raise InvalidOptionError(f"aggregation must be one of {AGGREGATIONS}, got {aggregation!r}.")
    if aggregation == "mean":
        return _weighted_mean(maps, weights)
    each = [values.to(torch.promote_types(values.dtype, torch.float32)) for values in maps]
    if not each:
        raise InvalidInputError("There are no maps to aggregate; pass one per scale.")
    stack = torch.stack(each).contiguous()
    column = weights.to(stack).reshape(*weights.shape, *[1] * (stack.ndim - weights.ndim))
    counts = column > 0
    if aggregation == "max":
        return (stack * column).amax(0) * counts.sum(0)
    return (stack.clamp_min(1e-12).log() * column).sum(0).exp() * ((stack > 0) | ~counts).all(0)


def _weighted_mean(maps: Iterable[Tensor], weights: Tensor) -> Tensor:
    """Sum the weighted maps, holding one of them at a time."""
    total: Tensor | None = None
    for weight, values in zip(weights, maps, strict=True):
        if total is None:
            dtype = torch.promote_types(values.dtype, torch.float32)
            total = torch.zeros(values.shape, dtype=dtype, device=values.device)
        if weight.ndim:
            total.addcmul_(values.to(total), weight.to(total).reshape(-1, *[1] * (values.ndim - 1)))
        else:
            total.add_(values, alpha=float(weight))
    if total is None:
        raise InvalidInputError("There are no maps to aggregate; pass one per scale.")
    return total
