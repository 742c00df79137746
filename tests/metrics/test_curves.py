"""Curves and their summaries agree with sums computed by hand."""

from __future__ import annotations

import numpy as np
import pytest

from captum_intramodal.errors import InvalidInputError, InvalidOptionError
from captum_intramodal.metrics import aopc, area_under_curve, deletion_curve, insertion_curve, road

WEIGHTS = np.array([[0.05, 0.4], [0.15, 0.3], [0.1, 0.0]])


def total(kept: np.ndarray) -> np.ndarray:
    return (kept * WEIGHTS).sum((1, 2))


def test_curves_of_a_sum_are_its_sorted_partial_sums() -> None:
    fractions = np.arange(7) / 6
    largest_first = np.concatenate([[0], np.sort(WEIGHTS.ravel())[::-1].cumsum()])
    np.testing.assert_allclose(insertion_curve(total, WEIGHTS, fractions), largest_first)
    np.testing.assert_allclose(deletion_curve(total, WEIGHTS, fractions), 1 - largest_first)
    smallest_first = np.concatenate([[0], np.sort(WEIGHTS.ravel()).cumsum()])
    np.testing.assert_allclose(deletion_curve(total, WEIGHTS, fractions, least_first=True), 1 - smallest_first)


def test_summaries_of_curves_computed_by_hand() -> None:
    curve, fractions = np.array([1.0, 0.5, 0.4, 0.0]), (0.0, 0.25, 0.5, 1.0)
    assert area_under_curve(curve, fractions) == pytest.approx(0.25 * 0.75 + 0.25 * 0.45 + 0.5 * 0.2)
    assert aopc(curve) == pytest.approx((0 + 0.5 + 0.6 + 1.0) / 4)
    halves = (0.5,)
    assert road(total, WEIGHTS, halves) == pytest.approx(((0.4 + 0.3 + 0.15) - (0.05 + 0.1 + 0.0)) / 2)
    assert road(total, -WEIGHTS, halves) == pytest.approx(-road(total, WEIGHTS, halves))


def test_equal_values_are_removed_in_random_order() -> None:
    flat = np.zeros((40, 50))
    masks: list[np.ndarray] = []

    def score(kept: np.ndarray) -> np.ndarray:
        masks.append(kept)
        return kept.mean((1, 2))

    np.testing.assert_allclose(deletion_curve(score, flat, (0.0, 0.5, 1.0)), (1, 0.5, 0))
    half = masks[0][1]
    assert abs(half[:20].mean() - half[20:].mean()) < 0.1 and abs(half[:, :25].mean() - half[:, 25:].mean()) < 0.1
    deletion_curve(score, flat, (0.0, 0.5, 1.0), seed=1)
    assert (masks[1][1] != half).any()


@pytest.mark.parametrize(
    ("fractions", "message"),
    [((0.5, 0.2), "increase"), ((0.0, 1.5), "from 0 to 1"), ((), "from 0 to 1"), ((0.0, float("nan")), "from 0 to 1")],
)
def test_wrong_fractions_are_rejected(fractions: tuple[float, ...], message: str) -> None:
    with pytest.raises(InvalidOptionError, match=message):
        deletion_curve(total, WEIGHTS, fractions)


def test_wrong_scores_and_curves_are_rejected() -> None:
    with pytest.raises(InvalidInputError, match="one number for each of 11 masks"):
        insertion_curve(lambda kept: kept, WEIGHTS)
    with pytest.raises(InvalidInputError, match="NaN"):
        insertion_curve(lambda kept: np.full(len(kept), np.nan), WEIGHTS)
    with pytest.raises(InvalidInputError, match="one score for each of 3"):
        area_under_curve(np.zeros(2), (0.0, 0.5, 1.0))
