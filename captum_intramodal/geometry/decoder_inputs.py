r"""Which of the states that the decoder receives belong to visual tokens? Forward passes that end where it begins."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from captum_intramodal.errors import InvalidInputError, NoTokenGeometryError, UnsupportedModelError
from captum_intramodal.models.decoder import decoder_blocks, decoder_layers, input_device
from captum_intramodal.models.hooks import register_hooks
from captum_intramodal.models.layer_io import hidden_rows, named_arguments
from captum_intramodal.models.placeholders import visual_positions

__all__ = ["state_rows", "visual_rows"]

# Argument of the decoder's blocks for its own sequence.
SEQUENCE_ARGUMENT = "hidden_states"


class _DecoderReached(Exception):
    """Raised by a hook to leave a forward pass at the decoder, whose layers need not run."""


def hidden_argument(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return the hidden states among the arguments of a block's call."""
    return args[0] if args else kwargs.get("hidden_states", kwargs.get("hidden_state"))


def _run(model: PreTrainedModel, inputs: Mapping[str, Any]) -> None:
    """Run a forward pass that draws the same random numbers every time, as some models add noise to their inputs.

    Callers restore the random state. A model rejects tokens or images that do not match its configuration with a plain
    :class:`ValueError`; only this call can tell it from other errors, so it is converted here.
    """
    torch.manual_seed(0)
    try:
        model(**inputs, use_cache=False)
    except ValueError as error:
        raise NoTokenGeometryError(
            f"{type(model).__name__} rejects the inputs that its processor computes from images, so its visual tokens "
            "cannot be located; the error above is the model's."
        ) from error


def layer0_input(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Tensor:
    """Return the hidden states that enter decoder layer 0, (T, D), without computing anything after that point."""
    captured: list[Tensor] = []

    def capture(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        captured.append(hidden_argument(args, kwargs))
        raise _DecoderReached

    first_layer = decoder_layers(model)[0]
    with suppress(_DecoderReached), register_hooks([first_layer], capture, before=True, with_kwargs=True):
        _run(model, inputs)
    if not captured:
        raise UnsupportedModelError(
            f"The forward pass of {type(model).__name__} does not run its decoder's first layer, a "
            f"{type(first_layer).__name__}, so the states that enter it cannot be captured."
        )
    return hidden_rows(captured[0])


def state_arguments(model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the sequences of states that the decoder's first blocks receive, by the names of the arguments."""
    states: dict[str, Tensor] = {}
    blocks = decoder_blocks(model)  # Separate cross-attention blocks may run before the first layer.
    first_layer = decoder_layers(model)[0]

    def capture(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for name, value in named_arguments(module, args, kwargs).items():
            # Some models pass their own inputs on to every layer.
            if isinstance(value, Tensor) and value.is_floating_point() and value.ndim == 3 and name not in inputs:
                states.setdefault(name, value)
        if module is first_layer:
            raise _DecoderReached

    with suppress(_DecoderReached), register_hooks(blocks, capture, before=True, with_kwargs=True):
        _run(model, inputs)
    return states


def decoder_states(model: PreTrainedModel, inputs: Mapping[str, Any], argument: str | None) -> Tensor:
    """Return the states of the decoder's sequence, or those in an argument of its blocks, (N, D)."""
    if argument in (None, SEQUENCE_ARGUMENT):
        return layer0_input(model, inputs)
    return state_rows(state_arguments(model, inputs)[argument], argument)


def state_rows(states: Tensor, argument: str | None) -> Tensor:
    """Return the states of one example that a block of the decoder receives in an argument, one row each, (N, D)."""
    # Cross-attention may have an example's tiles in the batch dimension.
    return hidden_rows(states) if argument in (None, SEQUENCE_ARGUMENT) else states.flatten(0, -2)


def visual_rows(model: PreTrainedModel, inputs: Mapping[str, Any], argument: str | None, count: int) -> Tensor:
    r"""
    Return which of the states that the decoder's blocks receive belong to visual tokens.

    Args:

        model (PreTrainedModel): The model.
        inputs (Mapping): Its inputs for one example.
        argument (str or None): The argument that holds the visual tokens, as in :class:`TokenGeometry`.
        count (int): Number of states in that argument.

    Returns:
        **rows** (*Tensor*): indices of the visual tokens' states, int64 (V,).

    Raises:
        NoTokenGeometryError: the visual tokens are at placeholders, but the inputs contain none.

    Examples::

        >>> from captum_intramodal.geometry import visual_rows
        >>> inputs = adapter.prepare([image], "describe the picture.")
        >>> rows = visual_rows(model, inputs, None, inputs["input_ids"].shape[1])
        >>> len(rows) == len(adapter.geometry([image.size]).kinds)
        True
    """
    ids = inputs.get("input_ids")
    length = 0 if ids is None else int(ids.shape[1])
    # An encoder of images and text has placeholders in its own sequence.
    if argument is None or (model.config.is_encoder_decoder and count == length):
        return _placeholder_positions(model, ids)
    return torch.arange(count - length if argument == SEQUENCE_ARGUMENT else count)


def _placeholder_positions(model: PreTrainedModel, ids: Tensor | None) -> Tensor:
    """Return the positions of the image placeholders; without them, no part of the sequence has a place in an image."""
    if ids is None:
        raise NoTokenGeometryError(
            f"The inputs of {type(model).__name__} have no input_ids, in which image placeholders could mark its "
            "visual tokens."
        )
    try:
        return visual_positions(model, ids)
    except (InvalidInputError, UnsupportedModelError) as error:
        raise NoTokenGeometryError(
            f"The {ids.shape[-1]} tokens in the inputs of {type(model).__name__} include no image placeholder that its "
            "config names, so the positions of its visual tokens are unknown. If the processor repeats a token for "
            "every visual token, set model.config.image_token_id to its id."
        ) from error


def model_inputs(model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the inputs of one example on the model's device, floating point tensors in its dtype.

    Raises:
        InvalidInputError: not the inputs of one example.
    """
    ids = inputs.get("input_ids", inputs.get("decoder_input_ids"))
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.shape[0] != 1:
        found = tuple(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
        raise InvalidInputError(
            "prepare must return the model inputs of one example, with 'input_ids' of shape (1, sequence length); got "
            f"{found} among {sorted(inputs)}."
        )
    device = input_device(model)
    # Contiguous, as the changed inputs are: operations round differently in another memory layout.
    return {
        key: value.to(device, model.dtype if value.is_floating_point() else value.dtype).contiguous()
        if isinstance(value, Tensor)
        else value
        for key, value in inputs.items()
    }
