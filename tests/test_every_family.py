"""An explanation of a tiny model of every type of AutoModelForImageTextToText, end to end."""

from __future__ import annotations

from typing import Any

import pytest
from families import FAMILIES, LEFT_OUT, build
from tiny import picture

from captum_intramodal import ModelAdapter, adapter, check, coordinates, decoder, explain, geometry
from captum_intramodal.geometry import geometry_oracle

NOT_EXPLAINED = LEFT_OUT | {
    "instructblipvideo": "takes videos only, of exactly four frames",
    "pp_formulanet": "its processor crops each picture by what it shows, and no gradient passes through it",
    "udop": "its processor takes words with boxes from an OCR, not a prompt",
}
# No place per visual token: resamplers, cross-attention, encoder-decoders, pictures before the sequence.
BY_PIXELS = {
    "aria",
    "blip",
    "blip-2",
    "deepseek_ocr2",
    "diffusion_gemma",
    "florence2",
    "git",
    "idefics",
    "idefics2",
    "instructblip",
    "kosmos-2",
    "kosmos-2.5",
    "mllama",
    "pix2struct",
    "t5gemma2",
    "vision-encoder-decoder",
}
# Codes of quantised pictures: no small change moves them, so that the oracle cannot tell.
CODES = {"chameleon", "emu3"}


def test_reasons() -> None:
    assert set(NOT_EXPLAINED) <= set(FAMILIES) and set(FAMILIES) > BY_PIXELS
    assert len(FAMILIES) - len(NOT_EXPLAINED) >= 85


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [t for t in FAMILIES if t not in NOT_EXPLAINED])
def test_explain(model_type: str) -> None:
    model, processor = build(model_type)
    explanation = explain(model, processor, picture(320, 200), "describe the picture", "a red cat", scales=(1.0,))
    assert explanation.settings["method"] == ("input_x_gradient" if model_type in BY_PIXELS else "logit_lens")
    assert explanation.answer.split() == ["a", "red", "cat"]
    assert bool(explanation.maps[0].isfinite().all()) and bool(explanation.maps[0].any())
    if model_type not in BY_PIXELS | CODES:
        bound = ModelAdapter(model, processor)
        prepare = lambda images: bound.prepare(images, "describe")  # noqa: E731
        assert geometry_oracle(model, prepare, [picture(320, 200)], bound.geometry([(320, 200)]), blocks=12) >= 0.97


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
    report = check(*build(model_type), picture(320, 200))
    assert report.passed, str(report)
    assert report["geometry"].figures["oracle"] >= 0.97
