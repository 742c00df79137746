"""Images resized and processed again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from captum.attr import (
    FeatureAblation,
    InputXGradient,
    LayerActivation,
    NoiseTunnel,
    Occlusion,
    Saliency,
)
from PIL import Image
from torch import Tensor, nn

from captum_intramodal import MSEA, Reprocess
from captum_intramodal.errors import InvalidInputError, InvalidOptionError
from captum_intramodal.geometry.pixel_probe import measure_pixels
from tests.testing.tiny import tiny


def smooth_image(width: int = 240, height: int = 168) -> Image.Image:
    rng = np.random.default_rng(3)
    coarse = Image.fromarray(rng.integers(30, 226, (4, 5), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC).convert("RGB")


@pytest.mark.parametrize("model_type", ["llava", "idefics3", "qwen2_vl"])
def test_attributions_return_to_their_place_in_the_original_tensor(model_type: str) -> None:
    processor = tiny(model_type)[1].image_processor
    image = smooth_image()

    def prepare(images: list[Image.Image]) -> Mapping[str, Any]:
        return processor(images=images, return_tensors="pt", do_normalize=False)

    # In a model that sums its inputs, the attribution of an element is its value, so attributions are an image.
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
    depends = measure_pixels(prepare, [image.size])["pixel_values"].gain.reshape(pixels.shape) != 0
    assert (actual[0] - pixels)[depends].abs().mean() < 0.02 < pixels[depends].std() / 5
    assert (actual[0][~depends] == 0).all()
    msea.preserve_sum = True
    assert torch.allclose(msea.attribute(pixels[None]).sum(), small[small > 0].sum(), rtol=0.03)


def test_inputs_grids_and_tokens_follow_the_scale_in_qwen2_vl() -> None:
    model, processor = tiny("qwen2_vl")
    image = smooth_image(168, 112)
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "describe the picture"}]}],
        add_generation_prompt=True,
        tokenize=False,
    )

    def prepare(images: list[Image.Image]) -> Mapping[str, Any]:
        return processor(images=images, text=[text], return_tensors="pt", return_mm_token_type_ids=True)

    lengths: list[tuple[int, ...]] = []

    def forward(pixels: Tensor, ids: Tensor, grids: Tensor, types: Tensor) -> Tensor:
        lengths.append((pixels.shape[1], ids.shape[1]))
        each = [
            model(pixel_values=p, input_ids=i[None], image_grid_thw=g[None], mm_token_type_ids=t[None]).logits[:, -1]
            for p, i, g, t in zip(pixels, ids, grids, types, strict=True)
        ]
        return torch.cat(each)

    names = ("input_ids", "image_grid_thw", "mm_token_type_ids")
    inputs = prepare([image])
    pyramid = Reprocess(prepare, [image], forward_args=names)
    arguments: dict[str, Any] = {"target": 9, "additional_forward_args": tuple(inputs[name] for name in names)}
    saliency = MSEA(NoiseTunnel(Saliency(forward)), scales=(1.0, 0.5, 1.5), pyramid=pyramid)
    actual = saliency.attribute(inputs["pixel_values"][None], stdevs=0.0, nt_samples=2, **arguments)
    assert actual.shape == (1, *inputs["pixel_values"].shape)
    assert actual.isfinite().all() and (actual > 0).float().mean() > 0.9
    counts = {count for count, _ in lengths}
    assert counts == {8 * 12, 4 * 6, 12 * 18}
    assert len({length - count // 4 for count, length in lengths}) == 1  # a token is four patches
    # Segments and baselines are given in the frame of the image.
    left = (torch.arange(168) < 84).long().expand(112, 168)
    ablation = MSEA(FeatureAblation(forward), scales=(1.0, 0.5), pyramid=pyramid)
    black = Image.new("RGB", (8, 8))
    halves = ablation.attribute(inputs["pixel_values"][None], feature_mask=left, baselines=black, **arguments)[0]
    mask = measure_pixels(prepare, [image.size])["pixel_values"].feature_mask([left])
    assert all(halves[mask == side].std() < 0.3 * halves.std() for side in (0, 1))


def test_misuse_is_refused() -> None:
    processor = tiny("llava")[1].image_processor
    image = smooth_image()

    def prepare(images: list[Image.Image]) -> Mapping[str, Any]:
        return processor(images=images, return_tensors="pt")

    pixels = prepare([image])["pixel_values"]
    pyramid = Reprocess(prepare, [image])

    def net(x: Tensor) -> Tensor:
        return x.flatten(1).sum(1)

    msea = MSEA(InputXGradient(net), scales=(1.0, 0.5), pyramid=pyramid)
    with pytest.raises(InvalidInputError, match="belongs inside MSEA"):
        NoiseTunnel(msea).attribute(pixels, stdevs=0.5, nt_samples=1)
    with pytest.raises(InvalidInputError, match="a PIL image for each"):
        MSEA(FeatureAblation(net), pyramid=pyramid).attribute(pixels, baselines=torch.zeros_like(pixels))
    with pytest.raises(InvalidInputError, match="segmentation per image"):
        MSEA(FeatureAblation(net), pyramid=pyramid).attribute(pixels, feature_mask=torch.zeros(1, 3, 112, 112).long())
    with pytest.raises(InvalidOptionError, match="Windows cannot slide"):
        MSEA(Occlusion(net), pyramid=pyramid).attribute(pixels, (3, 4, 4))
    with pytest.raises(InvalidInputError, match="1 inputs for the pixel tensors"):
        MSEA(InputXGradient(net), pyramid=Reprocess(prepare, [image], ("a", "b"))).attribute(pixels)
    pool = nn.AdaptiveAvgPool2d(2)
    with pytest.raises(InvalidInputError, match="attributions of the pixel tensors"):
        MSEA(LayerActivation(pool, pool), pyramid=pyramid).attribute(pixels)
    with pytest.raises(TypeError, match="sequences of names"):
        Reprocess(prepare, [image], "pixel_values")
    with pytest.raises(InvalidInputError, match="a PIL image for each of 1"):
        MSEA(FeatureAblation(net), pyramid=pyramid).attribute(pixels, baselines=[image, image])
    absent = Reprocess(lambda images: {**prepare(images), "constant": torch.zeros(1, 2)}, [image], ("constant",))
    with pytest.raises(InvalidOptionError, match="tensors that depend on the images"):
        absent.back((torch.zeros(1, 2),), (torch.zeros(1, 2),), 0.5, False)
