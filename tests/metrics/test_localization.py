from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import permutation_test

from captum_intramodal.metrics import (
    Interval,
    average_precision,
    bootstrap_interval,
    energy_inside,
    f1_iou,
    function_iou,
    iou,
    object_iou,
    otsu_threshold,
    paired_bootstrap_difference,
    paired_permutation_test,
    pointing_hit,
    statistics,
)

MASK = torch.tensor([[True, True, False], [False, False, False]])


def random_map(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).clamp_min(0)


def between_class_variance(values: list[float], lower: list[float], upper: list[float]) -> float:
    total = sum(values) / len(values)
    return sum(len(part) / len(values) * (sum(part) / len(part) - total) ** 2 for part in (lower, upper))


def slow_otsu(values: list[float], edges: list[float]) -> float:
    best, threshold = -1.0, math.nan
    for edge in edges:
        lower, upper = [x for x in values if x < edge], [x for x in values if x >= edge]
        variance = between_class_variance(values, lower, upper)
        if variance > best * (1 + 1e-12):
            best, threshold = variance, max(lower)
    return threshold


def slow_resize(image: list[list[float]], height: int, width: int) -> list[list[float]]:
    def at(position: int, new: int, old: int) -> tuple[int, int, float]:
        center = min(max((position + 0.5) * old / new - 0.5, 0.0), old - 1.0)
        left = int(center)
        return left, min(left + 1, old - 1), center - left

    result = []
    for row in range(height):
        top, bottom, down = at(row, height, len(image))
        line = []
        for column in range(width):
            left, right, along = at(column, width, len(image[0]))
            upper = image[top][left] * (1 - along) + image[top][right] * along
            lower = image[bottom][left] * (1 - along) + image[bottom][right] * along
            line.append(upper * (1 - down) + lower * down)
        result.append(line)
    return result


def slow_iou(image: list[list[float]], mask: list[list[bool]], threshold: float) -> float:
    both = either = 0
    for values, insides in zip(image, mask, strict=True):
        for value, inside in zip(values, insides, strict=True):
            both += value > threshold and inside
            either += value > threshold or inside
    return both / either


@pytest.mark.parametrize("seed", range(8))
def test_otsu_equals_exhaustive_search(seed: int) -> None:
    values = random_map(15, 12, seed=seed).flatten()
    low, high = values.min().item(), values.max().item()
    edges = [low + (high - low) * k / 256 for k in range(1, 256)]
    assert otsu_threshold(values) == slow_otsu(values.tolist(), edges)


@pytest.mark.parametrize("seed", range(4))
def test_otsu_of_integers_equals_search_over_every_split(seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, 256, size=300)
    values[:2] = 0, 255
    assert otsu_threshold(values) == slow_otsu(values.tolist(), list(range(1, 256)))


def test_otsu_by_hand() -> None:
    assert otsu_threshold([0, 0, 0, 1]) == 0
    assert otsu_threshold([1, 2, 3, 50, 51, 52]) == 3
    assert otsu_threshold([-5.0, 5.0]) == -5
    for constant in (0.0, 0.1, -3.0):
        assert otsu_threshold(np.full((4, 5), constant)) == constant
    assert otsu_threshold([7.0]) == 7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_otsu_threshold_is_a_value_that_splits(dtype: torch.dtype) -> None:
    values = random_map(20, 20).to(dtype)
    threshold = otsu_threshold(values)
    assert (values.double() == threshold).any()
    assert 0 < (values.double() > threshold).sum() < values.numel()


@pytest.mark.parametrize(("factor", "offset"), [(4.0, 0.0), (0.001, 0.0), (1e-30, 0.0), (2.0, 3.0)])
def test_otsu_follows_scale_and_offset(factor: float, offset: float) -> None:
    values = random_map(200)
    assert otsu_threshold(values * factor + offset) == pytest.approx(otsu_threshold(values) * factor + offset)


def test_iou() -> None:
    map = torch.tensor([[0.9, 0.2, 0.8], [0.1, 0.5, 0.5]])
    assert iou(map, MASK, 0.5) == 1 / 3
    assert iou(map, MASK, 0.49) == 1 / 5
    assert iou(map, MASK, 1.0) == 0
    assert iou(map, MASK, -1.0) == 2 / 6
    assert iou(MASK.float(), MASK, 0.5) == 1
    assert iou(map.numpy(), MASK.numpy().astype(np.uint8) * 255, 0.5) == 1 / 3
    assert iou(map.flatten(), MASK.flatten(), 0.5) == 1 / 3


