from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from captum.attr import InputXGradient
from torch import Tensor

from captum_intramodal import ModelAdapter, explain
from captum_intramodal.adapter.gradients import input_x_gradient
from captum_intramodal.adapter.position_interpolation import ResizedInputAdapter
from captum_intramodal.errors import NoTokenGeometryError
from captum_intramodal.explanation.activations import collect_answer_activations
from captum_intramodal.explanation.scale_views import select_views
from captum_intramodal.geometry.oracle import geometry_oracle
from captum_intramodal.geometry.pixel_map import PixelMaps
from captum_intramodal.geometry.token_geometry import TokenGeometry
from captum_intramodal.models.decoder import position_embedding_modules
from captum_intramodal.models.hooks import interpolate_position_embeddings
from tests.testing.families import build
from tests.testing.tiny import random_image, tiny


@pytest.mark.parametrize("model_type", ["llava", "smolvlm"])
def test_input_x_gradient_is_captums(model_type: str) -> None:
    model, processor = tiny(model_type)
    adapter = ModelAdapter(model, processor)
    inputs = adapter.prepare([random_image(160, 120)], "describe the picture")
    encoding = adapter.encode(inputs, adapter.tokenize_answer("a red dog"))
    n = len(encoding.input_ids)

    def forward(pixels: Tensor) -> Tensor:
        logits = torch.cat([model(**(encoding.inputs | {"pixel_values": p})).logits for p in pixels])
        rows = logits[:, :-1].log_softmax(-1)
        return rows.gather(2, encoding.input_ids[None, 1:, None])[..., 0]

    positions = torch.tensor([0, n - 3, n - 1])
    actual = [a["pixel_values"] for a in input_x_gradient(adapter, encoding, ["pixel_values"], positions)]
    # One example of Captum is the whole pixel tensor, tiles included.
    pixels = encoding.inputs["pixel_values"][None]
    for position, attribution in zip(positions[1:].tolist(), actual[1:], strict=True):
        expected = InputXGradient(forward).attribute(pixels, target=position - 1)[0]
        torch.testing.assert_close(attribution, expected.detach(), atol=1e-6, rtol=1e-4)
        assert attribution.abs().sum() > 0
    assert not actual[0].any(), "nothing predicts the first token"
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_explain_by_pixels() -> None:
    model, processor = tiny("llava")
    arguments = (model, processor, random_image(160, 120), "describe the picture", "a red dog")
    result = explain(*arguments, scales=(0.5, 1.0), arc=None, method="input_x_gradient")
    assert result.settings["method"] == "input_x_gradient"
    assert result.settings["scales"] == [0.5, 1.0]
    assert result.maps[0].shape[1:] == (18, 24)
    assert result.settings["levels"][1]["token_size"] == [6.67, 6.67]
    adapter = ModelAdapter(model, processor)
    encoding = adapter.encode(
        adapter.prepare([random_image(160, 120)], "describe the picture"), adapter.tokenize_answer("dog")
    )
    alone = explain(*arguments[:4], "dog", scales=(1.0,), arc=None, method="input_x_gradient")
    (attribution,) = input_x_gradient(adapter, encoding, ["pixel_values"], torch.tensor([len(encoding.input_ids) - 1]))
    pixels = adapter.pixel_maps([(160, 120)]).maps["pixel_values"]
    expected = pixels.fold(attribution["pixel_values"], (18, 24)).clamp_min(0)
    torch.testing.assert_close(alone.maps[0][-1], expected)
    # The center crop's margins are not seen.
    assert not alone.maps[0][:, :, :2].any() and not alone.maps[0][:, :, -2:].any() and alone.maps[0].any()
    suppressed = explain(*arguments, scales=(1.0,), method="input_x_gradient")
    assert suppressed.settings["arc"] is not None


def test_the_lens_is_the_default_where_tokens_have_places() -> None:
    model, processor = tiny("smolvlm")
    arguments = (model, processor, random_image(160, 120), "describe the picture", "a dog")
    by_default = explain(*arguments, scales=(1.0,))
    assert by_default.settings["method"] == "logit_lens"
    assert torch.equal(by_default.maps[0], explain(*arguments, scales=(1.0,), method="logit_lens").maps[0])


def test_enlargements_that_become_the_same_pixels_are_dropped() -> None:
    adapter = ModelAdapter(*tiny("llava"))
    images = [random_image(160, 120)]
    inputs = adapter.prepare(images, "describe")
    kept, dropped = select_views(adapter, images, (0.5, 1.0, 1.5), inputs, "input_x_gradient")
    assert list(kept) == [0.5, 1.0] and dropped == [1.5]
    # A processor of native resolution shows more of an enlarged image.
    adapter = ModelAdapter(*tiny("qwen2_vl"))
    kept, dropped = select_views(adapter, images, (1.0, 1.5), adapter.prepare(images, "a"), "input_x_gradient")
    assert list(kept) == [1.0, 1.5] and not dropped


