from __future__ import annotations

from typing import Any

import pytest
import torch
from captum.attr import (
    IntegratedGradients,
    InternalInfluence,
    LayerActivation,
    LayerConductance,
    LayerGradCam,
    LayerGradientXActivation,
    LayerIntegratedGradients,
)
from PIL import Image
from torch import Tensor, nn

from captum_intramodal import (
    ARC,
    ActivationRankingCorrelation,
    LayerLogitLens,
    LogitLens,
    ModelAdapter,
    PixelForward,
    rank_biased_overlap,
)
from captum_intramodal.attr.hidden_states import attribute_positions
from captum_intramodal.functional.suppression import WEIGHTINGS, ContextRelevance, suppress_interference
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
    actual = suppress_interference(maps, weights, least_squares, strength, working_memory=200)
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
    image = torch.rand(1, 3, 64, 96)
    method = IntegratedGradients(forward)
    maps = torch.cat([method.attribute(image, target=t, n_steps=3) for t in answer_targets(forward)])
    arc = ARC(model=adapter.model, weighting="irrelevance", relu_attributions=False)
    context = arc.context(forward.inputs(image[0]), forward.positions(image[0]))
    suppressed = arc.suppress(maps, context)
    assert suppressed.shape == (3, 3, 64, 96)
    expected = suppress_interference(maps, context.weights(arc.weighting), relu_attributions=False)
    assert torch.equal(suppressed, expected)
    assert torch.equal(suppressed[0], maps[0]) and not torch.equal(suppressed[2], maps[2])


def test_wrapper_around_layer_integrated_gradients(adapter: ModelAdapter) -> None:
    """(b): around a LayerAttribution."""
    forward = PixelForward(adapter, "describe the picture", "a red dog")
    image = torch.rand(1, 3, 64, 96)
    layer = adapter.lens.layers[0]
    method = LayerIntegratedGradients(forward, layer)
    options = dict(n_steps=2, attribute_to_layer_input=True)
    arc = ActivationRankingCorrelation(method, relu_attributions=False)
    targets, positions = answer_targets(forward), forward.positions(image[0])
    every = arc.attribute_all(image, targets, positions, **options)
    maps = torch.cat(
        [method.attribute(image, target=t, internal_batch_size=1, **options).sum(-1).detach() for t in targets]
    )
    assert every.shape == maps.shape
    context = arc.context(forward.inputs(image[0]), positions) if arc.model is not None else None
    assert context is not None
    assert torch.allclose(every, arc.suppress(maps, context), atol=1e-6)
    last = arc.attribute(image, targets[-1], arc_context=targets[:-1], arc_positions=positions, **options)
    assert torch.allclose(last, every[-1:], atol=1e-6)
    assert torch.allclose(arc.attribute_all(image, **options), every, atol=1e-6)
    assert torch.allclose(arc.attribute(image, targets[1], **options), every[1:2], atol=1e-6)


