"""Scores of a teacher-forced answer, batched or one example at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from captum.attr import (
    GuidedBackprop,
    IntegratedGradients,
    LayerIntegratedGradients,
)
from torch import Tensor, nn

from captum_intramodal import ModelAdapter, PixelForward
from captum_intramodal.errors import (
    EmptyAnswerError,
    InvalidInputError,
    InvalidOptionError,
    UnsupportedModelError,
)
from captum_intramodal.models.hooks import evaluation_mode
from tests.attr.forward_helpers import (
    ANSWER,
    PROMPT,
    adapter_of,
    ids_of,
    own_log_probs,
    own_logits,
    random_image,
    to_image,
    to_tensor,
)
from tests.testing.families import build


def test_each_output_is_computed_from_the_models_own_logits() -> None:
    adapter = adapter_of("llava")
    image, other = random_image(), "a green dog"
    x, ids, others = to_tensor(image), ids_of(adapter, ANSWER), ids_of(adapter, other)
    logits = own_logits(adapter, image)
    log_probs = logits.log_softmax(1)
    tokens = torch.arange(3)

    def output(kind: Any, contrast: str | None = None) -> Tensor:
        return PixelForward(adapter, PROMPT, ANSWER, kind, contrast)(x)

    expected = {
        "logits": logits,
        "log_probs": log_probs,
        "token_logits": logits[tokens, ids],
        "token_log_probs": log_probs[tokens, ids],
        "answer_log_prob": log_probs[tokens, ids].sum(),
    }
    for kind, value in expected.items():
        assert torch.allclose(output(kind), value[None], atol=1e-4), kind
    assert torch.allclose(
        output("token_logits", other), (logits[tokens, ids] - logits[tokens, others])[None], atol=1e-4
    )
    # The difference of two tokens at one position is the same for log-probabilities and logits.
    assert torch.allclose(output("token_log_probs", other), output("token_logits", other), atol=1e-4)
    assert torch.allclose(output("answer_log_prob", other), output("token_logits", other).sum(1), atol=1e-4)


def test_answer_ids_are_expanded_with_the_examples() -> None:
    adapter = adapter_of("qwen2_vl")
    answers = ("a red cat", "the blue dog")
    ids = torch.tensor([ids_of(adapter, answer) for answer in answers])
    x = torch.cat([to_tensor(random_image()), to_tensor(random_image(seed=4))])
    forward = PixelForward(adapter, PROMPT, "yes", "answer_log_prob")
    expected = [sum(own_log_probs(adapter, to_image(p), a)) for p, a in zip(x, answers, strict=True)]
    assert forward(x, None, ids).tolist() == pytest.approx(expected, abs=1e-4)
    options = dict(additional_forward_args=(None, ids), n_steps=3)
    whole = IntegratedGradients(forward).attribute(x, **options)
    batches = IntegratedGradients(forward).attribute(x, internal_batch_size=2, **options)
    each = [
        IntegratedGradients(PixelForward(adapter, PROMPT, answer, "answer_log_prob")).attribute(p[None], n_steps=3)
        for p, answer in zip(x, answers, strict=True)
    ]
    assert torch.allclose(whole, torch.cat(each), atol=1e-5) and torch.allclose(batches, whole, atol=1e-5)
    other = torch.tensor([ids_of(adapter, "a red dog")])
    contrast = forward(x[:1], None, ids[:1], other)
    logits = own_logits(adapter, to_image(x[0]))[2]
    assert float(contrast) == pytest.approx(float(logits[ids[0, 2]] - logits[other[0, 2]]), abs=1e-4)


@pytest.mark.parametrize("model_type", ["llava", "qwen2_vl", "internvl"])
def test_batching_does_not_change_the_logits(model_type: str) -> None:
    forward = PixelForward(adapter_of(model_type), PROMPT, ANSWER)
    x = torch.cat([to_tensor(random_image(seed=seed)) for seed in (1, 2)])
    torch.testing.assert_close(forward(x), torch.cat([forward(x[:1]), forward(x[1:])]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("model_type", ["llava", "qwen2_vl", "idefics3"])
def test_captums_layer_methods_get_all_examples_in_one_pass(model_type: str) -> None:
    forward = PixelForward(adapter_of(model_type), PROMPT, ANSWER, "token_logits", exact=False)
    assert forward.stacks
    layer, x = forward.model.get_decoder().layers[0], to_tensor(random_image())
    method = LayerIntegratedGradients(forward, layer)
    together, one_by_one = (
        method.attribute(x, target=1, n_steps=4, attribute_to_layer_input=True, internal_batch_size=size)
        for size in (None, 1)
    )
    torch.testing.assert_close(together, one_by_one, atol=1e-5, rtol=1e-3)


def test_captums_layer_methods_are_refused_if_examples_run_one_at_a_time() -> None:
    forward = PixelForward(adapter_of("llava"), PROMPT, ANSWER, "token_logits")
    forward.stacks = False
    method = LayerIntegratedGradients(forward, forward.model.get_decoder().layers[0])
    with pytest.raises(UnsupportedModelError, match="internal_batch_size=1"):
        method.attribute(to_tensor(random_image()), target=1, n_steps=4)
    method.attribute(to_tensor(random_image()), target=1, n_steps=4, internal_batch_size=1)
    # Other hooks work with one example at a time.
    GuidedBackprop(forward).attribute(to_tensor(random_image()).expand(2, -1, -1, -1), target=1)


class Noisy(nn.Module):
    """Draws random numbers, even in evaluation mode."""

    error: type[BaseException] | None = None

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        torch.rand(3)
        if self.error is not None:
            raise self.error
        return self.inner(nn.functional.dropout(x, 0.5, self.training))


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_the_models_state_is_restored(error: type[BaseException] | None) -> None:
    model, processor = build("llava")
    model.requires_grad_(True).train()
    some = next(module for module in model.modules() if isinstance(module, nn.Linear))
    some.eval()
    model.lm_head = noisy = Noisy(model.lm_head)
    flags = [module.training for module in model.modules()]
    forward = PixelForward(ModelAdapter(model, processor), PROMPT, ANSWER, "token_logits")
    noisy.error = error
    x = to_tensor(random_image())
    rows = forward.prompt_embeddings(x[0])
    random = torch.get_rng_state()
    if error is None:
        first, second = (IntegratedGradients(forward).attribute((x, rows), target=1, n_steps=2) for _ in range(2))
        assert torch.equal(first[0], second[0])  # no dropout
    else:
        with pytest.raises(error):
            forward(x.requires_grad_(), rows)
    assert torch.equal(random, torch.get_rng_state())
    assert flags == [module.training for module in model.modules()]
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.get_input_embeddings().modules())


def test_no_graph_is_kept_without_gradients() -> None:
    with evaluation_mode(nn.Linear(2, 2), gradients=True), torch.no_grad():
        pass
    forward = PixelForward(adapter_of("llava"), PROMPT, ANSWER)
    with torch.no_grad():
        assert not forward(to_tensor(random_image()).requires_grad_()).requires_grad


def test_unknown_outputs_and_unfit_contrasts_are_refused() -> None:
    adapter = adapter_of("llava")
    x = to_tensor(random_image())
    with pytest.raises(InvalidOptionError, match="output must be one of"):
        PixelForward(adapter, PROMPT, ANSWER, "probability")  # type: ignore[arg-type]
    with pytest.raises(InvalidOptionError, match="covers the whole vocabulary"):
        PixelForward(adapter, PROMPT, ANSWER, contrast="a red dog")(x)
    with pytest.raises(InvalidInputError, match="2 tokens for an answer of 3"):
        PixelForward(adapter, PROMPT, ANSWER, "token_logits", contrast="a dog")(x)
    with pytest.raises(EmptyAnswerError):
        PixelForward(adapter, PROMPT, "")


def test_unfit_answer_ids_are_refused() -> None:
    forward = PixelForward(adapter_of("llava"), PROMPT, ANSWER, "token_logits")
    x, ids = to_tensor(random_image()), torch.tensor([forward.answer_ids])
    with pytest.raises(InvalidInputError, match="answer_ids must be integers"):
        forward(x, None, ids[0])
    with pytest.raises(InvalidInputError, match="2 answer_ids for 3 examples"):
        forward(x.repeat(3, 1, 1, 1), None, ids.repeat(2, 1))