@pytest.mark.parametrize(
    ("model_type", "size", "scales"),
    [
        # Native resolution processes more of enlarged images, up to its largest grid of 160 tokens.
        ("qwen2_vl", (160, 120), [1.0, 1.5, 2.0]),
        ("qwen2_vl", (300, 200), [0.75, 1.0, 1.5]),
        ("qwen2_vl", (640, 400), [0.5, 1.0]),
        # Always the same tokens.
        ("llava", (160, 120), [1.0]),
        ("smolvlm", (160, 120), [1.0]),
    ],
)
def test_auto_selects_scales_with_a_grid_of_their_own(
    model_type: str, size: tuple[int, int], scales: list[float]
) -> None:
    adapter = ModelAdapter(*tiny(model_type))
    images = [random_image(*size)]
    kept, dropped = select_views(adapter, images, "auto", adapter.prepare(images, "a"))
    assert list(kept) == scales and dropped == []
    grids = [len(view.layout.kinds) for view in kept.values() if isinstance(view.layout, TokenGeometry)]
    assert len(grids) == len(scales)
    assert len(set(grids)) == len(grids)


def test_crops_show_parts_of_the_image_larger() -> None:
    model, processor = tiny("llava")
    whole = random_image(120, 120)
    arguments = ("describe the picture", "a red dog")
    result = explain(model, processor, whole, *arguments, scales=(2.0,), crops=True, arc=None)
    assert result.settings["scales"] == [2.0] and result.settings["crops"]
    (level,) = result.settings["levels"]
    assert level["visual_tokens"] == 4 * 64 and level["token_size"] == pytest.approx([7.5, 7.5], abs=0.05)
    # Each cut-out is read as an image of its own, and its boxes lie where it was cut.
    adapter = ModelAdapter(model, processor)
    (cut,) = collect_answer_activations(adapter, [whole], *arguments, (2.0,), crops=True).scale_maps
    for index, (x, y) in enumerate([(0, 0), (60, 0), (0, 60), (60, 60)]):
        part = whole.crop((x, y, x + 60, y + 60))
        (alone,) = collect_answer_activations(adapter, [part], *arguments, (1.0,)).scale_maps
        own = slice(64 * index, 64 * index + 64)
        torch.testing.assert_close(cut.activation[:, own], alone.activation, atol=1e-5, rtol=1e-4)
        assert torch.equal(cut.geometry.boxes[own], alone.geometry.boxes + torch.tensor([x, y, x, y]))
    both = explain(model, processor, whole, *arguments, scales=(1.0, 1.5, 2.0), crops=True)
    assert both.settings["scales"] == [1.0, 1.5, 2.0]
    assert [level["visual_tokens"] for level in both.settings["levels"]] == [64, 256, 256]


def test_crops_only_where_enlarging_shows_nothing() -> None:
    model, processor = tiny("qwen2_vl")
    arguments = (model, processor, random_image(160, 120), "describe the picture", "a dog")
    cut, resized = explain(*arguments, scales=(1.0, 1.5), crops=True), explain(*arguments, scales=(1.0, 1.5))
    assert torch.equal(cut.maps[0], resized.maps[0])


def test_crops_of_one_of_two_images() -> None:
    model, processor = tiny("llava")
    images = [random_image(120, 120), random_image(90, 120)]
    result = explain(model, processor, images, "describe the picture", "a dog", scales=(1.0, 2.0), crops=True)
    assert result.settings["levels"][1]["visual_tokens"] == 8 * 128
    assert all(bool(m.any()) and bool(m.isfinite().all()) for m in result.maps)


