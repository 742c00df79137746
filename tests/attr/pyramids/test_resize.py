"""Inputs, arguments and attributions resized."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from captum.attr import (
    FeatureAblation,
    GradientShap,
    Occlusion,
)
from torch import Tensor, nn

from captum_intramodal import MSEA, Resize
from captum_intramodal.errors import InvalidInputError, InvalidOptionError
from tests.attr.pyramids.helpers import HALF, SIZE, at_half, half


@pytest.fixture
def image() -> Tensor:
    return torch.rand(2, 3, *SIZE)


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_baseline_tensors_of_any_number_of_rows_are_resized(image: Tensor, rows: int) -> None:
    baselines = torch.rand(rows, 3, *SIZE)
    assert torch.allclose(at_half(image, baselines=baselines)["baselines"], half(baselines))
    in_tuple = at_half((image,), baselines=(baselines,))["baselines"]
    assert isinstance(in_tuple, tuple) and torch.allclose(in_tuple[0], half(baselines))


@pytest.mark.parametrize("value", [None, 0, 0.5, (0.5,), torch.rand(2, 3, 1, 1)], ids=str)
def test_other_baselines_are_left_as_they_are(image: Tensor, value: Any) -> None:
    scaled = at_half(image, baselines=value)["baselines"]
    assert scaled is value or scaled == value


def test_each_input_has_its_own_baseline(image: Tensor) -> None:
    other = torch.rand(2, 4)
    given = (torch.rand(2, 3, *SIZE), torch.rand(2, 4))
    first, second = at_half((image, other), baselines=given)["baselines"]
    assert torch.allclose(first, half(given[0])) and second is given[1]
    assert at_half((image, other), baselines=(0.25, 1))["baselines"] == (0.25, 1)


def test_baselines_returned_by_a_callable_are_resized(image: Tensor) -> None:
    baselines = torch.rand(3, 3, *SIZE)
    assert torch.allclose(at_half(image, baselines=lambda: baselines)["baselines"](), half(baselines))
    scaled = at_half(image, baselines=lambda inputs: inputs * 2)["baselines"]
    assert torch.allclose(scaled(half(image)), half(image) * 2)
    net = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 3))

    def shap(baselines: Any) -> Tensor:
        torch.manual_seed(0)
        np.random.seed(0)  # Captum's source of randomness
        return MSEA(GradientShap(net), scales=(0.5, 1.0)).attribute(image, baselines, target=0)

    assert torch.equal(shap(lambda: baselines), shap(baselines))


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (1,), ()], ids=str)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_masks_are_resized_by_nearest_neighbor(image: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    mask = torch.randint(0, 99, (*shape, *SIZE)).to(dtype)
    actual = at_half(image, feature_mask=mask)["feature_mask"]
    expected = F.interpolate(mask.double().reshape(1, -1, *SIZE), size=HALF, mode="nearest-exact")
    assert actual.dtype == dtype and torch.equal(actual, expected.to(dtype).reshape(*shape, *HALF))


def test_segments_may_vanish_at_small_scales(image: Tensor) -> None:
    mask = torch.arange(16 * 12).reshape(1, 1, *SIZE)
    net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    result = MSEA(FeatureAblation(net), scales=(0.25, 1.0)).attribute(image, target=0, feature_mask=mask)
    assert result.isfinite().all() and result.shape == image.shape


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ((3, 4, 4), (3, 2, 2)),
        (((3, 4, 4),), ((3, 2, 2),)),
        ((1, 1, 1), (1, 1, 1)),
        ((2, 16, 12), (2, 8, 6)),
        (4, (4, 2, 2)),
        ((4,), ((4, 2, 2),)),
        (1, (1, 1, 1)),
    ],
    ids=str,
)
def test_windows_and_strides_are_rounded_and_clamped(image: Tensor, value: Any, expected: Any) -> None:
    assert at_half(image, strides=value)["strides"] == expected
    if not isinstance(value, int) and value != (4,):
        assert at_half(image, sliding_window_shapes=value)["sliding_window_shapes"] == expected


def test_windows_of_several_inputs(image: Tensor) -> None:
    given = at_half((image, torch.rand(2, 4)), sliding_window_shapes=((3, 4, 4), (2,)), strides=(2, 1))
    assert given["sliding_window_shapes"] == ((3, 2, 2), (2,))
    assert given["strides"] == ((2, 1, 1), 1)


def test_forward_args_of_the_inputs_size_are_resized(image: Tensor) -> None:
    depth, visible, vector = torch.rand(2, 1, *SIZE), torch.rand(2, *SIZE) > 0.5, torch.rand(2, 12)
    given = at_half(image, additional_forward_args=(depth, visible, vector, 7, None))["additional_forward_args"]
    assert torch.allclose(given[0], half(depth))
    assert given[1].dtype == torch.bool and torch.equal(
        given[1], F.interpolate(visible[None].double(), HALF, mode="nearest-exact")[0].bool()
    )
    assert given[2] is vector and given[3:] == (7, None)
    only = at_half(image, Resize(forward_args=(1,)), additional_forward_args=(depth, visible))[
        "additional_forward_args"
    ]
    assert only[0] is depth and only[1].shape == (2, *HALF)
    assert at_half(image, additional_forward_args=depth)["additional_forward_args"][0].shape == (2, 1, *HALF)


def test_groups_of_pixels_keep_their_values_and_single_pixels_their_sum() -> None:
    image = torch.ones(1, 1, 8, 8)
    mean = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    mask = torch.arange(4).reshape(1, 1, 2, 2).repeat_interleave(4, 2).repeat_interleave(4, 3)
    quarters = MSEA(FeatureAblation(mean), scales=(0.5, 1.0)).attribute(image, target=0, feature_mask=mask)
    assert torch.allclose(quarters, torch.full_like(image, 1 / 4))
    windows = MSEA(Occlusion(mean), scales=(0.5, 1.0)).attribute(image, (1, 4, 4), strides=(1, 4, 4), target=0)
    assert torch.allclose(windows, torch.full_like(image, 1 / 4))
    pixels = MSEA(FeatureAblation(mean), scales=(0.5, 1.0)).attribute(image, target=0)
    assert torch.allclose(pixels, torch.full_like(image, 1 / 64))


def test_unknown_interpolation_and_unfit_shapes_are_refused() -> None:
    with pytest.raises(InvalidOptionError, match="interpolate_mode"):
        Resize("cubic")  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="spatial dimensions"):
        Resize().down((torch.rand(2, 3),), {}, 0.5)
    with pytest.raises(InvalidInputError, match="more than spatial dimensions"):
        Resize().back((torch.rand(1, 2, 8, 8),), (torch.rand(1, 3, 16, 16),), 0.5, False)
