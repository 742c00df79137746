"""Bootstrap intervals and permutation tests agree with slow loops, with SciPy, and with values computed by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import permutation_test

from captum_intramodal.errors import InvalidInputError, InvalidOptionError
from captum_intramodal.metrics import (
    Interval,
    bootstrap_interval,
    f1_iou,
    paired_bootstrap_difference,
    paired_permutation_test,
    statistics,
)


def slow_bootstrap(
    values: np.ndarray[Any, Any], statistic: Callable[[np.ndarray[Any, Any]], float], n: int, seed: int
) -> tuple[float, float]:
    rows = np.random.default_rng(seed).integers(len(values), size=(n, len(values)))
    results = sorted(statistic(values[row]) for row in rows)

    def quantile(share: float) -> float:
        position = share * (n - 1)
        below = int(position)
        above = min(below + 1, n - 1)
        return results[below] + (position - below) * (results[above] - results[below])

    return quantile(0.025), quantile(0.975)


def test_bootstrap_equals_loops() -> None:
    values = np.random.default_rng(5).random(30)

    def slow_mean(rows: np.ndarray[Any, Any]) -> float:
        return float(sum(rows) / len(rows))

    def slow_median(rows: np.ndarray[Any, Any]) -> float:
        ordered = sorted(rows)
        return float(ordered[14] + ordered[15]) / 2

    functions: list[tuple[Callable[..., Any], Callable[..., float]]] = [(np.mean, slow_mean), (np.median, slow_median)]
    for vectorized, slow in functions:
        interval = bootstrap_interval(values, vectorized, n=400, seed=1)
        assert interval[1:] == pytest.approx(slow_bootstrap(values, slow, 400, 1))
        assert interval.estimate == pytest.approx(slow(values))


def test_bootstrap_resamples_all_columns_together() -> None:
    values = np.random.default_rng(6).random((25, 2))

    def slow(rows: np.ndarray[Any, Any]) -> float:
        obj, func = sum(rows[:, 0]) / len(rows), sum(rows[:, 1]) / len(rows)
        return float(2 * obj * func / (obj + func))

    interval = bootstrap_interval(torch.from_numpy(values), f1_iou, n=300, seed=2)
    assert interval[1:] == pytest.approx(slow_bootstrap(values, slow, 300, 2))
    counted = np.column_stack([values, np.ones((25, 2))])
    assert bootstrap_interval(counted, f1_iou, n=300, seed=2) == pytest.approx(interval)


def test_bootstrap_interval_of_a_constant_is_that_constant() -> None:
    assert bootstrap_interval(np.full(8, 0.5)) == Interval(0.5, 0.5, 0.5)
    assert bootstrap_interval([0.1] * 7) == pytest.approx((0.1, 0.1, 0.1))
    assert bootstrap_interval([3.0]) == (3, 3, 3)


def test_bootstrap_depends_on_level_and_seed_but_not_on_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(7).random(40)
    wide, narrow = bootstrap_interval(values, level=0.99), bootstrap_interval(values, level=0.5)
    assert wide.low < narrow.low < values.mean() < narrow.high < wide.high
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=np.random.default_rng(3))
    assert bootstrap_interval(values, seed=3) != bootstrap_interval(values, seed=4)
    expected = bootstrap_interval(values, n=101, seed=3)
    monkeypatch.setattr(statistics, "_RESAMPLED_VALUES", 400)
    assert bootstrap_interval(values, n=101, seed=3) == pytest.approx(expected)


def test_bootstrap_covers_the_mean() -> None:
    generator = np.random.default_rng(8)
    hits = 0
    for _ in range(200):
        interval = bootstrap_interval(generator.normal(size=60), n=400, seed=generator)
        hits += interval.low <= 0 <= interval.high
    assert 0.88 <= hits / 200 <= 0.99


def test_paired_difference_resamples_both_methods_together() -> None:
    generator = np.random.default_rng(9)
    hard = generator.random(50)
    first, second = hard + 0.05 + 0.01 * generator.random(50), hard
    interval = paired_bootstrap_difference(first, second, n=500, seed=1)
    assert interval == pytest.approx(bootstrap_interval(first - second, n=500, seed=1))
    assert interval.low > 0
    assert paired_bootstrap_difference(first, first) == (0, 0, 0)
    columns = generator.random((2, 50, 2))
    difference = paired_bootstrap_difference(columns[0], columns[1], f1_iou, n=500)
    opposite = paired_bootstrap_difference(columns[1], columns[0], f1_iou, n=500)
    assert difference == pytest.approx((-opposite.estimate, -opposite.high, -opposite.low))


def test_permutation_test_equals_scipy() -> None:
    generator = np.random.default_rng(10)
    first, second = generator.random((2, 9, 2))

    def mean_gap(a: Any, b: Any, axis: int) -> Any:
        return (a - b).mean(axis)

    # SciPy swaps single columns, so it is given row numbers.
    rows = np.concatenate([first, second])

    def f1_gap(a: Any, b: Any, axis: int) -> Any:
        f1_a, f1_b = (f1_iou(*np.moveaxis(rows[numbers.astype(int)], -1, 0), axis=axis) for numbers in (a, b))
        return f1_a - f1_b

    exact = permutation_test((first[:, 0], second[:, 0]), mean_gap, permutation_type="samples")
    assert paired_permutation_test(first[:, 0], second[:, 0]) == pytest.approx(exact.pvalue)
    exact = permutation_test((np.arange(9.0), np.arange(9.0, 18)), f1_gap, permutation_type="samples")
    assert 0.01 < exact.pvalue < 0.9
    assert paired_permutation_test(first, second, f1_iou) == pytest.approx(exact.pvalue)
    random = paired_permutation_test(first, second, f1_iou, n=500, seed=1)
    assert random == pytest.approx(exact.pvalue, abs=4 * (exact.pvalue / 500) ** 0.5)
    assert random != paired_permutation_test(first, second, f1_iou, n=500, seed=2)


def test_permutation_tests_computed_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    # Differences 1, 2, 3: of the eight combinations of signs, only + + + and - - - reach their sum.
    assert paired_permutation_test([2.0, 3.0, 4.0], [1.0, 1.0, 1.0], n=8) == 2 / 8
    assert paired_permutation_test([1.0, 2.0], [1.0, 2.0]) == 1
    # The rounding error of 0.1 + 0.2 - 0.3 depends on the order; every combination of signs reaches a difference of 0.
    assert paired_permutation_test([0.1, 0.2, 0.0], [0.0, 0.0, 0.3]) == 1
    # p is never 0, because the original rows count, too.
    assert paired_permutation_test(np.ones(100), np.zeros(100), n=99) == 1 / 100
    generator = np.random.default_rng(11)
    first, second = generator.normal(size=(2, 40))
    expected = paired_permutation_test(first, second, n=101, seed=3)
    flips = np.random.default_rng(3).random((101, 40)) < 0.5
    signs = np.where(flips, -1, 1)
    hits = sum(abs((sign * (first - second)).mean()) >= abs((first - second).mean()) for sign in signs)
    assert expected == (1 + hits) / 102
    monkeypatch.setattr(statistics, "_RESAMPLED_VALUES", 400)
    assert paired_permutation_test(first, second, n=101, seed=3) == expected


def test_p_values_are_uniform_without_a_difference() -> None:
    generator = np.random.default_rng(12)
    p = [paired_permutation_test(*generator.normal(size=(2, 20)), n=99, seed=generator) for _ in range(300)]
    assert np.mean(np.array(p) <= 0.1) == pytest.approx(0.1, abs=0.06)


def test_invalid_input_of_permutation_tests_is_rejected() -> None:
    with pytest.raises(InvalidInputError, match=r"the same shape.*\(2, 1\) and \(3, 1\)"):
        paired_permutation_test([1.0, 2.0], [1.0, 2.0, 3.0])
    with pytest.raises(InvalidOptionError, match="n must be positive, but it is 0"):
        paired_permutation_test([1.0], [2.0], n=0)
    with pytest.raises(InvalidInputError, match="not finite in 4 of 4"), np.errstate(invalid="ignore"):
        paired_permutation_test([1.0, 2.0], [1.0, 2.0], lambda x, axis: 0 * x.mean(axis) / 0.0)


def test_invalid_input_of_bootstraps_is_rejected() -> None:
    with pytest.raises(InvalidInputError, match="values is empty"):
        bootstrap_interval([])
    with pytest.raises(InvalidInputError, match="values holds NaN or infinity in 1 of 2"):
        bootstrap_interval([0.5, math.nan])
    with pytest.raises(InvalidInputError, match=r"\(2, 2, 2\)"):
        bootstrap_interval(np.zeros((2, 2, 2)))
    with pytest.raises(InvalidOptionError, match="n must be positive, but it is 0"):
        bootstrap_interval([1.0], n=0)
    with pytest.raises(InvalidOptionError, match="between 0 and 1, but it is 95"):
        bootstrap_interval([1.0], level=95)
    with pytest.raises(InvalidInputError, match=r"returned \(\)"):
        bootstrap_interval([1.0, 2.0], lambda x, axis: x.mean())
    with pytest.raises(InvalidInputError, match="not finite in"), np.errstate(invalid="ignore"):
        bootstrap_interval([[0.0, 0.0], [1.0, 1.0]], lambda x, count, axis: x.sum(axis) / count.sum(axis))
    with pytest.raises(InvalidInputError, match=r"\(2, 1\) and \(3, 1\)"):
        paired_bootstrap_difference([1.0, 2.0], [1.0, 2.0, 3.0])
