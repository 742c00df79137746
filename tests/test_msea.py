from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from captum.attr import (
    DeepLift,
    FeatureAblation,
    GradientShap,
    InputXGradient,
    IntegratedGradients,
    LayerGradCam,
    NoiseTunnel,
    Occlusion,
    Saliency,
)
from captum.metrics import sensitivity_max
from torch import Tensor, nn

from captum_intramodal import MSEA, MultiScaleExplanationAggregation


class ConvNet(nn.Module):
    """Any input size; two inputs if asked."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.relu = nn.ReLU()
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor, extra: Tensor | None = None) -> Tensor:
        x = self.relu(self.conv(x)).mean((2, 3))
        return self.head(x) + (0 if extra is None else extra.sum(1, keepdim=True))


@pytest.fixture
def net() -> ConvNet:
    return ConvNet().eval()


@pytest.fixture
def image() -> Tensor:
    return torch.rand(2, 3, 16, 12)


METHODS: list[tuple[type, dict[str, Any]]] = [
    (Saliency, {}),
    (InputXGradient, {}),
    (IntegratedGradients, {"n_steps": 4}),
    (DeepLift, {}),
    (FeatureAblation, {"feature_mask": torch.arange(4).reshape(2, 2).repeat_interleave(8, 0).repeat_interleave(6, 1)}),
    (Occlusion, {"sliding_window_shapes": (3, 4, 4), "strides": (3, 4, 4)}),
]


@pytest.mark.parametrize(("method", "kwargs"), METHODS, ids=lambda value: getattr(value, "__name__", ""))
def test_scale_one_is_the_inner_method(net: ConvNet, image: Tensor, method: type, kwargs: dict[str, Any]) -> None:
    expected = method(net).attribute(image.clone(), target=1, **kwargs)
    actual = MSEA(method(net), scales=(1.0,)).attribute(image.clone(), target=1, **kwargs)
    assert torch.equal(actual, expected)


def test_scale_one_passes_the_convergence_delta_through(net: ConvNet, image: Tensor) -> None:
    inner = IntegratedGradients(net)
    expected = inner.attribute(image, target=1, return_convergence_delta=True, n_steps=4)
    actual = MSEA(inner, scales=(1.0,)).attribute(image, target=1, return_convergence_delta=True, n_steps=4)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize(("method", "kwargs"), METHODS, ids=lambda value: getattr(value, "__name__", ""))
def test_every_method_at_several_scales(net: ConvNet, image: Tensor, method: type, kwargs: dict[str, Any]) -> None:
    result = MSEA(method(net), scales=(0.5, 1.0, 1.5)).attribute(image, target=1, **kwargs)
    assert result.shape == image.shape
    assert result.isfinite().all() and result.abs().sum() > 0
    assert result.is_contiguous() and not result.requires_grad


def test_equals_the_formula_by_hand(net: ConvNet, image: Tensor) -> None:
    small = F.interpolate(image, size=(8, 6), mode="bilinear", antialias=True)
    at_small = InputXGradient(net).attribute(small.detach(), target=2).detach()
    back = F.interpolate(at_small, size=(16, 12), mode="bilinear") * (8 * 6) / (16 * 12)
    at_one = InputXGradient(net).attribute(image.clone(), target=2).detach()
    expected = 0.25 * back + 0.75 * at_one
    actual = MSEA(InputXGradient(net), scales=(0.5, 1.0), weights=(1, 3)).attribute(image.clone(), target=2)
    assert torch.allclose(actual, expected, atol=1e-7)


def test_mass_is_kept_for_methods_that_multiply_by_inputs_only(net: ConvNet) -> None:
    image = torch.rand(1, 3, 8, 8)
    nearest = MSEA(InputXGradient(net), scales=(0.5,), interpolate_mode="nearest")
    small = F.interpolate(image, size=(4, 4), mode="nearest-exact")
    mass = InputXGradient(net).attribute(small.clone(), target=0).sum()
    assert torch.allclose(nearest.attribute(image, target=0).sum(), mass, atol=1e-6)
    saliency = MSEA(Saliency(net), scales=(0.5,), interpolate_mode="nearest").attribute(image, target=0)
    assert torch.allclose(saliency.mean(), Saliency(net).attribute(small, target=0).mean(), atol=1e-7)


def test_arguments_that_depend_on_scale(net: ConvNet, image: Tensor) -> None:
    seen: list[dict[str, Any]] = []

    class Spy(FeatureAblation):
        def attribute(self, inputs: Tensor, **kwargs: Any) -> Tensor:  # type: ignore[override]
            seen.append({"inputs": inputs, **kwargs})
            return torch.zeros_like(inputs)

    mask = torch.arange(4).reshape(1, 1, 2, 2).repeat_interleave(8, 2).repeat_interleave(6, 3)
    MSEA(Spy(net), scales=(1.0, 0.5)).attribute(
        image,
        target=1,
        baselines=torch.ones_like(image),
        feature_mask=mask,
        sliding_window_shapes=(3, 5, 1),
        strides=4,
    )
    half = seen[1]
    assert half["inputs"].shape == half["baselines"].shape == (2, 3, 8, 6)
    assert torch.equal(half["baselines"], torch.ones(2, 3, 8, 6))
    assert half["feature_mask"].dtype == mask.dtype
    assert torch.equal(half["feature_mask"], mask[..., ::2, ::2])
    assert half["sliding_window_shapes"] == (3, 2, 1)
    assert half["strides"] == 2
    assert half["target"] == 1


def test_positional_arguments_follow_the_scale_too(net: ConvNet, image: Tensor) -> None:
    by_name = MSEA(Occlusion(net), scales=(0.5, 1.0)).attribute(image, sliding_window_shapes=(3, 4, 4), target=1)
    by_position = MSEA(Occlusion(net), scales=(0.5, 1.0)).attribute(image, (3, 4, 4), target=1)
    assert torch.equal(by_name, by_position)


def test_tuples_in_tuples_out(net: ConvNet, image: Tensor) -> None:
    msea = MSEA(InputXGradient(net), scales=(0.5, 1.0))
    assert isinstance(msea.attribute((image,), target=1), tuple)
    extra = torch.rand(2, 4)
    both = msea.attribute((image, extra), target=1)
    assert [tuple(part.shape) for part in both] == [tuple(image.shape), (2, 4)]


def test_layer_methods_are_aligned(net: ConvNet, image: Tensor) -> None:
    result = MSEA(LayerGradCam(net, net.conv), scales=(0.5, 1.0, 2.0)).attribute(image, target=1)
    assert result.shape == (2, 1, 16, 12)


def test_composes_with_captum(net: ConvNet, image: Tensor) -> None:
    outside = NoiseTunnel(MSEA(Saliency(net), scales=(0.5, 1.0))).attribute(image, target=1, nt_samples=2, stdevs=0.1)
    inside = MSEA(NoiseTunnel(Saliency(net)), scales=(0.5, 1.0)).attribute(image, target=1, nt_samples=2, stdevs=0.1)
    nested = MSEA(MSEA(Saliency(net), scales=(0.5, 1.0)), scales=(1.0, 2.0)).attribute(image, target=1)
    shap = MSEA(GradientShap(net), scales=(0.5, 1.0)).attribute(image, target=1, baselines=torch.zeros(3, 3, 16, 12))
    assert outside.shape == inside.shape == nested.shape == shap.shape == image.shape
    assert sensitivity_max(MSEA(Saliency(net), scales=(0.5, 1.0)).attribute, image, target=1).shape == (2,)


def test_follows_the_inner_method(net: ConvNet) -> None:
    inner = IntegratedGradients(net)
    msea = MSEA(inner)
    assert msea.forward_func is net and msea.multiplies_by_inputs
    other = ConvNet()
    inner.forward_func = other
    assert msea.forward_func is other
    msea.forward_func = net
    assert inner.forward_func is net
    assert msea.is_gradient_method and not MSEA(FeatureAblation(net)).is_gradient_method
    assert not msea.has_convergence_delta()
    assert MultiScaleExplanationAggregation.get_name() == "Multi Scale Explanation Aggregation"


@pytest.mark.parametrize("aggregation", ["max", "geometric_mean"])
def test_other_aggregations(net: ConvNet, image: Tensor, aggregation: Any) -> None:
    maps = [MSEA(Saliency(net), scales=(1.0, scale), weights=(0, 1)).attribute(image, target=1) for scale in (0.5, 2.0)]
    both = MSEA(Saliency(net), scales=(0.5, 2.0), aggregation=aggregation)
    # Without 1.0 among the scales the size of the result is that of the scale closest to it.
    assert both.attribute(image, target=1).ndim == 4
    stacked = MSEA(Saliency(net), scales=(1.0, 0.5, 2.0), weights=(0, 1, 1), aggregation=aggregation)
    expected = torch.stack(maps).amax(0) * 1.5 if aggregation == "max" else (maps[0] * maps[1]).sqrt()
    seen = torch.stack([Saliency(net).attribute(image, target=1), *maps]).gt(0).all(0)
    actual = stacked.attribute(image, target=1)
    assert torch.allclose(actual[seen], expected[seen], atol=1e-6)


def test_inner_errors_leave_no_hooks(net: ConvNet, image: Tensor) -> None:
    with pytest.raises(Exception, match=r".+"):
        MSEA(DeepLift(net), scales=(0.5, 1.0)).attribute(image, target=99)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scales": ()}, "empty"),
        ({"scales": (0.0, 1.0)}, "positive"),
        ({"scales": (float("inf"),)}, "positive"),
        ({"scales": (1.0, 1.0)}, "different"),
        ({"scales": (1.0, 2.0), "weights": (1.0,)}, "1 weights for 2 scales"),
        ({"scales": (1.0,), "weights": (0.0,)}, "not all zero"),
        ({"aggregation": "median"}, "aggregation"),
        ({"interpolate_mode": "cubic"}, "interpolate_mode"),
    ],
)
def test_bad_options(net: ConvNet, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MSEA(Saliency(net), **options)


def test_bad_calls(net: ConvNet, image: Tensor) -> None:
    with pytest.raises(TypeError, match="Captum Attribution"):
        MSEA(net)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="completeness"):
        MSEA(IntegratedGradients(net)).attribute(image, target=1, return_convergence_delta=True)
    with pytest.raises(ValueError, match="spatial"):
        MSEA(Saliency(nn.Linear(4, 2))).attribute(torch.rand(2, 4), target=0)
    with pytest.raises(NotImplementedError):
        MSEA(Saliency(net)).attribute_future()
