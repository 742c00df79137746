r"""TODO."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from captum_intramodal.adapter.model_adapter import ModelAdapter
from captum_intramodal.geometry.token_geometry import TokenGeometry

__all__ = ["CropView"]


@dataclass(frozen=True)
class CropView:
    """Overlapping cut-outs of the images, each of which the model sees in the place of its image.

    Attributes:
        boxes (tuple): (image, x0, y0, x1, y1) of each cut-out in whole pixels.
        geometry (TokenGeometry): of the tokens of all cut-outs, one after another, in the frame of the originals;
            tokens of the images that stand beside a cut-out have no box.
    """

    boxes: tuple[tuple[int, int, int, int, int], ...]
    geometry: TokenGeometry

    @classmethod
    def of(cls, adapter: ModelAdapter, sizes: Sequence[tuple[int, int]], scale: float) -> CropView:
        """As many as it takes, of one ``scale``-th of an image's sides, evenly spread."""
        steps = math.ceil(scale)
        boxes, parts, images = [], [], []
        for image, (width, height) in enumerate(sizes):
            w, h = max(1, round(width / scale)), max(1, round(height / scale))
            geometry = adapter.geometry([(w, h) if i == image else size for i, size in enumerate(sizes)])
            boxed = geometry.boxes.masked_fill(~(geometry.is_local & geometry.sees(image))[:, None], torch.nan)
            for row, column in np.ndindex(steps, steps):
                x, y = column * (width - w) // (steps - 1), row * (height - h) // (steps - 1)
                boxes.append((image, x, y, x + w, y + h))
                parts.append(boxed + torch.tensor([x, y, x, y]))
                images.append(torch.full((len(boxed),), image))
        placed = torch.cat(parts)
        kinds = tuple("separator" if nowhere else "local" for nowhere in placed.isnan().any(1).tolist())
        return cls(
            tuple(boxes), TokenGeometry(placed, kinds, torch.cat(images), tuple(sizes), argument=geometry.argument)
        )

    def show(self, images: Sequence[Image.Image]) -> Iterator[list[Image.Image]]:
        """The images of each pass, one of them cut."""
        for image, *box in self.boxes:
            yield [p.crop((box[0], box[1], box[2], box[3])) if i == image else p for i, p in enumerate(images)]
