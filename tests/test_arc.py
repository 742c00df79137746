from __future__ import annotations

from typing import Any

import pytest
import torch
from captum.attr import IntegratedGradients, LayerIntegratedGradients
from PIL import Image
from tiny import tiny
from torch import Tensor

from captum_intramodal import (
    ARC,
    ActivationRankingCorrelation,
    LayerLogitLens,
    LogitLens,
    ModelAdapter,
    PixelForward,
    rank_biased_overlap,
)
from captum_intramodal.arc import WEIGHTINGS, ContextRelevance, suppress_interference
from captum_intramodal.tam import estimated_causal_inference


@pytest.fixture(scope="module")
def adapter() -> ModelAdapter:
    return ModelAdapter(*tiny("qwen2_vl"))


@pytest.fixture(scope="module")
def inputs(adapter: ModelAdapter) -> dict[str, Any]:
    picture = Image.effect_mandelbrot((96, 64), (-2, -1.5, 1, 1.5), 40).convert("RGB")
    prepared = adapter.prepare([picture], "describe the picture")
    answer = adapter.tokenizer("a red dog and a blue cat", add_special_tokens=False)["input_ids"]
    return adapter.encode(prepared, answer).inputs


def literal_suppression(maps: Tensor, weights: Tensor, least_squares: bool, strength: float) -> Tensor:
    result = []
    for t in range(len(maps)):
        total = sum(float(weights[t, j]) for j in range(len(maps)))
        if total == 0:
            result.append(maps[t].clamp_min(0))
            continue
        interference = sum(float(weights[t, j]) * maps[j].double() for j in range(len(maps))) / total
        energy = float((interference * interference).sum())
        scale = float((maps[t].double() * interference).sum()) / energy if least_squares else 1.0
        result.append((maps[t].double() - strength * scale * interference).clamp_min(0).float())
    return torch.stack(result)


@pytest.mark.parametrize("least_squares", [True, False])
@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_suppression_equals_the_loop(least_squares: bool, strength: float) -> None:
    maps, weights = torch.rand(9, 4, 5), torch.rand(9, 9).tril(-1)
    weights[3] = 0
    actual = suppress_interference(maps, weights, least_squares, strength, chunk_size=4)
    assert torch.allclose(actual, literal_suppression(maps, weights, least_squares, strength), atol=1e-6)
    assert torch.equal(actual[0], maps[0]) and torch.equal(actual[3], maps[3])


def test_suppression_by_hand() -> None:
    # The second map is the first plus something of its own: only that is left.
    maps = torch.tensor([[2.0, 0.0, 0.0], [2.0, 0.0, 3.0]])
    weights = torch.tensor([[0.0, 0.0], [0.7, 0.0]])
    assert torch.allclose(suppress_interference(maps, weights), torch.tensor([[2.0, 0, 0], [0, 0, 3.0]]))
    signed = suppress_interference(-maps, weights, relu_attributions=False)
    assert torch.allclose(signed, torch.tensor([[-2.0, 0, 0], [0, 0, -3.0]]))


def test_context_without_activation_changes_nothing() -> None:
    maps = torch.rand(3, 6)
    maps[0] = 0
    weights = torch.tensor([[0.0, 0, 0], [1.0, 0, 0], [1.0, 0, 0]])
    assert torch.equal(suppress_interference(maps, weights), maps)


def test_relevance_from_the_models_own_logits(adapter: ModelAdapter, inputs: dict[str, Any]) -> None:
    ids = inputs["input_ids"][0]
    positions = torch.arange(len(ids) - 9, len(ids))
    with torch.no_grad():
        logits = adapter.model(**inputs).logits[0]
    for at, shift in (("token", 0), ("prediction", -1)):
        arc = ARC(model=adapter.model, k=20, p=0.8, ranking_position=at)  # type: ignore[arg-type]
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


def test_text_activation_weights_are_tams_causal_inference(adapter: ModelAdapter, inputs: dict[str, Any]) -> None:
    ids = inputs["input_ids"][0]
    positions = torch.arange(len(ids) - 9, len(ids))
    arc = ARC(model=adapter.model, weighting="text_activation")
    context = arc.context(inputs, positions)
    maps, tokens = torch.rand(9, 30), ids[positions]
    expected = estimated_causal_inference(maps, context.text_activation, tokens[:, None] == tokens)
    assert torch.allclose(arc.suppress(maps, context), expected, atol=1e-5)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_weightings(weighting: Any) -> None:
    relevance, activation = torch.tensor([[1.0, 0.25], [0.25, 1.0]]), torch.tensor([[3.0, 5.0], [4.0, 2.0]])
    context = ContextRelevance(relevance, activation, torch.tensor([[False, False], [True, False]]))
    expected = {
        "uniform": 1.0,
        "irrelevance": 0.75,
        "relevance": 0.25,
        "text_activation": 4.0,
        "irrelevance*text_activation": 3.0,
        "relevance*text_activation": 1.0,
    }
    assert torch.equal(context.weights(weighting), torch.tensor([[0.0, 0.0], [expected[weighting], 0.0]]))


