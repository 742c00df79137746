r"""Values per visual token, drawn into the frame of the original picture."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["canvas_grid", "draw_on_canvas"]

_LARGEST_SIDE = 160


def canvas_grid(boxes: Tensor, image_size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of a canvas whose cells are half as long as the typical box is: enough for a linear
    interpolation between token centres, and no finer than the tokens deserve.

    Args:
        boxes (Tensor): float (V, 4), x0, y0, x1, y1 in pixels; rows of NaN are ignored.
        image_size (tuple[int, int]): Width and height in pixels.

    Returns:
        tuple[int, int]: rows and columns, each from 1 to 160.
    """
    known = boxes[~boxes.isnan().any(1)]
    if len(known) == 0:
        raise ValueError(f"None of the {len(boxes)} visual tokens stands for a region of the picture; there is no map.")
    sides = torch.stack([known[:, 2] - known[:, 0], known[:, 3] - known[:, 1]]).median(1).values.clamp_min(1.0)
    columns, rows = (math.ceil(2 * n / side - 0.05) for n, side in zip(image_size, sides.tolist(), strict=True))
    return min(max(rows, 1), _LARGEST_SIDE), min(max(columns, 1), _LARGEST_SIDE)


def draw_on_canvas(values: Tensor, boxes: Tensor, image_size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    r"""
    Interpolates values at visual tokens linearly over the picture (paper, Eq. 5).

    A token's weight falls linearly from its box's centre to zero one box length further, in both directions; weights
    are normalised at each cell. On a regular raster this is bilinear interpolation; overlapping tiles and a
    thumbnail are averaged, each raster with the same weight. Cells outside all boxes, which the model never sees, are
    0.

    Args:

        values (Tensor): float (T, V).
        boxes (Tensor): float (V, 4), x0, y0, x1, y1 in pixels of the picture; tokens with a row of NaN are left out.
        image_size (tuple[int, int]): Width and height of the picture in pixels.
        grid (tuple[int, int]): Rows and columns of the canvas.

    Returns:
        *Tensor* float32 (T, rows, columns).

    Examples::

        >>> boxes = torch.tensor([[0.0, 0, 8, 8], [8, 0, 16, 8]])
        >>> draw_on_canvas(torch.tensor([[0.0, 1.0]]), boxes, (16, 8), (1, 4))
        tensor([[[0.0000, 0.2500, 0.7500, 1.0000]]])
    """
    if values.shape[-1] != len(boxes):
        raise ValueError(f"{values.shape[-1]} values for {len(boxes)} boxes.")
    known = ~boxes.isnan().any(1)
    boxes = boxes[known].float()
    (width, height), (rows, columns) = image_size, grid
    along_x, inside_x = _tent(boxes[:, 0], boxes[:, 2], width, columns)
    along_y, inside_y = _tent(boxes[:, 1], boxes[:, 3], height, rows)
    kernel = (along_y[:, :, None] * along_x[:, None, :]).reshape(len(boxes), -1)
    seen = (inside_y.T @ inside_x > 0).reshape(-1)
    weight = kernel / kernel.sum(0).clamp_min(1e-12)
    drawn = values[:, known].float() @ (weight * seen).to(values.device)
    return drawn.reshape(-1, rows, columns)


def _tent(low: Tensor, high: Tensor, length: int, cells: int) -> tuple[Tensor, Tensor]:
    """Per box and cell along one axis: the linear weight, and whether the cell's centre lies in the box (0 or 1)."""
    centres = (torch.arange(cells, device=low.device) + 0.5) * (length / cells)
    side = (high - low).clamp_min(1e-6)[:, None]
    distance = (centres - ((low + high) / 2)[:, None]).abs()
    inside = (distance <= side / 2 + 0.5).float()
    # At the rim only half a tent reaches a cell; a floor keeps the ratio of weights there finite.
    return (1 - distance / side).clamp_min(0) + 1e-6 * inside, inside
