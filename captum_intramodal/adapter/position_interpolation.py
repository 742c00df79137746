r"""How is a model given images at a larger input size than its own? By interpolating its position embeddings."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image
from transformers.utils import ModelOutput

from captum_intramodal.adapter.model_adapter import ModelAdapter
from captum_intramodal.adapter.trials import TRIAL_PROMPT
from captum_intramodal.errors import UnsupportedModelError
from captum_intramodal.geometry.pixel_map import PixelMaps
from captum_intramodal.geometry.token_geometry import TokenGeometry
from captum_intramodal.models.decoder import position_embedding_modules
from captum_intramodal.models.families import TOKEN_COUNTS
from captum_intramodal.models.hooks import interpolate_position_embeddings

__all__ = ["ResizedInputAdapter", "measure_resized_input"]


class ResizedInputAdapter(ModelAdapter):
    r"""
    ResizedInputAdapter is an adapter whose model is given images at a multiple of its input size.

    Args:

        adapter (ModelAdapter): The model and its processor. Neither is changed: hooks last for one pass, and the larger
                    size is that of a copy of the processor.
        scale (float): Factor of the input size, which is rounded to whole patches.
        more_tokens (bool): Whether a larger image makes more visual tokens, as it does if they cover regions of it.

    Raises:
        UnsupportedModelError: the model has no position embeddings that can be interpolated, or its image processor
            has no input size.

    Examples::

        >>> from captum_intramodal.adapter.position_interpolation import ResizedInputAdapter
        >>> ResizedInputAdapter(adapter, 2.0, more_tokens=True).geometry([image.size])  # doctest: +SKIP
    """

    def __init__(self, adapter: ModelAdapter, scale: float, more_tokens: bool) -> None:
        tables: list[Any] = position_embedding_modules(adapter.model)
        if not tables:
            raise _unsupported(adapter, scale, "none of its modules has interpolate_pos_encoding")
        patch = tables[0].patch_size
        side = getattr(tables[0], "image_size", None) or _input_side(adapter.processor.image_processor)
        if side is None:
            raise _unsupported(adapter, scale, "its image processor has no size or crop_size")

        def scaled(length: int) -> int:
            return max(patch, round(length * scale / patch) * patch)

        processor = copy.copy(adapter.processor)
        for name in ("image_processor", "video_processor"):
            if (part := getattr(processor, name, None)) is not None:
                setattr(processor, name, _scaled_processor(part, scaled))
        if more_tokens:
            growth = (scaled(side) // patch) / (side // patch)
            for owner in (processor, processor.image_processor):
                for attribute in TOKEN_COUNTS:
                    if isinstance(count := getattr(owner, attribute, None), int):
                        setattr(owner, attribute, round(count * growth**2))
        super().__init__(adapter.model, processor, adapter.video, adapter.working_memory)

    def run(self, inputs: Mapping[str, Any]) -> ModelOutput:
        """Run one forward pass as :meth:`ModelAdapter.run` does, with interpolated position embeddings."""
        with interpolate_position_embeddings(self.model):
            return super().run(inputs)

    def geometry(self, image_sizes: Sequence[tuple[int, int]]) -> TokenGeometry:
        """Measure the geometry as :meth:`ModelAdapter.geometry` does, with interpolated position embeddings."""
        with interpolate_position_embeddings(self.model):
            return super().geometry(image_sizes)


def _input_side(image_processor: Any) -> int | None:
    """Return the side length of the images that an image processor makes, if it has one."""
    for attribute in ("crop_size", "size"):
        size = getattr(image_processor, attribute, None)
        for length in [size] if isinstance(size, int) else dict(size or {}).values():
            if isinstance(length, int):
                return length
    return None


def _scaled_processor(processor: Any, scaled: Callable[[int], int]) -> Any:
    """Copy an image or video processor, with other sizes."""
    processor = copy.copy(processor)
    for attribute in ("size", "crop_size", "tile_size"):
        size = getattr(processor, attribute, None)
        if isinstance(size, int):
            setattr(processor, attribute, scaled(size))
        elif size:
            lengths = {key: scaled(length) for key, length in dict(size).items()}
            setattr(processor, attribute, type(size)(**lengths))
    return processor


def _unsupported(adapter: ModelAdapter, scale: float, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{type(adapter.model).__name__} cannot process images at {scale:g} times its input size: {reason}. Leave "
        "interpolate_pos_encoding out; crops=True explains cut-outs of the images at that scale instead."
    )


def measure_resized_input(
    adapter: ModelAdapter,
    sizes: Sequence[tuple[int, int]],
    scale: float,
    original: TokenGeometry | PixelMaps,
    more_tokens: bool,
) -> tuple[ResizedInputAdapter, TokenGeometry | PixelMaps]:
    r"""
    Measure at a multiple of the model's input size what was measured at the input size itself.

    Args:

        adapter (ModelAdapter): The model and its processor.
        sizes (Sequence[tuple[int, int]]): (width, height) of each image.
        scale (float): Factor of the input size.
        original (TokenGeometry or PixelMaps): What was measured at the model's own input size.
        more_tokens (bool): Whether a larger image makes more visual tokens.

    Returns:
        **resized, layout** (*tuple[ResizedInputAdapter, TokenGeometry or PixelMaps]*):
            The adapter for that size, and what was measured with it, of the same type as ``original``.

    Raises:
        UnsupportedModelError: the model or its processor cannot process images at that size.
    """
    resized = ResizedInputAdapter(adapter, scale, more_tokens)
    try:
        if isinstance(original, TokenGeometry):
            return resized, resized.geometry(sizes)
        resized.run(resized.prepare([Image.new("RGB", size, "gray") for size in sizes], TRIAL_PROMPT))
        return resized, resized.pixel_maps(sizes)
    except Exception as error:  # Code that was not made for another input size raises anything.
        raise _unsupported(adapter, scale, "the model or its processor fails at that size") from error
