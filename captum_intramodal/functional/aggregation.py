r"""TODO."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

__all__ = [
    "AGGREGATIONS",
    "CHANGED_DECISIONS",
    "DEFAULT_SCALES",
    "Aggregation",
    "ChangedDecisions",
    "aggregate",
    "check_scales",
    "normalized_weights",
]

# What the benchmark picks (benchmarks/sensitivity.py).
DEFAULT_SCALES: tuple[float, ...] = (1.0, 1.5, 2.0)


Aggregation = Literal["mean", "max", "geometric_mean"]


AGGREGATIONS: tuple[str, ...] = get_args(Aggregation)


ChangedDecisions = Literal["keep", "drop", "weigh"]


CHANGED_DECISIONS: tuple[str, ...] = get_args(ChangedDecisions)


def check_scales(scales: Sequence[float]) -> tuple[float, ...]:
    """Scales as a tuple of positive finite numbers, each once."""
    if not isinstance(scales, Iterable):
        raise TypeError(f"scales must be a sequence of factors such as (1, 1.5, 2), got {scales!r}.")
    result = tuple(float(scale) for scale in scales)
    if not result:
        raise ValueError("scales is empty; pass at least one, such as (1.0,).")
    if bad := [scale for scale in result if not (math.isfinite(scale) and scale > 0)]:
        raise ValueError(f"Scales must be positive and finite, got {bad}.")
    if len(set(result)) < len(result):
        raise ValueError(f"Scales must be different from each other, got {result}.")
    return result


def normalized_weights(scales: Sequence[float], weights: Sequence[float] | None) -> Tensor:
    """Weights of the scales, float32, non-negative and of sum 1; equal ones for None."""
    if weights is None:
        return torch.full((len(scales),), 1 / len(scales))
    result = torch.as_tensor(list(weights), dtype=torch.float32)
    if result.shape != (len(scales),):
        raise ValueError(f"{result.numel()} weights for {len(scales)} scales.")
    if not bool(result.isfinite().all()) or bool((result < 0).any()) or float(result.sum()) <= 0:
        raise ValueError(f"Weights must be non-negative, finite and not all zero, got {list(weights)}.")
    return result / result.sum()


def aggregate(maps: Iterable[Tensor], weights: Tensor, aggregation: Aggregation = "mean") -> Tensor:
    r"""
    Combines maps of the same shape, one per scale (paper, Eq. 4).

    Args:

        maps (Iterable[Tensor]): One map per scale, all of the same shape, in the frame of the original input. For a
                    mean, one at a time is taken.
        weights (Tensor): float32 (scales,), of sum 1; or (scales, N) with weights for each of the N first entries of a
                    map. A scale of weight 0 is left out.
        aggregation (str, optional): ``'mean'``: the weighted mean. ``'max'``: the largest weighted value, times the
                    number of scales. ``'geometric_mean'``: of non-negative maps, what all scales agree on; negative
                    values count as 0.
                    Default: ``'mean'``

    Returns:
        *Tensor* of the shape of one map, contiguous; float32, of float64 maps float64.
    """
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"aggregation must be one of {AGGREGATIONS}, got {aggregation!r}.")
    if aggregation == "mean":
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
            raise ValueError("There are no maps to combine.")
        return total
    stack = torch.stack([values.to(torch.promote_types(values.dtype, torch.float32)) for values in maps]).contiguous()
    column = weights.to(stack).reshape(*weights.shape, *[1] * (stack.ndim - weights.ndim))
    counts = column > 0
    if aggregation == "max":
        return (stack * column).amax(0) * counts.sum(0)
    return (stack.clamp_min(1e-12).log() * column).sum(0).exp() * ((stack > 0) | ~counts).all(0)
