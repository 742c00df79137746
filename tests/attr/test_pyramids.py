from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from captum.attr import (
    Attribution,
    FeatureAblation,
    GradientShap,
    InputXGradient,
    LayerActivation,
    LayerFeatureAblation,
    NeuronGradient,
    NoiseTunnel,
    Occlusion,
    Saliency,
)
from PIL import Image
from torch import Tensor, nn

from captum_intramodal import MSEA, LowPass, Reprocess, Resize
from captum_intramodal.geometry.pixel_probe import measure_pixels
from tests.testing.tiny import tiny

SIZE = (16, 12)
HALF = (8, 6)


def half(value: Tensor) -> Tensor:
    return F.interpolate(value, size=HALF, mode="bilinear", antialias=True)


def at_half(inputs: Any, pyramid: Any = None, **kwargs: Any) -> dict[str, Any]:
    """What the inner method is given at scale 0.5."""
    seen: list[dict[str, Any]] = []

    class Spy(Attribution):
        def attribute(self, inputs: Any, **kwargs: Any) -> Any:  # type: ignore[override]
            seen.append({"inputs": inputs, **kwargs})
            return tuple(map(torch.zeros_like, inputs)) if isinstance(inputs, tuple) else torch.zeros_like(inputs)

    MSEA(Spy(lambda x: x), scales=(1.0, 0.5), pyramid=pyramid).attribute(inputs, **kwargs)
    return seen[1]


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
def test_other_baselines_stay(image: Tensor, value: Any) -> None:
    assert (
        at_half(image, baselines=value)["baselines"] is value or at_half(image, baselines=value)["baselines"] == value
    )


def test_each_input_has_its_own_baseline(image: Tensor) -> None:
    other = torch.rand(2, 4)
    given = (torch.rand(2, 3, *SIZE), torch.rand(2, 4))
    first, second = at_half((image, other), baselines=given)["baselines"]
    assert torch.allclose(first, half(given[0])) and second is given[1]
    assert at_half((image, other), baselines=(0.25, 1))["baselines"] == (0.25, 1)


