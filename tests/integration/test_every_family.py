"""Every type of AutoModelForImageTextToText can be explained, end to end, as a tiny random model."""

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
    "pp_formulanet": "its processor crops each image by its content, and no gradient passes through it",
    "udop": "its processor takes words with boxes from an OCR program, not a prompt",
}
# Types whose visual tokens are not in the decoder's sequence, and the argument of its blocks that holds them.
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
# Types whose visual tokens have no place in the image: resamplers, and a decoder that reads its encoder's cache.
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
# Types that quantize images to codes, which no small change affects, so the oracle cannot decide.
QUANTIZED = {"chameleon", "emu3"}
# Types that cannot reuse the text before the image: layers keep other states than keys and values of all tokens, or
# share them; more arguments run along the sequence; words attend to later tokens; the text depends on the image's size;
# there is no text before the image; or visual tokens are not in the sequence.
NO_PREFIX_REUSE = {*BY_GRADIENTS, *BY_PIXELS - {"aria", "deepseek_ocr2", "idefics2"}} | {
    *("dots3_note", "glm5_next", "inkling2", "inkling_mm_model", "lfm3_vl", "minicpm_ocr", "minicpmv4_6"),
    *("minicpmv4_7", "mistral_large4", "nemotron_h_omni", "qwen3_5", "qwen3_5_moe", "qwen4_exp"),
    *("gemma3n", "gemma4", "molmo2", "paligemma", "llama4", "chameleon", "fuyu"),
}
# Types whose tokens are ranked after the answer: the model's tail is replayed, its head takes scaled states, or the
# answer is not generated token by token.
RANKED_AFTERWARDS = {
    *("blip", "blip-2", "chameleon", "diffusion_gemma", "gemma3n", "glm5_next", "inkling2", "inkling_mm_model"),
    *("kosmos-2", "kosmos-2.5", "mistral_large4", "nemotron_h_omni", "qwen4_exp", "vision-encoder-decoder"),
}


def test_the_exceptions_are_types_and_few() -> None:
    assert set(NOT_EXPLAINED) <= set(FAMILIES)
    assert set(FAMILIES) > BY_PIXELS | set(BY_GRADIENTS) | NO_PREFIX_REUSE | RANKED_AFTERWARDS
    assert len(FAMILIES) - len(NOT_EXPLAINED) >= 85


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [t for t in FAMILIES if t not in NOT_EXPLAINED])
def test_explain_gives_maps_at_the_right_places(model_type: str) -> None:
    model, processor = build(model_type)
    explanation = explain(model, processor, random_image(320, 200), "describe the picture", "a red cat", scales=(1.0,))
    methods = dict.fromkeys(BY_PIXELS, "input_x_gradient") | dict.fromkeys(BY_GRADIENTS, "layer_gradient_x_activation")
    assert explanation.settings["method"] == methods.get(model_type, "logit_lens")
    assert explanation.answer.split() == ["a", "red", "cat"]
    assert bool(explanation.maps[0].isfinite().all()) and bool(explanation.maps[0].any())
    if model_type not in BY_PIXELS | QUANTIZED:
        adapter = ModelAdapter(model, processor)
        geometry = adapter.geometry([(320, 200)])
        assert geometry.argument == BY_GRADIENTS.get(model_type)
        images = [random_image(320, 200)]
        agreement = geometry_oracle(model, lambda x: adapter.prepare(x, "describe"), images, geometry, blocks=12)
        assert agreement >= 0.97
    assert can_reuse_prefix(ModelAdapter(model, processor)) == (model_type not in NO_PREFIX_REUSE)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [t for t in FAMILIES if t not in NOT_EXPLAINED])
def test_rankings_captured_while_generating_are_those_of_the_answer(model_type: str) -> None:
    adapter = ModelAdapter(*build(model_type))
    options = dict(answer=None, scales=(1.0,), ranking_k=8, max_new_tokens=4)
    with evaluation_mode(adapter.model):
        captured = collect_answer_activations(adapter, [random_image(160, 120)], "describe the picture", **options)
    ranked, n = captured.answer_rankings, captured.n_answer
    assert (ranked is None) == (model_type in RANKED_AFTERWARDS)
    if ranked is not None:
        tokens = captured.last[: len(captured.text.ids)][-n:]
        expected = adapter.lens.rank(torch.cat([captured.last[-n:][:1], tokens]), 8)
        torch.testing.assert_close(ranked.log_normalizer, expected.log_normalizer, atol=1e-4, rtol=1e-4)
        # Words with almost equal logits may swap ranks.
        assert (ranked.ids == expected.ids).float().mean() > 0.9


# Types that the loop of this test cannot replicate: each pass draws noise; the tokenizer adds a token to the answer.
NOT_BY_LOOP = {"diffusion_gemma", "fuyu"}


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [t for t in FAMILIES if t not in {*NOT_EXPLAINED, *NOT_BY_LOOP}])
def test_feature_ablation_equals_a_loop_over_removed_features(model_type: str) -> None:
    model, processor = build(model_type)
    adapter = ModelAdapter(model, processor)
    inp = ImageTextInput(adapter, random_image(320, 200), "describe the picture", grid=(1, 2))
    attribution = MultimodalLLMAttribution(FeatureAblation(model), adapter)
    result = attribution.attribute(inp, "a red cat", perturbations_per_eval=3)
    tokenizer, answer = processor.tokenizer, adapter.tokenize_answer("a red cat")

    def log_probabilities(image: Image.Image, without: str | None = None) -> torch.Tensor:
        inputs = prepare(model, processor, [image], "describe the picture")
        key = "input_ids" if "input_ids" in inputs else "decoder_input_ids"
        if without is not None:
            word = inputs[key] == tokenizer.convert_tokens_to_ids(without)
            inputs[key] = inputs[key].masked_fill(word, tokenizer.unk_token_id)
        return answer_logits(model, inputs, answer).log_softmax(-1)[range(len(answer)), answer]

    without_feature = []
    for left in (0, 160):
        pixels = np.asarray(random_image(320, 200)).copy()
        pixels[:, left : left + 160] = pixels.reshape(-1, 3).mean(0).round()
        without_feature.append(log_probabilities(Image.fromarray(pixels)))
    without_feature += [log_probabilities(random_image(320, 200), word) for word in inp.values[2:]]
    expected = log_probabilities(random_image(320, 200)) - torch.stack(without_feature)
    assert torch.allclose(result.token_attr, expected.T, atol=1e-4)


@pytest.mark.parametrize("model_type", ["qwen3_vl", "llama4", "ovis2"])
def test_a_type_without_a_row_in_any_table_passes_the_check(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "_FAMILIES", {})
    monkeypatch.setattr(pixel_probe, "NUMBERED_PATCHES", ())
    monkeypatch.setattr(cache, "_cache", type(cache._cache)())
    report = check(*build(model_type), random_image(320, 200))
    assert report.passed, str(report)
    assert report["geometry"].figures["oracle"] >= 0.97
