"""Imputations keep what is kept, and solve their equations."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from captum_intramodal.errors import InvalidInputError, InvalidOptionError
from captum_intramodal.functional.imputation import Imputer, noisy_linear_imputation
from tests.testing.tiny import random_image


def means_of_neighbors(pixels: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Build the equations of the imputation one by one, and solve them densely."""
    height, width = kept.shape
    unknown = [(y, x) for y in range(height) for x in range(width) if not kept[y, x]]
    index = {pixel: i for i, pixel in enumerate(unknown)}
    matrix, right = np.zeros((len(unknown), len(unknown))), np.zeros((len(unknown), 3))
    for i, (y, x) in enumerate(unknown):
        for dy in (-1, 0, 1):
            for dx in (-1, 0, 1):
                pixel = (y + dy, x + dx)
                if (dy or dx) and 0 <= pixel[0] < height and 0 <= pixel[1] < width:
                    weight = 1 / 12 if dy and dx else 1 / 6
                    matrix[i, i] += weight
                    if pixel in index:
                        matrix[i, index[pixel]] -= weight
                    else:
                        right[i] += weight * pixels[pixel]
    result = pixels.astype(float)
    for pixel, value in zip(unknown, np.linalg.solve(matrix, right), strict=True):
        result[pixel] = value
    return result


@pytest.mark.parametrize("shape", ["disc", "scattered"])
def test_imputation_solves_the_equations_below_its_noise(shape: str) -> None:
    pixels = np.asarray(random_image(32, 24))
    rows, columns = np.mgrid[:24, :32]
    disc = np.hypot(rows - 12, columns - 14) > 8
    kept = disc if shape == "disc" else np.random.default_rng(1).random((24, 32)) < 0.4
    imputed = noisy_linear_imputation(pixels, np.stack([kept, ~kept]), noise=0.0)
    for mask, result in zip((kept, ~kept), imputed, strict=True):
        np.testing.assert_array_equal(result[mask], pixels[mask])
        assert np.abs(result - means_of_neighbors(pixels, mask)).mean() < 0.01 * 255
    noised = noisy_linear_imputation(pixels, kept[None], noise=0.02)[0].astype(float)
    assert (noised - imputed[0])[~kept].std() == pytest.approx(0.02 * 255, rel=0.15)


def test_imputation_with_nothing_kept_is_the_mean_color() -> None:
    pixels = np.asarray(random_image(32, 24))
    imputed = noisy_linear_imputation(pixels, np.zeros((1, 24, 32), bool), noise=0.0)
    np.testing.assert_allclose(imputed[0], np.broadcast_to(pixels.mean((0, 1)).round(), pixels.shape), atol=1)
    with pytest.raises(InvalidInputError, match="must be"):
        noisy_linear_imputation(pixels, np.zeros((24, 32), bool))


@pytest.mark.parametrize("imputation", ["blur", "mean", "noisy_linear"])
def test_every_imputation_changes_only_removed_pixels(imputation: str) -> None:
    original = random_image(32, 24)
    kept = np.random.default_rng(0).random((2, 24, 32)) < 0.5
    imputer = Imputer(original, imputation)  # type: ignore[arg-type]
    for mask, imputed in zip(kept, imputer(kept), strict=True):
        np.testing.assert_array_equal(np.asarray(imputed)[mask], np.asarray(original)[mask])
        assert (np.asarray(imputed)[~mask] != np.asarray(original)[~mask]).any()
    (blank,) = imputer(np.zeros((1, 24, 32), bool))
    assert imputer.nothing_kept() == blank


def test_wrong_imputations_and_masks_are_rejected() -> None:
    with pytest.raises(InvalidOptionError, match="one of blur, mean, noisy_linear; got 'black'"):
        Imputer(random_image(32, 24), "black")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="must be a PIL image, got str"):
        Imputer("photo.png")  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match=r"size \(5, 5\), but the image has \(32, 24\)"):
        Imputer(random_image(32, 24), Image.new("RGB", (5, 5)))
    with pytest.raises(InvalidInputError, match=r"shape \(N, 24, 32\), got \(1, 1\)"):
        Imputer(random_image(32, 24))([[True]])  # type: ignore[arg-type]
