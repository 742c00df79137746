"""The randomization check shuffles weights from the top, measures correlations, and restores every bit."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from captum_intramodal import ModelAdapter
from captum_intramodal.adapter.answer_scorer import AnswerScorer
from captum_intramodal.demo import CHECKPOINT, IMAGES
from captum_intramodal.errors import InvalidInputError, InvalidOptionError
from captum_intramodal.metrics import randomization_check
from captum_intramodal.models.decoder import decoder_layers
from tests.testing.families import build


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(30, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 1)).to(dtype)


def input_gradient(net: nn.Module) -> Callable[[], Tensor]:
    dtype = next(net.parameters()).dtype
    inputs = torch.randn(8, 30, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    return lambda: torch.autograd.grad(net(inputs).sum(), inputs)[0].float()


def weight_bits(module: nn.Module) -> list[Tensor]:
    return [parameter.detach().contiguous().view(torch.uint8).clone() for parameter in module.parameters()]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_correlations_equal_scipy_on_the_returned_maps() -> None:
    stats = pytest.importorskip("scipy.stats")
    net, maps = network(), []

    def explain() -> Tensor:
        maps.append(input_gradient(net)().round(decimals=2))  # with ties
        return maps[-1]

    steps = randomization_check(net, explain)
    assert [step.layer for step in steps] == ["4", "2", "0"] and len(maps) == 4
    for step, map in zip(steps, maps[1:], strict=True):
        assert step.rank_correlation == pytest.approx(stats.spearmanr(maps[0].ravel(), map.ravel()).statistic)
        assert step.correlation == pytest.approx(stats.pearsonr(maps[0].ravel(), map.ravel()).statistic)


def test_gradients_lose_correlation_and_maps_of_the_input_alone_keep_it() -> None:
    net = network()
    old = weight_bits(net)
    assert abs(randomization_check(net, input_gradient(net))[-1].rank_correlation) < 0.3
    image = torch.randn(7, 9, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    # Correlations do not depend on scale, however large or small.
    for scale, expected in ((1.0, 1), (1e200, 1), (-1e-200, -1), (0.0, 0)):
        steps = randomization_check(net, lambda s=scale: image if equal(weight_bits(net), old) else image * s)  # type: ignore[misc]
        assert [step[1:] for step in steps] == [pytest.approx((expected, expected))] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_are_shuffled_from_the_top_and_restored(dtype: torch.dtype) -> None:
    net = network(dtype)
    old, random_state, snapshots = weight_bits(net), torch.get_rng_state(), []
    first = net[0].weight
    first.requires_grad_(False)
    first.grad = torch.ones_like(first)

    def explain() -> Tensor:
        snapshots.append([parameter.detach().clone() for parameter in net.parameters()])
        return input_gradient(net)()

    steps = randomization_check(net, explain, seed=3)
    for randomized, weights in enumerate(snapshots):
        for index, (current, original) in enumerate(zip(weights, snapshots[0], strict=True)):
            if current.numel() > 1:
                assert torch.equal(current, original) == (index < 6 - 2 * randomized)
            torch.testing.assert_close(current.ravel().sort().values, original.ravel().sort().values, rtol=0, atol=0)
    assert equal(weight_bits(net), old) and torch.equal(torch.get_rng_state(), random_state)
    assert not first.requires_grad and first.grad is not None and bool((first.grad == 1).all())
    assert net[2].weight.requires_grad and net[0].weight is first
    assert randomization_check(net, input_gradient(net), seed=3) == steps
    assert randomization_check(net, input_gradient(net), seed=4) != steps


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_weights_are_restored_after_exceptions(error: type[BaseException]) -> None:
    net = network()
    old, calls = weight_bits(net), []

    def explain() -> Tensor:
        calls.append(weight_bits(net))
        if len(calls) == 3:
            raise error
        return input_gradient(net)()

    with pytest.raises(error):
        randomization_check(net, explain)
    assert not equal(calls[2], old) and equal(weight_bits(net), old)


def test_shared_weights_are_restored() -> None:
    net = network()
    net[2].weight = nn.Parameter(net[2].weight.detach().clone())
    sharing = nn.Sequential(*net[:3], nn.Tanh(), nn.Linear(20, 20), net[4])
    sharing[4].weight = net[2].weight
    old = weight_bits(sharing)
    assert len(randomization_check(sharing, input_gradient(sharing), layers=[sharing[4], sharing[2]])) == 2
    assert equal(weight_bits(sharing), old)


def test_invalid_layers_and_maps_are_rejected() -> None:
    net = network()
    shapes = iter([(2, 3), (3, 2)])
    with pytest.raises(InvalidInputError, match=r"shape \(2, 3\), but with '4' randomized \(3, 2\)"):
        randomization_check(net, lambda: torch.arange(6.0).reshape(next(shapes)))
    with pytest.raises(InvalidInputError, match=r"one value everywhere, 1\.0"):
        randomization_check(net, lambda: torch.ones(3))
    with pytest.raises(InvalidOptionError, match="not a module of Sequential"):
        randomization_check(net, input_gradient(net), layers=[nn.Linear(2, 2)])
    with pytest.raises(InvalidOptionError, match="'1' has no weights"):
        randomization_check(net, input_gradient(net), layers=[net[1]])
    with pytest.raises(InvalidOptionError, match="no layer"):
        randomization_check(net, input_gradient(net), layers=[])
    with pytest.raises(InvalidOptionError, match="they are offloaded"):
        randomization_check(net.to("meta"), lambda: torch.arange(3.0))


def test_multimodal_models_are_randomized_from_the_head_to_the_vision_tower() -> None:
    model = AutoModelForImageTextToText.from_pretrained(CHECKPOINT, dtype=torch.float32)
    adapter = ModelAdapter(model, AutoProcessor.from_pretrained(CHECKPOINT))
    scorer = AnswerScorer(adapter, "describe the picture.", "a dog and a cat.")
    images = [Image.open(IMAGES[0]).convert("RGB"), Image.new("RGB", (96, 96), "gray")]
    old, scores = weight_bits(model), scorer.log_probability(images)
    steps = randomization_check(model, lambda: scorer.log_probability(images))
    names = dict(model.named_modules())
    decoder = model.get_decoder()
    layers = [model.lm_head, decoder.norm, *reversed(decoder.layers), decoder.embed_tokens, model.model.visual]
    assert [names[step.layer] for step in steps] == layers
    assert {p for layer in layers for p in layer.parameters()} == set(model.parameters())
    assert steps[-1].rank_correlation < 0.9 and np.isfinite([step[1:] for step in steps]).all()
    assert equal(weight_bits(model), old)
    torch.testing.assert_close(scorer.log_probability(images), scores, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("family", "head", "vision"),
    [
        ("blip", "text_decoder.cls", "vision_model"),
        ("llava_next", "lm_head", "model.vision_tower"),
        ("mllama", "lm_head", "model.vision_model"),
        ("t5gemma2", "lm_head", "model.encoder"),
    ],
)
def test_heads_come_first_and_vision_towers_last(family: str, head: str, vision: str) -> None:
    model = build(family)[0]
    steps = randomization_check(model, lambda: torch.arange(3.0))
    layers = [step.layer for step in steps]
    decoder = [name for name, module in model.named_modules() if module in set(decoder_layers(model))]
    assert layers[0] == head and layers[-1] == vision
    assert [layer for layer in layers if layer in decoder] == decoder[::-1]
