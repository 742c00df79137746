"""Direct contributions as a Captum layer attribution, alone and inside this package's wrappers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from captum.attr import LayerAttribution
from torch import Tensor

from captum_intramodal import ARC, MSEA, LayerDirectContribution, ModelAdapter, PixelForward, VisualTokenAttribution
from captum_intramodal.adapter.contribution import direct_contribution, position_contribution
from captum_intramodal.attr.visual_token_attribution import draw_positions
from captum_intramodal.errors import InvalidInputError, InvalidOptionError
from captum_intramodal.models.decoder import decoder_layers
from tests.testing.families import build
from tests.testing.tiny import tiny

PROMPT, ANSWER = "describe the picture", "a red dog"


def forward_of(model_type: str, output: Any = "logits", contrast: str | None = None) -> PixelForward:
    adapter = ModelAdapter(*build(model_type))
    return PixelForward(adapter, PROMPT, ANSWER, output, contrast)


def pixels(count: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, 56, 84), generator=generator) / 255


def contributions(forward: PixelForward, image: Tensor) -> Tensor:
    """Return contributions to all tokens of the answer, from the adapter's function."""
    encoding = forward.adapter.encode(forward._prompt_inputs(image), forward.answer_ids)
    positions = torch.arange(encoding.prompt_length, len(encoding.input_ids))
    return position_contribution(forward.adapter, encoding, positions)


@pytest.mark.parametrize("model_type", ["qwen2_vl", "llava", "smolvlm", "gemma3", "internvl"])
def test_all_layers_of_each_image(model_type: str) -> None:
    forward, images = forward_of(model_type), pixels(2)
    method = LayerDirectContribution(forward, forward.model.get_decoder())
    assert isinstance(method, LayerAttribution) and method.multiplies_by_inputs
    actual = method.attribute(images, target=[forward.targets[0], forward.targets[2]])
    expected = torch.stack([contributions(forward, images[0])[0], contributions(forward, images[1])[2]])
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-4)
    clipped = method.attribute(images[:1], target=forward.targets[0], relu_attributions=True)
    torch.testing.assert_close(clipped, expected[:1].clamp_min(0), atol=1e-6, rtol=1e-4)


def test_one_layer_and_several() -> None:
    forward, image = forward_of("llava"), pixels()
    layers = list(decoder_layers(forward.model))
    target = forward.targets[1]
    every = LayerDirectContribution(forward, [*layers, forward.model.get_decoder()]).attribute(image, target=target)
    assert isinstance(every, tuple) and len(every) == len(layers) + 1
    torch.testing.assert_close(torch.stack(every[:-1]).sum(0), every[-1], atol=1e-6, rtol=1e-4)
    one = LayerDirectContribution(forward, layers[1]).attribute(image, target=target)
    torch.testing.assert_close(one, every[1], atol=1e-6, rtol=1e-4)


def test_targets_name_the_same_logit() -> None:
    forward, image = forward_of("llava"), pixels()
    expected = contributions(forward, image[0])
    decoder = forward.model.get_decoder()
    tokens = PixelForward(forward.adapter, PROMPT, ANSWER, "token_log_probs")
    actual = LayerDirectContribution(tokens, decoder).attribute(image, target=torch.tensor([2]))
    torch.testing.assert_close(actual[0], expected[2], atol=1e-6, rtol=1e-4)
    # A function of the model's inputs; positions count from the start of the sequence, or from its end.
    inputs = forward.inputs(image[0])
    length = inputs["input_ids"].shape[1]

    def run(ids: Tensor, values: Tensor) -> Tensor:
        return forward.model(input_ids=ids, pixel_values=values).logits

    method = LayerDirectContribution(run, decoder, model=forward.model)
    arguments: Any = (inputs["input_ids"], inputs["pixel_values"])
    for position in (length - 2, -2):
        actual = method.attribute(arguments, target=(position, forward.answer_ids[2]))
        torch.testing.assert_close(actual[0], expected[2], atol=1e-6, rtol=1e-4)
    assert method.attribute(arguments, target=5).shape == (1, length)


def test_a_contrast_is_subtracted() -> None:
    forward, image = forward_of("llava", "token_logits", contrast="a blue cat"), pixels()
    method = LayerDirectContribution(forward, forward.model.get_decoder())
    plain = LayerDirectContribution(PixelForward(forward.adapter, PROMPT, ANSWER), forward.model.get_decoder())
    assert forward.contrast_ids is not None
    for index, (own, other) in enumerate(zip(forward.answer_ids, forward.contrast_ids, strict=True)):
        expected = plain.attribute(image, target=(index, own)) - plain.attribute(image, target=(index, other))
        torch.testing.assert_close(method.attribute(image, target=index), expected, atol=1e-6, rtol=1e-4)


def test_states_of_cross_attention() -> None:
    forward, image = forward_of("mllama"), pixels()
    encoding = forward.adapter.encode(forward._prompt_inputs(image[0]), forward.answer_ids)
    last = torch.tensor([len(encoding.input_ids) - 1])
    expected = direct_contribution(forward.adapter, encoding, last, "cross_attention_states")
    method = LayerDirectContribution(forward, forward.model.get_decoder())
    actual = method.attribute(image, target=forward.targets[-1], attribute_to_states=True)
    torch.testing.assert_close(actual[:, : expected.shape[1]], expected, atol=1e-6, rtol=1e-4)
    assert actual.abs().sum() > 0


def test_maps_over_scales_and_without_interference() -> None:
    model, processor = tiny("qwen2_vl")
    forward, image = PixelForward(ModelAdapter(model, processor), PROMPT, ANSWER), pixels()
    values = VisualTokenAttribution(LayerDirectContribution(forward, model.get_decoder()))
    maps = values.attribute(image, target=forward.targets[1])
    ids = forward.inputs(image[0])["input_ids"]
    (drawn,) = draw_positions(contributions(forward, image[0])[1:2], forward.adapter, ids, [(84, 56)])
    assert maps.shape == (1, 1, 56, 84)
    assert torch.corrcoef(torch.stack([maps.flatten(), drawn.flatten()]))[0, 1] > 0.999
    scaled = MSEA(values, scales=(1.0, 1.5)).attribute(image, target=forward.targets[1])
    assert scaled.shape == maps.shape and not torch.equal(scaled, maps)
    suppressed = ARC(values).attribute_all(image)
    assert suppressed.shape[0] == len(forward.targets) and bool(suppressed.isfinite().all())


def test_what_is_refused() -> None:
    forward, image = forward_of("llava"), pixels()
    decoder: Any = forward.model.get_decoder()
    with pytest.raises(InvalidInputError, match="Embedding does not"):
        LayerDirectContribution(forward, decoder.embed_tokens)
    method = LayerDirectContribution(forward, decoder)
    with pytest.raises(InvalidInputError, match="needs a target"):
        method.attribute(image, target=1)
    with pytest.raises(InvalidInputError, match="no token of an answer of 3 tokens"):
        method.attribute(image, target=(3, 5))
    with pytest.raises(InvalidInputError, match="outside the vocabulary"):
        method.attribute(image, target=(0, 10**6))
    with pytest.raises(InvalidInputError, match="Got 2 targets for 1 examples"):
        method.attribute(image, target=[(0, 5), (1, 5)])
    with pytest.raises(InvalidInputError, match="one integer per example"):
        method.attribute(image, target=torch.tensor([[1, 2]]))
    whole = PixelForward(forward.adapter, PROMPT, ANSWER, "answer_log_prob")
    with pytest.raises(InvalidOptionError, match="no logit per token"):
        LayerDirectContribution(whole, decoder).attribute(image, target=0)
