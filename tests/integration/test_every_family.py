"""An explanation of a tiny model of every type of AutoModelForImageTextToText, end to end."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from captum.attr import FeatureAblation
from PIL import Image

from captum_intramodal import (
    ImageTextInput,
    ModelAdapter,
    MultimodalLLMAttribution,
    check,
    explain,
)
from captum_intramodal.adapter.prefix_cache import can_reuse_prefix
from captum_intramodal.explanation.activations import collect_answer_activations
from captum_intramodal.geometry import cache, pixel_probe
from captum_intramodal.geometry.oracle import geometry_oracle
from captum_intramodal.models import families
from captum_intramodal.models.hooks import evaluation_mode
from tests.testing.families import FAMILIES, LEFT_OUT, answer_logits, build, prepare
from tests.testing.tiny import random_image

NOT_EXPLAINED = LEFT_OUT | {
    "instructblipvideo": "takes videos only, of exactly four frames",
    "pp_formulanet": "its processor crops each image by what it shows, and no gradient passes through it",
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
# Codes of quantized images: no small change moves them, so that the oracle cannot tell.
CODES = {"chameleon", "emu3"}
# Every pass reads the text before the image itself: layers that keep other states than all tokens' keys and values,
# or share them; more arguments along the sequence; words that see what comes after them; another text at another size;
# no text before the image; and those whose visual tokens are not in the sequence.
READ_APART = {*BY_GRADIENTS, *BY_PIXELS - {"aria", "deepseek_ocr2", "idefics2"}} | {
    *("dots3_note", "glm5_next", "inkling2", "inkling_mm_model", "lfm3_vl", "minicpm_ocr", "minicpmv4_6"),
    *("minicpmv4_7", "mistral_large4", "nemotron_h_omni", "qwen3_5", "qwen3_5_moe", "qwen4_exp"),
    *("gemma3n", "gemma4", "molmo2", "paligemma", "llama4", "chameleon", "fuyu"),
}
# Their vocabulary is read again when they have answered: a tail that is replayed, a head that reads scaled states, an
# answer that is not read token by token.
RANKED_AFTERWARDS = {
    *("blip", "blip-2", "chameleon", "diffusion_gemma", "gemma3n", "glm5_next", "inkling2", "inkling_mm_model"),
    *("kosmos-2", "kosmos-2.5", "mistral_large4", "nemotron_h_omni", "qwen4_exp", "vision-encoder-decoder"),
}


def test_reasons() -> None:
    assert set(NOT_EXPLAINED) <= set(FAMILIES)
    assert set(FAMILIES) > BY_PIXELS | set(BY_GRADIENTS) | READ_APART | RANKED_AFTERWARDS
    assert len(FAMILIES) - len(NOT_EXPLAINED) >= 85


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [t for t in FAMILIES if t not in NOT_EXPLAINED])
def test_explain(model_type: str) -> None:
    model, processor = build(model_type)
    explanation = explain(model, processor, random_image(320, 200), "describe the picture", "a red cat", scales=(1.0,))
    methods = dict.fromkeys(BY_PIXELS, "input_x_gradient") | dict.fromkeys(BY_GRADIENTS, "layer_gradient_x_activation")
    assert explanation.settings["method"] == methods.get(model_type, "logit_lens")
    assert explanation.answer.split() == ["a", "red", "cat"]
    assert bool(explanation.maps[0].isfinite().all()) and bool(explanation.maps[0].any())
    if model_type not in BY_PIXELS | CODES:
        bound = ModelAdapter(model, processor)
        prepare = lambda images: bound.prepare(images, "describe")  # noqa: E731
        boxes = bound.geometry([(320, 200)])
        assert boxes.argument == BY_GRADIENTS.get(model_type)
        assert geometry_oracle(model, prepare, [random_image(320, 200)], boxes, blocks=12) >= 0.97
    assert can_reuse_prefix(ModelAdapter(model, processor)) == (model_type not in READ_APART)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [t for t in FAMILIES if t not in NOT_EXPLAINED])
def test_rankings_of_its_own_answer(model_type: str) -> None:
    bound = ModelAdapter(*build(model_type))
    options = dict(answer=None, scales=(1.0,), ranking_k=8, max_new_tokens=4)
    with evaluation_mode(bound.model):
        reading = collect_answer_activations(bound, [random_image(160, 120)], "describe the picture", **options)
    ranked, n = reading.answer_rankings, reading.n_answer
    assert (ranked is None) == (model_type in RANKED_AFTERWARDS)
    if ranked is not None:
        tokens = reading.last[: len(reading.text.ids)][-n:]
        expected = bound.lens.rank(torch.cat([reading.last[-n:][:1], tokens]), 8)
        torch.testing.assert_close(ranked.log_normalizer, expected.log_normalizer, atol=1e-4, rtol=1e-4)
        # Neighbors that are almost equal may change places.
        assert (ranked.ids == expected.ids).float().mean() > 0.9


# Not by this loop: each pass has noise of its own; the tokenizer adds a token to the answer.
NOT_BY_HAND = {"diffusion_gemma", "fuyu"}


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [t for t in FAMILIES if t not in {*NOT_EXPLAINED, *NOT_BY_HAND}])
def test_feature_ablation(model_type: str) -> None:
    model, processor = build(model_type)
    bound = ModelAdapter(model, processor)
    inp = ImageTextInput(bound, random_image(320, 200), "describe the picture", grid=(1, 2))
    result = MultimodalLLMAttribution(FeatureAblation(model), bound).attribute(
        inp, "a red cat", perturbations_per_eval=3
    )
    tokenizer, answer = processor.tokenizer, bound.tokenize_answer("a red cat")

    def log_probabilities(image: Image.Image, without: str | None = None) -> torch.Tensor:
        inputs = prepare(model, processor, [image], "describe the picture")
        key = "input_ids" if "input_ids" in inputs else "decoder_input_ids"
        if without is not None:
            word = inputs[key] == tokenizer.convert_tokens_to_ids(without)
            inputs[key] = inputs[key].masked_fill(word, tokenizer.unk_token_id)
        return answer_logits(model, inputs, answer).log_softmax(-1)[range(len(answer)), answer]

    hidden = []
    for left in (0, 160):
        pixels = np.asarray(random_image(320, 200)).copy()
        pixels[:, left : left + 160] = pixels.reshape(-1, 3).mean(0).round()
        hidden.append(log_probabilities(Image.fromarray(pixels)))
    hidden += [log_probabilities(random_image(320, 200), word) for word in inp.values[2:]]
    expected = log_probabilities(random_image(320, 200)) - torch.stack(hidden)
    assert torch.allclose(result.token_attr, expected.T, atol=1e-4)


@pytest.mark.parametrize("model_type", ["qwen3_vl", "llama4", "ovis2"])
def test_a_type_in_no_table(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "_FAMILIES", {})
    monkeypatch.setattr(pixel_probe, "NUMBERED_PATCHES", ())
    monkeypatch.setattr(cache, "_cache", type(cache._cache)())
    report = check(*build(model_type), random_image(320, 200))
    assert report.passed, str(report)
    assert report["geometry"].figures["oracle"] >= 0.97
