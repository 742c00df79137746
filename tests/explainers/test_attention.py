"""Explainers from attention weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from captum_intramodal import ModelAdapter, draw_positions
from captum_intramodal.errors import InvalidOptionError, UnsupportedModelError
from captum_intramodal.explainers import eager_attention, make_explainer
from tests.explainers.helpers import PROMPT, answer_to, model_of
from tests.testing.families import build
from tests.testing.tiny import random_image, tiny


def eager_pass(adapter: ModelAdapter, image: Image.Image) -> tuple[Any, Any]:
    """Return the answer's encoding, and the output of a copy of the model that was created with eager attention."""
    encoding = adapter.encode(adapter.prepare([image], PROMPT), answer_to(adapter))
    copy = type(adapter.model)._from_config(adapter.model.config, attn_implementation="eager")
    copy.load_state_dict(adapter.model.state_dict())
    return encoding, copy.eval()(**encoding.inputs, output_attentions=True, use_cache=False)


def draw(adapter: ModelAdapter, encoding: Any, rows: list[Tensor], image: Image.Image) -> Tensor:
    (maps,) = draw_positions(torch.stack(rows).detach(), adapter, encoding.input_ids, [image.size])
    return maps


@pytest.mark.parametrize("model_type", ["qwen2_vl", "llava"])
def test_attention_is_that_of_an_eager_pass(model_type: str) -> None:
    adapter, image = model_of(model_type), random_image(112, 112)
    encoding, output = eager_pass(adapter, image)
    start = encoding.prompt_length
    rows = [output.attentions[1][0, :, start + t - 1].mean(0) for t in range(3)]
    (maps,) = make_explainer("attention:layer=1")(adapter, [image], PROMPT, answer_to(adapter))
    assert torch.allclose(maps, draw(adapter, encoding, rows, image), atol=1e-6)


def test_rollout_by_a_slow_loop() -> None:
    adapter, image = model_of("qwen2_vl"), random_image(112, 84)
    encoding, output = eager_pass(adapter, image)
    joint = torch.eye(len(encoding.input_ids))
    for attention in output.attentions:
        joint = (0.7 * attention[0].mean(0) + 0.3 * torch.eye(len(joint))) @ joint
    rows = [joint[encoding.prompt_length + t - 1] for t in range(3)]
    (maps,) = make_explainer("attention_rollout:residual=0.3")(adapter, [image], PROMPT, answer_to(adapter))
    assert torch.allclose(maps, draw(adapter, encoding, rows, image), atol=1e-6)


def test_attention_x_gradient_by_a_slow_loop() -> None:
    adapter, image = model_of("qwen2_vl"), random_image(112, 84)
    for parameter in adapter.model.parameters():
        parameter.requires_grad_()
    encoding, output = eager_pass(adapter, image)
    rows = []
    for t, token in enumerate(answer_to(adapter)):
        position = encoding.prompt_length + t - 1
        relevance = torch.eye(len(encoding.input_ids))
        gradients = torch.autograd.grad(output.logits[0, position, token], output.attentions, retain_graph=True)
        for attention, gradient in zip(output.attentions, gradients, strict=True):
            relevance = relevance + (attention * gradient)[0].clamp(min=0).mean(0) @ relevance
        rows.append(relevance[position])
    adapter.model.requires_grad_(False)
    (maps,) = make_explainer("attention_x_gradient")(adapter, [image], PROMPT, answer_to(adapter))
    expected = draw(adapter, encoding, rows, image)
    assert torch.allclose(maps, expected, rtol=1e-4, atol=1e-6 * float(expected.max()))


def test_attention_implementations_are_restored() -> None:
    adapter = ModelAdapter(*tiny("llava"))
    tower = adapter.model.model.vision_tower
    tower.set_attn_implementation("eager")
    with pytest.raises(ZeroDivisionError), eager_attention(adapter.model):
        assert adapter.model.config._attn_implementation == "eager" and 1 / 0
    assert adapter.model.config._attn_implementation == "sdpa"
    assert adapter.model.get_decoder().config._attn_implementation == "sdpa"
    assert tower.config._attn_implementation == "eager"


def test_layers_without_attention_weights() -> None:
    hybrid = ModelAdapter(*build("qwen3_5")[:2])
    (maps,) = make_explainer("attention")(hybrid, [random_image(112, 84)], PROMPT, answer_to(hybrid))
    assert float(maps.max()) > 0
    with pytest.raises(UnsupportedModelError, match="of 1 of its 2 layers"):
        make_explainer("attention_rollout")(hybrid, [random_image(112, 84)], PROMPT, answer_to(hybrid))


def test_a_part_that_refuses_its_former_implementation() -> None:
    adapter = ModelAdapter(*build("fast_vlm")[:2])
    before = [part.config._attn_implementation for part in adapter.model.modules() if hasattr(part, "config")]
    (maps,) = make_explainer("attention")(adapter, [random_image(112, 84)], PROMPT, answer_to(adapter))
    after = [part.config._attn_implementation for part in adapter.model.modules() if hasattr(part, "config")]
    assert float(maps.max()) > 0 and after == before and "sdpa" in after


def test_a_layer_that_does_not_exist_is_refused() -> None:
    adapter = model_of("qwen2_vl")
    with pytest.raises(InvalidOptionError, match="no layer 7"):
        make_explainer("attention:layer=7")(adapter, [random_image(112, 84)], PROMPT, answer_to(adapter))
