"""Activation x gradient at the visual tokens, in the decoder's sequence or in its cross-attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from captum.attr import LayerGradientXActivation
from PIL import Image
from torch import Tensor, nn

from captum_intramodal import ModelAdapter, check, explain
from captum_intramodal.adapter.gradients import layer_gradient_x_activation
from captum_intramodal.explanation.activations import collect_answer_activations
from captum_intramodal.functional.rasterize import rasterize
from captum_intramodal.geometry.oracle import geometry_oracle
from tests.testing.families import build
from tests.testing.tiny import tiny

PROMPT, ANSWER = "describe the picture", "a red dog"


def random_image(width: int = 160, height: int = 120) -> Image.Image:
    coarse = np.random.default_rng(3).integers(0, 256, (5, 7, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize(
    ("model_type", "key", "layer_of", "at_input", "argument", "layer"),
    [
        ("llava", "pixel_values", lambda m: m.get_decoder().layers[0], True, None, None),
        ("llava", "pixel_values", lambda m: m.get_decoder().layers[2], True, None, 2),
        ("mllama", "pixel_values", lambda m: m.model.multi_modal_projector, False, "cross_attention_states", None),
        ("pix2struct", "flattened_patches", lambda m: m.encoder.layernorm, False, "encoder_hidden_states", None),
    ],
)
def test_attributions_are_captums(
    model_type: str,
    key: str,
    layer_of: Callable[[Any], nn.Module],
    at_input: bool,
    argument: str | None,
    layer: int | None,
) -> None:
    model, processor = build(model_type)
    adapter = ModelAdapter(model, processor)
    encoding = adapter.encode(adapter.prepare([random_image()], PROMPT), adapter.tokenize_answer(ANSWER))
    n = len(encoding.input_ids)

    def forward(pixels: Tensor) -> Tensor:
        logits = model(**(encoding.inputs | {key: pixels})).logits[:, -n:-1].log_softmax(-1)
        return logits.gather(2, encoding.input_ids[None, 1:, None])[..., 0]

    actual = layer_gradient_x_activation(adapter, encoding, torch.tensor([0, n - 2, n - 1]), argument, layer)
    assert not actual[0].any(), "nothing predicts the first token"
    method = LayerGradientXActivation(forward, layer_of(model))
    for row, position in zip(actual[1:], (n - 2, n - 1), strict=True):
        expected = method.attribute(encoding.inputs[key], target=position - 1, attribute_to_layer_input=at_input)
        expected = (expected[0] if isinstance(expected, tuple) else expected).sum(-1).flatten()
        if argument is None:
            expected = expected[encoding.visual_positions]
        torch.testing.assert_close(row, expected.detach()[: len(row)], atol=1e-6, rtol=1e-3)
        assert row.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("model_type", ["mllama", "idefics", "git"])
def test_shuffled_boxes_fail_the_oracle(model_type: str) -> None:
    adapter = ModelAdapter(*build(model_type))
    prepare = lambda images: adapter.prepare(images, PROMPT)  # noqa: E731
    geometry = adapter.geometry([(160, 120)])
    assert geometry.argument is not None
    assert geometry_oracle(adapter.model, prepare, [random_image()], geometry, blocks=16) >= 0.97
    local = geometry.is_local.nonzero().flatten()
    boxes = geometry.boxes.clone()
    boxes[local] = boxes[local.flip(0)]
    assert geometry_oracle(adapter.model, prepare, [random_image()], replace(geometry, boxes=boxes), blocks=16) <= 0.3


def test_maps_follow_the_attributions() -> None:
    model, processor = build("mllama")
    result = explain(model, processor, random_image(), PROMPT, ANSWER, scales=(1.0,), arc=None)
    assert result.settings["method"] == "layer_gradient_x_activation" and result.settings["layer"] is None
    adapter = ModelAdapter(model, processor)
    encoding = adapter.encode(adapter.prepare([random_image()], PROMPT), adapter.tokenize_answer(ANSWER))
    last = torch.tensor([len(encoding.input_ids) - 1])
    (values,) = layer_gradient_x_activation(adapter, encoding, last, "cross_attention_states").clamp_min(0)
    boxes, grid = adapter.geometry([(160, 120)]).boxes, (result.maps[0].shape[1], result.maps[0].shape[2])
    torch.testing.assert_close(result.maps[0][-1], rasterize(values[None], boxes, (160, 120), grid)[0])
    assert result.maps[0][-1].any()


def test_tiles_at_a_larger_scale_and_several_images() -> None:
    model, processor = build("mllama")
    larger = explain(model, processor, random_image(), PROMPT, ANSWER, scales=(1.0, 2.0))
    assert larger.settings["scales"] == [1.0, 2.0]
    sizes = [level["token_size"][0] for level in larger.settings["levels"]]
    assert sizes[1] < 0.75 * sizes[0], "more tiles, smaller tokens"
    model, processor = build("idefics")
    several = explain(model, processor, [random_image(), random_image(96, 96)], PROMPT, ANSWER, scales=(1.0,))
    assert len(several.maps) == 2 and all(bool(m.any()) for m in several.maps)


def test_gradients_replace_the_lens() -> None:
    model, processor = tiny("llava")
    adapter, whole = ModelAdapter(model, processor), random_image(120, 120)
    arguments = (PROMPT, ANSWER)
    by: dict[str, Any] = dict(method="layer_gradient_x_activation")
    result = explain(model, processor, whole, *arguments, scales=(1.0,), **by)
    assert result.settings["method"] == "layer_gradient_x_activation" and result.maps[0].any()
    # Each cut-out is processed as an image of its own.
    (cut,) = collect_answer_activations(adapter, [whole], *arguments, (2.0,), crops=True, **by).scale_maps
    for index, (x, y) in enumerate([(0, 0), (60, 0), (0, 60), (60, 60)]):
        (alone,) = collect_answer_activations(
            adapter, [whole.crop((x, y, x + 60, y + 60))], *arguments, (1.0,), **by
        ).scale_maps
        torch.testing.assert_close(cut.activation[:, 64 * index : 64 * index + 64], alone.activation)


def test_a_model_with_cross_attention_passes_the_check() -> None:
    report = check(*build("idefics"), random_image(96, 96))
    assert report.passed, str(report)
    assert "in image_hidden_states" in report["geometry"].detail
    assert report["scales"].figures["oracle"] >= 0.97


def test_layers_and_gradients_that_do_not_exist() -> None:
    model, processor = build("mllama")
    arguments: Any = (model, processor, random_image(), PROMPT, ANSWER)
    with pytest.raises(ValueError, match="use method='layer_gradient_x_activation'"):
        explain(*arguments, method="logit_lens")
    with pytest.raises(ValueError, match="leave layer out"):
        explain(*arguments, scales=(1.0,), layer=0)
    model, processor = tiny("llava")
    by: Any = dict(method="layer_gradient_x_activation", scales=(1.0,))
    with pytest.raises(ValueError, match=r"\[3\] do not exist; the decoder has 3 layers"):
        explain(model, processor, random_image(), PROMPT, ANSWER, layer=3, **by)
    decoder = model.get_decoder()
    decoder.norm.forward = torch.no_grad()(decoder.norm.forward)
    with pytest.raises(ValueError, match="No gradient passes"):
        explain(model, processor, random_image(), PROMPT, ANSWER, **by)
    assert not any(module._forward_pre_hooks for module in model.modules()) and torch.is_grad_enabled()