@pytest.mark.parametrize("model_type", ["qwen2_vl", "llava", "smolvlm"])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        (LayerGradientXActivation, {}),
        (LayerGradCam, {}),
        (LayerConductance, {"n_steps": 2}),
        (InternalInfluence, {"n_steps": 2}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_wrapper_around_layer_methods(model_type: str, method: type, options: dict[str, Any]) -> None:
    adapter = ModelAdapter(*tiny(model_type))
    forward, image = PixelForward(adapter, "describe the picture", "a red dog"), torch.rand(1, 3, 64, 96)
    inner = method(forward, adapter.lens.layers[1])
    arc = ARC(inner)
    maps = torch.cat([attribute_positions(inner, image, "sum", target=t, **options) for t in answer_targets(forward)])
    relevance = arc.context(forward.inputs(image[0]), forward.positions(image[0]))
    every = arc.attribute_all(image, **options)
    assert every.shape == (3, forward.inputs(image[0])["input_ids"].shape[1])
    weights = relevance.weights("irrelevance")
    assert torch.allclose(every, literal_suppression(maps, weights, True, 1.0), atol=1e-6)


def test_relevance_is_computed_once_for_several_methods(adapter: ModelAdapter, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, image = PixelForward(adapter, "describe the picture", "a red dog"), torch.rand(1, 3, 64, 96)
    layer, targets = adapter.lens.layers[1], answer_targets(forward)
    methods = [ARC(LayerGradientXActivation(forward, layer)), ARC(LayerGradCam(forward, layer), model=adapter.lens)]
    expected = [arc.attribute_all(image) for arc in methods]
    relevance = methods[0].forward_context(image)
    monkeypatch.setattr(ARC, "forward_context", None)
    for arc, maps in zip(methods, expected, strict=True):
        assert torch.allclose(arc.attribute_all(image, arc_relevance=relevance), maps, atol=1e-6)
        assert torch.allclose(arc.attribute(image, targets[1], arc_relevance=relevance), maps[1:2], atol=1e-6)
    with pytest.raises(ValueError, match="one of the answer's"):
        methods[0].attribute(image, 7)
    with pytest.raises(ValueError, match="3 tokens, but there are 2"):
        methods[0].attribute(image, targets[1], arc_context=targets[:1], arc_relevance=relevance)


def test_features_of_hidden_states_are_reduced(adapter: ModelAdapter) -> None:
    forward, image = PixelForward(adapter, "describe the picture", "a"), torch.rand(1, 3, 64, 96)
    method = LayerGradientXActivation(forward, adapter.lens.layers[0])
    plain = method.attribute(image, target=(0, forward.answer_ids[0])).detach()
    for reduce, expected in (("sum", plain.sum(-1)), ("norm", plain.norm(dim=-1)), (None, plain)):
        actual = ARC(method, relu_attributions=False, reduce=reduce).attribute_all(image)  # type: ignore[arg-type]
        assert torch.allclose(actual, expected, atol=1e-6)
    with pytest.raises(ValueError, match="reduce"):
        ARC(method, reduce="mean")  # type: ignore[arg-type]


def test_all_targets_in_one_pass_of_the_logit_lens(adapter: ModelAdapter) -> None:
    forward, image = PixelForward(adapter, "describe the picture", "a red dog"), torch.rand(1, 3, 64, 96)
    method = LayerLogitLens(forward, adapter.lens.layers[-1])
    arc, calls = ARC(method), []
    relevance = arc.forward_context(image)
    handle = adapter.lens.layers[0].register_forward_hook(lambda *_: calls.append(1))
    every = arc.attribute_all(image, arc_relevance=relevance)
    handle.remove()
    assert len(calls) == 1
    maps = torch.cat([method.attribute(image, target=target) for target in answer_targets(forward)])
    assert torch.allclose(every, arc.suppress(maps, relevance), atol=1e-6)


def test_a_method_without_target_runs_once_and_warns(adapter: ModelAdapter) -> None:
    forward, image = PixelForward(adapter, "describe the picture", "a red dog"), torch.rand(1, 3, 64, 96)
    with pytest.warns(UserWarning, match="knows no target"):
        every = ARC(LayerActivation(forward, adapter.lens.layers[0]), reduce="norm").attribute_all(image)
    assert every[0].max() > 0 and torch.allclose(every[1:], torch.zeros(()), atol=1e-3)


class Plain(nn.Module):
    """A plain function of the processor's pixels, with ids beside them."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, pixel_values=pixel_values).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_module_over_ids_and_pixels(dtype: torch.dtype) -> None:
    model, processor = tiny("llava")
    adapter = ModelAdapter(model.to(dtype), processor)
    inputs = PixelForward(adapter, "describe the picture", "a red dog").inputs(torch.rand(3, 64, 96))
    ids, pixels = inputs["input_ids"], inputs["pixel_values"].to(dtype)
    length = ids.shape[1]
    positions = torch.arange(length - 3, length)
    targets = [(int(p) - 1, int(ids[0, p])) for p in positions]
    method = LayerIntegratedGradients(Plain(model), model.get_decoder().layers[1])
    options: dict[str, Any] = {"additional_forward_args": ids, "n_steps": 2}
    arc = ARC(method)
    every = arc.attribute_all(pixels, targets, positions, **options)
    maps = torch.cat(
        [method.attribute(pixels, target=target, **options).detach().float().sum(-1) for target in targets]
    )
    assert every.shape == (3, length) and every.dtype == torch.float32
    relevance = arc.context({"input_ids": ids, "pixel_values": pixels}, positions)
    assert torch.allclose(every, arc.suppress(maps, relevance), atol=1e-2 if dtype == torch.bfloat16 else 1e-5)
    with pytest.raises(ValueError, match="arc_positions"):
        arc.attribute_all(pixels, targets, **options)
    with pytest.raises(ValueError, match="arc_context"):
        arc.attribute(pixels, targets[-1], **options)


def test_wrapper_around_the_logit_lens(adapter: ModelAdapter) -> None:
    forward = PixelForward(adapter, "describe the picture", "a red dog")
    image = torch.rand(1, 3, 64, 96)
    method = LayerLogitLens(forward, adapter.lens.layers[-1])
    targets = answer_targets(forward)
    result = ARC(method).attribute_all(image, targets, forward.positions(image[0]))
    assert result.shape == (3, forward.inputs(image[0])["input_ids"].shape[1])
    assert torch.allclose(result[0], method.attribute(image, target=targets[0])[0], atol=1e-6)


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