@pytest.mark.parametrize(
    ("shape", "size"), [((7, 7), (28, 28)), ((3, 5), (20, 17)), ((9, 4), (4, 9)), ((6, 6), (6, 6))]
)
def test_object_iou_equals_loops(shape: tuple[int, int], size: tuple[int, int]) -> None:
    map = random_map(*shape, seed=3)
    mask = random_map(*size, seed=4) > 0.4
    resized = slow_resize(map.tolist(), *size)
    values = [value for row in resized for value in row]
    edges = [min(values) + (max(values) - min(values)) * k / 256 for k in range(1, 256)]
    assert object_iou(map, mask) == slow_iou(resized, mask.tolist(), slow_otsu(values, edges))


@pytest.mark.parametrize("resolution", [1, 2, 8])
def test_map_equal_to_mask_has_iou_one(resolution: int) -> None:
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[1:3, 2:5] = True
    full = mask.repeat_interleave(resolution, 0).repeat_interleave(resolution, 1)
    assert object_iou(full.float(), full) == 1
    assert object_iou(~full, full) == 0
    assert energy_inside(full.float(), full) == 1
    assert pointing_hit(full.float(), full) == 1


@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, 7.0])
def test_constant_maps(value: float) -> None:
    mask = torch.zeros(35, 41, dtype=torch.bool)
    mask[3:20, 5:17] = True
    share = mask.double().mean().item()
    constant = torch.full((7, 9), value, dtype=torch.float64)
    assert object_iou(constant, mask) == 0
    assert pointing_hit(constant, mask) == pytest.approx(share)
    assert energy_inside(constant, mask) == pytest.approx(share if value else 0)


@pytest.mark.parametrize("factor", [1e-6, 0.3, 3.0, 1e6])
def test_scaling_a_map_changes_nothing(factor: float) -> None:
    map, mask = random_map(8, 8), random_map(32, 24, seed=1) > 0.5
    assert object_iou(map * factor, mask) == object_iou(map, mask)
    assert pointing_hit(map * factor, mask) == pointing_hit(map, mask)
    assert energy_inside(map * factor, mask) == pytest.approx(energy_inside(map, mask))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes_and_arrays(dtype: torch.dtype) -> None:
    map, mask = random_map(8, 8).to(dtype).requires_grad_(), random_map(32, 24, seed=1) > 0.5
    for metric in (object_iou, pointing_hit, energy_inside):
        result = metric(map, mask)
        assert type(result) is float
        array = map.detach().float().numpy()
        array.flags.writeable = False
        assert result == metric(array, mask.numpy())
        assert metric(array[::-1], mask.numpy()[::-1]) == pytest.approx(result)


def test_pointing() -> None:
    map = torch.tensor([[0.0, 2.0, 1.0], [0.0, 0.0, 0.0]])
    assert pointing_hit(map, MASK) == 1
    assert pointing_hit(map.flip(0), MASK) == 0
    assert pointing_hit(torch.tensor([[2.0, 2.0, 2.0], [0.0, 0.0, 1.0]]), MASK) == pytest.approx(2 / 3)
    corner = torch.zeros(4, 4)
    corner[0, 0] = 1
    mask = torch.zeros(32, 32, dtype=torch.bool)
    mask[:8, :8] = True
    assert pointing_hit(corner, mask) == 1
    # The resized peak is a plateau of 4 x 4 pixels in the corner.
    mask[:, 2:] = False
    assert pointing_hit(corner, mask) == 0.5


@pytest.mark.parametrize("value", [0.1, 0.3, 0.7])
def test_rounding_of_the_resize_does_not_break_ties(value: float) -> None:
    map = torch.zeros(5, 6, dtype=torch.float64)
    map[1:4, 1:5] = value
    mask = torch.zeros(48, 41, dtype=torch.bool)
    mask[:24] = True
    plateau = torch.tensor(slow_resize((map / value).tolist(), 48, 41), dtype=torch.float64) > 1 - 1e-9
    assert pointing_hit(map, mask) == pytest.approx(plateau[:24].sum().item() / plateau.sum().item())


