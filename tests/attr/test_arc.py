"""ARC as a post-processor of maps and as a wrapper around Captum methods."""

from __future__ import annotations

from typing import Any

import numpy as np
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
from torch import Tensor, nn

from captum_intramodal import (
    ARC,
    ActivationRankingCorrelation,
    LayerLogitLens,
    ModelAdapter,
    PixelForward,
)
from captum_intramodal.attr.hidden_states import attribute_positions
from captum_intramodal.errors import InvalidInputError, InvalidOptionError
from captum_intramodal.functional.suppression import suppress_interference
from tests.testing.tiny import tiny


@pytest.fixture(scope="module")
def adapter() -> ModelAdapter:
    return ModelAdapter(*tiny("qwen2_vl"))


def answer_targets(forward: PixelForward) -> list[tuple[int, int]]:
    return list(enumerate(forward.answer_ids))


def suppress_by_regression(maps: Tensor, weights: Tensor) -> Tensor:
    """Subtract the weighted mean of the context's maps, scaled by numpy's least squares."""
    result = []
    for values, row in zip(maps.double().numpy(), weights.double().numpy(), strict=True):
        interference = row @ maps.double().numpy() / max(row.sum(), 1e-30)
        scale = np.linalg.lstsq(interference[:, None], values, rcond=None)[0]
        result.append((values - scale * interference).clip(0))
    return torch.from_numpy(np.array(result)).float()


def test_post_processing_of_integrated_gradients_on_pixels(adapter: ModelAdapter) -> None:
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
    context = arc.context(forward.inputs(image[0]), positions)
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
    assert torch.allclose(every, suppress_by_regression(maps, weights), atol=1e-6)


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
    with pytest.raises(InvalidInputError, match="one of the answer's"):
        methods[0].attribute(image, 7)
    with pytest.raises(InvalidInputError, match="3 tokens, but there are 2"):
        methods[0].attribute(image, targets[1], arc_context=targets[:1], arc_relevance=relevance)


def test_features_of_hidden_states_are_reduced(adapter: ModelAdapter) -> None:
    forward, image = PixelForward(adapter, "describe the picture", "a"), torch.rand(1, 3, 64, 96)
    method = LayerGradientXActivation(forward, adapter.lens.layers[0])
    plain = method.attribute(image, target=(0, forward.answer_ids[0])).detach()
    for reduce, expected in (("sum", plain.sum(-1)), ("norm", plain.norm(dim=-1)), (None, plain)):
        actual = ARC(method, relu_attributions=False, reduce=reduce).attribute_all(image)  # type: ignore[arg-type]
        assert torch.allclose(actual, expected, atol=1e-6)
    with pytest.raises(InvalidOptionError, match="reduce must be"):
        ARC(method, reduce="mean")  # type: ignore[arg-type]


def test_the_logit_lens_attributes_all_targets_in_one_pass(adapter: ModelAdapter) -> None:
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
    with pytest.warns(UserWarning, match="takes no target"):
        every = ARC(LayerActivation(forward, adapter.lens.layers[0]), reduce="norm").attribute_all(image)
    assert every[0].max() > 0 and torch.allclose(every[1:], torch.zeros(()), atol=1e-3)


class IdsAndPixels(nn.Module):
    """A forward function of the processor's pixels and of token ids."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, pixel_values=pixel_values).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wrapper_around_a_plain_module_needs_positions(dtype: torch.dtype) -> None:
    model, processor = tiny("llava")
    adapter = ModelAdapter(model.to(dtype), processor)
    inputs = PixelForward(adapter, "describe the picture", "a red dog").inputs(torch.rand(3, 64, 96))
    ids, pixels = inputs["input_ids"], inputs["pixel_values"].to(dtype)
    length = ids.shape[1]
    positions = torch.arange(length - 3, length)
    targets = [(int(p) - 1, int(ids[0, p])) for p in positions]
    method = LayerIntegratedGradients(IdsAndPixels(model), model.get_decoder().layers[1])
    options: dict[str, Any] = {"additional_forward_args": ids, "n_steps": 2}
    arc = ARC(method)
    every = arc.attribute_all(pixels, targets, positions, **options)
    maps = torch.cat(
        [method.attribute(pixels, target=target, **options).detach().float().sum(-1) for target in targets]
    )
    assert every.shape == (3, length) and every.dtype == torch.float32
    relevance = arc.context({"input_ids": ids, "pixel_values": pixels}, positions)
    assert torch.allclose(every, arc.suppress(maps, relevance), atol=1e-2 if dtype == torch.bfloat16 else 1e-5)
    with pytest.raises(InvalidInputError, match="arc_positions"):
        arc.attribute_all(pixels, targets, **options)
    with pytest.raises(InvalidInputError, match="3 targets but 2 positions"):
        arc.attribute_all(pixels, targets, positions[:2], **options)
    with pytest.raises(InvalidInputError, match="arc_context"):
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
def test_options_out_of_range_are_refused(adapter: ModelAdapter, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ARC(model=adapter.lens, **options)


def test_a_method_or_a_model_is_needed(adapter: ModelAdapter) -> None:
    arc = ARC(model=adapter.model)
    with pytest.raises(InvalidOptionError, match="to wrap"):
        ARC()
    with pytest.raises(TypeError, match="model="):
        ARC(adapter.model)  # type: ignore[arg-type]
    with pytest.raises(InvalidOptionError, match="post-processor"):
        _ = arc.forward_func
    with pytest.raises(InvalidOptionError, match="wraps no attribution method"):
        arc.attribute(torch.rand(1, 3, 8, 8), 1, [], torch.tensor([3]))
    assert not arc.multiplies_by_inputs


def test_one_example_at_a_time(adapter: ModelAdapter) -> None:
    forward, images = PixelForward(adapter, "describe the picture", "a red dog"), torch.rand(2, 3, 64, 96)
    arc = ARC(LayerGradientXActivation(forward, adapter.lens.layers[1]))
    relevance = arc.forward_context(images[:1])
    with pytest.raises(InvalidInputError, match=r"positions for 1 examples.* batch of 2"):
        arc.forward_context(images)
    with pytest.raises(InvalidInputError, match="one example at a time"):
        arc.attribute_all(images, arc_relevance=relevance)
