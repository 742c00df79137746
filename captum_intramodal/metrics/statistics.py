r"""Quantify uncertainty: how sure is a metric, or the difference between two methods? Bootstrap and paired tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from captum_intramodal.errors import InvalidInputError, InvalidOptionError
from captum_intramodal.metrics.arrays import Array, Floats, finite_array

__all__ = ["Interval", "bootstrap_interval", "paired_bootstrap_difference", "paired_permutation_test"]

# Resampled values held in memory at a time.
_RESAMPLED_VALUES = 2**22


class Interval(NamedTuple):
    r"""An estimate with its bootstrap interval.

    Args:

        estimate (float): The statistic of all values.
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
    r"""Compute the percentile bootstrap interval of a statistic over samples.

    Samples (images, not words) are drawn with replacement, together with all their columns.

    Source: Efron, "Bootstrap methods: another look at the jackknife", 1979.

    Args:

        values (Tensor, ndarray or sequence): One row per sample. Shape: N, or N x C for C columns.
        statistic (Callable): Called as ``statistic(column_1, ..., column_C, axis=-1)`` with arrays of shape B x N;
                    returns B numbers, as ``numpy.mean``, ``numpy.median`` and :func:`f1_iou` do.
                    Default: ``numpy.mean``
        n (int): Number of resamples.
                    Default: ``10_000``
        level (float): Coverage, between 0 and 1.
                    Default: ``0.95``
        seed (int or Generator): Seed of a NumPy generator, or the generator.
                    Default: ``0``

    Returns:
        **interval** (*Interval*):
            The named tuple (estimate, low, high).

    Raises:
        InvalidOptionError: ``level`` or ``n`` is out of range.
        InvalidInputError: There are no samples, a value is not finite, or the statistic returns a wrong shape or is
            not finite in some resample (such as a ratio of counts that are all 0).

    Examples::

        >>> from captum_intramodal.metrics import bootstrap_interval, f1_iou
        >>> bootstrap_interval([0.25, 0.25, 0.25])
        Interval(estimate=0.25, low=0.25, high=0.25)
        >>> obj, func = [0.2, 0.4, 0.9], [0.5, 0.7, 0.6]
        >>> estimate, low, high = bootstrap_interval(np.stack([obj, func], axis=1), f1_iou, n=1000)
        >>> low < estimate < high
        True
    """
    return _bootstrap([_table(values, "values")], statistic, n, level, seed)


