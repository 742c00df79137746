"""Captum's layer methods at decoder layers, against Captum on one batch and against formulas."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from captum.attr import (
    InternalInfluence,
    LayerActivation,
    LayerConductance,
    LayerDeepLift,
    LayerGradCam,
    LayerGradientShap,
    LayerGradientXActivation,
    LayerIntegratedGradients,
    NoiseTunnel,
    Saliency,
)
from torch import Tensor, nn

from captum_intramodal import HiddenStates, ModelAdapter, PixelForward
from captum_intramodal.attr.hidden_states import attribute_positions, check_reduction, single_tensor
from captum_intramodal.errors import InvalidInputError, InvalidOptionError
from captum_intramodal.models.layer_io import first_tensor, replace_first_tensor
from tests.testing.tiny import tiny


@cache
def pixel_forward(model_type: str) -> PixelForward:
    """Return a forward function that runs images one by one, as for models that do not take stacked inputs."""
    forward = PixelForward(ModelAdapter(*tiny(model_type)), "describe the picture", "a red dog")
    forward.stacks = False
    return forward


class OnePass(nn.Module):
    """Run all images in one batch, as Captum expects; not every family of PixelForward allows it."""

    def __init__(self, forward: PixelForward) -> None:
        super().__init__()
        self.pixels = forward

    def forward(self, images: Tensor) -> Tensor:
        examples = [self.pixels.inputs(image) for image in images]
        batch = {
            key: torch.cat([example[key] for example in examples]) if isinstance(value, Tensor) else value
            for key, value in examples[0].items()
        }
        count = len(self.pixels.answer_ids)
        return self.pixels.adapter.run(batch).logits[:, -count - 1 : -1]


METHODS: list[tuple[type, dict[str, Any]]] = [
    (LayerIntegratedGradients, {"n_steps": 3}),
    (LayerIntegratedGradients, {"n_steps": 2, "attribute_to_layer_input": True}),
    (LayerConductance, {"n_steps": 2}),
    (LayerGradientXActivation, {}),
    (LayerActivation, {}),
    (InternalInfluence, {"n_steps": 2}),
    (LayerDeepLift, {}),
    (LayerGradientShap, {"n_samples": 2, "baselines": torch.zeros(2, 3, 64, 96)}),
]
CASES = [("llava", *case) for case in METHODS] + [(t, *METHODS[i]) for t in ("qwen2_vl", "smolvlm") for i in (0, 2)]


@pytest.mark.parametrize(("model_type", "method", "options"), CASES, ids=lambda v: getattr(v, "__name__", ""))
def test_equals_captum_on_one_batch(model_type: str, method: type, options: dict[str, Any]) -> None:
    forward, image = pixel_forward(model_type), torch.rand(1, 3, 64, 96)
    layer = forward.adapter.lens.layers[1]
    options = options if method is LayerActivation else options | {"target": (1, forward.answer_ids[1])}
    results = []
    for attribute in (
        lambda: attribute_positions(method(forward, layer), image, None, **options),
        lambda: method(OnePass(forward), layer).attribute(image, **options),
    ):
        torch.manual_seed(0)
        np.random.seed(0)
        results.append(attribute().detach())
    assert results[0].shape == results[1].shape and results[0].shape[-1] == 64
    assert torch.allclose(*results, atol=1e-5 * float(results[1].abs().max()))


def test_equals_captum_with_one_step_at_a_time() -> None:
    forward, image = pixel_forward("llava"), torch.rand(1, 3, 64, 96)
    method = LayerIntegratedGradients(forward, forward.adapter.lens.layers[1])
    options: dict[str, Any] = {"n_steps": 8, "target": (1, forward.answer_ids[1])}
    one_at_a_time, delta = method.attribute(image, internal_batch_size=1, return_convergence_delta=True, **options)
    assert delta.abs() < 0.02 * one_at_a_time.sum().abs()
    assert torch.allclose(attribute_positions(method, image, "sum", **options), one_at_a_time.sum(-1), atol=1e-4)


@pytest.mark.parametrize("model_type", ["llava", "qwen2_vl"])
def test_grad_cam_equals_its_formula(model_type: str) -> None:
    forward, image = pixel_forward(model_type), torch.rand(1, 3, 64, 96)
    layer, target = forward.adapter.lens.layers[-2], forward.answer_ids[2]
    kept: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> Any:
        kept.append(first_tensor(output).detach().requires_grad_())
        return replace_first_tensor(output, kept[-1])

    handle = layer.register_forward_hook(keep)
    forward(image)[0, 2, target].backward()
    handle.remove()
    assert kept[0].grad is not None
    hidden, gradient = kept[0].detach().numpy()[0], kept[0].grad.numpy()[0]
    expected = (hidden * gradient.mean(axis=0)).sum(axis=1)
    method = LayerGradCam(forward, layer)
    actual = attribute_positions(method, image, "sum", target=(2, target))
    assert np.allclose(actual.numpy(), expected[None], atol=1e-6)
    clipped = attribute_positions(method, image, "sum", target=(2, target), relu_attributions=True)
    assert np.allclose(clipped.numpy(), expected.clip(0)[None], atol=1e-6)
    features = attribute_positions(method, image, None, target=(2, target), attr_dim_summation=False)
    assert np.allclose(features.sum(-1).numpy(), expected[None], atol=1e-6)


class KeywordLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, *, hidden_states: Tensor) -> tuple[Tensor, None]:
        return self.linear(hidden_states), None


class KeywordNet(nn.Module):
    def __init__(self, one_by_one: bool = False) -> None:
        super().__init__()
        self.layer, self.one_by_one = KeywordLayer(), one_by_one

    def forward(self, x: Tensor) -> Tensor:
        examples = x.split(1) if self.one_by_one else [x]
        return torch.cat([self.layer(hidden_states=e)[0].square().sum((1, 2)) for e in examples])


@pytest.mark.parametrize("at_input", [False, True])
def test_layers_called_by_keyword_that_return_tuples(at_input: bool) -> None:
    net, x = KeywordNet(), torch.rand(2, 3, 4)
    method = LayerGradientXActivation(net, net.layer)
    with pytest.raises(Exception, match=r".+"):
        method.attribute(x, attribute_to_layer_input=at_input)
    actual = attribute_positions(method, x, None, attribute_to_layer_input=at_input)
    hidden = net.layer.linear(x).detach()
    expected = x * (2 * hidden @ net.layer.linear.weight) if at_input else 2 * hidden.square()
    assert torch.allclose(actual, expected, atol=1e-6)
    assert method.forward_func is net and method.layer is net.layer


def test_other_functions_that_run_examples_one_by_one_are_refused() -> None:
    net, x = KeywordNet(one_by_one=True), torch.rand(2, 3, 4)
    with pytest.raises(InvalidInputError, match="one by one"):
        attribute_positions(LayerGradientXActivation(net, net.layer), x, None)
    attribute_positions(LayerGradientXActivation(net, net.layer), x[:1], None)


def test_features_are_reduced() -> None:
    net, x = KeywordNet(), torch.rand(1, 3, 4)
    method = LayerGradientXActivation(net, net.layer)
    plain = attribute_positions(method, x, None)
    assert torch.equal(attribute_positions(method, x, "sum"), plain.sum(-1))
    assert torch.equal(attribute_positions(method, x, "norm"), plain.norm(dim=-1))
    assert torch.equal(attribute_positions(method, x, lambda a: a.amax(-1)), plain.amax(-1))


def test_noise_tunnel_around_a_layer_method() -> None:
    forward, image = pixel_forward("llava"), torch.rand(1, 3, 64, 96)
    method = LayerGradientXActivation(forward, forward.adapter.lens.layers[1])
    options: dict[str, Any] = {"target": (0, forward.answer_ids[0])}
    quiet = attribute_positions(NoiseTunnel(method), image, "sum", nt_samples=2, stdevs=0.0, **options)
    assert torch.allclose(quiet, attribute_positions(method, image, "sum", **options), atol=1e-5)


def test_hooks_are_removed() -> None:
    forward, image = pixel_forward("llava"), torch.rand(2, 3, 64, 96)
    forward(image[:1])  # transformers adds hooks of its own in its first pass
    layer = forward.adapter.lens.layers[1]
    before = len(layer._forward_hooks), len(layer._forward_pre_hooks)
    for target in ((0, 3), (0, 10**6)):
        try:
            attribute_positions(LayerGradientXActivation(forward, layer), image, "sum", target=target)
        except IndexError:
            assert target == (0, 10**6)
    assert (len(layer._forward_hooks), len(layer._forward_pre_hooks)) == before


def test_hidden_states_of_another_shape_are_refused() -> None:
    states = HiddenStates(net := nn.Linear(4, 2), net)
    with pytest.raises(InvalidInputError, match="positions"):
        states(torch.rand(3, 4))


def test_a_layer_outside_the_forward_function_is_refused() -> None:
    states = HiddenStates(pixel_forward("llava"), nn.Linear(4, 4))
    with pytest.raises(InvalidInputError, match="Linear did not run"):
        states(torch.rand(2, 3, 64, 96))


def test_other_methods_and_reductions_are_refused() -> None:
    net = KeywordNet()
    with pytest.raises(InvalidOptionError, match="LayerAttribution of one layer"):
        attribute_positions(Saliency(net), torch.rand(1, 3, 4), "sum")
    with pytest.raises(InvalidOptionError, match="reduce must be"):
        check_reduction("mean")


def test_several_tensors_are_refused() -> None:
    assert torch.equal(single_tensor((torch.ones(2),)), torch.ones(2))
    with pytest.raises(InvalidInputError, match=r"got \['Tensor', 'Tensor'\]"):
        single_tensor((torch.ones(2), torch.ones(2)))
