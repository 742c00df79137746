r"""The parts of a transformers model that this package hooks into, wherever its family keeps them."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from captum_intramodal.errors import UnsupportedModelError
from captum_intramodal.models.families import NORM_NAMES, family_of

__all__ = [
    "decoder_blocks",
    "decoder_layers",
    "final_norm",
    "input_device",
    "lens_layers",
    "position_embedding_modules",
]


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Return the decoder's layers, in order.

    Raises:
        UnsupportedModelError: the decoder has no list of as many modules as its config counts layers.
    """
    decoder = model.get_decoder()
    layers = getattr(decoder, "layers", None)
    if isinstance(layers, nn.ModuleList):
        return layers
    depth = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    lists = [module for module in decoder.modules() if isinstance(module, nn.ModuleList) and len(module) == depth]
    if lists:
        return lists[-1]  # Towers and encoders are registered before the layers that process their outputs.
    raise UnsupportedModelError(
        f"The decoder of {type(model).__name__} has no list of {depth} layers, so its layers cannot be found."
    )


def decoder_blocks(model: PreTrainedModel) -> list[nn.Module]:
    """Return the decoder's layers and the modules listed beside them, such as separate cross-attention blocks."""
    layers = decoder_layers(model)
    owner = next(module for module in model.modules() if any(child is layers for child in module.children()))
    return [block for blocks in owner.children() if isinstance(blocks, nn.ModuleList) for block in blocks]


def lens_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Return the decoder's layers, the last one replaced in families whose final norm follows another module."""
    layers = decoder_layers(model)
    decoder = model.get_decoder()
    name = family_of(getattr(decoder, "config", None)).final_states
    return layers if name is None else nn.ModuleList([*layers[:-1], getattr(decoder, name)])


def final_norm(model: PreTrainedModel) -> nn.Module:
    """Return the norm between the last layer and the language-model head, or the identity if there is none."""
    decoder = model.get_decoder()
    # Some families' get_decoder() returns the model with its head, one level up.
    for owner in (decoder, getattr(decoder, "model", None)):
        for name in NORM_NAMES:
            if isinstance(norm := getattr(owner, name, None), nn.Module):
                return norm
    return nn.Identity()


def input_device(model: PreTrainedModel) -> torch.device:
    """Return the device of a model's inputs: that of its embeddings, or the one on which offloaded embeddings run."""
    try:
        embeddings = model.get_input_embeddings()
    except NotImplementedError:
        device: torch.device = model.device
        return device
    device = embeddings.weight.device
    if device.type == "meta":
        return torch.device(getattr(getattr(embeddings, "_hf_hook", None), "execution_device", None) or "cpu")
    return device


def position_embedding_modules(model: nn.Module) -> list[nn.Module]:
    """Return the modules of a vision tower that embed patches, and can interpolate the patches' position embeddings."""
    name = "interpolate_pos_encoding"
    return [m for m in model.modules() if hasattr(m, name) and isinstance(getattr(m, "patch_size", None), int)]
