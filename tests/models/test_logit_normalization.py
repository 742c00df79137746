"""Centered and z-scored activations: against the whole vocabulary, and invariant where raw logits are not."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from captum_intramodal import LayerLogitLens, LogitLens, explain
from captum_intramodal.errors import InvalidOptionError
from captum_intramodal.models.logit_lens import LogitNormalization
from tests.testing.families import build
from tests.testing.tiny import random_image, tiny


def by_hand(logits: Tensor, tokens: Tensor, normalization: str) -> Tensor:
    """From the logits of the whole vocabulary, in float64."""
    logits = logits.double()
    centered = logits - logits.mean(-1, keepdim=True)
    values = centered if normalization == "centered" else centered / logits.std(-1, correction=0, keepdim=True)
    return values[..., tokens].float()


@pytest.mark.parametrize("normalization", ["centered", "zscore"])
@pytest.mark.parametrize("model_type", ["qwen2_vl", "llava"])
def test_equals_the_formula_over_the_whole_vocabulary(model_type: str, normalization: LogitNormalization) -> None:
    raw = LogitLens(tiny(model_type)[0], working_memory=4096)
    lens = raw.with_normalization(normalization)
    hidden, tokens = torch.randn(2, 7, raw.hidden_size), torch.tensor([5, 9, 11])
    logits = raw.activation(hidden, torch.arange(raw.vocab_size))
    torch.testing.assert_close(
        lens.activation(hidden, tokens), by_hand(logits, tokens, normalization), atol=1e-4, rtol=1e-4
    )


def test_a_bias_of_the_head_is_centered_as_well() -> None:
    model, _ = tiny("llava")
    model.lm_head.bias = nn.Parameter(torch.randn(model.lm_head.out_features), requires_grad=False)
    raw = LogitLens(model)
    hidden, tokens = torch.randn(4, raw.hidden_size), torch.tensor([5, 9])
    expected = by_hand(raw.activation(hidden, torch.arange(raw.vocab_size)), tokens, "centered")
    torch.testing.assert_close(raw.with_normalization("centered").activation(hidden, tokens), expected)


def test_a_soft_cap_applies_to_centered_products() -> None:
    model, _ = build("gemma3")
    raw = LogitLens(model)
    raw.cap, raw.factor = 3.0, 1.0
    hidden, tokens = torch.randn(4, raw.hidden_size), torch.tensor([5, 9])
    product = raw.normalize(hidden).float() @ raw._weight.float().T
    expected = 3.0 * torch.tanh((product - product.mean(1, keepdim=True))[:, tokens] / 3.0)
    torch.testing.assert_close(raw.with_normalization("centered").activation(hidden, tokens), expected)


@pytest.mark.parametrize("normalization", ["centered", "zscore"])
def test_one_vector_added_to_every_row_changes_no_map(normalization: LogitNormalization) -> None:
    model, processor = tiny("llava")
    shifted = copy.deepcopy(model)
    with torch.no_grad():
        shifted.lm_head.weight.add_(torch.randn(shifted.lm_head.in_features))
    arguments = (processor, random_image(), "describe the picture", "a red dog")
    options = {"scales": (1.0,), "logit_normalization": normalization}
    one, other = (explain(m, *arguments, **options) for m in (model, shifted))  # type: ignore[arg-type]
    torch.testing.assert_close(one.maps[0], other.maps[0], atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(one.relevance, other.relevance, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(one.probabilities, other.probabilities, atol=1e-4, rtol=1e-3)
    raw = [explain(m, *arguments, scales=(1.0,)).maps[0] for m in (model, shifted)]
    assert not torch.allclose(*raw, atol=0.1), "raw logits are not invariant"


def test_weights_changed_in_place_are_centered_anew() -> None:
    model, _ = tiny("llava")
    lens = LogitLens(model, logit_normalization="centered")
    hidden, tokens = torch.randn(3, lens.hidden_size), torch.tensor([5])
    before = lens.activation(hidden, tokens)
    with torch.no_grad():
        model.lm_head.weight[7].mul_(100.0)
    fresh = LogitLens(model, logit_normalization="centered").activation(hidden, tokens)
    torch.testing.assert_close(lens.activation(hidden, tokens), fresh)
    assert not torch.allclose(before, fresh)


def test_tail_replay_centers_over_tokens_that_are_not_masked() -> None:
    model, processor = build("chameleon")
    raw = LogitLens(model)
    assert raw.tail == "replay"
    hidden, tokens = torch.randn(3, raw.hidden_size), torch.tensor(processor.tokenizer("a dog")["input_ids"][-2:])
    logits = raw.activation(hidden, torch.arange(raw.vocab_size))
    kept = logits > torch.finfo(torch.float32).min / 4
    assert not bool(kept.all())
    for row, values in zip(logits, raw.with_normalization("zscore").activation(hidden, tokens), strict=True):
        known = row[row > torch.finfo(torch.float32).min / 4].double()
        torch.testing.assert_close(values, ((row[tokens] - known.mean()) / known.std(correction=0)).float())


def test_the_layer_attribution_takes_it() -> None:
    model, _ = tiny("llava")
    ids = torch.tensor([[5, 6, 7]])
    layer = model.get_decoder().layers[-1]
    by_option = LayerLogitLens(model, layer, logit_normalization="centered").attribute(
        ids, target=9, relu_attributions=False
    )
    lens = LogitLens(model, logit_normalization="centered")
    assert torch.equal(by_option, LayerLogitLens(model, layer, lens).attribute(ids, target=9, relu_attributions=False))
    assert not torch.equal(by_option, LayerLogitLens(model, layer).attribute(ids, target=9, relu_attributions=False))


def test_errors() -> None:
    model, processor = tiny("llava")
    with pytest.raises(InvalidOptionError, match=r"logit_normalization must be one of .*'softmax'"):
        LogitLens(model, logit_normalization="softmax")  # type: ignore[arg-type]
    with pytest.raises(InvalidOptionError, match=r"logit_normalization must be one of .*'softmax'"):
        explain(model, processor, random_image(), "a", "dog", logit_normalization="softmax")  # type: ignore[arg-type]