def test_energy() -> None:
    assert energy_inside(torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 6.0]]), MASK) == pytest.approx(3 / 12)
    map, mask = random_map(5, 4), random_map(13, 9, seed=1) > 0.5
    resized = slow_resize(map.tolist(), 13, 9)
    inside = sum(resized[r][c] for r in range(13) for c in range(9) if mask[r, c])
    assert energy_inside(map, mask) == pytest.approx(inside / sum(sum(row) for row in resized))


def test_function_iou() -> None:
    maps = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[0.0, 0.0], [0.0, 2.5]]])
    assert function_iou(maps, [1.0, 4.0]) == 5 / 8
    assert function_iou(maps[0], torch.tensor([2.5])) == 0.5
    assert function_iou(maps, [10.0]) == 1
    assert function_iou(torch.zeros(3, 5), [0.0]) == 0
    many = random_map(4, 6, 5)
    by_token = [sum(value < 0.5 for row in token for value in row) / 30 for token in many.tolist()]
    assert function_iou(many, [0.2, 0.8]) == pytest.approx(sum(by_token) / 4)
    assert function_iou(many * 9, [0.2 * 9, 0.8 * 9]) == function_iou(many, [0.2, 0.8])


def test_f1() -> None:
    assert f1_iou([0.5], [0.5]) == 0.5
    assert f1_iou([0.25, 0.75], [0.0, 1.0, 0.5]) == 0.5
    assert f1_iou([0.0], [0.0]) == 0
    assert f1_iou([0.0], [1.0]) == 0
    # TAM's published rows: the F1 of the two means.
    for obj, func, f1 in ((0.2123, 0.5193, 0.3014), (0.2241, 0.6903, 0.3384), (0.2737, 0.6844, 0.3910)):
        assert float(f1_iou([obj], [func])) == pytest.approx(f1, abs=1e-4)
    rows = np.random.default_rng(0).random((2, 6, 5))
    expected = [float(f1_iou(obj, func)) for obj, func in zip(*rows, strict=True)]
    assert f1_iou(rows[0], rows[1]) == pytest.approx(expected)
    assert f1_iou(rows[0].T, rows[1].T, axis=0) == pytest.approx(expected)


def test_f1_counts_words() -> None:
    obj_words, func_words = [0.2, 0.4, 0.9], [0.5, 0.1, 0.3, 0.7]
    expected = f1_iou(obj_words, func_words)
    result = f1_iou([(0.2 + 0.4) / 2, 0.9, 0.0], [0.0, 0.3, (0.5 + 0.1 + 0.7) / 3], [2, 1, 0], [0, 1, 3])
    assert result == pytest.approx(expected)


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

    statistics: list[tuple[Callable[..., Any], Callable[..., float]]] = [(np.mean, slow_mean), (np.median, slow_median)]
    for vectorized, slow in statistics:
        interval = bootstrap_interval(values, vectorized, n=400, seed=1)
        assert interval[1:] == pytest.approx(slow_bootstrap(values, slow, 400, 1))
        assert interval.estimate == pytest.approx(slow(values))


def test_bootstrap_of_several_columns() -> None:
    values = np.random.default_rng(6).random((25, 2))

    def slow(rows: np.ndarray[Any, Any]) -> float:
        obj, func = sum(rows[:, 0]) / len(rows), sum(rows[:, 1]) / len(rows)
        return float(2 * obj * func / (obj + func))

    interval = bootstrap_interval(torch.from_numpy(values), f1_iou, n=300, seed=2)
    assert interval[1:] == pytest.approx(slow_bootstrap(values, slow, 300, 2))
    counted = np.column_stack([values, np.ones((25, 2))])
    assert bootstrap_interval(counted, f1_iou, n=300, seed=2) == pytest.approx(interval)


def test_bootstrap_of_a_constant() -> None:
    assert bootstrap_interval(np.full(8, 0.5)) == Interval(0.5, 0.5, 0.5)
    assert bootstrap_interval([0.1] * 7) == pytest.approx((0.1, 0.1, 0.1))
    assert bootstrap_interval([3.0]) == (3, 3, 3)


