r"""How does a text token's log-probability depend on the pixels, or on the visual tokens? Gradients times inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from captum_intramodal.adapter.encoding import Encoding
from captum_intramodal.adapter.model_adapter import ModelAdapter
from captum_intramodal.errors import InvalidOptionError, NoGradientError
from captum_intramodal.geometry.decoder_inputs import state_rows, visual_rows
from captum_intramodal.models.decoder import decoder_blocks, decoder_layers
from captum_intramodal.models.layer_io import named_arguments

__all__ = ["input_x_gradient", "layer_gradient_x_activation"]


def input_x_gradient(
    adapter: ModelAdapter, encoding: Encoding, keys: Sequence[str], positions: Tensor
) -> Iterator[dict[str, Tensor]]:
    r"""
    Compute input times gradient of text tokens' log-probabilities with respect to the processor's pixel tensors.

    Args:

        adapter (ModelAdapter): The model.
        encoding (Encoding): Prompt and answer; batch of 1.
        keys (Sequence[str]): Names of the pixel tensors among the inputs.
        positions (Tensor): Positions of the text tokens, int64 (T,). The token at position 0 is not predicted: its
                    attribution is 0.

    Yields:
        **attributions** (*dict[str, Tensor]*):
            Per text token, by name, a float32 tensor of the pixel tensor's shape, on the CPU.

    Raises:
        NoGradientError: no gradient reaches the pixels, for example because the model quantizes its images.
    """
    leaves = {key: encoding.inputs[key].to(adapter.model.dtype).detach().clone().requires_grad_() for key in keys}
    with torch.enable_grad():
        scores = _log_probabilities(adapter, encoding, leaves, positions)
    if not scores[0].requires_grad:
        raise NoGradientError(
            f"No gradient passes from the answer to the pixels of {type(adapter.model).__name__}, so its answers "
            "cannot be attributed to pixels; use a method without gradients, such as FeatureAblation."
        )
    for score, position in zip(scores, positions.tolist(), strict=True):
        if position == 0:
            yield {key: torch.zeros(leaf.shape) for key, leaf in leaves.items()}
            continue
        grads = torch.autograd.grad(score, list(leaves.values()), retain_graph=True, allow_unused=True)
        yield {
            key: torch.zeros(leaf.shape) if grad is None else (leaf.detach() * grad).float().cpu()
            for (key, leaf), grad in zip(leaves.items(), grads, strict=True)
        }


def _log_probabilities(
    adapter: ModelAdapter, encoding: Encoding, replaced_inputs: dict[str, Tensor], positions: Tensor
) -> tuple[Tensor, ...]:
    """Compute the log-probabilities of the tokens at some positions, each given all tokens before it."""
    before = (positions - 1).clamp_min(0)
    logits = adapter.logits(encoding.inputs | replaced_inputs, before - len(encoding.input_ids))[0]
    ids = encoding.input_ids[positions].to(logits.device)
    scores = logits.float().log_softmax(1).gather(1, ids[:, None])
    return scores[:, 0].unbind()


def layer_gradient_x_activation(
    adapter: ModelAdapter,
    encoding: Encoding,
    positions: Tensor,
    argument: str | None = None,
    layer: int | None = None,
) -> Tensor:
    r"""
    Compute activation times gradient at the visual tokens' states, summed over features: Captum's
    LayerGradientXActivation of text tokens' log-probabilities, in one forward pass and a backward pass per text token.

    Args:

        adapter (ModelAdapter): The model.
        encoding (Encoding): Prompt and answer; batch of 1.
        positions (Tensor): Positions of the text tokens, int64 (T,). The token at position 0 is not predicted: its
                    attributions are 0.
        argument (str, optional): The argument of the decoder's blocks that holds the visual tokens, as in
                    :class:`~captum_intramodal.geometry.TokenGeometry`. The gradient at the states of a cross-attention
                    sums over all layers that attend to them.
                    Default: None, placeholders in the decoder's sequence
        layer (int, optional): Decoder layer whose input is attributed to, if states change from layer to layer.
                    Default: None, the first

    Returns:
        **attributions** (*Tensor*):
            float32 (T, V), of either sign, on the CPU.

    Raises:
        InvalidOptionError: a layer that does not exist, or any layer if all layers attend to the same states.
        NoGradientError: no gradient reaches the states.
    """
    model = adapter.model
    if argument in (None, "hidden_states"):
        layers = decoder_layers(model)
        index = 0 if layer is None else layer
        if not -len(layers) <= index < len(layers):
            raise InvalidOptionError(f"Layer {layer} does not exist; the decoder has {len(layers)} layers.")
        blocks: list[nn.Module] = [layers[index]]
    elif layer is not None:
        raise InvalidOptionError(
            f"All layers of {type(model).__name__} attend to the same visual states; leave layer out."
        )
    else:
        blocks = decoder_blocks(model)
    # The part of the model before the states needs no gradient.
    with torch.no_grad(), _differentiable(blocks, argument) as leaves:
        scores = _log_probabilities(adapter, encoding, {}, positions)
    if not leaves or not any(score.requires_grad for score in scores):
        raise NoGradientError(
            f"No gradient passes from the answer to the visual states of {type(model).__name__}; use "
            "method='logit_lens' or method='input_x_gradient'."
        )
    (leaf,) = leaves
    count = len(state_rows(leaf, argument))
    rows = visual_rows(model, encoding.inputs, argument, count).to(leaf.device)
    attributions = torch.zeros(len(scores), len(rows))
    for index, (score, position) in enumerate(zip(scores, positions.tolist(), strict=True)):
        if position > 0:
            (gradient,) = torch.autograd.grad(score, leaf, retain_graph=True)
            product = state_rows((leaf.detach() * gradient).float(), argument)
            attributions[index] = product[rows].sum(-1).cpu()
    return attributions


@contextmanager
def _differentiable(blocks: Sequence[nn.Module], argument: str | None) -> Iterator[list[Tensor]]:
    """Replace the blocks' states by a function of a leaf with the same values; the list holds it once a block ran."""
    leaves: list[Tensor] = []
    replacement: list[Tensor] = []

    def replace(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not replacement:
            named = named_arguments(module, args, kwargs)
            value = next(iter(named.values())) if argument is None else named.get(argument)
            if not isinstance(value, Tensor):
                return None
            torch.set_grad_enabled(True)  # Until the caller's torch.no_grad() ends.
            leaves.append(value.detach().requires_grad_())
            # The leaf itself must not be changed in place.
            replacement.extend([value, leaves[0].clone()])
        old, new = replacement
        return tuple(new if a is old else a for a in args), {k: new if v is old else v for k, v in kwargs.items()}

    handles = [block.register_forward_pre_hook(replace, with_kwargs=True) for block in blocks]
    try:
        yield leaves
    finally:
        for handle in handles:
            handle.remove()
