r"""Images at a larger input size than a vision tower's own, by interpolation of its position embeddings."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from captum_intramodal.adapter.model_adapter import ModelAdapter
from captum_intramodal.geometry.pixel_map import PixelMaps
from captum_intramodal.geometry.token_geometry import TokenGeometry
from captum_intramodal.models.families import TOKEN_COUNTS
from captum_intramodal.models.hooks import interpolated_positions, position_tables

__all__ = ["ResizedInputAdapter", "ResizedInputView"]


class ResizedInputAdapter(ModelAdapter):
    r"""
    The same model, to which images are shown at a multiple of its input size.

    Args:

        adapter (ModelAdapter): The model and its processor, neither of which is changed: hooks last for one pass, and
                    the larger size is that of a copy of the processor.
        scale (float): Factor of the input size; the size is rounded to whole patches.
        more_tokens (bool): Whether a larger image makes more visual tokens, as where each has a place in it.

    Raises:
        ValueError: no part of the model has ``interpolate_pos_encoding``.
    """

    def __init__(self, adapter: ModelAdapter, scale: float, more_tokens: bool) -> None:
        tables: list[Any] = position_tables(adapter.model)
        if not tables:
            raise ValueError("no part of it has interpolate_pos_encoding")
        patch = tables[0].patch_size
        side = getattr(tables[0], "image_size", None) or _input_side(adapter.processor.image_processor)

        def enlarged(length: int) -> int:
            return max(patch, round(length * scale / patch) * patch)

        growth = (enlarged(side) // patch) / (side // patch)
        processor = copy.copy(adapter.processor)
        for name in ("image_processor", "video_processor"):
            if (part := getattr(processor, name, None)) is not None:
                part = copy.copy(part)
                for attribute in ("size", "crop_size", "tile_size"):
                    size = getattr(part, attribute, None)
                    if isinstance(size, int):
                        setattr(part, attribute, enlarged(size))
                    elif size:
                        lengths = {key: enlarged(length) for key, length in dict(size).items()}
                        setattr(part, attribute, type(size)(**lengths))
                setattr(processor, name, part)
        for owner in (processor, processor.image_processor):
            for attribute in TOKEN_COUNTS if more_tokens else ():
                if isinstance(count := getattr(owner, attribute, None), int):
                    setattr(owner, attribute, round(count * growth**2))
        super().__init__(adapter.model, processor, adapter.video)

    def run(self, inputs: Mapping[str, Any]) -> Any:
        with interpolated_positions(self.model):
            return super().run(inputs)

    def geometry(self, image_sizes: Sequence[tuple[int, int]]) -> TokenGeometry:
        with interpolated_positions(self.model):
            return super().geometry(image_sizes)


def _input_side(image_processor: Any) -> int:
    for attribute in ("crop_size", "size"):
        size = getattr(image_processor, attribute, None)
        for length in [size] if isinstance(size, int) else dict(size or {}).values():
            if isinstance(length, int):
                return length
    raise ValueError("its image processor does not say what size it makes images of")


@dataclass(frozen=True)
class ResizedInputView:
    """What the model sees of the images at a larger input size than its own.

    Attributes:
        adapter (ResizedInputAdapter): shows them at that size.
        sight (TokenGeometry or PixelMaps): in the frame of the originals.
    """

    adapter: ResizedInputAdapter
    sight: TokenGeometry | PixelMaps

    @classmethod
    def of(
        cls,
        adapter: ModelAdapter,
        sizes: Sequence[tuple[int, int]],
        scale: float,
        original: TokenGeometry | PixelMaps,
        more_tokens: bool,
    ) -> ResizedInputView:
        """The counterpart of what is seen at the model's own input size; an error says why there is none."""
        try:
            larger = ResizedInputAdapter(adapter, scale, more_tokens)
            if isinstance(original, TokenGeometry):
                return cls(larger, larger.geometry(sizes))
            larger.run(larger.prepare([Image.new("RGB", size, "gray") for size in sizes], "describe"))
            return cls(larger, larger.pixel_maps(sizes))
        except (ValueError, TypeError, RuntimeError, IndexError) as error:
            raise ValueError(
                f"{type(adapter.model).__name__} cannot see images at {scale:g} times its input size: "
                f"{str(error).rstrip('.')}. Leave interpolate_pos_encoding out; crops=True shows it cut-outs instead."
            ) from error

    def shows_same(self, other: object) -> bool:
        """Whether another sight, of any kind, gives the model the same tokens or pixels."""
        return self.sight.shows_same(other.sight if isinstance(other, ResizedInputView) else other)
