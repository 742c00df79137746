"""Arguments of a layer adapted to the layer's size."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from captum.attr import (
    LayerFeatureAblation,
    NeuronGradient,
)
from torch import Tensor, nn

from captum_intramodal import MSEA
from tests.attr.pyramids.helpers import SIZE, half


@pytest.fixture
def image() -> Tensor:
    return torch.rand(2, 3, *SIZE)


class Strided(nn.Module):
    """A layer whose size is no multiple of the input's: (16, 12) -> (5, 4), (8, 6) -> (2, 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 3, stride=3, padding=0)
        self.head = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).relu().mean((2, 3)))


def test_the_neuron_at_the_same_place_is_selected(image: Tensor) -> None:
    net = Strided()
    inner = NeuronGradient(net, net.conv)
    small = inner.attribute(half(image).detach(), (1, 1, 1))  # (4, 3) in a layer of (5, 4)
    expected = F.interpolate(small, size=SIZE, mode="bilinear") * 0.5 + inner.attribute(image.clone(), (1, 4, 3)) * 0.5
    actual = MSEA(inner, scales=(0.5, 1.0)).attribute(image, (1, 4, 3))
    assert net.conv(half(image)).shape[2:] == (2, 2) and net.conv(image).shape[2:] == (5, 4)
    assert torch.allclose(actual, expected, atol=1e-6) and actual.abs().sum() > 0
    whole = MSEA(inner, scales=(0.5, 1.0)).attribute(image, (0, slice(0, 5), slice(1, 3)))
    assert whole.isfinite().all()


def test_masks_and_baselines_of_a_layer_are_resized_to_its_measured_size(image: Tensor) -> None:
    net = Strided()
    mask = torch.arange(20).reshape(1, 1, 5, 4) // 10
    inner = LayerFeatureAblation(net, net.conv)
    actual = MSEA(inner, scales=(0.5, 1.0)).attribute(
        image, layer_baselines=torch.ones(1, 2, 5, 4), target=1, layer_mask=mask
    )
    small = inner.attribute(
        half(image), layer_baselines=torch.ones(1, 2, 2, 2), target=1, layer_mask=mask[..., [1, 3], :][..., [1, 3]]
    )
    large = inner.attribute(image, layer_baselines=torch.ones(1, 2, 5, 4), target=1, layer_mask=mask)
    assert torch.allclose(actual, (F.interpolate(small, (5, 4), mode="bilinear") + large) / 2, atol=1e-6)
