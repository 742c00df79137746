"""Maps over the image from layer methods, alone and inside MSEA, ARC and NoiseTunnel."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from captum.attr import (
    LayerGradCam,
    LayerGradientXActivation,
    LayerIntegratedGradients,
    NoiseTunnel,
    Saliency,
)
from PIL import Image
from torch import Tensor, nn

from captum_intramodal import (
    ARC,
    MSEA,
    LayerLogitLens,
    ModelAdapter,
    PixelForward,
    VisualTokenAttribution,
    draw_positions,
    explain,
)
from captum_intramodal.attr.hidden_states import attribute_positions
from captum_intramodal.errors import InvalidInputError
from tests.testing.tiny import tiny


@cache
def pixel_forward(model_type: str) -> PixelForward:
    return PixelForward(ModelAdapter(*tiny(model_type)), "describe the picture", "a red dog")


def targets_of(forward: PixelForward) -> list[tuple[int, int]]:
    return list(enumerate(forward.answer_ids))


def sequence_ids(forward: PixelForward, image: Tensor) -> Tensor:
    ids: Tensor = forward.inputs(image[0])["input_ids"][0]
    return ids


def test_a_raster_is_interpolated_between_its_centers() -> None:
    forward, image = pixel_forward("llava"), torch.rand(1, 3, 112, 112)
    ids = sequence_ids(forward, image)
    visual = forward.adapter.visual_positions(ids)
    grid, values = torch.rand(2, 8, 8), torch.full((2, len(ids)), 9.0)
    values[:, visual] = grid.flatten(1)
    (maps,) = draw_positions(values, forward.adapter, ids, [(112, 112)])
    halves = F.interpolate(grid[None], size=(16, 16), mode="bilinear")
    assert torch.allclose(maps, F.interpolate(halves, size=(112, 112), mode="bilinear")[0], atol=0.02)


@pytest.mark.parametrize("model_type", ["qwen2_vl", "llava", "smolvlm"])
def test_a_token_is_drawn_over_the_region_it_covers(model_type: str) -> None:
    forward, image = pixel_forward(model_type), torch.rand(1, 3, 120, 160)
    ids = sequence_ids(forward, image)
    visual, geometry = forward.adapter.visual_positions(ids), forward.adapter.geometry([(160, 120)])
    local = geometry.is_local.nonzero()[::5, 0]
    values = torch.zeros(len(local), len(ids))
    values[range(len(local)), visual[local]] = 1
    (maps,) = draw_positions(values, forward.adapter, ids, [(160, 120)])
    assert maps.shape == (len(local), 120, 160)
    for one, (x0, y0, x1, y1) in zip(maps, geometry.boxes[local].tolist(), strict=True):
        y, x = divmod(int(one.argmax()), 160)
        assert x0 - 3 <= x <= x1 + 3 and y0 - 3 <= y <= y1 + 3


def test_several_images() -> None:
    adapter = pixel_forward("qwen2_vl").adapter
    sizes = [(112, 56), (56, 84)]
    inputs = adapter.prepare([Image.new("RGB", size, "gray") for size in sizes], "describe")
    ids = inputs["input_ids"]
    values = torch.zeros(3, 2, ids.shape[1])
    values[..., adapter.visual_positions(ids[0])[-1]] = 1
    first, second = draw_positions(values, adapter, ids, sizes)
    assert first.shape == (3, 2, 56, 112) and second.shape == (3, 2, 84, 56)
    assert first.max() == 0 and second[2, 1].argmax() > 40 * 56


@pytest.mark.parametrize("size", [(112, 112), (64, 96)])
@pytest.mark.parametrize("model_type", ["qwen2_vl", "llava"])
def test_pixels_of_integral_methods_sum_to_visual_tokens(model_type: str, size: tuple[int, int]) -> None:
    forward, image = pixel_forward(model_type), torch.rand(1, 3, *size)
    method = LayerIntegratedGradients(forward, forward.adapter.lens.layers[0])
    options: dict[str, Any] = {"target": targets_of(forward)[1], "n_steps": 2}
    values = attribute_positions(method, image, "sum", **options)
    visual = forward.adapter.visual_positions(sequence_ids(forward, image))
    total = VisualTokenAttribution(method).attribute(image, **options).sum()
    assert abs(total - values[0, visual].sum()) < 0.03 * values[0, visual].abs().sum()


def test_methods_that_do_not_multiply_keep_their_values() -> None:
    forward, image = pixel_forward("llava"), torch.rand(2, 3, 112, 112)
    method = LayerGradCam(forward, forward.adapter.lens.layers[1])
    maps = VisualTokenAttribution(method).attribute(image, target=targets_of(forward)[1])
    assert maps.shape == (2, 1, 112, 112) and not maps.requires_grad
    for one, single in zip(maps, image.split(1), strict=True):
        values = attribute_positions(method, single, "sum", target=targets_of(forward)[1])
        (drawn,) = draw_positions(values, forward.adapter, sequence_ids(forward, image), [(112, 112)])
        assert torch.allclose(one, drawn, atol=1e-6)


def test_the_logit_lens_over_the_image_matches_explain() -> None:
    forward = pixel_forward("qwen2_vl")
    image = Image.effect_mandelbrot((140, 112), (-2, -1.5, 1, 1.5), 40).convert("RGB")
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
    adapter = forward.adapter
    method = VisualTokenAttribution(LayerLogitLens(forward, adapter.lens.layers[-1]))
    options: dict[str, Any] = {"answer": forward.answer_ids, "scales": (1.0,)}
    plain = explain(adapter.model, adapter.processor, image, "describe the picture", arc=None, **options)
    for (index, token), heat in zip(targets_of(forward), map(plain.heatmap, range(3)), strict=True):
        ours = method.attribute(pixels, target=(index, token))[0, 0].numpy()
        assert np.corrcoef(ours.ravel(), np.asarray(heat).ravel())[0, 1] > 0.99


@pytest.mark.parametrize("inner", ["logit_lens", "grad_cam"])
def test_arc_around_msea_around_a_layer(inner: str) -> None:
    forward, image = pixel_forward("qwen2_vl"), torch.rand(1, 3, 84, 112)
    layer, targets = forward.adapter.lens.layers[-1], targets_of(forward)
    method = VisualTokenAttribution((LayerLogitLens if inner == "logit_lens" else LayerGradCam)(forward, layer))
    arc = ARC(MSEA(method, scales=(1.0, 1.5)))
    actual = arc.attribute_all(image)
    larger = F.interpolate(image, size=(126, 168), mode="bilinear")
    maps = []
    for target in targets:
        above = F.interpolate(method.attribute(larger, target=target), size=(84, 112), mode="bilinear", antialias=True)
        maps.append((method.attribute(image, target=target) + above) / 2)
    assert actual.shape == (3, 1, 84, 112)
    assert torch.allclose(actual, arc.suppress(torch.cat(maps), arc.forward_context(image)), atol=1e-5)


def test_msea_around_arc_around_a_layer() -> None:
    forward, image = pixel_forward("qwen2_vl"), torch.rand(1, 3, 84, 112)
    arc = ARC(VisualTokenAttribution(LayerGradientXActivation(forward, forward.adapter.lens.layers[1])))
    actual = MSEA(arc, scales=(1.0, 1.5)).attribute(image, target=targets_of(forward)[2])
    at_one = arc.attribute_all(image)[2:]
    above = arc.attribute_all(F.interpolate(image, size=(126, 168), mode="bilinear"))[2:]
    # The method multiplies by inputs, so the way back preserves the sum.
    back = 1.5**2 * F.interpolate(above, size=(84, 112), mode="bilinear", antialias=True)
    assert torch.allclose(actual, (at_one + back) / 2, atol=1e-6)


def test_msea_around_positions_is_refused() -> None:
    forward, image = pixel_forward("qwen2_vl"), torch.rand(1, 3, 84, 112)
    arc = ARC(LayerGradientXActivation(forward, forward.adapter.lens.layers[1]))
    with pytest.raises(InvalidInputError, match="differs in more than spatial"):
        MSEA(arc, scales=(1.0, 1.5)).attribute(image, target=targets_of(forward)[1])


def test_noise_tunnel_outside_and_inside() -> None:
    forward, image = pixel_forward("llava"), torch.rand(1, 3, 64, 96)
    layer = LayerGradientXActivation(forward, forward.adapter.lens.layers[1])
    quiet: dict[str, Any] = {"nt_samples": 2, "stdevs": 0.0, "target": targets_of(forward)[1]}
    outside = NoiseTunnel(VisualTokenAttribution(layer)).attribute(image, **quiet)
    inside = VisualTokenAttribution(NoiseTunnel(layer)).attribute(image, **quiet)
    expected = VisualTokenAttribution(layer).attribute(image, target=targets_of(forward)[1])
    assert torch.allclose(outside, expected, atol=1e-6) and torch.allclose(inside, expected, atol=1e-6)


def test_tuple_in_tuple_out() -> None:
    forward, image = pixel_forward("llava"), torch.rand(1, 3, 64, 96)
    method = VisualTokenAttribution(LayerGradCam(forward, forward.adapter.lens.layers[1]))
    assert isinstance(method.attribute((image,), target=targets_of(forward)[0]), tuple)


def test_misuse_is_refused() -> None:
    forward, image = pixel_forward("llava"), torch.rand(1, 3, 64, 96)
    adapter, ids = forward.adapter, sequence_ids(forward, image)
    with pytest.raises(TypeError, match="LayerAttribution"):
        VisualTokenAttribution(Saliency(forward))
    with pytest.raises(TypeError, match="PixelForward"):
        VisualTokenAttribution(LayerGradCam(net := nn.Linear(2, 2), net))
    projector = adapter.model.get_submodule("model.multi_modal_projector")
    with pytest.raises(InvalidInputError, match="module of the decoder"):
        VisualTokenAttribution(LayerGradientXActivation(forward, projector)).attribute(image, target=(0, 5))
    with pytest.raises(InvalidInputError, match="a tuple of 2 tensors"):
        VisualTokenAttribution(LayerGradCam(forward, adapter.lens.layers[1])).attribute((image, image))
    with pytest.raises(InvalidInputError, match="3 values for a sequence"):
        draw_positions(torch.rand(1, 3), adapter, ids, [(96, 64)])
    with pytest.raises(InvalidInputError, match="visual tokens, but images"):
        draw_positions(torch.rand(1, len(ids)), adapter, ids, [(96, 64), (96, 64)])
    with pytest.raises(NotImplementedError):
        VisualTokenAttribution(LayerGradCam(forward, adapter.lens.layers[1])).attribute_future()
