r"""Cut-outs of the images, each processed in place of its image: more detail for models of a fixed input size."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from PIL import Image

from captum_intramodal.adapter.model_adapter import ModelAdapter
from captum_intramodal.geometry.token_geometry import TokenGeometry

__all__ = ["Crop", "crop_images", "measure_crops"]

# Index of the image, then x0, y0, x1, y1 in whole pixels.
Crop = tuple[int, int, int, int, int]


def measure_crops(
    adapter: ModelAdapter, sizes: Sequence[tuple[int, int]], scale: float
) -> tuple[tuple[Crop, ...], TokenGeometry]:
    r"""
    Cover each image with overlapping, evenly spaced cut-outs of one ``scale``-th of its sides.

    Args:

        adapter (ModelAdapter): The model and its processor.
        sizes (Sequence[tuple[int, int]]): (width, height) of each image.
        scale (float): Above 1.

    Returns:
        **crops, geometry** (*tuple*):
            The cut-outs, and the visual tokens of all of them, one cut-out after the other, in the frame of the
            original images. Tokens of the other images, which are processed beside each cut-out, have no box.
    """
    steps = math.ceil(scale)
    crops: list[Crop] = []
    boxes, image_index = [], []
    for index, (width, height) in enumerate(sizes):
        w, h = max(1, round(width / scale)), max(1, round(height / scale))
        geometry = adapter.geometry([(w, h) if i == index else size for i, size in enumerate(sizes)])
        own = geometry.boxes.masked_fill(~(geometry.is_local & geometry.sees(index))[:, None], torch.nan)
        for row, column in np.ndindex(steps, steps):
            x, y = column * (width - w) // (steps - 1), row * (height - h) // (steps - 1)
            crops.append((index, x, y, x + w, y + h))
            boxes.append(own + torch.tensor([x, y, x, y]))
            image_index.append(torch.full((len(own),), index))
    placed = torch.cat(boxes)
    kinds = tuple("separator" if unplaced else "local" for unplaced in placed.isnan().any(1).tolist())
    return tuple(crops), TokenGeometry(placed, kinds, torch.cat(image_index), tuple(sizes), argument=geometry.argument)


def crop_images(images: Sequence[Image.Image], crops: Sequence[Crop]) -> Iterator[list[Image.Image]]:
    """Yield the images of each pass: one of them replaced by its cut-out."""
    for index, x0, y0, x1, y1 in crops:
        yield [image.crop((x0, y0, x1, y1)) if i == index else image for i, image in enumerate(images)]
