r"""Exceptions of model families: one row per family, and the attribute names that general rules try in order.

Everything else is measured on the model. To support a family that needs an exception, add its row here, or register it
from your own code with :func:`register_family`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from captum_intramodal.errors import InvalidOptionError

__all__ = [
    "IMAGE_TOKEN_ATTRIBUTES",
    "NORM_NAMES",
    "NUMBERED_PATCHES",
    "SEQUENCE_DIMS",
    "TOKEN_COUNTS",
    "VIDEO_TOKEN_ATTRIBUTES",
    "Family",
    "family_of",
    "register_family",
]


@dataclass(frozen=True)
class Family:
    r"""
    Exceptions of one model family. The defaults are the general rules.

    Attributes:
        model_type (str): ``config.model_type`` of the model, or of its decoder for ``final_states``.
        final_states (str or None): module of the decoder whose output is the input of the final norm.
            None: the last layer.
        code_raster_ends (int or None): number of tokens that end each row, if the visual tokens are discrete codes in a
            raster over the pixel tensor, which small changes of the pixels do not change. None: the regions of the
            tokens are measured.
        interleaves_images (bool): whether the processor takes a prompt as a list of texts and images in order.
        answer_token_type (int or None): token type id of the answer, if it differs from the prompt's.
        attends_ahead (bool): whether visual tokens attend to the text after them.
        head (str or None): dotted path of the unembedding in the model. None: its output embeddings.
    """

    model_type: str
    final_states: str | None = None
    code_raster_ends: int | None = None
    interleaves_images: bool = False
    answer_token_type: int | None = None
    attends_ahead: bool = False
    head: str | None = None


_FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("chameleon", code_raster_ends=0),
        Family("emu3", code_raster_ends=1),
        Family("idefics", interleaves_images=True),
        Family("inkling2_text", final_states="final_input"),
        Family("paligemma", answer_token_type=1, attends_ahead=True),
    )
}

# Attributes of a config that hold the id of the placeholder token, most common name first.
IMAGE_TOKEN_ATTRIBUTES = ("image_token_id", "image_token_index", "image_patch_id")
VIDEO_TOKEN_ATTRIBUTES = ("video_token_id", "video_token_index")
# Names of a decoder's final norm, most common first.
NORM_NAMES = ("norm", "final_layernorm", "embedding_norm", "final_layer_norm", "ln_f")
# Attributes of a processor that hold the number of placeholders per image, if it does not derive it from the pixels.
TOKEN_COUNTS = ("image_seq_length", "image_seq_len", "num_image_tokens")
# Pixel tensors whose patches contain their own position, such as Pix2Struct's: (image, patch, 2 + elements), where the
# first two are the patch's row and column, counted from 1, or 0 for padding. Values are normalized by each image's own
# contrast.
NUMBERED_PATCHES = ("flattened_patches",)
# The dimension of a decoder's arguments that runs along its sequence.
SEQUENCE_DIMS = {
    "inputs_embeds": 1,
    "position_ids": -1,
    "cache_position": 0,
    "visual_pos_masks": 1,
    "vision_mask": 1,
    "moe_mm_token_type_ids": 1,
}


def family_of(config: Any) -> Family:
    r"""
    Return the row of a model family.

    Args:

        config (PreTrainedConfig or None): A model's or decoder's configuration.

    Returns:
        **family** (*Family*): the row of ``config.model_type``, or the defaults if it has none.

    Examples::

        >>> from types import SimpleNamespace
        >>> from captum_intramodal.models.families import family_of
        >>> family_of(SimpleNamespace(model_type="emu3")).code_raster_ends
        1
        >>> family_of(SimpleNamespace(model_type="llava")).final_states is None
        True
    """
    model_type = str(getattr(config, "model_type", ""))
    return _FAMILIES.get(model_type, Family(model_type))


def register_family(family: Family) -> None:
    r"""
    Register the row of a model family; it replaces an earlier row of the same model type.

    Args:

        family (Family): The row.

    Raises:
        InvalidOptionError: its model type is empty.

    Examples::

        >>> from captum_intramodal.models.families import Family, register_family
        >>> register_family(Family("my_vlm", answer_token_type=1))
    """
    if not family.model_type:
        raise InvalidOptionError("model_type must be that of the config of the family's checkpoints, got an empty one.")
    _FAMILIES[family.model_type] = family
