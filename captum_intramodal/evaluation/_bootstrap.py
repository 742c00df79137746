r"""How sure are means and differences of explainers? Bootstrap intervals and permutation tests of many at once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations_with_replacement, groupby
from typing import NamedTuple

import numpy as np

from captum_intramodal.metrics.arrays import Floats
from captum_intramodal.metrics.statistics import Interval, permutation_p, resamples, swaps

__all__ = ["LEVEL", "Estimate", "compare_explainers", "holm", "mean_curves"]

# Coverage of all intervals.
LEVEL = 0.95


class Estimate(NamedTuple):
    """An explainer's value in a column (``first == second``), or the difference of two explainers, by index."""

    column: int
    first: int
    second: int
    interval: Interval
    p: float
    samples: int


def compare_explainers(tables: Sequence[Floats], n: int, seed: int) -> list[Estimate]:
    """Estimate the values and differences of all explainers, from one table of sums and counts per column."""
    estimates = []
    for groups in _groups(tables, paired=True):
        samples = groups[0].table.shape[-1]
        resampled = _products(groups, _multiplicities(samples, n, seed))
        swapped = _products(groups, (part.astype(np.float64) for part in swaps(samples, n, seed)))
        for group, products, moved in zip(groups, resampled, swapped, strict=True):
            total = group.table.sum(-1)
            estimate, drawn = _statistic(total), _statistic(products)
            row = {label: k for k, label in enumerate(group.labels)}
            for i, j in group.pairs:
                a, b = row[i], row[j]
                value = estimate[a] if i == j else estimate[a] - estimate[b]
                if not np.isfinite(value):
                    continue
                if i == j:
                    interval, p = _interval(value, drawn[a]), 1.0
                else:
                    interval = _interval(value, drawn[a] - drawn[b])
                    gained = moved[:, :, b] - moved[:, :, a]
                    first, second = total[:, :, a, None] + gained, total[:, :, b, None] - gained
                    p = permutation_p(_statistic(first) - _statistic(second))
                estimates.append(Estimate(group.column, i, j, interval, p, samples))
    return sorted(estimates)


def mean_curves(tables: Sequence[Floats], n: int, seed: int) -> list[tuple[int, int, tuple[Interval, ...]]]:
    """Estimate mean curves, from one table of sums and counts per curve: index of the curve, of the explainer,
    points."""
    curves = []
    for groups in _groups(tables, paired=False):
        weights = _multiplicities(groups[0].table.shape[-1], n, seed)
        for group, products in zip(groups, _products(groups, weights), strict=True):
            estimates, drawn = _means(group.table.sum(-1)), _means(products)
            for k, label in enumerate(group.labels):
                curves.append((group.column, label, tuple(map(_interval, estimates[:, k], drawn[:, k]))))
    return sorted(curves)


def holm(p: Sequence[float]) -> list[float]:
    """Adjust p-values for multiple tests. Source: Holm, "A simple sequentially rejective multiple test procedure",
    1979."""
    values = np.asarray(p, dtype=np.float64)
    order = np.argsort(values, kind="stable")
    adjusted = np.empty_like(values)
    adjusted[order] = np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1)).clip(max=1)
    return [float(value) for value in adjusted]


class _Group(NamedTuple):
    """Pairs of explainers that share the same samples in a column, and the table of all their explainers there."""

    column: int
    pairs: list[tuple[int, int]]
    labels: list[int]
    table: Floats


def _groups(tables: Sequence[Floats], paired: bool) -> Iterator[list[_Group]]:
    """Yield lists of groups with equally many samples, which can share resamples.

    Each explainer forms a pair with itself; with ``paired``, also with every other one.
    """
    members: dict[tuple[bytes, int], list[tuple[int, int]]] = defaultdict(list)
    for column, table in enumerate(tables):
        present = np.asarray(table[:, 1].any(0))
        for i, j in combinations_with_replacement(range(len(present)), 2):
            if i == j or paired:
                members[np.logical_and(present[i], present[j]).tobytes(), column].append((i, j))

    # A mask's bytes are 0 or 1: their sum is the number of samples.
    def size(key: tuple[bytes, int]) -> int:
        return sum(key[0])

    for samples, same in groupby(sorted(members, key=size), key=size):
        if samples:
            yield [_group(column, members[mask, column], tables[column], mask) for mask, column in same]


def _group(column: int, pairs: list[tuple[int, int]], table: Floats, mask: bytes) -> _Group:
    """Select the explainers of the pairs and the samples of the mask from a table."""
    labels = sorted({label for pair in pairs for label in pair})
    return _Group(column, pairs, labels, table[:, :, labels][..., np.frombuffer(mask, np.bool_)])


def _products(groups: list[_Group], weights: Iterable[Floats]) -> list[Floats]:
    """Compute the groups' sums and counts in every draw, from the samples' weights (draws, samples)."""
    tables = [group.table.reshape(-1, group.table.shape[-1]) for group in groups]
    rows = np.concatenate(tables)
    products = np.concatenate([rows @ part.T for part in weights], axis=1)
    ends = np.cumsum([len(table) for table in tables])[:-1]
    return [
        product.reshape(*group.table.shape[:-1], -1)
        for product, group in zip(np.split(products, ends), groups, strict=True)
    ]


def _multiplicities(samples: int, n: int, seed: int) -> Iterator[Floats]:
    """Count how often each sample occurs in each bootstrap resample."""
    for rows in resamples(samples, n, seed):
        offsets = samples * np.arange(len(rows))[:, None]
        yield np.bincount((rows + offsets).ravel(), minlength=rows.size).reshape(rows.shape).astype(np.float64)


def _means(sums_and_counts: Floats) -> Floats:
    """Divide sums by counts; NaN if there are no words."""
    sums, counts = sums_and_counts[:, 0], sums_and_counts[:, 1]
    return np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)


def _statistic(sums_and_counts: Floats) -> Floats:
    """Compute the mean, or the harmonic mean of two means."""
    mean, *others = _means(sums_and_counts)
    for other in others:
        total = mean + other
        mean = 2 * mean * other / np.where(total == 0, 1, total)
    return mean


def _interval(estimate: float, drawn: Floats) -> Interval:
    # In a resample without any word of one of its two columns, a derived column is NaN.
    low, high = np.nanquantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(estimate), float(low), float(high))
