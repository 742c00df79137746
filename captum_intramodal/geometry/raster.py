r"""TODO."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from captum_intramodal.geometry.decoder_inputs import layer0_input, model_inputs, noise_image
from captum_intramodal.geometry.ownership import bypassed_attention
from captum_intramodal.geometry.pixel_map import PixelMap, Prepare, Size, check_sizes
from captum_intramodal.geometry.token_geometry import TokenGeometry
from captum_intramodal.models.hooks import evaluation_mode
from captum_intramodal.models.placeholders import visual_positions

__all__ = ["SAMPLE", "expected_raster"]

# A small image's tokens tell whether those of larger ones can be expected to form a raster as well; (width, height).
SAMPLE: Size = (192, 128)


def code_raster_geometry(
    pixels: Mapping[str, PixelMap], sizes: tuple[Size, ...], n_tokens: int, ends: int
) -> TokenGeometry:
    """Geometry of tokens that lie row by row over a pixel tensor (images, channels, height, width), whose images
    may be padded below and on the right."""
    (map_,) = pixels.values()
    shown = (map_.gain != 0).reshape(map_.shape)[:, 0]
    extents = [(int(s.any(1).sum()), int(s.any(0).sum())) for s in shown]

    def grids(cell: int) -> list[Size]:
        return [(height // cell, width // cell) for height, width in extents]

    cells = [
        cell
        for cell in range(1, min(map(min, extents)) + 1)
        if not any(height % cell or width % cell for height, width in extents)
        and sum(rows * (columns + ends) for rows, columns in grids(cell)) == n_tokens
    ]
    if len(shown) != len(sizes) or not cells:
        raise ValueError(f"{n_tokens} codes are no raster over images of (height, width) {extents}.")
    cell = cells[0]
    lower, upper = (e.reshape(2, *map_.shape)[:, :, 0] for e in (map_.lower, map_.upper))
    boxes, image_index = [], []
    kinds: list[str] = []
    for image, (rows, columns) in enumerate(grids(cell)):
        low = lower[:, image, ::cell, ::cell][:, :rows, :columns]
        high = upper[:, image, cell - 1 :: cell, cell - 1 :: cell][:, :rows, :columns]
        grid = F.pad(torch.cat([low, high]), (0, ends), value=math.nan)
        boxes.append(grid.flatten(1).T)
        image_index.append(torch.full((len(boxes[-1]),), image))
        kinds += (["local"] * columns + ["separator"] * ends) * rows
    return TokenGeometry(torch.cat(boxes).contiguous(), tuple(kinds), torch.cat(image_index), sizes)


def _raster_shape(size: Size, count: int, aspect: float) -> tuple[int, int]:
    """Rows and columns of so many cells over an image, of a width that is about ``aspect`` times their height."""
    shapes = [(count // columns, columns) for columns in range(1, count + 1) if count % columns == 0]
    return min(shapes, key=lambda shape: abs(math.log(size[0] * shape[0] / (size[1] * shape[1] * aspect))))


def _raster_boxes(size: Size, shape: tuple[int, int]) -> Tensor:
    """Boxes of equal cells that cover an image, row by row."""
    (width, height), (rows, columns) = size, shape
    row, column = (t.flatten() for t in torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"))
    corners = torch.stack([column, row, column + 1, row + 1], dim=1)
    return corners * torch.tensor([width / columns, height / rows] * 2)


def _change_cells(image: Image.Image, cells: Tensor) -> Image.Image:
    """An image with other values inside some of the cells of a raster, bool (rows, columns); the cells' rims stay."""
    chosen, inside = cells, []
    for axis, length in enumerate((image.height, image.width)):
        place = (torch.arange(length) + 0.5) * (cells.shape[axis] / length)
        chosen = chosen.index_select(axis, place.long())
        inside.append((place.frac() - 0.5).abs() < 0.375)
    values = np.array(image)
    values[(chosen & inside[0][:, None] & inside[1]).numpy()] += 128
    return Image.fromarray(values)


def expected_raster(
    model: PreTrainedModel, prepare: Prepare, sample: TokenGeometry, image_sizes: Sequence[Size]
) -> TokenGeometry | None:
    r"""What :func:`measure_geometry` would find where a model puts a raster of equal tokens over images of any size,
    in a tenth of the time.

    If the tokens of a small image are such a raster, the number of tokens tells the raster of another image. A
    trial confirms it: noise changes inside the boxes of a random half of the tokens, then of the others, and exactly
    these tokens must react where the decoder reads them. The changes leave out an eighth of each box on every side, for
    the processor's resampling; so boxes are right to about that.

    Args:
        model (PreTrainedModel): See :func:`measure_geometry`.
        prepare (Callable): See there.
        sample (TokenGeometry): Measured on one small image.
        image_sizes (Sequence[tuple[int, int]]): (width, height) of each image of the prompt, in order.

    Returns:
        **geometry** (*TokenGeometry or None*):
            None where the tokens are not known to form a raster, and must be measured.
    """
    sizes = check_sizes(image_sizes)
    shape = _raster_shape(sample.image_sizes[0], len(sample.kinds), 1.0)
    raster = _raster_boxes(sample.image_sizes[0], shape)
    if sample.argument is not None or min(shape) < 2 or not bool(((sample.boxes - raster).abs() < 1).all()):
        return None
    generator = torch.Generator().manual_seed(0)
    images = [noise_image(size, generator) for size in sizes]
    with evaluation_mode(model):
        inputs = model_inputs(model, prepare(images))
        positions = visual_positions(model, inputs["input_ids"])
        starts = [0, *((positions.diff() > 1).nonzero().flatten() + 1).tolist()] if len(sizes) > 1 else [0]
        counts = [b - a for a, b in zip(starts, [*starts[1:], len(positions)], strict=True)]
        if len(counts) != len(sizes):
            return None
        width, height = raster[0, 2:].tolist()
        shapes = [_raster_shape(size, n, width / height) for size, n in zip(sizes, counts, strict=True)]
        # What attention is does not depend on the image's size.
        with bypassed_attention(model, model_inputs(model, prepare([noise_image(SAMPLE, generator)]))):
            base, same = (layer0_input(model, inputs)[positions].float() for _ in range(2))
            half = torch.rand(len(positions), generator=generator) < 0.5
            for group in (half, ~half):
                parts = zip(images, group.split(counts), shapes, strict=True)
                changed = model_inputs(model, prepare([_change_cells(p, g.reshape(s)) for p, g, s in parts]))
                if not torch.equal(changed["input_ids"], inputs["input_ids"]):
                    return None
                moved = (layer0_input(model, changed)[positions].float() - base).abs().amax(dim=1)
                if not torch.equal((moved > 4 * (same - base).abs().amax(dim=1)).cpu(), group):
                    return None
    boxes = torch.cat([_raster_boxes(*each) for each in zip(sizes, shapes, strict=True)])
    index = torch.arange(len(sizes)).repeat_interleave(torch.tensor(counts))
    return TokenGeometry(boxes, ("local",) * len(boxes), index, sizes)
