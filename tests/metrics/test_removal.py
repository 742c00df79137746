from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from captum_intramodal.metrics import (
    ImageRemoval,
    Imputer,
    TokenRemoval,
    aopc,
    area_under_curve,
    deletion_curve,
    insertion_curve,
    noisy_linear_imputation,
    road,
)

WEIGHTS = np.array([[0.05, 0.4], [0.15, 0.3], [0.1, 0.0]])


def total(kept: np.ndarray) -> np.ndarray:
    return (kept * WEIGHTS).sum((1, 2))


def random_image(height: int = 24, width: int = 32, seed: int = 0) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def test_curves_of_a_sum_are_its_sorted_partial_sums() -> None:
    fractions = np.arange(7) / 6
    largest_first = np.concatenate([[0], np.sort(WEIGHTS.ravel())[::-1].cumsum()])
    np.testing.assert_allclose(insertion_curve(total, WEIGHTS, fractions), largest_first)
    np.testing.assert_allclose(deletion_curve(total, WEIGHTS, fractions), 1 - largest_first)
    smallest_first = np.concatenate([[0], np.sort(WEIGHTS.ravel()).cumsum()])
    np.testing.assert_allclose(deletion_curve(total, WEIGHTS, fractions, least_first=True), 1 - smallest_first)


def test_numbers_of_curves_by_hand() -> None:
    curve, fractions = np.array([1.0, 0.5, 0.4, 0.0]), (0.0, 0.25, 0.5, 1.0)
    assert area_under_curve(curve, fractions) == pytest.approx(0.25 * 0.75 + 0.25 * 0.45 + 0.5 * 0.2)
    assert aopc(curve) == pytest.approx((0 + 0.5 + 0.6 + 1.0) / 4)
    halves = (0.5,)
    assert road(total, WEIGHTS, halves) == pytest.approx(((0.4 + 0.3 + 0.15) - (0.05 + 0.1 + 0.0)) / 2)
    assert road(total, -WEIGHTS, halves) == pytest.approx(-road(total, WEIGHTS, halves))


def test_equal_values_are_removed_in_random_order() -> None:
    flat = np.zeros((40, 50))
    seen: list[np.ndarray] = []

    def remember(kept: np.ndarray) -> np.ndarray:
        seen.append(kept)
        return kept.mean((1, 2))

    np.testing.assert_allclose(deletion_curve(remember, flat, (0.0, 0.5, 1.0)), (1, 0.5, 0))
    half = seen[0][1]
    assert abs(half[:20].mean() - half[20:].mean()) < 0.1 and abs(half[:, :25].mean() - half[:, 25:].mean()) < 0.1
    deletion_curve(remember, flat, (0.0, 0.5, 1.0), seed=1)
    assert (seen[1][1] != half).any()


