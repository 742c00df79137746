"""Explainers that ignore the model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from captum_intramodal.explainers import make_explainer
from tests.explainers.helpers import PROMPT, answer_to, model_of
from tests.testing.tiny import random_image


def test_noise_differs_by_image_token_and_seed_but_the_gaussian_does_not() -> None:
    adapter, ids = model_of("qwen2_vl"), answer_to(model_of("qwen2_vl"))
    image, other = [random_image(112, 84)], [random_image(112, 84, 1)]
    noise, more = (make_explainer(f"random:seed={seed}") for seed in (0, 1))
    (first,) = noise(adapter, image, PROMPT, ids)
    assert not torch.equal(first, noise(adapter, other, PROMPT, ids)[0])
    assert not torch.equal(first, more(adapter, image, PROMPT, ids)[0])
    assert not torch.equal(first[0], first[1])
    (center,) = make_explainer("center_gaussian:sigma=0.5,cells=4")(adapter, image, PROMPT, ids)
    assert center.shape == (3, 3, 4)
    assert torch.allclose(center[0], center[0].flip(0, 1)) and torch.equal(center[0], center[2])
    assert float(center[0, 1, 0] / center[0, 1, 1]) == pytest.approx(np.exp((0.125**2 - 0.375**2) / 0.5))
