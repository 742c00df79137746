r"""TODO."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedModel

from captum_intramodal.geometry.pixel_map import Size
from captum_intramodal.models.decoder import decoder_blocks, decoder_layers, input_device
from captum_intramodal.models.hooks import hidden_rows, named_arguments
from captum_intramodal.models.placeholders import visual_positions

__all__ = ["state_rows", "visual_rows"]

# Argument of the decoder's blocks for its own sequence.
SEQUENCE_ARGUMENT = "hidden_states"


class _LayerReached(Exception):
    """Leaves a forward pass at the input of decoder layer 0."""


def hidden_argument(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return args[0] if args else kwargs.get("hidden_states", kwargs.get("hidden_state"))


def _run(model: PreTrainedModel, inputs: Mapping[str, Any]) -> None:
    """A pass that draws the same random numbers every time: some models begin with noise. Callers give the random state
    back."""
    torch.manual_seed(0)
    model(**inputs, use_cache=False)


def layer0_input(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Tensor:
    """Hidden states that enter decoder layer 0, shape T x D; nothing after that point is computed."""
    captured: list[Tensor] = []

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        captured.append(hidden_argument(args, kwargs))
        raise _LayerReached

    with (
        suppress(_LayerReached),
        decoder_layers(model)[0].register_forward_pre_hook(stop, with_kwargs=True),
    ):
        _run(model, inputs)
    if not captured:
        raise TypeError(f"The forward pass of {type(model).__name__} never reached its first decoder layer.")
    return hidden_rows(captured[0])


def visual_rows(model: PreTrainedModel, inputs: Mapping[str, Any], argument: str | None, count: int) -> Tensor:
    r"""Which of the states that the decoder's blocks are given stand for visual tokens.

    Args:

        model (PreTrainedModel): The model.
        inputs (Mapping): Its inputs, with placeholders for the visual tokens where it has any.
        argument (str, optional): Where the visual tokens are, as in :class:`TokenGeometry`.
        count (int): Number of states.

    Returns:
        **rows** (*Tensor*):
            int64, shape: V.

    Raises:
        ValueError: as :func:`visual_positions`.
    """
    ids = inputs.get("input_ids")
    length = 0 if ids is None else int(ids.shape[1])
    # An encoder of images and words has placeholders of its own.
    if argument is None or (model.config.is_encoder_decoder and count == length):
        if ids is None:
            raise ValueError(f"Nothing that the decoder of {type(model).__name__} reads follows the image locally.")
        return visual_positions(model, ids)
    return torch.arange(count - length if argument == SEQUENCE_ARGUMENT else count)


def state_rows(states: Tensor, argument: str | None) -> Tensor:
    """States that a decoder's block is given, of one example, one row each: (N, D)."""
    # Cross-attention may have an example's tiles in the place of the batch.
    return hidden_rows(states) if argument in (None, SEQUENCE_ARGUMENT) else states.flatten(0, -2)


def read_states(model: PreTrainedModel, inputs: Mapping[str, Any], argument: str | None) -> Tensor:
    """The states of the decoder's sequence, or those in the named argument of its blocks, shape N x D."""
    if argument in (None, SEQUENCE_ARGUMENT):
        return layer0_input(model, inputs)
    return state_rows(state_arguments(model, inputs)[argument], argument)


def state_arguments(model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Sequences of states that the decoder's first blocks are given, by the arguments' names."""
    states: dict[str, Tensor] = {}
    first = decoder_layers(model)[0]

    def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for name, value in named_arguments(module, args, kwargs).items():
            # Some models hand their own inputs on to every layer.
            if isinstance(value, Tensor) and value.is_floating_point() and value.ndim == 3 and name not in inputs:
                states.setdefault(name, value)
        if module is first:
            raise _LayerReached

    # Cross-attention blocks of their own may come before the first layer.
    handles = [block.register_forward_pre_hook(watch, with_kwargs=True) for block in decoder_blocks(model)]
    try:
        _run(model, inputs)
    except _LayerReached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return states


def model_inputs(model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs of one example on the model's device, floating point ones in its dtype."""
    ids = inputs.get("input_ids", inputs.get("decoder_input_ids"))
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.shape[0] != 1:
        found = tuple(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(
            "prepare must return the model inputs of one example, with 'input_ids' of shape (1, sequence length); got "
            f"{found} among {sorted(inputs)}."
        )
    device = input_device(model)
    # Contiguous, as what is changed will be: another memory layout is rounded differently everywhere.
    return {
        key: value.to(device, model.dtype if value.is_floating_point() else value.dtype).contiguous()
        if isinstance(value, Tensor)
        else value
        for key, value in inputs.items()
    }


def noise_image(size: Size, generator: torch.Generator) -> Image.Image:
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())