def test_k_beyond_the_vocabulary(adapter: ModelAdapter, inputs: dict[str, Any]) -> None:
    positions = torch.tensor([2, 3])
    context = ARC(model=adapter.model, k=10**6).context(inputs, positions)
    assert torch.allclose(context.relevance.diagonal(), torch.ones(2))


def answer_targets(forward: PixelForward) -> list[tuple[int, int]]:
    return list(enumerate(forward.answer_ids))


def test_chain_with_integrated_gradients_on_pixels(adapter: ModelAdapter) -> None:
    """(a): maps of a method on pixels that exist already, suppressed afterwards."""
    forward = PixelForward(adapter, "describe the picture", "a red dog")
    picture = torch.rand(1, 3, 64, 96)
    method = IntegratedGradients(forward)
    maps = torch.cat([method.attribute(picture, target=t, n_steps=3) for t in answer_targets(forward)])
    arc = ARC(model=adapter.model, weighting="irrelevance", relu_attributions=False)
    context = arc.context(forward.inputs(picture[0]), forward.positions(picture[0]))
    suppressed = arc.suppress(maps, context)
    assert suppressed.shape == (3, 3, 64, 96)
    expected = suppress_interference(maps, context.weights(arc.weighting), relu_attributions=False)
    assert torch.equal(suppressed, expected)
    assert torch.equal(suppressed[0], maps[0]) and not torch.equal(suppressed[2], maps[2])


def test_wrapper_around_layer_integrated_gradients(adapter: ModelAdapter) -> None:
    """(b): around a LayerAttribution."""
    forward = PixelForward(adapter, "describe the picture", "a red dog")
    picture = torch.rand(1, 3, 64, 96)
    layer = adapter.lens.layers[0]
    method = LayerIntegratedGradients(forward, layer)
    options = dict(n_steps=2, attribute_to_layer_input=True)
    arc = ActivationRankingCorrelation(method, reduce=lambda a: a.sum(-1), relu_attributions=False)
    targets, positions = answer_targets(forward), forward.positions(picture[0])
    every = arc.attribute_all(picture, targets, positions, **options)
    maps = torch.cat([method.attribute(picture, target=t, **options).sum(-1).detach() for t in targets])
    assert every.shape == maps.shape
    context = arc.context(forward.inputs(picture[0]), positions) if arc.model is not None else None
    assert context is not None
    assert torch.allclose(every, arc.suppress(maps, context), atol=1e-6)
    last = arc.attribute(picture, targets[-1], arc_context=targets[:-1], arc_positions=positions, **options)
    assert torch.allclose(last, every[-1:], atol=1e-6)


def test_wrapper_around_the_logit_lens(adapter: ModelAdapter) -> None:
    forward = PixelForward(adapter, "describe the picture", "a red dog")
    picture = torch.rand(1, 3, 64, 96)
    method = LayerLogitLens(forward, adapter.lens.layers[-1])
    targets = answer_targets(forward)
    result = ARC(method).attribute_all(picture, targets, forward.positions(picture[0]))
    assert result.shape == (3, forward.inputs(picture[0])["input_ids"].shape[1])
    assert torch.equal(result[0], method.attribute(picture, target=targets[0])[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k must be"),
        ({"p": 1.0}, "p must lie"),
        ({"weighting": "attention"}, "weighting"),
        ({"normalization": "none"}, "normalization"),
        ({"ranking_position": "before"}, "ranking_position"),
        ({"strength": -1.0}, "strength"),
        ({"layers": (99,)}, "do not exist"),
        ({"layers": ()}, "At least one"),
    ],
)
def test_bad_options(adapter: ModelAdapter, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ARC(model=adapter.lens, **options)


def test_bad_calls(adapter: ModelAdapter, inputs: dict[str, Any]) -> None:
    arc = ARC(model=adapter.model)
    with pytest.raises(ValueError, match="wrap"):
        ARC()
    with pytest.raises(TypeError, match="model="):
        ARC(adapter.model)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="increase"):
        arc.context(inputs, torch.tensor([3, 2]))
    with pytest.raises(ValueError, match="within the sequence of"):
        arc.context(inputs, torch.tensor([3, 10_000]))
    with pytest.raises(ValueError, match="needs a transformers model"):
        ARC(model=LogitLens(adapter.model)).context(inputs, torch.tensor([3]))
    with pytest.raises(ValueError, match="post-processor"):
        _ = arc.forward_func
    with pytest.raises(ValueError, match=r"\(T, \.\.\.\)"):
        suppress_interference(torch.rand(3, 4), torch.rand(2, 2))
    with pytest.raises(ValueError, match="wraps no attribution method"):
        arc.attribute(torch.rand(1, 3, 8, 8), 1, [], torch.tensor([3]))
