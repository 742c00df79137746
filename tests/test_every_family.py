"""An explanation of a tiny model of every type of AutoModelForImageTextToText, end to end."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from families import FAMILIES, LEFT_OUT, build
from PIL import Image

from captum_intramodal import ModelAdapter, adapter, check, coordinates, decoder, explain, geometry
from captum_intramodal.geometry import geometry_oracle

NOT_EXPLAINED = LEFT_OUT | {
    "instructblipvideo": "takes videos only, of exactly four frames",
    "pp_formulanet": "its processor crops each picture by what it shows, and no gradient passes through it",
    "udop": "its processor takes words with boxes from an OCR, not a prompt",
}
# Visual tokens that the decoder reads, but not in its sequence, and the argument of its blocks that holds them.
BY_GRADIENTS = {
    "blip": "encoder_hidden_states",
    "florence2": "encoder_hidden_states",
    "git": "hidden_states",
    "idefics": "image_hidden_states",
    "mllama": "cross_attention_states",
    "pix2struct": "encoder_hidden_states",
    "t5gemma2": "encoder_hidden_states",
    "vision-encoder-decoder": "encoder_hidden_states",
}
# No place per visual token: resamplers, and a decoder that reads its encoder's cache.
BY_PIXELS = {
    "aria",
    "blip-2",
    "deepseek_ocr2",
    "diffusion_gemma",
    "idefics2",
    "instructblip",
    "kosmos-2",
    "kosmos-2.5",
}
# Codes of quantised pictures: no small change moves them, so that the oracle cannot tell.
CODES = {"chameleon", "emu3"}


def picture(width: int = 320, height: int = 200) -> Image.Image:
    coarse = np.random.default_rng(3).integers(0, 256, (6, 9, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def test_reasons() -> None:
    assert set(NOT_EXPLAINED) <= set(FAMILIES) and set(FAMILIES) > BY_PIXELS | set(BY_GRADIENTS)
    assert len(FAMILIES) - len(NOT_EXPLAINED) >= 85


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [t for t in FAMILIES if t not in NOT_EXPLAINED])
def test_explain(model_type: str) -> None:
    model, processor = build(model_type)
    explanation = explain(model, processor, picture(), "describe the picture", "a red cat", scales=(1.0,))
    methods = dict.fromkeys(BY_PIXELS, "input_x_gradient") | dict.fromkeys(BY_GRADIENTS, "layer_gradient_x_activation")
    assert explanation.settings["method"] == methods.get(model_type, "logit_lens")
    assert explanation.answer.split() == ["a", "red", "cat"]
    assert bool(explanation.maps[0].isfinite().all()) and bool(explanation.maps[0].any())
    if model_type not in BY_PIXELS | CODES:
        bound = ModelAdapter(model, processor)
        prepare = lambda images: bound.prepare(images, "describe")  # noqa: E731
        boxes = bound.geometry([(320, 200)])
        assert boxes.argument == BY_GRADIENTS.get(model_type)
        assert geometry_oracle(model, prepare, [picture()], boxes, blocks=12) >= 0.97


@pytest.mark.parametrize("model_type", ["qwen3_vl", "llama4", "ovis2"])
def test_a_type_in_no_table(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tables: list[tuple[Any, str]] = [
        (adapter, "ANSWER_TYPES"),
        (adapter, "NESTED_IMAGES"),
        (coordinates, "NUMBERED_PATCHES"),
        (decoder, "FINAL_STATES"),
        (geometry, "CODE_RASTERS"),
    ]
    for module, name in tables:
        monkeypatch.setattr(module, name, type(getattr(module, name))())
    monkeypatch.setattr(geometry, "_cache", type(geometry._cache)())
    report = check(*build(model_type), picture())
    assert report.passed, str(report)
    assert report["geometry"].figures["oracle"] >= 0.97