def test_what_callable_baselines_return_is_resized(image: Tensor) -> None:
    baselines = torch.rand(3, 3, *SIZE)
    assert torch.allclose(at_half(image, baselines=lambda: baselines)["baselines"](), half(baselines))
    followed = at_half(image, baselines=lambda inputs: inputs * 2)["baselines"]
    assert torch.allclose(followed(half(image)), half(image) * 2)
    net = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 3))

    def shap(given: Any) -> Tensor:
        torch.manual_seed(0)
        np.random.seed(0)  # what Captum draws from
        return MSEA(GradientShap(net), scales=(0.5, 1.0)).attribute(image, given, target=0)

    assert torch.equal(shap(lambda: baselines), shap(baselines))


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (1,), ()], ids=str)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_masks_follow_by_nearest_neighbor(image: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
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


def test_forward_args_that_look_like_the_input_follow(image: Tensor) -> None:
    depth, seen, vector = torch.rand(2, 1, *SIZE), torch.rand(2, *SIZE) > 0.5, torch.rand(2, 12)
    given = at_half(image, additional_forward_args=(depth, seen, vector, 7, None))["additional_forward_args"]
    assert torch.allclose(given[0], half(depth))
    assert given[1].dtype == torch.bool and torch.equal(
        given[1], F.interpolate(seen[None].double(), HALF, mode="nearest-exact")[0].bool()
    )
    assert given[2] is vector and given[3:] == (7, None)
    only = at_half(image, Resize(forward_args=(1,)), additional_forward_args=(depth, seen))["additional_forward_args"]
    assert only[0] is depth and only[1].shape == (2, *HALF)
    assert at_half(image, additional_forward_args=depth)["additional_forward_args"][0].shape == (2, 1, *HALF)


class Strided(nn.Module):
    """A layer whose size no factor of the input's gives: (16, 12) -> (5, 4), (8, 6) -> (3, 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 3, stride=3, padding=0)
        self.head = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).relu().mean((2, 3)))


def test_the_neuron_at_the_same_place_is_selected(image: Tensor) -> None:
    net = Strided()
    inner = NeuronGradient(net, net.conv)
    small = inner.attribute(half(image).detach(), (1, 1, 1))  # (4, 3) of (5, 4), in (2, 2)
    expected = F.interpolate(small, size=SIZE, mode="bilinear") * 0.5 + inner.attribute(image.clone(), (1, 4, 3)) * 0.5
    actual = MSEA(inner, scales=(0.5, 1.0)).attribute(image, (1, 4, 3))
    assert net.conv(half(image)).shape[2:] == (2, 2) and net.conv(image).shape[2:] == (5, 4)
    assert torch.allclose(actual, expected, atol=1e-6) and actual.abs().sum() > 0
    whole = MSEA(inner, scales=(0.5, 1.0)).attribute(image, (0, slice(0, 5), slice(1, 3)))
    assert whole.isfinite().all()


def test_masks_and_baselines_of_a_layer_follow_its_measured_size(image: Tensor) -> None:
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


def test_low_pass_goes_down_and_up_again(image: Tensor) -> None:
    baselines, seen = torch.rand(1, 3, *SIZE), torch.rand(2, *SIZE) > 0.5
    given = at_half(
        image, LowPass(), baselines=baselines, feature_mask=seen.long(), strides=3, additional_forward_args=seen
    )
    up = {"size": SIZE, "mode": "bilinear"}
    assert torch.allclose(given["inputs"], F.interpolate(half(image), **up))
    assert torch.allclose(given["baselines"], F.interpolate(half(baselines), **up))
    assert torch.equal(given["feature_mask"], seen.long()) and given["strides"] == 3
    assert given["additional_forward_args"][0] is seen
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 12, 2))  # takes one size only
    inner = InputXGradient(net)
    actual = MSEA(inner, scales=(0.5, 1.0, 2.0), pyramid=LowPass()).attribute(image, target=1)
    weight = net[1].weight[1].reshape(1, 3, *SIZE).detach()
    assert torch.allclose(actual, (given["inputs"] + 2 * image) / 3 * weight, atol=1e-6)


def test_a_pyramid_of_ones_own(image: Tensor) -> None:
    class Brightness:
        """Not a size at all: the scale is a factor of the brightness, undone on the way back."""

        def down(
            self, inputs: tuple[Tensor, ...], kwargs: Mapping[str, Any], scale: float
        ) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
            return tuple(t * scale for t in inputs), dict(kwargs)

        def back(
            self, attributions: tuple[Tensor, ...], like: tuple[Tensor, ...], scale: float, preserve_sum: bool
        ) -> tuple[Tensor, ...]:
            return tuple(a / scale for a in attributions)

    inner = InputXGradient(lambda x: x.square().flatten(1).sum(1))
    actual = MSEA(inner, scales=(1.0, 2.0), pyramid=Brightness()).attribute(image)
    assert torch.allclose(actual, 2 * image**2 * (1 + 2) / 2)


# ------------------------------------------------------------------------------------------- through the processor


def smooth_image(width: int = 240, height: int = 168) -> Image.Image:
    rng = np.random.default_rng(3)
    coarse = Image.fromarray(rng.integers(30, 226, (4, 5), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC).convert("RGB")


@pytest.mark.parametrize("model_type", ["llava", "idefics3", "qwen2_vl"])
def test_attributions_come_back_to_their_place_in_the_original_tensor(model_type: str) -> None:
    processor = tiny(model_type)[1].image_processor
    image = smooth_image()

    def prepare(images: list[Image.Image]) -> Mapping[str, Any]:
        return processor(images=images, return_tensors="pt", do_normalize=False)

    # Where a model adds its inputs up, each element's attribution is its own value: an image that can be compared.
    msea = MSEA(
        InputXGradient(lambda x: x.flatten(1).sum(1)),
        scales=(1.0, 0.6),
        weights=(0, 1),
        pyramid=Reprocess(prepare, [image]),
        preserve_sum=False,
    )
    pixels = prepare([image])["pixel_values"]
    small = prepare([image.resize((144, 101), Image.Resampling.BICUBIC)])["pixel_values"]
    actual = msea.attribute(pixels[None])
    assert actual.shape == (1, *pixels.shape)
    shown = measure_pixels(prepare, [image.size])["pixel_values"].gain.reshape(pixels.shape) != 0
    assert (actual[0] - pixels)[shown].abs().mean() < 0.02 < pixels[shown].std() / 5
    assert (actual[0][~shown] == 0).all()
    msea.preserve_sum = True
    assert torch.allclose(msea.attribute(pixels[None]).sum(), small[small > 0].sum(), rtol=0.03)


def test_inputs_grids_and_tokens_go_through_the_processor_of_a_real_model() -> None:
    model, processor = tiny("qwen2_vl")
    image = smooth_image(168, 112)
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "describe the picture"}]}],
        add_generation_prompt=True,
        tokenize=False,
    )

    def prepare(images: list[Image.Image]) -> Mapping[str, Any]:
        return processor(images=images, text=[text], return_tensors="pt", return_mm_token_type_ids=True)

    seen: list[tuple[int, ...]] = []

    def forward(pixels: Tensor, ids: Tensor, grids: Tensor, types: Tensor) -> Tensor:
        seen.append((pixels.shape[1], ids.shape[1]))
        each = [
            model(pixel_values=p, input_ids=i[None], image_grid_thw=g[None], mm_token_type_ids=t[None]).logits[:, -1]
            for p, i, g, t in zip(pixels, ids, grids, types, strict=True)
        ]
        return torch.cat(each)

    names = ("input_ids", "image_grid_thw", "mm_token_type_ids")
    inputs = prepare([image])
    pyramid = Reprocess(prepare, [image], forward_args=names)
    given: dict[str, Any] = {"target": 9, "additional_forward_args": tuple(inputs[name] for name in names)}
    saliency = MSEA(NoiseTunnel(Saliency(forward)), scales=(1.0, 0.5, 1.5), pyramid=pyramid)
    actual = saliency.attribute(inputs["pixel_values"][None], stdevs=0.0, nt_samples=2, **given)
    assert actual.shape == (1, *inputs["pixel_values"].shape)
    assert actual.isfinite().all() and (actual > 0).float().mean() > 0.9
    counts = {count for count, _ in seen}
    assert counts == {8 * 12, 4 * 6, 12 * 18}
    assert len({length - count // 4 for count, length in seen}) == 1  # four patches are a token
    # Segments and baselines in the frame of the image.
    left = (torch.arange(168) < 84).long().expand(112, 168)
    ablation = MSEA(FeatureAblation(forward), scales=(1.0, 0.5), pyramid=pyramid)
    black = Image.new("RGB", (8, 8))
    halves = ablation.attribute(inputs["pixel_values"][None], feature_mask=left, baselines=black, **given)[0]
    mask = measure_pixels(prepare, [image.size])["pixel_values"].feature_mask([left])
    assert all(halves[mask == side].std() < 0.3 * halves.std() for side in (0, 1))


def test_misuse_of_reprocessing_says_what_to_do() -> None:
    processor = tiny("llava")[1].image_processor
    image = smooth_image()

    def prepare(images: list[Image.Image]) -> Mapping[str, Any]:
        return processor(images=images, return_tensors="pt")

    pixels = prepare([image])["pixel_values"]
    pyramid = Reprocess(prepare, [image])

    def net(x: Tensor) -> Tensor:
        return x.flatten(1).sum(1)

    msea = MSEA(InputXGradient(net), scales=(1.0, 0.5), pyramid=pyramid)
    with pytest.raises(ValueError, match="belongs inside MSEA"):
        NoiseTunnel(msea).attribute(pixels, stdevs=0.5, nt_samples=1)
    with pytest.raises(ValueError, match="PIL image"):
        MSEA(FeatureAblation(net), pyramid=pyramid).attribute(pixels, baselines=torch.zeros_like(pixels))
    with pytest.raises(ValueError, match="segmentation per image"):
        MSEA(FeatureAblation(net), pyramid=pyramid).attribute(pixels, feature_mask=torch.zeros(1, 3, 112, 112).long())
    with pytest.raises(ValueError, match="no window"):
        MSEA(Occlusion(net), pyramid=pyramid).attribute(pixels, (3, 4, 4))
    with pytest.raises(ValueError, match="1 inputs for the pixel tensors"):
        MSEA(InputXGradient(net), pyramid=Reprocess(prepare, [image], ("a", "b"))).attribute(pixels)
    pool = nn.AdaptiveAvgPool2d(2)
    with pytest.raises(ValueError, match="brings back attributions of pixel tensors"):
        MSEA(LayerActivation(pool, pool), pyramid=pyramid).attribute(pixels)
    with pytest.raises(TypeError, match="sequences of names"):
        Reprocess(prepare, [image], "pixel_values")
    with pytest.raises(ValueError, match="interpolate_mode"):
        Resize("cubic")  # type: ignore[arg-type]
