"""Relevance of context from a model: rankings of its own logits, several layers, batches' positions, misuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image

from captum_intramodal import ARC, LogitLens, ModelAdapter, rank_biased_overlap
from captum_intramodal.attr.relevance import check_positions
from captum_intramodal.errors import InvalidInputError, InvalidOptionError
from captum_intramodal.functional.tam import estimated_causal_inference
from tests.testing.tiny import tiny


@pytest.fixture(scope="module")
def adapter() -> ModelAdapter:
    return ModelAdapter(*tiny("qwen2_vl"))


@pytest.fixture(scope="module")
def inputs(adapter: ModelAdapter) -> dict[str, Any]:
    image = Image.effect_mandelbrot((96, 64), (-2, -1.5, 1, 1.5), 40).convert("RGB")
    prepared = adapter.prepare([image], "describe the picture")
    answer = adapter.tokenizer("a red dog and a blue cat", add_special_tokens=False)["input_ids"]
    return adapter.encode(prepared, answer).inputs


def test_relevance_equals_the_overlap_of_rankings_of_the_models_logits(
    adapter: ModelAdapter, inputs: dict[str, Any]
) -> None:
    ids = inputs["input_ids"][0]
    positions = torch.arange(len(ids) - 9, len(ids))
    with torch.no_grad():
        logits = adapter.model(**inputs).logits[0]
    for ranking_position, shift in (("token", 0), ("prediction", -1)):
        arc = ARC(model=adapter.model, k=20, p=0.8, ranking_position=ranking_position)  # type: ignore[arg-type]
        context = arc.context(inputs, positions)
        rankings = logits[positions + shift].argsort(dim=1, descending=True, stable=True)[:, :20]
        for t in range(9):
            for j in range(9):
                expected = rank_biased_overlap(rankings[t], rankings[j], 0.8)
                assert context.relevance[t, j].item() == pytest.approx(expected.item(), abs=1e-5)
                assert context.context[t, j] == (j < t and ids[positions[t]] != ids[positions[j]])
                activation = logits[positions[j], ids[positions[t]]].clamp_min(0)
                assert context.text_activation[t, j].item() == pytest.approx(activation.item(), abs=1e-5)


def test_several_layers_are_averaged(adapter: ModelAdapter, inputs: dict[str, Any]) -> None:
    positions = torch.arange(5) + inputs["input_ids"].shape[1] - 5
    each = [ARC(model=adapter.model, layers=(layer,)).context(inputs, positions).relevance for layer in (0, -1)]
    both = ARC(model=adapter.model, layers=(0, -1)).context(inputs, positions).relevance
    assert torch.allclose(both, (each[0] + each[1]) / 2)


def test_text_activation_weights_equal_tams_causal_inference(adapter: ModelAdapter, inputs: dict[str, Any]) -> None:
    ids = inputs["input_ids"][0]
    positions = torch.arange(len(ids) - 9, len(ids))
    arc = ARC(model=adapter.model, weighting="text_activation")
    context = arc.context(inputs, positions)
    maps, tokens = torch.rand(9, 30), ids[positions]
    expected = estimated_causal_inference(maps, context.text_activation, tokens[:, None] == tokens)
    assert torch.allclose(arc.suppress(maps, context), expected, atol=1e-5)


def test_k_beyond_the_vocabulary_ranks_all_of_it(adapter: ModelAdapter, inputs: dict[str, Any]) -> None:
    positions = torch.tensor([2, 3])
    context = ARC(model=adapter.model, k=10**6).context(inputs, positions)
    assert torch.allclose(context.relevance.diagonal(), torch.ones(2))


def test_inputs_that_do_not_fit_are_refused(adapter: ModelAdapter, inputs: dict[str, Any]) -> None:
    arc, one = ARC(model=adapter.model), torch.tensor([3])
    with pytest.raises(InvalidInputError, match="increase"):
        arc.context(inputs, torch.tensor([3, 2]))
    with pytest.raises(InvalidInputError, match="within the sequence of"):
        arc.context(inputs, torch.tensor([3, 10_000]))
    with pytest.raises(InvalidInputError, match="pass a list of tensors"):
        arc.context(inputs, [one, one])
    with pytest.raises(InvalidInputError, match="'input_ids'"):
        arc.context({}, one)
    mask = torch.ones_like(inputs["input_ids"])
    mask[:, :4] = 0
    with pytest.raises(InvalidInputError, match=r"examples \[0\] lie in the padding"):
        arc.context(inputs | {"attention_mask": mask}, one)
    with pytest.raises(InvalidOptionError, match="needs a transformers model"):
        ARC(model=LogitLens(adapter.model)).context(inputs, one)


@pytest.mark.parametrize("positions", [torch.empty(0, dtype=torch.int64), torch.rand(2), torch.ones(1, 2).long()])
def test_positions_are_integers_in_one_dimension(positions: torch.Tensor) -> None:
    with pytest.raises(InvalidInputError, match="non-empty 1-D integer tensor"):
        check_positions(positions, None)