@pytest.mark.parametrize("model_type", ["llava", "paligemma"])
def test_a_larger_input_size_shows_the_whole_image_in_more_tokens(model_type: str) -> None:
    model, processor = build(model_type)
    adapter, whole = ModelAdapter(model, processor), random_image(120, 120)
    inputs = adapter.prepare([whole], "describe")
    size = dict(processor.image_processor.size)
    kept, dropped = select_views(adapter, [whole], (1.0, 1.5, 2.0), inputs, interpolate_pos_encoding=True)
    assert list(kept) == [1.0, 1.5, 2.0] and dropped == []
    for scale, tokens in ((1.5, 12), (2.0, 16)):
        larger = kept[scale]
        assert isinstance(larger.adapter, ResizedInputAdapter) and isinstance(larger.layout, TokenGeometry)
        assert len(larger.layout.kinds) == tokens**2
        assert larger.layout.token_size == pytest.approx((120 / tokens,) * 2, abs=0.1)
        with interpolate_position_embeddings(model):
            prepare = partial(larger.adapter.prepare, prompt="describe")
            assert geometry_oracle(model, prepare, [whole], larger.layout, blocks=12) == 1.0
    arguments = (model, processor, whole, "describe the picture", "a red dog")
    result = explain(*arguments, scales=(1.0, 2.0), interpolate_pos_encoding=True)
    first, second = result.settings["levels"]
    assert (first["visual_tokens"], second["visual_tokens"]) == (64, 256)
    assert second["token_size"] == pytest.approx([7.5, 7.5], abs=0.1)
    # Model and processor are as they were.
    assert dict(processor.image_processor.size) == size
    assert not any(table._forward_pre_hooks for table in position_embedding_modules(model))
    torch.testing.assert_close(adapter.run(inputs).logits, adapter.run(adapter.prepare([whole], "describe")).logits)


def test_positions_are_those_that_transformers_interpolates() -> None:
    model, _ = tiny("llava")
    (table,) = position_embedding_modules(model)
    pixels = torch.randn(1, 3, 168, 168)
    with interpolate_position_embeddings(model):
        ours = table(pixels)
    assert torch.equal(ours, table(pixels, interpolate_pos_encoding=True))
    with pytest.raises(ValueError, match="doesn't match model"):
        table(pixels)


def test_a_larger_input_size_for_maps_over_the_pixels() -> None:
    model, processor = build("git")
    adapter, whole = ModelAdapter(model, processor), random_image(160, 120)
    arguments = ([whole], (1.0, 2.0), adapter.prepare([whole], "describe"))
    by: Any = {"method": "input_x_gradient", "interpolate_pos_encoding": True}
    larger = select_views(adapter, *arguments, **by)[0][2.0]
    assert isinstance(larger.adapter, ResizedInputAdapter) and isinstance(larger.layout, PixelMaps)
    assert larger.layout.maps["pixel_values"].shape == (1, 3, 256, 256)
    both = collect_answer_activations(adapter, [whole], "describe", "a dog", (1.0, 2.0), **by).scale_maps
    assert [level.scale for level in both] == [1.0, 2.0]
    assert not torch.equal(*(level.rasterize(0, whole.size, (18, 24)) for level in both))


def test_where_the_input_size_cannot_be_enlarged() -> None:
    whole = random_image(160, 120)
    for model_type, reason in (("smolvlm", "has interpolate_pos_encoding"), ("gemma3", "fails at that size")):
        with pytest.raises(ValueError, match=rf"1.5 times its input size: .*{reason}.*crops=True"):
            explain(*build(model_type), whole, "describe", "a dog", scales=(1.0, 1.5), interpolate_pos_encoding=True)
    model, processor = tiny("llava")
    with pytest.raises(ValueError, match="choose one"):
        explain(model, processor, whole, "describe", "a dog", crops=True, interpolate_pos_encoding=True)
    # Nothing to do where the model sees more of an enlarged image anyway.
    explain(*tiny("qwen2_vl"), whole, "describe", "a dog", scales=(1.0, 1.5), interpolate_pos_encoding=True)


def test_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = tiny("llava")
    arguments: Any = (model, processor, random_image(160, 120), "describe the picture", "a dog")
    with pytest.raises(ValueError, match="method must be one of"):
        explain(*arguments, method="gradcam")  # type: ignore[arg-type]

    with pytest.raises(ValueError, match="'auto' or a sequence"):
        explain(*arguments, scales="all")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="sequence of factors"):
        explain(*arguments, scales=1.5)
    with pytest.raises(ValueError, match="scale_weights need the scales"):
        explain(*arguments, scale_weights=(1, 2))

    def none(self: ModelAdapter, sizes: Any) -> Any:
        raise NoTokenGeometryError("Its tokens have no fixed boxes.")

    monkeypatch.setattr(ModelAdapter, "geometry", none)
    assert explain(*arguments, scales=(1.0,)).settings["method"] == "input_x_gradient"
    with pytest.raises(ValueError, match=r"covers? known regions .* method='input_x_gradient'"):
        explain(*arguments, method="logit_lens")
    projector = model.model.multi_modal_projector
    monkeypatch.setattr(projector, "forward", torch.no_grad()(projector.forward))
    with pytest.raises(ValueError, match="No gradient passes"):
        explain(*arguments)
