r"""Positions of the visual tokens in a model's sequence: those of its image placeholders."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedModel

from captum_intramodal.errors import InvalidInputError, UnsupportedModelError
from captum_intramodal.models.families import IMAGE_TOKEN_ATTRIBUTES, VIDEO_TOKEN_ATTRIBUTES

__all__ = ["image_token_id", "visual_positions"]


def image_token_id(model: PreTrainedModel) -> int | None:
    """Return the id of the token that the processor repeats for every visual token, or None if there is none."""
    return _config_id(model, IMAGE_TOKEN_ATTRIBUTES)


def _config_id(model: PreTrainedModel, names: Sequence[str]) -> int | None:
    """Return the first token id that the model's config has under one of these names."""
    ids = (getattr(model.config, name, None) for name in names)
    return next((i for i in ids if isinstance(i, int)), None)


def visual_positions(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    r"""
    Find the positions of the decoder sequence that hold visual tokens.

    Args:

        model (transformers.PreTrainedModel): An image-text-to-text model whose config names its image placeholder.
        input_ids (Tensor): Token ids of one example, with the placeholders expanded by the processor, int64 (T,) or
                    (1, T).

    Returns:
        **positions** (*Tensor*): int64 (V,), on the device of ``input_ids``.

    Raises:
        InvalidInputError: several examples, or a sequence without placeholders.
        UnsupportedModelError: the config names no placeholder.

    Examples::

        >>> from captum_intramodal.geometry import visual_positions
        >>> inputs = adapter.prepare([image], "describe the picture.")
        >>> len(visual_positions(model, inputs["input_ids"])) == len(adapter.geometry([image.size]).kinds)
        True
    """
    if input_ids.ndim == 2 and input_ids.shape[0] == 1:
        input_ids = input_ids[0]
    if input_ids.ndim != 1:
        raise InvalidInputError(
            f"input_ids must be those of one example, (T,) or (1, T), got shape {tuple(input_ids.shape)}."
        )
    token_id = image_token_id(model)
    if token_id is None:
        raise UnsupportedModelError(
            f"The config of {type(model).__name__} names no image placeholder ({', '.join(IMAGE_TOKEN_ATTRIBUTES)}); "
            "set model.config.image_token_id to the id that the processor repeats for every visual token."
        )
    is_visual = input_ids == token_id
    if (video_token_id := _config_id(model, VIDEO_TOKEN_ATTRIBUTES)) is not None:
        is_visual |= input_ids == video_token_id
    positions = is_visual.nonzero().flatten()
    if len(positions) == 0:
        raise InvalidInputError(
            f"No image placeholder (id {token_id}) among the {len(input_ids)} input ids; the prompt needs one for "
            "every image, and config and processor must agree on its id."
        )
    return positions