@pytest.mark.parametrize(
    ("fractions", "message"),
    [((0.5, 0.2), "increase"), ((0.0, 1.5), "from 0 to 1"), ((), "from 0 to 1"), ((0.0, float("nan")), "from 0 to 1")],
)
def test_wrong_fractions_are_refused(fractions: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        deletion_curve(total, WEIGHTS, fractions)


def test_wrong_scores_and_curves_are_refused() -> None:
    with pytest.raises(ValueError, match="one number for each of 11 masks"):
        insertion_curve(lambda kept: kept, WEIGHTS)
    with pytest.raises(ValueError, match="NaN"):
        insertion_curve(lambda kept: np.full(len(kept), np.nan), WEIGHTS)
    with pytest.raises(ValueError, match="one score for each of 3"):
        area_under_curve(np.zeros(2), (0.0, 0.5, 1.0))


def means_of_neighbors(pixels: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """The equations of the imputation, one by one, solved densely."""
    height, width = kept.shape
    unknown = [(y, x) for y in range(height) for x in range(width) if not kept[y, x]]
    index = {at: i for i, at in enumerate(unknown)}
    matrix, right = np.zeros((len(unknown), len(unknown))), np.zeros((len(unknown), 3))
    for i, (y, x) in enumerate(unknown):
        for dy in (-1, 0, 1):
            for dx in (-1, 0, 1):
                at = (y + dy, x + dx)
                if (dy or dx) and 0 <= at[0] < height and 0 <= at[1] < width:
                    weight = 1 / 12 if dy and dx else 1 / 6
                    matrix[i, i] += weight
                    if at in index:
                        matrix[i, index[at]] -= weight
                    else:
                        right[i] += weight * pixels[at]
    result = pixels.astype(float)
    for at, value in zip(unknown, np.linalg.solve(matrix, right), strict=True):
        result[at] = value
    return result


@pytest.mark.parametrize("shape", ["disc", "scattered"])
def test_imputation_solves_the_equations_below_its_noise(shape: str) -> None:
    pixels = np.asarray(random_image())
    rows, columns = np.mgrid[:24, :32]
    disc = np.hypot(rows - 12, columns - 14) > 8
    kept = disc if shape == "disc" else np.random.default_rng(1).random((24, 32)) < 0.4
    imputed = noisy_linear_imputation(pixels, np.stack([kept, ~kept]), noise=0.0)
    for mask, result in zip((kept, ~kept), imputed, strict=True):
        np.testing.assert_array_equal(result[mask], pixels[mask])
        assert np.abs(result - means_of_neighbors(pixels, mask)).mean() < 0.01 * 255
    shaken = noisy_linear_imputation(pixels, kept[None], noise=0.02)[0].astype(float)
    assert (shaken - imputed[0])[~kept].std() == pytest.approx(0.02 * 255, rel=0.15)


def test_imputation_without_anything_kept_is_the_mean_color() -> None:
    pixels = np.asarray(random_image())
    imputed = noisy_linear_imputation(pixels, np.zeros((1, 24, 32), bool), noise=0.0)
    np.testing.assert_allclose(imputed[0], np.broadcast_to(pixels.mean((0, 1)).round(), pixels.shape), atol=1)
    with pytest.raises(ValueError, match="must be"):
        noisy_linear_imputation(pixels, np.zeros((24, 32), bool))


def test_an_image_is_scored_with_its_removed_pixels_imputed() -> None:
    original, white = random_image(), Image.new("RGB", (32, 24), "white")
    shown: list[Image.Image] = []

    def score(images: list[Image.Image]) -> torch.Tensor:
        shown.extend(images)
        return torch.tensor([float(np.asarray(p)[:, :16].mean()) for p in images])

    removal = ImageRemoval(score, original, white)
    left = torch.zeros(3, 4)
    left[:, :2] = 1  # the left half is important
    importance = removal.importance(left)
    assert importance.shape == (24, 32) and (importance[:, :12] == 1).all() and (importance[:, 20:] == 0).all()
    curve = deletion_curve(removal, importance, (0.0, 0.5, 1.0))
    pixels = np.asarray(original)
    np.testing.assert_array_equal(np.asarray(shown[0]), pixels)
    np.testing.assert_array_equal(np.asarray(shown[1])[:, 16:], pixels[:, 16:])
    assert (np.asarray(shown[1])[:, :16] == 255).all() and (np.asarray(shown[2]) == 255).all()
    assert curve.tolist() == pytest.approx([pixels[:, :16].mean(), 255, 255])


@pytest.mark.parametrize("imputation", ["blur", "mean", "noisy_linear"])
def test_every_imputation_keeps_what_is_kept(imputation: str) -> None:
    original = random_image()
    kept = np.random.default_rng(0).random((2, 24, 32)) < 0.5
    imputer = Imputer(original, imputation)  # type: ignore[arg-type]
    for mask, shown in zip(kept, imputer(kept), strict=True):
        np.testing.assert_array_equal(np.asarray(shown)[mask], np.asarray(original)[mask])
        assert (np.asarray(shown)[~mask] != np.asarray(original)[~mask]).any()
    (blank,) = imputer(np.zeros((1, 24, 32), bool))
    assert imputer.nothing_kept() == blank


def test_a_wrong_imputation_is_refused() -> None:
    with pytest.raises(ValueError, match="blur, mean, noisy_linear"):
        ImageRemoval(len, random_image(), "black")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="must be a PIL image, got str"):
        Imputer("photo.png")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"Masks of shape \(1, 1\)"):
        Imputer(random_image())([[True]])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"size \(5, 5\)"):
        ImageRemoval(len, random_image(), Image.new("RGB", (5, 5)))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"Masks of shape \(1, 2, 2\)"):
        ImageRemoval(len, random_image()).images(np.ones((1, 2, 2), bool))  # type: ignore[arg-type]


class RecordedScorer:
    """Log-probabilities of three tokens: of the j-th, minus the kept positions' sum / 100 (j + 1)."""

    answer_ids = (7, 8, 9)

    def without_tokens(
        self, images: object, positions: torch.Tensor, removed: torch.Tensor, baseline: int | None
    ) -> torch.Tensor:
        self.seen = images, baseline
        total = (positions * ~removed).sum(1, keepdim=True)
        return -total / 100 / torch.tensor([1.0, 2.0, 3.0])


def test_removed_tokens_change_the_probability_of_a_token_or_of_all() -> None:
    scorer = RecordedScorer()
    kept = np.array([[True, True, False], [False, True, False], [False, False, False]])
    totals = np.array([3 + 10, 10, 0]) / 100
    for token, share in ((0, 1), (-1, 1 / 3), (None, 1 + 1 / 2 + 1 / 3)):
        removal = TokenRemoval(scorer, "picture", [3, 10, 20], token, baseline=5)  # type: ignore[arg-type]
        np.testing.assert_allclose(removal(kept), np.exp(-totals * share), rtol=1e-6)
        assert scorer.seen == ("picture", 5)
    curve = deletion_curve(removal, np.array([0.1, 0.3, 0.2]), np.arange(4) / 3)
    np.testing.assert_allclose(np.log(curve) * -100 / share, [33, 23, 3, 0], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="-3 to 2 for an answer of 3 tokens, got 3"):
        TokenRemoval(scorer, "picture", [3], 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="int64"):
        TokenRemoval(scorer, "picture", [0.5])  # type: ignore[arg-type, list-item]