def paired_bootstrap_difference(
    first: Array | Sequence[Any],
    second: Array | Sequence[Any],
    statistic: Callable[..., Any] = np.mean,
    n: int = 10_000,
    level: float = 0.95,
    seed: int | np.random.Generator = 0,
) -> Interval:
    r"""Compute the percentile bootstrap interval of ``statistic(first) - statistic(second)`` for two methods on the
    same samples.

    Each resample draws the same samples for both methods, so that the difficulty of samples cancels. The methods
    differ significantly at the given level if the interval excludes 0.

    Args:

        first (Tensor, ndarray or sequence): One row per sample. Shape: N or N x C.
        second (Tensor, ndarray or sequence): The same samples in the same order, in the shape of ``first``.
        statistic (Callable): As in :func:`bootstrap_interval`.
                    Default: ``numpy.mean``
        n (int): Number of resamples.
                    Default: ``10_000``
        level (float): Coverage, between 0 and 1.
                    Default: ``0.95``
        seed (int or Generator): Seed of a NumPy generator, or the generator.
                    Default: ``0``

    Returns:
        **interval** (*Interval*):
            The named tuple (estimate, low, high) of the difference.

    Raises:
        InvalidOptionError: As in :func:`bootstrap_interval`.
        InvalidInputError: As in :func:`bootstrap_interval`, and if the shapes differ.

    Examples::

        >>> from captum_intramodal.metrics import paired_bootstrap_difference
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
    r"""Run a two-sided permutation test of ``statistic(first) = statistic(second)`` for two methods on the same
    samples.

    If the methods do not differ, the two rows of any sample can be swapped. If there are at most ``n`` ways to swap
    rows, all are tried. Otherwise ``n`` random ones are, and the original rows count as one more, which keeps the test
    valid.

    Sources: Fisher, "The design of experiments", 1935; Phipson and Smyth, "Permutation p-values should never be zero",
    2010.

    Args:

        first (Tensor, ndarray or sequence): One row per sample. Shape: N or N x C.
        second (Tensor, ndarray or sequence): The same samples in the same order, in the shape of ``first``.
        statistic (Callable): As in :func:`bootstrap_interval`.
                    Default: ``numpy.mean``
        n (int): Number of random swaps.
                    Default: ``10_000``
        seed (int or Generator): Seed of a NumPy generator, or the generator.
                    Default: ``0``

    Returns:
        **p** (*float*):
            p-value: the share of swaps whose absolute difference is at least that of the original rows; at least
            1 / 2 ** N, or 1 / (1 + n) for random swaps.

    Raises:
        InvalidOptionError: ``n`` is not positive.
        InvalidInputError: As in :func:`paired_bootstrap_difference`.

    Examples::

        >>> from captum_intramodal.metrics import paired_permutation_test
        >>> paired_permutation_test([0.75, 0.5, 1.0, 0.5], [0.5, 0.25, 0.75, 0.25])  # 2 of 16 swaps
        0.125
    """
    pair = _pair(first, second)
    columns = list(zip(*(table.T for table in pair), strict=True))

    def difference(swapped: npt.NDArray[np.bool_]) -> Floats:
        minuend = _evaluate(statistic, [np.where(swapped, y, x) for x, y in columns])
        return minuend - _evaluate(statistic, [np.where(swapped, x, y) for x, y in columns])

    differences = np.concatenate([difference(part) for part in swaps(len(pair[0]), n, seed, len(columns))])
    failed = int((~np.isfinite(differences)).sum())
    if failed:
        raise InvalidInputError(
            f"statistic is not finite in {failed} of {len(differences)} ways to swap; remove samples without a value."
        )
    return permutation_p(differences)


def _bootstrap(
    tables: list[Floats], statistic: Callable[..., Any], n: int, level: float, seed: int | np.random.Generator
) -> Interval:
    """Compute the interval of the statistic of the first table, minus that of the second if there is one."""
    if not 0 < level < 1:
        raise InvalidOptionError(f"level must lie between 0 and 1, but it is {level}.")
    samples, columns = tables[0].shape

    def evaluate(rows: npt.NDArray[np.intp]) -> Floats:
        results = [_evaluate(statistic, [column[rows] for column in table.T]) for table in tables]
        return results[0] if len(results) == 1 else results[0] - results[1]

    drawn = np.concatenate([evaluate(rows) for rows in resamples(samples, n, seed, columns)])
    estimate = evaluate(np.arange(samples, dtype=np.intp)[None])[0]
    failed = int((~np.isfinite(drawn)).sum())
    if failed or not np.isfinite(estimate):
        raise InvalidInputError(
            f"statistic is {estimate} on all {samples} samples and not finite in {failed} of {n} resamples; remove "
            "samples without a value, or add samples."
        )
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(estimate), float(low), float(high))


def _evaluate(statistic: Callable[..., Any], columns: Sequence[Floats]) -> Floats:
    """Apply the statistic to resampled columns and check the shape of the result."""
    result = np.asarray(statistic(*columns, axis=-1), dtype=np.float64)
    shape = columns[0].shape
    if result.shape != shape[:1]:
        raise InvalidInputError(
            f"statistic must reduce {len(columns)} arrays of shape {shape} to {shape[:1]}, "
            f"but it returned {result.shape}."
        )
    return result


def resamples(
    samples: int, n: int, seed: int | np.random.Generator, columns: int = 1
) -> Iterator[npt.NDArray[np.intp]]:
    """Yield the row numbers of ``n`` bootstrap resamples, in batches of shape B x N."""
    generator = np.random.default_rng(seed)
    for size in _batch_sizes(samples, n, columns):
        yield generator.integers(samples, size=(size, samples), dtype=np.intp)


def swaps(samples: int, n: int, seed: int | np.random.Generator, columns: int = 1) -> Iterator[npt.NDArray[np.bool_]]:
    """Yield masks of swapped samples, in batches of shape B x N: first none, then all others or ``n`` random ones."""
    sizes = _batch_sizes(samples, n, columns)
    if 2**samples <= n:
        yield (np.arange(2**samples)[:, None] >> np.arange(samples)) & 1 == 1
        return
    yield np.zeros((1, samples), dtype=np.bool_)
    generator = np.random.default_rng(seed)
    for size in sizes:
        yield generator.random((size, samples)) < 0.5


def permutation_p(differences: Floats) -> float:
    """Compute the share of differences at least as far from 0 as the first; undefined ones count, too."""
    distances = np.abs(differences)
    # The tolerance covers equal differences that were summed in a different order.
    return float((~(distances < distances[0] - 1e-10 * np.nanmax(distances))).mean())


def _batch_sizes(samples: int, n: int, columns: int) -> list[int]:
    """Divide ``n`` resamples into batches that fit in memory."""
    if n < 1:
        raise InvalidOptionError(f"n must be positive, but it is {n}.")
    size = max(1, _RESAMPLED_VALUES // (samples * columns))
    return [min(size, n - start) for start in range(0, n, size)]


def _pair(first: Array | Sequence[Any], second: Array | Sequence[Any]) -> list[Floats]:
    """Convert two methods' values to tables of the same shape."""
    pair = [_table(first, "first"), _table(second, "second")]
    if pair[0].shape != pair[1].shape:
        raise InvalidInputError(
            f"first and second must have the same shape, but have {pair[0].shape} and {pair[1].shape}; pass one row "
            "per sample, for the same samples."
        )
    return pair


def _table(values: Array | Sequence[Any], name: str) -> Floats:
    """Convert values to a table with one row per sample."""
    table = finite_array(values, name)
    if table.ndim not in (1, 2):
        raise InvalidInputError(f"{name} must be N or N x C, but its shape is {table.shape}.")
    return table.reshape(len(table), -1)
