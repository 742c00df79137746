"""MSEA against its formula, and what Captum's methods and tools expect of an attribution."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from captum.attr import (
    LRP,
    DeepLift,
    FeatureAblation,
    GuidedBackprop,
    GuidedGradCam,
    InputXGradient,
    IntegratedGradients,
    LayerActivation,
    LayerConductance,
    LayerGradCam,
    LayerIntegratedGradients,
    NeuronGradient,
    NoiseTunnel,
    Occlusion,
    Saliency,
    visualization,
)
from captum.metrics import infidelity, sensitivity_max
from torch import Tensor, nn

from captum_intramodal import MSEA, LowPass, MultiScaleExplanationAggregation, Resize
from captum_intramodal.errors import InvalidInputError, InvalidOptionError


class ConvNet(nn.Module):
    """A net for images of any size, with an optional second input."""

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
    nearest = MSEA(InputXGradient(net), scales=(0.5,), pyramid=Resize("nearest"))
    small = F.interpolate(image, size=(4, 4), mode="nearest-exact")
    mass = InputXGradient(net).attribute(small.clone(), target=0).sum()
    assert torch.allclose(nearest.attribute(image, target=0).sum(), mass, atol=1e-6)
    saliency = MSEA(Saliency(net), scales=(0.5,), pyramid=Resize("nearest")).attribute(image, target=0)
    assert torch.allclose(saliency.mean(), Saliency(net).attribute(small, target=0).mean(), atol=1e-7)


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
    # Without scale 1.0 the result still has the dimensions of the input.
    assert both.attribute(image, target=1).ndim == 4
    stacked = MSEA(Saliency(net), scales=(1.0, 0.5, 2.0), weights=(0, 1, 1), aggregation=aggregation)
    expected = torch.stack(maps).amax(0) if aggregation == "max" else (maps[0] * maps[1]).sqrt()
    positive = torch.stack([Saliency(net).attribute(image, target=1), *maps]).gt(0).all(0)
    actual = stacked.attribute(image, target=1)
    assert torch.allclose(actual[positive], expected[positive], atol=1e-6)


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
        ({"scales": (1.0, 1.0)}, "distinct"),
        ({"scales": (1.0, 2.0), "weights": (1.0,)}, "1 weights for 2 scales"),
        ({"scales": (1.0,), "weights": (0.0,)}, "not all zero"),
        ({"aggregation": "median"}, "aggregation"),
    ],
)
def test_options_out_of_range_are_refused(net: ConvNet, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidOptionError, match=message):
        MSEA(Saliency(net), **options)


def test_misuse_is_refused(net: ConvNet, image: Tensor) -> None:
    with pytest.raises(TypeError, match="Captum Attribution"):
        MSEA(net)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="such as Resize"):
        MSEA(Saliency(torch.nn.Identity()), pyramid="resize")  # type: ignore[arg-type]
    with pytest.raises(InvalidOptionError, match="completeness"):
        MSEA(IntegratedGradients(net)).attribute(image, target=1, return_convergence_delta=True)
    with pytest.raises(ValueError, match="spatial"):
        MSEA(Saliency(nn.Linear(4, 2))).attribute(torch.rand(2, 4), target=0)
    with pytest.raises(NotImplementedError):
        MSEA(Saliency(net)).attribute_future()


def test_results_that_are_not_tensors_are_refused(net: ConvNet, image: Tensor) -> None:
    class Named(Saliency):
        def attribute(self, *args: Any, **kwargs: Any) -> Any:
            return super().attribute(*args, **kwargs), "a name"

    with pytest.raises(InvalidInputError, match=r"Named returned \['Tensor', 'str'\]"):
        MSEA(Named(net)).attribute(image, target=1)


# ------------------------------------------------------------------------------------------------ Captum's contract


def by_hand(method: Any, image: Tensor, scale: float = 0.5, **kwargs: Any) -> Tensor:
    """Aggregate a gradient-like method over two scales without MSEA."""
    mode = {3: "linear", 4: "bilinear", 5: "trilinear"}[image.ndim]
    sides = [round(side * scale) for side in image.shape[2:]]
    small = F.interpolate(image, size=sides, mode=mode, antialias=image.ndim == 4)
    at_small = method.attribute(small.detach(), **kwargs).detach()
    back = F.interpolate(at_small, size=image.shape[2:], mode=mode)
    return (back + method.attribute(image.clone(), **kwargs).detach()) / 2


@pytest.mark.parametrize("n", [1, 2, 3])
def test_inputs_of_one_to_three_spatial_dimensions(n: int) -> None:
    conv, pool = ((nn.Conv1d, nn.Conv2d, nn.Conv3d), (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d))
    net = nn.Sequential(conv[n - 1](3, 4, 3, padding=1), nn.ReLU(), pool[n - 1](1), nn.Flatten())
    volume = torch.rand(2, 3, *(8, 6, 10)[:n])
    actual = MSEA(Saliency(net), scales=(0.5, 1.0)).attribute(volume, target=1)
    assert torch.allclose(actual, by_hand(Saliency(net), volume, target=1), atol=1e-7)


@pytest.mark.parametrize("target", [1, torch.tensor(1), torch.tensor([1, 0]), [1, 0]], ids=str)
def test_every_form_of_target(net: ConvNet, image: Tensor, target: Any) -> None:
    actual = MSEA(Saliency(net), scales=(0.5, 1.0)).attribute(image, target=target)
    assert torch.allclose(actual, by_hand(Saliency(net), image, target=target), atol=1e-7)


@pytest.mark.parametrize("target", [(1, 2), [(1, 2), (0, 3)]], ids=str)
def test_targets_of_several_dimensions(net: ConvNet, image: Tensor, target: Any) -> None:
    inner = Saliency(lambda x: torch.stack([net(x), net(x * x)], 1))
    actual = MSEA(inner, scales=(0.5, 1.0)).attribute(image, target=target)
    assert torch.allclose(actual, by_hand(inner, image, target=target), atol=1e-7)


def test_each_example_is_attributed_on_its_own(net: ConvNet, image: Tensor) -> None:
    msea = MSEA(IntegratedGradients(net), scales=(0.5, 1.0))
    together = msea.attribute(image, target=1, n_steps=3)
    alone = [msea.attribute(row[None], target=1, n_steps=3) for row in image]
    assert torch.allclose(together, torch.cat(alone), atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_inner_dtype_is_kept(net: ConvNet, image: Tensor, dtype: torch.dtype) -> None:
    expected = MSEA(Saliency(net), scales=(0.5, 1.0)).attribute(image, target=1)
    actual = MSEA(Saliency(net.to(dtype)), scales=(0.5, 1.0)).attribute(image.to(dtype), target=1)
    assert actual.dtype == dtype
    assert torch.allclose(actual.float(), expected, atol=1e-6 if dtype == torch.float64 else 2e-3)
    if dtype == torch.float64:
        exact = by_hand(Saliency(net), image.double(), target=1)
        assert torch.allclose(actual, exact, rtol=0, atol=1e-15)


def test_channels_last_in_contiguous_out(net: ConvNet, image: Tensor) -> None:
    last = image.contiguous(memory_format=torch.channels_last)
    for aggregation in ("mean", "max"):
        msea = MSEA(Saliency(net), scales=(0.5, 1.0), aggregation=aggregation)  # type: ignore[arg-type]
        actual = msea.attribute(last, target=1)
        assert actual.is_contiguous() and torch.allclose(actual, msea.attribute(image, target=1), atol=1e-7)


def test_without_scale_one_the_result_still_has_the_size_of_the_input(net: ConvNet, image: Tensor) -> None:
    small = F.interpolate(image, size=(8, 6), mode="bilinear", antialias=True)
    expected = F.interpolate(Saliency(net).attribute(small, target=1), size=(16, 12), mode="bilinear")
    actual = MSEA(Saliency(net), scales=(0.5,)).attribute(image, target=1)
    assert torch.allclose(actual, expected, atol=1e-7)


def test_lists_and_nested_results_keep_their_form(image: Tensor) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 3, stride=2), nn.AdaptiveAvgPool2d(1))
    layers = [net[0], net[2]]
    result = MSEA(LayerActivation(net, layers), scales=(0.5, 1.0), preserve_sum=False).attribute(image)
    alone = [MSEA(LayerActivation(net, layer), scales=(0.5, 1.0), preserve_sum=False) for layer in layers]
    assert isinstance(result, list)
    assert all(torch.equal(a, m.attribute(image)) for a, m in zip(result, alone, strict=True))


def test_layers_without_spatial_dimensions_are_aggregated_as_they_are(net: ConvNet, image: Tensor) -> None:
    small = F.interpolate(image, size=(8, 6), mode="bilinear", antialias=True)
    expected = (net(small) + net(image)) / 2
    actual = MSEA(LayerActivation(net, net.head), scales=(0.5, 1.0)).attribute(image)
    assert torch.allclose(actual, expected, atol=1e-6)
    tokens = nn.Sequential(nn.Flatten(1), nn.AdaptiveAvgPool1d(4))
    with pytest.raises(InvalidInputError, match="differs in more than spatial"):
        MSEA(LayerActivation(tokens, tokens[0]), scales=(0.5, 1.0)).attribute(image)


FAILURES = [RuntimeError, KeyboardInterrupt]
STATEFUL: list[tuple[Any, dict[str, Any]]] = [
    (lambda net: Saliency(net), {}),
    (lambda net: IntegratedGradients(net), {"n_steps": 2}),
    (lambda net: DeepLift(net), {}),
    (lambda net: GuidedBackprop(net), {}),
    (lambda net: LRP(net), {}),
    (lambda net: LayerGradCam(net, net.conv), {}),
    (lambda net: LayerIntegratedGradients(net, net.conv), {"n_steps": 2}),
    (lambda net: LayerConductance(net, net.conv), {"n_steps": 2}),
    (lambda net: NeuronGradient(net, net.conv), {"neuron_selector": (0, 1, 1)}),
    (lambda net: GuidedGradCam(net, net.conv), {}),
    (lambda net: NoiseTunnel(Saliency(net)), {"stdevs": 0.0, "nt_samples": 2}),
]


class Fails(nn.Module):
    """A net of layers that LRP has rules for, which may fail at the end of its forward pass."""

    def __init__(self, failure: Any) -> None:
        super().__init__()
        self.conv, self.relu, self.pool = nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
        self.failure = failure

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.conv(x))).flatten(1)
        if self.failure is not None:
            raise self.failure("stop")
        return x


def count_hooks(net: nn.Module) -> list[int]:
    return [
        len(hooks)
        for m in net.modules()
        for hooks in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks)
    ]


@pytest.mark.parametrize("failure", [None, *FAILURES])
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize(("make", "kwargs"), STATEFUL, ids=lambda v: v.__code__.co_names[0] if callable(v) else "")
def test_hooks_modes_and_gradients_are_restored(
    make: Any, kwargs: dict[str, Any], requires_grad: bool, failure: Any
) -> None:
    net = Fails(failure).train()
    net.relu.eval()
    image = torch.rand(2, 3, 8, 8, requires_grad=requires_grad)
    image.grad = torch.full_like(image, 7.0)
    if "neuron_selector" not in kwargs:
        kwargs = {**kwargs, "target": 1}
    for scales in ((1.0,), (0.5, 1.0, 1.5)):
        before = (count_hooks(net), [m.training for m in net.modules()])
        msea = MSEA(make(net), scales=scales)
        if failure is None:
            msea.attribute(image, **kwargs)
        else:
            with pytest.raises(failure, match="stop"):
                msea.attribute(image, **kwargs)
        assert (count_hooks(net), [m.training for m in net.modules()]) == before
        assert image.requires_grad == requires_grad and bool((image.grad == 7).all())
        assert all(p.requires_grad and p.grad is None for p in net.parameters())


# ---------------------------------------------------------------------------------------------------- Captum's tools


def test_noise_tunnel_without_noise_changes_nothing(net: ConvNet, image: Tensor) -> None:
    expected = by_hand(Saliency(net), image, target=1)
    quiet: dict[str, Any] = {"target": 1, "nt_samples": 3, "stdevs": 0.0}
    outside = NoiseTunnel(MSEA(Saliency(net), scales=(0.5, 1.0))).attribute(image, **quiet)
    inside = MSEA(NoiseTunnel(Saliency(net)), scales=(0.5, 1.0)).attribute(image, **quiet)
    assert torch.allclose(outside, expected, atol=1e-6) and torch.allclose(inside, expected, atol=1e-6)


def test_msea_in_msea_multiplies_scales(image: Tensor) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    nested = MSEA(MSEA(Saliency(net), scales=(0.5,)), scales=(0.5, 1.0)).attribute(image, target=1)
    quarter = MSEA(Saliency(net), scales=(0.5,)).attribute(
        F.interpolate(image, size=(8, 6), mode="bilinear", antialias=True), target=1
    )
    half = MSEA(Saliency(net), scales=(0.5,)).attribute(image, target=1)
    assert torch.allclose(nested, (F.interpolate(quarter, size=(16, 12), mode="bilinear") + half) / 2, atol=1e-7)


def test_infidelity_of_a_linear_model_is_zero() -> None:
    linear = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 2)).double()
    image = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    # LowPass leaves scales of 1 and above unchanged, so the attribution is exact; below 1 it is not.
    exact = MSEA(InputXGradient(linear), scales=(1.0, 2.0), pyramid=LowPass())
    lossy = MSEA(InputXGradient(linear), scales=(0.25, 1.0), pyramid=LowPass())

    def perturb(inputs: Tensor, baselines: Any = None) -> tuple[Tensor, Tensor]:
        kept = (torch.rand_like(inputs) > 0.3).to(inputs)
        return 1 - kept, inputs * kept

    def infidelity_of(msea: MSEA) -> Tensor:
        torch.manual_seed(0)
        attributions = msea.attribute(image, target=1)
        return infidelity(linear, perturb, image, attributions, target=1, n_perturb_samples=20)

    assert infidelity_of(exact).max() < 1e-20 < 1e-8 < infidelity_of(lossy).min()


def test_sensitivity_is_the_largest_relative_change(net: ConvNet, image: Tensor) -> None:
    msea = MSEA(Saliency(net), scales=(0.5, 1.0))
    noise = torch.linspace(-0.2, 0.2, image[0].numel()).reshape(image.shape[1:])
    actual = sensitivity_max(msea.attribute, image, lambda x: (x + noise,), n_perturb_samples=1, target=1)
    before, after = (msea.attribute(x, target=1).flatten(1) for x in (image, image + noise))
    assert torch.allclose(actual, (after - before).norm(dim=1) / before.norm(dim=1), atol=1e-6)


def test_visualize_image_attr_shows_it(net: ConvNet, image: Tensor) -> None:
    heat = MSEA(Saliency(net), scales=(0.5, 1.0)).attribute(image, target=1)[0].permute(1, 2, 0)
    figure, axes = visualization.visualize_image_attr(heat.numpy(), sign="positive", use_pyplot=False)
    drawn = axes.images[-1].get_array()
    summed = heat.sum(2)
    top = summed.flatten().sort().values
    scale = top[(top.cumsum(0) >= top.sum() * 0.98).nonzero()[0, 0]]  # Captum clips 2 % as outliers.
    assert np.allclose(drawn, (summed / scale).clamp(0, 1), atol=1e-5) and figure is not None
