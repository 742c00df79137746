"""Estimates with bootstrap intervals, for metrics of explanations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from torch import Tensor

__all__ = ["Interval", "bootstrap_interval", "paired_bootstrap_difference"]

Array: TypeAlias = Tensor | npt.NDArray[Any]
Floats: TypeAlias = npt.NDArray[np.float64]

# Resampled values held at a time.
_RESAMPLED_VALUES = 2**22


class Interval(NamedTuple):
    r"""An estimate and its bootstrap interval.

    Args:

        estimate (float): The statistic of the values as they are.
        low (float): Lower end of the interval.
        high (float): Upper end of the interval.
    """

    estimate: float
    low: float
    high: float


def bootstrap_interval(
    values: Array | Sequence[Any],
    statistic: Callable[..., Any] = np.mean,
    n: int = 10_000,
    level: float = 0.95,
    seed: int | np.random.Generator = 0,
) -> Interval:
    r"""Percentile bootstrap interval of a statistic over samples.

    Samples, pictures and not words, are drawn with replacement, with all their columns. Source: Efron, "Bootstrap
    methods: another look at the jackknife", 1979.

    Args:

        values (Tensor, ndarray or sequence): One row for each sample. Shape: N, or N x C for C columns.
        statistic (Callable): Called as ``statistic(column_1, ..., column_C, axis=-1)`` with arrays of shape B x N, of
                    which it returns B numbers, like ``numpy.mean``, ``numpy.median`` or :func:`f1_iou`.
                    Default: ``numpy.mean``
        n (int): Number of resamples. Default: ``10_000``
        level (float): Coverage, between 0 and 1. Default: ``0.95``
        seed (int or Generator): Seed of a NumPy generator, or the generator. Default: ``0``

    Returns:
        **interval** (*Interval*):
            The named tuple (estimate, low, high).

    Raises:
        ValueError: If there are no samples, a value is not finite, or the statistic returns another shape or is not
            finite in some resample (as a ratio of counts that are all 0).

    Examples::

        >>> bootstrap_interval([0.25, 0.25, 0.25])
        Interval(estimate=0.25, low=0.25, high=0.25)
        >>> obj, func = [0.2, 0.4, 0.9], [0.5, 0.7, 0.6]
        >>> estimate, low, high = bootstrap_interval(np.stack([obj, func], axis=1), f1_iou, n=1000)
        >>> low < estimate < high
        True
    """
    return _bootstrap([_samples(values, "values")], statistic, n, level, seed)


def paired_bootstrap_difference(
    first: Array | Sequence[Any],
    second: Array | Sequence[Any],
    statistic: Callable[..., Any] = np.mean,
    n: int = 10_000,
    level: float = 0.95,
    seed: int | np.random.Generator = 0,
) -> Interval:
    r"""Percentile bootstrap interval of ``statistic(first) - statistic(second)`` for two methods on the same samples.

    Each resample draws the same samples for both, so that what makes a sample hard for both cancels. The methods
    differ at the level if the interval leaves out 0.

    Args:

        first (Tensor, ndarray or sequence): One row for each sample. Shape: N or N x C.
        second (Tensor, ndarray or sequence): The same samples in the same order, with the shape of ``first``.
        statistic (Callable): As in :func:`bootstrap_interval`. Default: ``numpy.mean``
        n (int): Number of resamples. Default: ``10_000``
        level (float): Coverage, between 0 and 1. Default: ``0.95``
        seed (int or Generator): Seed of a NumPy generator, or the generator. Default: ``0``

    Returns:
        **interval** (*Interval*):
            The named tuple (estimate, low, high) of the difference.

    Raises:
        ValueError: As in :func:`bootstrap_interval`, and if the shapes differ.

    Examples::

        >>> paired_bootstrap_difference([0.75, 0.5, 1.0, 0.5], [0.5, 0.25, 0.75, 0.25])
        Interval(estimate=0.25, low=0.25, high=0.25)
    """
    pair = [_samples(first, "first"), _samples(second, "second")]
    if pair[0].shape != pair[1].shape:
        raise ValueError(f"first and second must have one shape, but they have {pair[0].shape} and {pair[1].shape}.")
    return _bootstrap(pair, statistic, n, level, seed)


def _bootstrap(
    tables: list[Floats], statistic: Callable[..., Any], n: int, level: float, seed: int | np.random.Generator
) -> Interval:
    """Interval of the statistic of the first table, less that of the second if there is one."""
    if n < 1:
        raise ValueError(f"n must be positive, but it is {n}.")
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, but it is {level}.")
    samples, columns = tables[0].shape

    def evaluate(rows: npt.NDArray[np.intp]) -> Floats:
        results = []
        for table in tables:
            result = np.asarray(statistic(*(column[rows] for column in table.T), axis=-1), dtype=np.float64)
            if result.shape != rows.shape[:1]:
                raise ValueError(
                    f"statistic must reduce {columns} arrays of shape {rows.shape} to {rows.shape[:1]}, "
                    f"but it returned {result.shape}."
                )
            results.append(result)
        return results[0] if len(results) == 1 else results[0] - results[1]

    generator = np.random.default_rng(seed)
    part = max(1, _RESAMPLED_VALUES // (samples * columns))
    drawn = np.concatenate(
        [
            evaluate(generator.integers(samples, size=(min(part, n - start), samples), dtype=np.intp))
            for start in range(0, n, part)
        ]
    )
    estimate = evaluate(np.arange(samples, dtype=np.intp)[None])[0]
    failed = int((~np.isfinite(drawn)).sum())
    if failed or not np.isfinite(estimate):
        raise ValueError(
            f"statistic is {estimate} on all {samples} samples and not finite in {failed} of {n} resamples."
        )
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(estimate), float(low), float(high))


def _samples(values: Array | Sequence[Any], name: str) -> Floats:
    table = finite(values, name)
    if table.ndim not in (1, 2):
        raise ValueError(f"{name} must be N or N x C, but its shape is {table.shape}.")
    return table.reshape(len(table), -1)


def finite(values: Array | Sequence[Any], name: str) -> Floats:
    if isinstance(values, Tensor):
        values = values.detach().cpu().double().numpy()
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        raise ValueError(f"{name} is empty, its shape is {array.shape}.")
    wrong = int((~np.isfinite(array)).sum())
    if wrong:
        raise ValueError(f"{name} holds NaN or infinity in {wrong} of {array.size} values.")
    return array
