r"""Rasterization: the cells of a map, interpolated linearly from values per visual token."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_intramodal._utils.memory import WORKING_MEMORY, items_within, run_in_chunks
from captum_intramodal.errors import InvalidInputError, NoTokenGeometryError

__all__ = ["raster_grid", "rasterize"]

_LARGEST_SIDE = 160


def raster_grid(boxes: Tensor, image_size: tuple[int, int]) -> tuple[int, int]:
    r"""
    Return the rows and columns of a grid whose cells are half as long as the median box, which is fine enough for
    linear interpolation between box centers.

    Args:

        boxes (Tensor): Boxes of the visual tokens, x0, y0, x1, y1 in pixels, float (V, 4); rows of NaN are ignored.
        image_size (tuple[int, int]): Width and height in pixels.

    Returns:
        **rows, columns** (*tuple[int, int]*): each from 1 to 160.

    Raises:
        NoTokenGeometryError: no token has a box.

    Examples::

        >>> from captum_intramodal.functional.rasterize import raster_grid
        >>> raster_grid(torch.tensor([[0.0, 0, 8, 8], [8, 0, 16, 8]]), (16, 8))
        (2, 4)
    """
    known = boxes[~boxes.isnan().any(1)]
    if len(known) == 0:
        raise NoTokenGeometryError(
            f"None of the {len(boxes)} visual tokens covers a known region of the image, so they give no map."
        )
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
    Interpolate values of visual tokens linearly over the image (paper, Eq. 5).

    A token's weight falls linearly from 1 at the center of its box to 0 one box length away, along both axes; weights
    are normalized in each cell. On a regular raster of tokens this is bilinear interpolation. Overlapping rasters, such
    as tiles and a thumbnail, are averaged with equal weights. Cells outside all boxes, which the model does not
    process, are 0.

    Args:

        values (Tensor): Values of V tokens in each of T maps, float (T, V).
        boxes (Tensor): Boxes of the tokens, x0, y0, x1, y1 in pixels of the image, float (V, 4); tokens with a row of
                    NaN are ignored.
        image_size (tuple[int, int]): Width and height of the image in pixels.
        grid (tuple[int, int]): Rows and columns of the maps.
        working_memory (int, optional): Bytes of the maps that are computed at a time.
                    Default: 16 MiB

    Returns:
        **maps** (*Tensor*): float32 (T, rows, columns).

    Raises:
        InvalidInputError: the numbers of values and boxes differ.

    Examples::

        >>> from captum_intramodal.functional.rasterize import rasterize
        >>> boxes = torch.tensor([[0.0, 0, 8, 8], [8, 0, 16, 8]])
        >>> rasterize(torch.tensor([[0.0, 1.0]]), boxes, (16, 8), (1, 4))
        tensor([[[0.0000, 0.2500, 0.7500, 1.0000]]])
    """
    if values.shape[-1] != len(boxes):
        raise InvalidInputError(f"Got {values.shape[-1]} values for {len(boxes)} boxes; pass one value per box.")
    known = ~boxes.isnan().any(1)
    boxes = boxes[known].float()
    (width, height), (rows, columns) = image_size, grid
    along_x, inside_x = _tent(boxes[:, 0], boxes[:, 2], width, columns)
    along_y, inside_y = _tent(boxes[:, 1], boxes[:, 3], height, rows)
    covered = (inside_y.T @ inside_x > 0).reshape(-1)
    cell, token, weight = _weights_by_cell(along_y, along_x)
    total = torch.zeros(rows * columns, device=weight.device).index_add_(0, cell, weight).clamp_min(1e-12)
    weight = weight / total[cell] * covered[cell]
    first = torch.searchsorted(cell, torch.arange(rows * columns, device=cell.device))
    token, weight, first = (t.to(values.device) for t in (token, weight, first))
    values = values[:, known].float()
    maps = torch.empty(len(values), rows * columns, device=values.device)

    def sum_by_cell(chunk: slice) -> None:
        sums = F.embedding_bag(token, values[chunk].T.contiguous(), first, mode="sum", per_sample_weights=weight)
        maps[chunk] = sums.T

    for _ in run_in_chunks(sum_by_cell, len(values), items_within(working_memory, 4 * (rows * columns + len(boxes)))):
        pass
    return maps.reshape(-1, rows, columns)


def _weights_by_cell(along_y: Tensor, along_x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return cells (numbered row by row, sorted), boxes and their weights in these cells, if not 0: few per cell."""
    n_rows, n_columns = along_y.shape[1], along_x.shape[1]
    (box_y, row), (box_x, column) = (along.nonzero().unbind(1) for along in (along_y, along_x))
    # Pair each row of a box with each of its columns.
    count = box_x.bincount(minlength=len(along_x))
    times = count[box_y]
    nth = torch.arange(int(times.sum()), device=times.device)
    nth = nth - (times.cumsum(0) - times).repeat_interleave(times)
    box, row = box_y.repeat_interleave(times), row.repeat_interleave(times)
    column = column[(count.cumsum(0) - count)[box] + nth]
    cell, order = (row * n_columns + column).sort(stable=True)
    weight = along_y.reshape(-1)[box * n_rows + row] * along_x.reshape(-1)[box * n_columns + column]
    return cell, box[order], weight[order]


def _tent(low: Tensor, high: Tensor, length: int, cells: int) -> tuple[Tensor, Tensor]:
    """Return, by box and cell along one axis, the linear weight, and if the cell's center is in the box (0 or 1)."""
    centers = (torch.arange(cells, device=low.device) + 0.5) * (length / cells)
    side = (high - low).clamp_min(1e-6)[:, None]
    distance = (centers - ((low + high) / 2)[:, None]).abs()
    inside = (distance <= side / 2 + 0.5).float()
    # At the edge of a box the weight may be 0; a floor keeps the normalized weights finite.
    return (1 - distance / side).clamp_min(0) + 1e-6 * inside, inside
