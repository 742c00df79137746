"""Fine detail removed at an unchanged size."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from captum.attr import (
    InputXGradient,
)
from torch import Tensor, nn

from captum_intramodal import MSEA, LowPass
from tests.attr.pyramids.helpers import SIZE, at_half, half


@pytest.fixture
def image() -> Tensor:
    return torch.rand(2, 3, *SIZE)


def test_inputs_and_baselines_are_shrunk_and_enlarged_again(image: Tensor) -> None:
    baselines, visible = torch.rand(1, 3, *SIZE), torch.rand(2, *SIZE) > 0.5
    given = at_half(
        image, LowPass(), baselines=baselines, feature_mask=visible.long(), strides=3, additional_forward_args=visible
    )
    up = {"size": SIZE, "mode": "bilinear"}
    assert torch.allclose(given["inputs"], F.interpolate(half(image), **up))
    assert torch.allclose(given["baselines"], F.interpolate(half(baselines), **up))
    assert torch.equal(given["feature_mask"], visible.long()) and given["strides"] == 3
    assert given["additional_forward_args"][0] is visible
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 12, 2))  # accepts one size only
    inner = InputXGradient(net)
    actual = MSEA(inner, scales=(0.5, 1.0, 2.0), pyramid=LowPass()).attribute(image, target=1)
    weight = net[1].weight[1].reshape(1, 3, *SIZE).detach()
    assert torch.allclose(actual, (given["inputs"] + 2 * image) / 3 * weight, atol=1e-6)
