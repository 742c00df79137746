"""Direct contributions, and their product with the lens, as methods of ``explain`` and of explainers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from captum_intramodal import ModelAdapter, explain
from captum_intramodal.adapter.contribution import direct_contribution
from captum_intramodal.adapter.text_tokens import text_positions
from captum_intramodal.errors import UnsupportedModelError
from captum_intramodal.explainers import make_explainer
from captum_intramodal.explanation.activations import collect_answer_activations
from captum_intramodal.explanation.scale_maps import TokenScaleMaps
from captum_intramodal.models.hooks import evaluation_mode
from tests.testing.families import build
from tests.testing.tiny import random_image, tiny

PROMPT, ANSWER = "describe the picture", "a red dog"


def values(adapter: ModelAdapter, method: Any, scale: float = 1.0) -> TokenScaleMaps:
    with evaluation_mode(adapter.model):
        activations = collect_answer_activations(
            adapter, [random_image(160, 120)], PROMPT, ANSWER, (scale,), method=method
        )
    (maps,) = activations.scale_maps
    assert isinstance(maps, TokenScaleMaps) and activations.method == method
    return maps


@pytest.mark.parametrize("model_type", ["qwen2_vl", "llava", "smolvlm"])
def test_contributions_are_those_of_one_pass_over_prompt_and_answer(model_type: str) -> None:
    adapter = ModelAdapter(*tiny(model_type))
    inputs = adapter.prepare([random_image(160, 120)], PROMPT)
    encoding = adapter.encode(inputs, adapter.tokenize_answer(ANSWER))
    with evaluation_mode(adapter.model):
        expected = direct_contribution(adapter, encoding, text_positions(adapter, encoding))
    torch.testing.assert_close(values(adapter, "direct_contribution").activation, expected.clamp_min(0))


@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_the_product_is_the_geometric_mean_at_each_visual_token(scale: float) -> None:
    adapter = ModelAdapter(*tiny("qwen2_vl"))
    lens, contribution, product = (
        values(adapter, method, scale).activation
        for method in ("logit_lens", "direct_contribution", "lens_x_contribution")
    )
    assert bool(product.any())
    torch.testing.assert_close(product, (lens * contribution).sqrt(), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("method", ["direct_contribution", "lens_x_contribution"])
def test_explain_and_explainers_take_them(method: Any) -> None:
    model, processor = tiny("qwen2_vl")
    image = random_image(160, 120)
    result = explain(model, processor, image, PROMPT, ANSWER, scales=(1.0, 1.5), method=method, arc=None)
    assert result.settings["method"] == method and result.settings["scales"] == [1.0, 1.5]
    adapter = ModelAdapter(model, processor)
    ids = adapter.tokenize_answer(ANSWER)
    (maps,) = make_explainer(f"msea:method={method},scales=[1,1.5]")(adapter, [image], PROMPT, ids)
    torch.testing.assert_close(maps, result.maps[0][-len(ids) :], atol=1e-6, rtol=1e-4)


def test_a_generated_answer_has_the_maps_of_the_same_answer_given() -> None:
    model, processor = tiny("llava")
    options: Any = {"scales": (1.0,), "method": "direct_contribution", "arc": None}
    own = explain(model, processor, random_image(), PROMPT, max_new_tokens=4, **options)
    given = explain(model, processor, random_image(), PROMPT, own.token_ids[-4:].tolist(), **options)
    torch.testing.assert_close(own.maps[0], given.maps[0], atol=1e-5, rtol=1e-4)


def test_the_product_needs_visual_tokens_in_the_decoders_sequence() -> None:
    model, processor = build("mllama")
    with pytest.raises(UnsupportedModelError, match="not in the decoder's sequence"):
        explain(model, processor, random_image(), "describe", "a dog", method="lens_x_contribution")


def test_blocks_that_are_not_attributed_are_said() -> None:
    model, processor = build("qwen3_5")
    with pytest.warns(UserWarning, match=r"\d+ of \d+ decoder blocks of Qwen3_5\w+ have no softmax attention"):
        explain(model, processor, random_image(), "describe", "a dog", scales=(1.0,), method="direct_contribution")
