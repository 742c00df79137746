"""Boxes derived by hand from each processor's rules, and what several tests of the geometry share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torch import Tensor

SIZES = [(200, 136), (640, 400), (130, 310)]


def preparer(processor: Any, n_images: int = 1, **options: Any) -> Callable[[list[Image.Image]], Any]:
    content = [*({"type": "image"} for _ in range(n_images)), {"type": "text", "text": "what is in the picture ?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return lambda images: processor(images=images, text=[text], return_tensors="pt", **options)


def image_only(processor: Any) -> Callable[[list[Image.Image]], Any]:
    return lambda images: processor.image_processor(images=images, return_tensors="pt")


def grid_boxes(rows: int, columns: int, x0: float, y0: float, x1: float, y1: float) -> list[list[float]]:
    x = [x0 + (x1 - x0) * i / columns for i in range(columns + 1)]
    y = [y0 + (y1 - y0) * i / rows for i in range(rows + 1)]
    return [[x[c], y[r], x[c + 1], y[r + 1]] for r in range(rows) for c in range(columns)]


def tiled_boxes(rows: int, columns: int, width: int, height: int) -> list[list[float]]:
    """4 x 4 tokens in every tile, then 4 x 4 of the thumbnail."""
    tiles = grid_boxes(rows, columns, 0, 0, width, height)
    boxes = [box for tile in tiles for box in grid_boxes(4, 4, *tile)]
    return boxes + grid_boxes(4, 4, 0, 0, width, height) if len(tiles) > 1 else boxes


def qwen_boxes(width: int, height: int) -> list[list[float]]:
    unit, most = 28, 160
    rows, columns = round(height / unit), round(width / unit)
    if rows * columns > most:
        shrink = math.sqrt(width * height / (most * unit**2))
        rows, columns = math.floor(height / shrink / unit), math.floor(width / shrink / unit)
    return grid_boxes(rows, columns, 0, 0, width, height)


def llava_boxes(width: int, height: int) -> list[list[float]]:
    # The shorter side is resized to 112, the longer one rounded down; the crop's margin is rounded down as well.
    crop = 112
    resized = [crop * side // min(width, height) for side in (width, height)]
    left, top = ((side - crop) // 2 for side in resized)
    x, y = width / resized[0], height / resized[1]
    return grid_boxes(8, 8, left * x, top * y, (left + crop) * x, (top + crop) * y)


def idefics_boxes(width: int, height: int) -> list[list[float]]:
    # The longer side is resized to three tiles, the shorter one up to the next whole tile.
    other = math.ceil(3 * min(width, height) / max(width, height))
    return tiled_boxes(other, 3, width, height) if width >= height else tiled_boxes(3, other, width, height)


def internvl_boxes(width: int, height: int) -> list[list[float]]:
    # The tiling of at most six tiles with the image's aspect ratio, looked up by hand.
    rows, columns = {(200, 136): (2, 3), (640, 400): (2, 3), (130, 310): (2, 1), (100, 100): (1, 1)}[width, height]
    return tiled_boxes(rows, columns, width, height)


BOXES = {
    "qwen2_vl": qwen_boxes,
    "qwen2_5_vl": qwen_boxes,
    "llava": llava_boxes,
    "smolvlm": idefics_boxes,
    "idefics3": idefics_boxes,
    "internvl": internvl_boxes,
}


def iou(a: Tensor, b: Tensor) -> Tensor:
    overlap = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp_min(0).prod(1)
    area = (a[:, 2:] - a[:, :2]).prod(1) + (b[:, 2:] - b[:, :2]).prod(1)
    return overlap / (area - overlap)
