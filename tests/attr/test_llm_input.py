"""Images and a prompt as features, and their baselines."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from captum_intramodal import ImageTextInput, ModelAdapter
from captum_intramodal.errors import InvalidInputError, InvalidOptionError
from tests.attr.llm_helpers import PROMPT
from tests.testing.tiny import random_image, tiny


@pytest.fixture(scope="module")
def qwen() -> ModelAdapter:
    return ModelAdapter(*tiny("qwen2_vl"))


def test_absent_features_are_replaced_by_their_baselines(qwen: ModelAdapter) -> None:
    image = random_image()
    present = torch.tensor([[0.0, 1, 1, 1, 0, 1, 1]])
    white = ImageTextInput(qwen, image, PROMPT, grid=(2, 2), image_baseline=(255, 254, 253), text_baseline="cat")
    (perturbed,) = white.perturb_images(present)
    assert np.array_equal(np.asarray(perturbed)[:68, :100], np.full((68, 100, 3), (255, 254, 253)))
    assert np.array_equal(np.asarray(perturbed)[68:], np.asarray(image)[68:])
    expected = qwen.prepare([perturbed], "cat the picture")
    actual = white.to_model_input(present)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[key], expected[key]) for key in expected)
    (blurred,) = ImageTextInput(qwen, image, PROMPT, grid=(1, 1), image_baseline="blur").perturb_images(torch.zeros(4))
    assert np.asarray(blurred).std() < 0.5 * np.asarray(image).std()
    assert not ImageTextInput(qwen, image, PROMPT, text="none").values[36:]


def test_unfit_options_segmentations_and_features_are_refused(qwen: ModelAdapter) -> None:
    image = random_image()
    inp = ImageTextInput(qwen, image, PROMPT, grid=(1, 1))

    def build(**options: Any) -> ImageTextInput:
        return ImageTextInput(qwen, image, PROMPT, **options)

    for call, error, message in (
        (lambda: inp.to_model_input(torch.ones(1, 3)), InvalidInputError, "4 features"),
        (lambda: build(grid=(0, 2)), InvalidOptionError, "136 x 200"),
        (lambda: build(segmentations=[torch.zeros(200, 136)]), InvalidInputError, r"\(136, 200\)"),
        (lambda: build(segmentations=[]), InvalidInputError, "segmentations"),
        (lambda: build(segmentations=[torch.zeros(136, 200)]), InvalidInputError, "float32"),
        (lambda: build(image_baseline="gray"), InvalidOptionError, "image_baseline"),
        (lambda: build(image_baseline=(0, 0, 256)), InvalidOptionError, "image_baseline"),
        (lambda: build(text="letters"), InvalidOptionError, "text must be"),
        (lambda: build(text_baseline="a cat"), InvalidOptionError, "got 2 tokens"),
        (lambda: build(text_baseline=10**6), InvalidOptionError, "vocabulary"),
    ):
        with pytest.raises(error, match=message):
            call()