def test_bootstrap_level_seed_and_parts(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_paired_difference() -> None:
    generator = np.random.default_rng(9)
    hard = generator.random(50)
    first, second = hard + 0.05 + 0.01 * generator.random(50), hard
    interval = paired_bootstrap_difference(first, second, n=500, seed=1)
    assert interval == pytest.approx(bootstrap_interval(first - second, n=500, seed=1))
    assert interval.low > 0
    assert paired_bootstrap_difference(first, first) == (0, 0, 0)
    columns = generator.random((2, 50, 2))
    forth = paired_bootstrap_difference(columns[0], columns[1], f1_iou, n=500)
    back = paired_bootstrap_difference(columns[1], columns[0], f1_iou, n=500)
    assert forth == pytest.approx((-back.estimate, -back.high, -back.low))


def test_permutation_test_equals_scipys() -> None:
    generator = np.random.default_rng(10)
    first, second = generator.random((2, 9, 2))

    def mean_gap(a: Any, b: Any, axis: int) -> Any:
        return (a - b).mean(axis)

    # SciPy swaps one column: here the numbers of the rows.
    rows = np.concatenate([first, second])

    def f1_gap(a: Any, b: Any, axis: int) -> Any:
        one, other = (f1_iou(*np.moveaxis(rows[numbers.astype(int)], -1, 0), axis=axis) for numbers in (a, b))
        return one - other

    exact = permutation_test((first[:, 0], second[:, 0]), mean_gap, permutation_type="samples")
    assert paired_permutation_test(first[:, 0], second[:, 0]) == pytest.approx(exact.pvalue)
    exact = permutation_test((np.arange(9.0), np.arange(9.0, 18)), f1_gap, permutation_type="samples")
    assert 0.01 < exact.pvalue < 0.9
    assert paired_permutation_test(first, second, f1_iou) == pytest.approx(exact.pvalue)
    random = paired_permutation_test(first, second, f1_iou, n=500, seed=1)
    assert random == pytest.approx(exact.pvalue, abs=4 * (exact.pvalue / 500) ** 0.5)
    assert random != paired_permutation_test(first, second, f1_iou, n=500, seed=2)


def test_permutation_test_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    # Differences 1, 2, 3: of the eight signs only + + + and - - - reach their sum.
    assert paired_permutation_test([2.0, 3.0, 4.0], [1.0, 1.0, 1.0], n=8) == 2 / 8
    assert paired_permutation_test([1.0, 2.0], [1.0, 2.0]) == 1
    # 0.1 + 0.2 - 0.3 sums to another rounding error in another order; all signs reach a difference of 0.
    assert paired_permutation_test([0.1, 0.2, 0.0], [0.0, 0.0, 0.3]) == 1
    # Never 0: the rows as they are count too.
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


def test_permutation_test_is_as_rare_as_it_says() -> None:
    generator = np.random.default_rng(12)
    p = [paired_permutation_test(*generator.normal(size=(2, 20)), n=99, seed=generator) for _ in range(300)]
    assert np.mean(np.array(p) <= 0.1) == pytest.approx(0.1, abs=0.06)


def test_permutation_test_errors() -> None:
    with pytest.raises(ValueError, match=r"one shape.*\(2, 1\) and \(3, 1\)"):
        paired_permutation_test([1.0, 2.0], [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="n must be positive, but it is 0"):
        paired_permutation_test([1.0], [2.0], n=0)
    with pytest.raises(ValueError, match="not finite in 4 of 4"), np.errstate(invalid="ignore"):
        paired_permutation_test([1.0, 2.0], [1.0, 2.0], lambda x, axis: 0 * x.mean(axis) / 0.0)


@pytest.mark.parametrize("metric", [object_iou, pointing_hit, energy_inside, lambda map, mask: iou(map, mask, 0.5)])
def test_map_and_mask_errors(metric: Callable[[Any, Any], float]) -> None:
    map = torch.rand(2, 3)
    with pytest.raises(ValueError, match=r"mask of shape \(2, 3\) has no cell inside"):
        metric(map, torch.zeros(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"mask of shape \(0, 3\) has no cell inside"):
        metric(map, torch.zeros(0, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="map holds NaN or infinity in 6 of 6"):
        metric(map * math.nan, MASK)
    with pytest.raises(ValueError, match=r"map is empty.*\(0, 3\)"):
        metric(map[:0], MASK)
    with pytest.raises(ValueError, match=r"boolean or integer.*float32"):
        metric(map, MASK.float())
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(1, 2, 3\)"):
        metric(map, MASK[None])


def test_other_errors() -> None:
    with pytest.raises(ValueError, match=r"\(2, 2\) and \(2, 3\)"):
        iou(torch.rand(2, 2), MASK, 0.5)
    with pytest.raises(ValueError, match="threshold is NaN"):
        iou(torch.rand(2, 3), MASK, math.nan)
    with pytest.raises(ValueError, match=r"non-negative.*-2"):
        energy_inside(torch.full((2, 3), -2.0), MASK)
    with pytest.raises(ValueError, match="values is empty"):
        otsu_threshold([])
    with pytest.raises(ValueError, match="1 of 2"):
        otsu_threshold([1.0, math.inf])
    with pytest.raises(ValueError, match="noun_thresholds is empty"):
        function_iou(torch.rand(2, 3), [])
    with pytest.raises(ValueError, match="func holds NaN or infinity in 1 of 2"):
        f1_iou([0.5], [0.5, math.nan])
    with pytest.raises(ValueError, match=r"obj_words must have one shape.*\(2,\) and \(1,\)"):
        f1_iou([0.5, 0.5], [0.5], obj_words=[1])
    with pytest.raises(ValueError, match=r"func_words.*smallest sum 0"):
        f1_iou([0.5], [0.5], func_words=[0])


def test_bootstrap_errors() -> None:
    with pytest.raises(ValueError, match="values is empty"):
        bootstrap_interval([])
    with pytest.raises(ValueError, match="values holds NaN or infinity in 1 of 2"):
        bootstrap_interval([0.5, math.nan])
    with pytest.raises(ValueError, match=r"\(2, 2, 2\)"):
        bootstrap_interval(np.zeros((2, 2, 2)))
    with pytest.raises(ValueError, match="n must be positive, but it is 0"):
        bootstrap_interval([1.0], n=0)
    with pytest.raises(ValueError, match="between 0 and 1, but it is 95"):
        bootstrap_interval([1.0], level=95)
    with pytest.raises(ValueError, match=r"returned \(\)"):
        bootstrap_interval([1.0, 2.0], lambda x, axis: x.mean())
    with pytest.raises(ValueError, match="not finite in"), np.errstate(invalid="ignore"):
        bootstrap_interval([[0.0, 0.0], [1.0, 1.0]], lambda x, count, axis: x.sum(axis) / count.sum(axis))
    with pytest.raises(ValueError, match=r"\(2, 1\) and \(3, 1\)"):
        paired_bootstrap_difference([1.0, 2.0], [1.0, 2.0, 3.0])


def slow_average_precision(values: list[float], inside: list[bool]) -> float:
    area, recall = 0.0, 0.0
    for threshold in sorted(set(values), reverse=True):
        found = [hit for value, hit in zip(values, inside, strict=True) if value >= threshold]
        area += (sum(found) / sum(inside) - recall) * sum(found) / len(found)
        recall = sum(found) / sum(inside)
    return area


@pytest.mark.parametrize("levels", [1, 3, 20, 10**9])
def test_average_precision_is_the_area_under_the_precision_recall_curve(levels: int) -> None:
    average_precision_score = pytest.importorskip("sklearn.metrics").average_precision_score
    generator = np.random.default_rng(levels)
    for share in (0.05, 0.5, 1.0):
        map, mask = generator.integers(0, levels, (9, 13)).astype(float), generator.random((9, 13)) < share
        result = average_precision(map, mask)
        assert result == pytest.approx(slow_average_precision(map.ravel().tolist(), mask.ravel().tolist()))
        assert result == pytest.approx(average_precision_score(mask.ravel(), map.ravel()))
        assert average_precision(np.exp(map / levels) - 7, mask) == pytest.approx(result)  # the order alone counts


def test_average_precision_of_resized_maps() -> None:
    mask = torch.zeros(12, 12, dtype=torch.int64)
    mask[:, 6:] = 4
    assert average_precision(torch.tensor([[0.0, 3.0], [0.0, 3.0]]), mask) == 1
    assert average_precision(torch.full((5, 5), 0.1), mask) == pytest.approx(0.5)
    # Columns that rounding makes unequal are one threshold: the lower half of a map of equal rows is not preferred.
    rows = random_map(1, 5, seed=3).expand(7, 5) + 0.1
    upper, lower = torch.zeros(53, 50, dtype=torch.bool), torch.zeros(53, 50, dtype=torch.bool)
    upper[:20, 10:30], lower[-20:, 10:30] = True, True
    assert average_precision(rows, upper) == pytest.approx(average_precision(rows, lower), abs=1e-12)
    with pytest.raises(ValueError, match="no cell inside"):
        average_precision(rows, upper & lower)
