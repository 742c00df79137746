"""Estimates with bootstrap intervals and paired tests, for metrics of explanations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from torch import Tensor

__all__ = ["Interval", "bootstrap_interval", "paired_bootstrap_difference", "paired_permutation_test"]

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

    Samples, images and not words, are drawn with replacement, with all their columns. Source: Efron, "Bootstrap
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
    return _bootstrap(_pair(first, second), statistic, n, level, seed)


def paired_permutation_test(
    first: Array | Sequence[Any],
    second: Array | Sequence[Any],
    statistic: Callable[..., Any] = np.mean,
    n: int = 10_000,
    seed: int | np.random.Generator = 0,
) -> float:
    r"""Two-sided permutation test of ``statistic(first) = statistic(second)`` for two methods on the same samples.

    If the methods do not differ, the two rows of a sample may as well be swapped. All ways to swap them are tried
    where there are at most ``n``, else ``n`` random ones beside the rows as they are, which keeps the test valid.
    Sources: Fisher, "The design of experiments", 1935; Phipson and Smyth, "Permutation p-values should never be zero",
    2010.

    Args:

        first (Tensor, ndarray or sequence): One row for each sample. Shape: N or N x C.
        second (Tensor, ndarray or sequence): The same samples in the same order, with the shape of ``first``.
        statistic (Callable): As in :func:`bootstrap_interval`. Default: ``numpy.mean``
        n (int): Number of random swaps. Default: ``10_000``
        seed (int or Generator): Seed of a NumPy generator, or the generator. Default: ``0``

    Returns:
        **p** (*float*):
            Share of the ways to swap whose difference is at least as large, in absolute value, as the one without: at
            least 1 / 2 ** N, or 1 / (1 + n) with random ones.

    Raises:
        ValueError: As in :func:`paired_bootstrap_difference`.

    Examples::

        >>> paired_permutation_test([0.75, 0.5, 1.0, 0.5], [0.5, 0.25, 0.75, 0.25])  # 2 of 16
        0.125
    """
    pair = _pair(first, second)
    columns = list(zip(*(table.T for table in pair), strict=True))

    def difference(swapped: npt.NDArray[np.bool_]) -> Floats:
        one = _evaluate(statistic, [np.where(swapped, y, x) for x, y in columns])
        return one - _evaluate(statistic, [np.where(swapped, x, y) for x, y in columns])

    differences = np.concatenate([difference(part) for part in swaps(len(pair[0]), n, seed, len(columns))])
    failed = int((~np.isfinite(differences)).sum())
    if failed:
        raise ValueError(f"statistic is not finite in {failed} of {len(differences)} ways to swap.")
    return permutation_p(differences)


def _bootstrap(
    tables: list[Floats], statistic: Callable[..., Any], n: int, level: float, seed: int | np.random.Generator
) -> Interval:
    """Interval of the statistic of the first table, less that of the second if there is one."""
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, but it is {level}.")
    samples, columns = tables[0].shape

    def evaluate(rows: npt.NDArray[np.intp]) -> Floats:
        results = [_evaluate(statistic, [column[rows] for column in table.T]) for table in tables]
        return results[0] if len(results) == 1 else results[0] - results[1]

    drawn = np.concatenate([evaluate(rows) for rows in resamples(samples, n, seed, columns)])
    estimate = evaluate(np.arange(samples, dtype=np.intp)[None])[0]
    failed = int((~np.isfinite(drawn)).sum())
    if failed or not np.isfinite(estimate):
        raise ValueError(
            f"statistic is {estimate} on all {samples} samples and not finite in {failed} of {n} resamples."
        )
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(estimate), float(low), float(high))


def _evaluate(statistic: Callable[..., Any], columns: Sequence[Floats]) -> Floats:
    result = np.asarray(statistic(*columns, axis=-1), dtype=np.float64)
    shape = columns[0].shape
    if result.shape != shape[:1]:
        raise ValueError(
            f"statistic must reduce {len(columns)} arrays of shape {shape} to {shape[:1]}, "
            f"but it returned {result.shape}."
        )
    return result


def resamples(
    samples: int, n: int, seed: int | np.random.Generator, columns: int = 1
) -> Iterator[npt.NDArray[np.intp]]:
    """The rows of ``n`` bootstrap resamples, in parts of shape B x N."""
    generator = np.random.default_rng(seed)
    for size in _parts(samples, n, columns):
        yield generator.integers(samples, size=(size, samples), dtype=np.intp)


def swaps(samples: int, n: int, seed: int | np.random.Generator, columns: int = 1) -> Iterator[npt.NDArray[np.bool_]]:
    """Which samples are swapped, in parts of shape B x N: first none, then all other ways or ``n`` random ones."""
    sizes = _parts(samples, n, columns)
    if 2**samples <= n:
        yield (np.arange(2**samples)[:, None] >> np.arange(samples)) & 1 == 1
        return
    yield np.zeros((1, samples), dtype=np.bool_)
    generator = np.random.default_rng(seed)
    for size in sizes:
        yield generator.random((size, samples)) < 0.5


def permutation_p(differences: Floats) -> float:
    """Share of differences as far from 0 as the first; one that is not defined counts as such."""
    distances = np.abs(differences)
    # Equal differences that were summed in another order are equal.
    return float((~(distances < distances[0] - 1e-10 * np.nanmax(distances))).mean())


def _parts(samples: int, n: int, columns: int) -> list[int]:
    if n < 1:
        raise ValueError(f"n must be positive, but it is {n}.")
    part = max(1, _RESAMPLED_VALUES // (samples * columns))
    return [min(part, n - start) for start in range(0, n, part)]


def _pair(first: Array | Sequence[Any], second: Array | Sequence[Any]) -> list[Floats]:
    pair = [_samples(first, "first"), _samples(second, "second")]
    if pair[0].shape != pair[1].shape:
        raise ValueError(f"first and second must have one shape, but they have {pair[0].shape} and {pair[1].shape}.")
    return pair


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
