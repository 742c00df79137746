r"""The parts of a transformers model's decoder, wherever its family keeps them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from captum_intramodal.models.families import NORM_NAMES, family_of

__all__ = ["decoder_blocks", "decoder_layers", "final_norm", "input_device", "readable_layers"]


def decoder_layers(model: Any) -> nn.ModuleList:
    """The decoder's layers, in order.

    Raises:
        TypeError: the decoder has no list of as many modules as its config says it has layers.
    """
    decoder = model.get_decoder()
    layers = getattr(decoder, "layers", None)
    if isinstance(layers, nn.ModuleList):
        return layers
    depth = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    lists = [module for module in decoder.modules() if isinstance(module, nn.ModuleList) and len(module) == depth]
    if lists:
        return lists[-1]  # Towers and encoders come before what reads them.
    raise TypeError(f"The decoder of {type(model).__name__} has no list of {depth} layers, so it cannot be read.")


def decoder_blocks(model: Any) -> list[nn.Module]:
    """The decoder's layers, and what else is listed beside them, such as cross-attention blocks of their own."""
    layers = decoder_layers(model)
    owner = next(module for module in model.modules() if any(child is layers for child in module.children()))
    return [block for blocks in owner.children() if isinstance(blocks, nn.ModuleList) for block in blocks]


def input_device(model: Any) -> torch.device:
    """Where a model wants its inputs: at its embeddings; where those are offloaded, on the device they come back to."""
    try:
        embeddings = model.get_input_embeddings()
    except NotImplementedError:
        device: torch.device = model.device
        return device
    device = embeddings.weight.device
    if device.type == "meta":
        return torch.device(getattr(getattr(embeddings, "_hf_hook", None), "execution_device", None) or "cpu")
    return device


def readable_layers(model: Any) -> nn.ModuleList:
    """The layers that a lens reads: the decoder's, the last one replaced where the final norm reads something else."""
    layers = decoder_layers(model)
    decoder = model.get_decoder()
    name = family_of(getattr(decoder, "config", None)).final_states
    return layers if name is None else nn.ModuleList([*layers[:-1], getattr(decoder, name)])


def final_norm(model: Any) -> nn.Module:
    """The norm between the last layer and the language-model head; the identity where there is none."""
    decoder = model.get_decoder()
    # Some families' get_decoder() returns the model with its head, one level up.
    for owner in (decoder, getattr(decoder, "model", None)):
        for name in NORM_NAMES:
            if isinstance(norm := getattr(owner, name, None), nn.Module):
                return norm
    return nn.Identity()
