"""Localization metrics agree with slow reference implementations and values computed by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from captum_intramodal.errors import InvalidInputError, InvalidOptionError
from captum_intramodal.metrics import (
    average_precision,
    energy_inside,
    f1_iou,
    function_iou,
    iou,
    object_iou,
    otsu_threshold,
    pointing_hit,
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


def slow_resize(map: list[list[float]], height: int, width: int) -> list[list[float]]:
    def at(position: int, new: int, old: int) -> tuple[int, int, float]:
        center = min(max((position + 0.5) * old / new - 0.5, 0.0), old - 1.0)
        left = int(center)
        return left, min(left + 1, old - 1), center - left

    result = []
    for row in range(height):
        top, bottom, down = at(row, height, len(map))
        line = []
        for column in range(width):
            left, right, along = at(column, width, len(map[0]))
            upper = map[top][left] * (1 - along) + map[top][right] * along
            lower = map[bottom][left] * (1 - along) + map[bottom][right] * along
            line.append(upper * (1 - down) + lower * down)
        result.append(line)
    return result


def slow_iou(map: list[list[float]], mask: list[list[bool]], threshold: float) -> float:
    intersection = union = 0
    for values, insides in zip(map, mask, strict=True):
        for value, inside in zip(values, insides, strict=True):
            intersection += value > threshold and inside
            union += value > threshold or inside
    return intersection / union


def slow_average_precision(values: list[float], inside: list[bool]) -> float:
    area, recall = 0.0, 0.0
    for threshold in sorted(set(values), reverse=True):
        found = [hit for value, hit in zip(values, inside, strict=True) if value >= threshold]
        area += (sum(found) / sum(inside) - recall) * sum(found) / len(found)
        recall = sum(found) / sum(inside)
    return area


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


def test_otsu_thresholds_computed_by_hand() -> None:
    assert otsu_threshold([0, 0, 0, 1]) == 0
    assert otsu_threshold([1, 2, 3, 50, 51, 52]) == 3
    assert otsu_threshold([-5.0, 5.0]) == -5
    for constant in (0.0, 0.1, -3.0):
        assert otsu_threshold(np.full((4, 5), constant)) == constant
    assert otsu_threshold([7.0]) == 7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_otsu_threshold_is_a_value_between_two_nonempty_classes(dtype: torch.dtype) -> None:
    values = random_map(20, 20).to(dtype)
    threshold = otsu_threshold(values)
    assert (values.double() == threshold).any()
    assert 0 < (values.double() > threshold).sum() < values.numel()


@pytest.mark.parametrize(("factor", "offset"), [(4.0, 0.0), (0.001, 0.0), (1e-30, 0.0), (2.0, 3.0)])
def test_otsu_threshold_scales_and_shifts_with_the_values(factor: float, offset: float) -> None:
    values = random_map(200)
    assert otsu_threshold(values * factor + offset) == pytest.approx(otsu_threshold(values) * factor + offset)


def test_iou_computed_by_hand() -> None:
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
def test_constant_maps_score_the_share_of_the_mask_or_zero(value: float) -> None:
    mask = torch.zeros(35, 41, dtype=torch.bool)
    mask[3:20, 5:17] = True
    share = mask.double().mean().item()
    constant = torch.full((7, 9), value, dtype=torch.float64)
    assert object_iou(constant, mask) == 0
    assert pointing_hit(constant, mask) == pytest.approx(share)
    assert energy_inside(constant, mask) == pytest.approx(share if value else 0)


@pytest.mark.parametrize("factor", [1e-6, 0.3, 3.0, 1e6])
def test_scaling_a_map_does_not_change_its_scores(factor: float) -> None:
    map, mask = random_map(8, 8), random_map(32, 24, seed=1) > 0.5
    assert object_iou(map * factor, mask) == object_iou(map, mask)
    assert pointing_hit(map * factor, mask) == pointing_hit(map, mask)
    assert energy_inside(map * factor, mask) == pytest.approx(energy_inside(map, mask))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_tensors_and_arrays_of_every_dtype_score_the_same(dtype: torch.dtype) -> None:
    map, mask = random_map(8, 8).to(dtype).requires_grad_(), random_map(32, 24, seed=1) > 0.5
    for metric in (object_iou, pointing_hit, energy_inside):
        result = metric(map, mask)
        assert type(result) is float
        array = map.detach().float().numpy()
        array.flags.writeable = False
        assert result == metric(array, mask.numpy())
        assert metric(array[::-1], mask.numpy()[::-1]) == pytest.approx(result)


def test_pointing_hit_computed_by_hand() -> None:
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


def test_energy_inside_equals_loops() -> None:
    assert energy_inside(torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 6.0]]), MASK) == pytest.approx(3 / 12)
    map, mask = random_map(5, 4), random_map(13, 9, seed=1) > 0.5
    resized = slow_resize(map.tolist(), 13, 9)
    inside = sum(resized[r][c] for r in range(13) for c in range(9) if mask[r, c])
    assert energy_inside(map, mask) == pytest.approx(inside / sum(sum(row) for row in resized))


def test_function_iou_is_the_share_below_the_mean_threshold() -> None:
    maps = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[0.0, 0.0], [0.0, 2.5]]])
    assert function_iou(maps, [1.0, 4.0]) == 5 / 8
    assert function_iou(maps[0], torch.tensor([2.5])) == 0.5
    assert function_iou(maps, [10.0]) == 1
    assert function_iou(torch.zeros(3, 5), [0.0]) == 0
    many = random_map(4, 6, 5)
    by_token = [sum(value < 0.5 for row in token for value in row) / 30 for token in many.tolist()]
    assert function_iou(many, [0.2, 0.8]) == pytest.approx(sum(by_token) / 4)
    assert function_iou(many * 9, [0.2 * 9, 0.8 * 9]) == function_iou(many, [0.2, 0.8])


def test_f1_is_the_harmonic_mean_of_means() -> None:
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


def test_f1_weights_samples_by_their_words() -> None:
    obj_words, func_words = [0.2, 0.4, 0.9], [0.5, 0.1, 0.3, 0.7]
    expected = f1_iou(obj_words, func_words)
    result = f1_iou([(0.2 + 0.4) / 2, 0.9, 0.0], [0.0, 0.3, (0.5 + 0.1 + 0.7) / 3], [2, 1, 0], [0, 1, 3])
    assert result == pytest.approx(expected)


@pytest.mark.parametrize("metric", [object_iou, pointing_hit, energy_inside, lambda map, mask: iou(map, mask, 0.5)])
def test_invalid_maps_and_masks_are_rejected(metric: Callable[[Any, Any], float]) -> None:
    map = torch.rand(2, 3)
    with pytest.raises(InvalidInputError, match=r"mask of shape \(2, 3\) has no cell inside"):
        metric(map, torch.zeros(2, 3, dtype=torch.bool))
    with pytest.raises(InvalidInputError, match=r"mask of shape \(0, 3\) has no cell inside"):
        metric(map, torch.zeros(0, 3, dtype=torch.bool))
    with pytest.raises(InvalidInputError, match="map holds NaN or infinity in 6 of 6"):
        metric(map * math.nan, MASK)
    with pytest.raises(InvalidInputError, match=r"map is empty.*\(0, 3\)"):
        metric(map[:0], MASK)
    with pytest.raises(InvalidInputError, match=r"boolean or integer.*float32"):
        metric(map, MASK.float())
    with pytest.raises(InvalidInputError, match=r"\(2, 3\) and \(1, 2, 3\)"):
        metric(map, MASK[None])


def test_invalid_thresholds_values_and_counts_are_rejected() -> None:
    with pytest.raises(InvalidInputError, match=r"\(2, 2\) and \(2, 3\)"):
        iou(torch.rand(2, 2), MASK, 0.5)
    with pytest.raises(InvalidOptionError, match="threshold is NaN"):
        iou(torch.rand(2, 3), MASK, math.nan)
    with pytest.raises(InvalidInputError, match=r"non-negative.*-2"):
        energy_inside(torch.full((2, 3), -2.0), MASK)
    with pytest.raises(InvalidInputError, match="values is empty"):
        otsu_threshold([])
    with pytest.raises(InvalidInputError, match="1 of 2"):
        otsu_threshold([1.0, math.inf])
    with pytest.raises(InvalidInputError, match="noun_thresholds is empty"):
        function_iou(torch.rand(2, 3), [])
    with pytest.raises(InvalidInputError, match="func holds NaN or infinity in 1 of 2"):
        f1_iou([0.5], [0.5, math.nan])
    with pytest.raises(InvalidInputError, match=r"obj_words must have the same shape.*\(2,\) and \(1,\)"):
        f1_iou([0.5, 0.5], [0.5], obj_words=[1])
    with pytest.raises(InvalidInputError, match=r"func_words.*smallest sum 0"):
        f1_iou([0.5], [0.5], func_words=[0])


@pytest.mark.parametrize("n_values", [1, 3, 20, 10**9])
def test_average_precision_is_the_area_under_the_precision_recall_curve(n_values: int) -> None:
    average_precision_score = pytest.importorskip("sklearn.metrics").average_precision_score
    generator = np.random.default_rng(n_values)
    for share in (0.05, 0.5, 1.0):
        map, mask = generator.integers(0, n_values, (9, 13)).astype(float), generator.random((9, 13)) < share
        result = average_precision(map, mask)
        assert result == pytest.approx(slow_average_precision(map.ravel().tolist(), mask.ravel().tolist()))
        assert result == pytest.approx(average_precision_score(mask.ravel(), map.ravel()))
        assert average_precision(np.exp(map / n_values) - 7, mask) == pytest.approx(result)  # only the order matters


def test_average_precision_of_resized_maps() -> None:
    mask = torch.zeros(12, 12, dtype=torch.int64)
    mask[:, 6:] = 4
    assert average_precision(torch.tensor([[0.0, 3.0], [0.0, 3.0]]), mask) == 1
    assert average_precision(torch.full((5, 5), 0.1), mask) == pytest.approx(0.5)
    # Values that differ only by rounding share a threshold: the lower half of a map of equal rows is not preferred.
    rows = random_map(1, 5, seed=3).expand(7, 5) + 0.1
    upper, lower = torch.zeros(53, 50, dtype=torch.bool), torch.zeros(53, 50, dtype=torch.bool)
    upper[:20, 10:30], lower[-20:, 10:30] = True, True
    assert average_precision(rows, upper) == pytest.approx(average_precision(rows, lower), abs=1e-12)
    with pytest.raises(InvalidInputError, match="no cell inside"):
        average_precision(rows, upper & lower)
