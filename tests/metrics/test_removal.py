"""Score functions remove what the masks leave out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from captum_intramodal.errors import InvalidInputError, InvalidOptionError
from captum_intramodal.metrics import ImageRemoval, TokenRemoval, deletion_curve
from tests.testing.tiny import random_image


def test_removed_pixels_are_imputed_before_the_image_is_scored() -> None:
    original, white = random_image(32, 24), Image.new("RGB", (32, 24), "white")
    scored: list[Image.Image] = []

    def score(images: list[Image.Image]) -> torch.Tensor:
        scored.extend(images)
        return torch.tensor([float(np.asarray(image)[:, :16].mean()) for image in images])

    removal = ImageRemoval(score, original, white)
    left = torch.zeros(3, 4)
    left[:, :2] = 1  # the left half is important
    importance = removal.importance(left)
    assert importance.shape == (24, 32) and (importance[:, :12] == 1).all() and (importance[:, 20:] == 0).all()
    curve = deletion_curve(removal, importance, (0.0, 0.5, 1.0))
    pixels = np.asarray(original)
    np.testing.assert_array_equal(np.asarray(scored[0]), pixels)
    np.testing.assert_array_equal(np.asarray(scored[1])[:, 16:], pixels[:, 16:])
    assert (np.asarray(scored[1])[:, :16] == 255).all() and (np.asarray(scored[2]) == 255).all()
    assert curve.tolist() == pytest.approx([pixels[:, :16].mean(), 255, 255])


def test_wrong_imputations_maps_and_masks_are_rejected() -> None:
    with pytest.raises(InvalidOptionError, match="blur, mean, noisy_linear"):
        ImageRemoval(len, random_image(32, 24), "black")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="must be a PIL image, got str"):
        ImageRemoval(len, "photo.png")  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match=r"\(rows, columns\), got shape \(3,\)"):
        ImageRemoval(len, random_image(32, 24)).importance(torch.ones(3))  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match=r"size \(5, 5\)"):
        ImageRemoval(len, random_image(32, 24), Image.new("RGB", (5, 5)))  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match=r"got \(1, 2, 2\)"):
        ImageRemoval(len, random_image(32, 24)).images(np.ones((1, 2, 2), bool))  # type: ignore[arg-type]


class RecordedScorer:
    """Return as the log-probability of the j-th of three tokens -(sum of the kept positions) / (100 (j + 1))."""

    answer_ids = (7, 8, 9)

    def without_tokens(
        self, images: object, positions: torch.Tensor, removed: torch.Tensor, baseline: int | None
    ) -> torch.Tensor:
        self.call = images, baseline
        total = (positions * ~removed).sum(1, keepdim=True)
        return -total / 100 / torch.tensor([1.0, 2.0, 3.0])


def test_removing_tokens_changes_the_probability_of_one_or_all_answer_tokens() -> None:
    scorer = RecordedScorer()
    kept = np.array([[True, True, False], [False, True, False], [False, False, False]])
    totals = np.array([3 + 10, 10, 0]) / 100
    for token, share in ((0, 1), (-1, 1 / 3), (None, 1 + 1 / 2 + 1 / 3)):
        removal = TokenRemoval(scorer, "image", [3, 10, 20], token, baseline=5)  # type: ignore[arg-type]
        np.testing.assert_allclose(removal(kept), np.exp(-totals * share), rtol=1e-6)
        assert scorer.call == ("image", 5)
    curve = deletion_curve(removal, np.array([0.1, 0.3, 0.2]), np.arange(4) / 3)
    np.testing.assert_allclose(np.log(curve) * -100 / share, [33, 23, 3, 0], rtol=1e-5, atol=1e-5)
    with pytest.raises(InvalidOptionError, match="-3 to 2 for an answer of 3 tokens, got 3"):
        TokenRemoval(scorer, "image", [3], 3)  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="int64"):
        TokenRemoval(scorer, "image", [0.5])  # type: ignore[arg-type, list-item]
