from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from captum_intramodal.errors import InvalidInputError, NoTokenGeometryError
from captum_intramodal.functional.rasterize import raster_grid, rasterize


def test_a_regular_raster_is_interpolated_bilinearly() -> None:
    values = torch.rand(3, 12)
    boxes = torch.tensor([[x * 10.0, y * 8.0, x * 10 + 10, y * 8 + 8] for y in range(3) for x in range(4)])
    expected = F.interpolate(values.reshape(1, 3, 3, 4), size=(6, 8), mode="bilinear", align_corners=False)[0]
    assert torch.allclose(rasterize(values, boxes, (40, 24), (6, 8)), expected, atol=1e-4)
    assert raster_grid(boxes, (40, 24)) == (6, 8)


def test_thumbnails_gaps_and_tokens_without_a_box() -> None:
    boxes = torch.tensor([[0.0, 0, 20, 20], [0, 0, 10, 20], [torch.nan] * 4])
    maps = rasterize(torch.tensor([[1.0, 3.0, 100.0]]), boxes, (40, 20), (1, 4))
    assert maps[0, 0, 2:].tolist() == [0, 0]  # no box covers the right half
    assert 1 < float(maps[0, 0, 0]) < 3
    with pytest.raises(NoTokenGeometryError, match="no map"):
        raster_grid(torch.full((3, 4), torch.nan), (10, 10))
    with pytest.raises(InvalidInputError, match="2 values for 3 boxes"):
        rasterize(torch.rand(1, 2), boxes, (4, 4), (1, 1))


def test_each_cell_is_the_weighted_mean_of_all_boxes() -> None:
    torch.manual_seed(0)
    # Overlapping tiles, a thumbnail, and a box off any raster.
    tiles = torch.tensor([[x * 15.0, y * 10.0, x * 15 + 20, y * 10 + 14] for y in range(4) for x in range(3)])
    thumbnail = torch.tensor([[x * 25.0, 0, x * 25 + 25, 44] for x in range(2)])
    boxes = torch.cat([tiles, thumbnail, torch.tensor([[3.0, 30, 17, 41]])])
    values = torch.rand(5, len(boxes))
    (width, height), (rows, columns) = (50, 44), (11, 13)
    expected = torch.zeros(5, rows, columns)
    for row, column in np.ndindex(rows, columns):
        x, y = (column + 0.5) * width / columns, (row + 0.5) * height / rows
        weights = []
        for x0, y0, x1, y1 in boxes.tolist():
            tents = [
                max(0.0, 1 - abs(at - (low + high) / 2) / (high - low)) for at, low, high in ((x, x0, x1), (y, y0, y1))
            ]
            weights.append(tents[0] * tents[1])
        expected[:, row, column] = values @ torch.tensor(weights) / sum(weights)
    actual = rasterize(values, boxes, (width, height), (rows, columns))
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    few = rasterize(values, boxes, (width, height), (rows, columns), working_memory=1000)
    torch.testing.assert_close(few, actual, atol=1e-6, rtol=1e-6)
