r"""Values per visual token, drawn into the frame of the original image."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_intramodal._utils.memory import WORKING_MEMORY, items_within, run_in_chunks

__all__ = ["raster_grid", "rasterize"]

_LARGEST_SIDE = 160


def raster_grid(boxes: Tensor, image_size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of a canvas whose cells are half as long as the typical box is: enough for a linear
    interpolation between token centers, and no finer than the tokens deserve.

    Args:
        boxes (Tensor): float (V, 4), x0, y0, x1, y1 in pixels; rows of NaN are ignored.
        image_size (tuple[int, int]): Width and height in pixels.

    Returns:
        tuple[int, int]: rows and columns, each from 1 to 160.
    """
    known = boxes[~boxes.isnan().any(1)]
    if len(known) == 0:
        raise ValueError(f"None of the {len(boxes)} visual tokens stands for a region of the image; there is no map.")
    sides = torch.stack([known[:, 2] - known[:, 0], known[:, 3] - known[:, 1]]).median(1).values.clamp_min(1.0)
    columns, rows = (math.ceil(2 * n / side - 0.05) for n, side in zip(image_size, sides.tolist(), strict=True))
    return min(max(rows, 1), _LARGEST_SIDE), min(max(columns, 1), _LARGEST_SIDE)


def rasterize(
    values: Tensor,
    boxes: Tensor,
    image_size: tuple[int, int],
    grid: tuple[int, int],
    working_memory: int = WORKING_MEMORY,
) -> Tensor:
    r"""
    Interpolates values at visual tokens linearly over the image (paper, Eq. 5).

    A token's weight falls linearly from its box's center to zero one box length further, in both directions; weights
    are normalized at each cell. On a regular raster this is bilinear interpolation; overlapping tiles and a
    thumbnail are averaged, each raster with the same weight. Cells outside all boxes, which the model never sees, are
    0.

    Args:

        values (Tensor): float (T, V).
        boxes (Tensor): float (V, 4), x0, y0, x1, y1 in pixels of the image; tokens with a row of NaN are left out.
        image_size (tuple[int, int]): Width and height of the image in pixels.
        grid (tuple[int, int]): Rows and columns of the canvas.
        working_memory (int, optional): Bytes that the maps which are drawn at a time may take.
                    Default: 16 MiB

    Returns:
        *Tensor* float32 (T, rows, columns).

    Examples::

        >>> boxes = torch.tensor([[0.0, 0, 8, 8], [8, 0, 16, 8]])
        >>> rasterize(torch.tensor([[0.0, 1.0]]), boxes, (16, 8), (1, 4))
        tensor([[[0.0000, 0.2500, 0.7500, 1.0000]]])
    """
    if values.shape[-1] != len(boxes):
        raise ValueError(f"{values.shape[-1]} values for {len(boxes)} boxes.")
    known = ~boxes.isnan().any(1)
    boxes = boxes[known].float()
    (width, height), (rows, columns) = image_size, grid
    along_x, inside_x = _tent(boxes[:, 0], boxes[:, 2], width, columns)
    along_y, inside_y = _tent(boxes[:, 1], boxes[:, 3], height, rows)
    seen = (inside_y.T @ inside_x > 0).reshape(-1)
    cell, token, weight = _pairs(along_y, along_x)
    total = torch.zeros(rows * columns, device=weight.device).index_add_(0, cell, weight).clamp_min(1e-12)
    weight = weight / total[cell] * seen[cell]
    first = torch.searchsorted(cell, torch.arange(rows * columns, device=cell.device))
    token, weight, first = (t.to(values.device) for t in (token, weight, first))
    shown = values[:, known].float()
    drawn = torch.empty(len(values), rows * columns, device=values.device)

    def draw(part: slice) -> None:
        bags = F.embedding_bag(token, shown[part].T.contiguous(), first, mode="sum", per_sample_weights=weight)
        drawn[part] = bags.T

    for _ in run_in_chunks(draw, len(values), items_within(working_memory, 4 * (rows * columns + len(boxes)))):
        pass
    return drawn.reshape(-1, rows, columns)


def _pairs(along_y: Tensor, along_x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cells, counted row by row and sorted, with the boxes that weigh there, and how much. Each cell lies near few."""
    n_rows, n_columns = along_y.shape[1], along_x.shape[1]
    (box_y, row), (box_x, column) = (along.nonzero().unbind(1) for along in (along_y, along_x))
    # Every row of a box meets every one of its columns.
    count = box_x.bincount(minlength=len(along_x))
    times = count[box_y]
    which = torch.arange(int(times.sum()), device=times.device)
    which = which - (times.cumsum(0) - times).repeat_interleave(times)
    box, row = box_y.repeat_interleave(times), row.repeat_interleave(times)
    column = column[(count.cumsum(0) - count)[box] + which]
    cell, order = (row * n_columns + column).sort(stable=True)
    weight = along_y.reshape(-1)[box * n_rows + row] * along_x.reshape(-1)[box * n_columns + column]
    return cell, box[order], weight[order]


def _tent(low: Tensor, high: Tensor, length: int, cells: int) -> tuple[Tensor, Tensor]:
    """Per box and cell along one axis: the linear weight, and whether the cell's center lies in the box (0 or 1)."""
    centers = (torch.arange(cells, device=low.device) + 0.5) * (length / cells)
    side = (high - low).clamp_min(1e-6)[:, None]
    distance = (centers - ((low + high) / 2)[:, None]).abs()
    inside = (distance <= side / 2 + 0.5).float()
    # At the rim only half a tent reaches a cell; a floor keeps the ratio of weights there finite.
    return (1 - distance / side).clamp_min(0) + 1e-6 * inside, inside
