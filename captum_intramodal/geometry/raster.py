r"""Where are tokens that form a regular raster? Boxes derived from the number of tokens, and confirmed by a trial."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from captum_intramodal._utils.image import noise_image
from captum_intramodal.errors import NoTokenGeometryError
from captum_intramodal.geometry.decoder_inputs import layer0_input, model_inputs
from captum_intramodal.geometry.ownership import bypassed_attention
from captum_intramodal.geometry.pixel_map import PixelMap, Prepare, Size, check_sizes
from captum_intramodal.geometry.token_geometry import TokenGeometry
from captum_intramodal.models.hooks import evaluation_mode
from captum_intramodal.models.placeholders import visual_positions

__all__ = ["SAMPLE", "expected_raster"]

# (width, height) of a small image, whose tokens tell if those of larger ones can be expected to form a raster.
SAMPLE: Size = (192, 128)


def code_raster_geometry(
    pixels: Mapping[str, PixelMap], sizes: tuple[Size, ...], n_tokens: int, ends: int
) -> TokenGeometry:
    """Return the geometry of discrete codes in a raster over a pixel tensor, each row followed by ``ends`` separators.

    The tensor is (images, channels, height, width); its images may be padded at the bottom and on the right.

    Raises:
        NoTokenGeometryError: the number of tokens is not that of such a raster.
    """
    (map_,) = pixels.values()
    sampled = (map_.gain != 0).reshape(map_.shape)[:, 0]
    extents = [(int(s.any(1).sum()), int(s.any(0).sum())) for s in sampled]

    def grids(cell: int) -> list[tuple[int, int]]:
        return [(height // cell, width // cell) for height, width in extents]

    cells = [
        cell
        for cell in range(1, min(map(min, extents)) + 1)
        if not any(height % cell or width % cell for height, width in extents)
        and sum(rows * (columns + ends) for rows, columns in grids(cell)) == n_tokens
    ]
    if len(sampled) != len(sizes) or not cells:
        raise NoTokenGeometryError(
            f"{n_tokens} visual tokens do not form a raster of square cells over {len(sizes)} images that the "
            f"processor resizes to (height, width) {extents}, so they cover no known regions."
        )
    cell = cells[0]
    lower, upper = (edges.reshape(2, *map_.shape)[:, :, 0] for edges in (map_.lower, map_.upper))
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


def expected_raster(
    model: PreTrainedModel, prepare: Prepare, sample: TokenGeometry, image_sizes: Sequence[Size]
) -> TokenGeometry | None:
    r"""
    Derive the geometry of images from that of a small one, in a tenth of the time of :func:`measure_geometry`.

    If the small image's tokens form a raster of equal boxes, the number of another image's tokens determines its
    raster. A trial confirms it: noise perturbs the boxes of a random half of the tokens, then those of the others, and
    exactly these tokens must change at the decoder's input. To allow for the processor's resampling, the perturbations
    spare an eighth of each box on every side; so the boxes are confirmed to about that.

    Args:

        model (PreTrainedModel): As in :func:`measure_geometry`.
        prepare (Callable): As in :func:`measure_geometry`.
        sample (TokenGeometry): Geometry of one small image.
        image_sizes (Sequence[tuple[int, int]]): (width, height) of each image of the prompt, in order.

    Returns:
        **geometry** (*TokenGeometry or None*): None if the tokens do not provably form a raster, and must be measured.

    Raises:
        InvalidInputError: ``image_sizes`` does not hold the size of at least one image, or ``prepare`` does not return
            the inputs of one example.

    Examples::

        >>> from captum_intramodal.geometry import expected_raster, measure_geometry
        >>> prepare = lambda images: adapter.prepare(images, "describe the picture.")
        >>> sample = measure_geometry(model, prepare, [(192, 128)])
        >>> expected_raster(model, prepare, sample, [(320, 224)]).boxes.shape
        torch.Size([70, 4])
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
        counts = _tokens_per_image(positions, len(sizes))
        if len(counts) != len(sizes):
            return None
        width, height = raster[0, 2:].tolist()
        shapes = [_raster_shape(size, n, width / height) for size, n in zip(sizes, counts, strict=True)]
        if not _trial_confirms(model, prepare, inputs, list(zip(images, counts, shapes, strict=True)), generator):
            return None
    boxes = torch.cat([_raster_boxes(*each) for each in zip(sizes, shapes, strict=True)])
    index = torch.arange(len(sizes)).repeat_interleave(torch.tensor(counts))
    return TokenGeometry(boxes, ("local",) * len(boxes), index, sizes)


def _trial_confirms(
    model: PreTrainedModel,
    prepare: Prepare,
    inputs: Mapping[str, Any],
    rasters: Sequence[tuple[Image.Image, int, tuple[int, int]]],
    generator: torch.Generator,
) -> bool:
    """Return whether perturbing half of the cells, then the others, changes exactly their tokens.

    ``inputs`` are those of the images; the rasters hold each image, its number of tokens and their rows and columns.
    """
    positions = visual_positions(model, inputs["input_ids"])
    counts = [count for _, count, _ in rasters]
    # A small image's inputs suffice: which blocks contain attention does not depend on the size.
    with bypassed_attention(model, model_inputs(model, prepare([noise_image(SAMPLE, generator)]))):
        base, repeated = (layer0_input(model, inputs)[positions].float() for _ in range(2))
        noise = 4 * (repeated - base).abs().amax(dim=1)
        half = torch.rand(len(positions), generator=generator) < 0.5
        for group in (half, ~half):
            cells = zip(rasters, group.split(counts), strict=True)
            images = [_perturb_cells(image, part.reshape(shape)) for (image, _, shape), part in cells]
            perturbed = model_inputs(model, prepare(images))
            if not torch.equal(perturbed["input_ids"], inputs["input_ids"]):
                return False
            change = (layer0_input(model, perturbed)[positions].float() - base).abs().amax(dim=1)
            if not torch.equal((change > noise).cpu(), group):
                return False
    return True


def _tokens_per_image(positions: Tensor, n_images: int) -> list[int]:
    """Return the lengths of the runs of successive positions; those of a single image are one run."""
    starts = [0, *((positions.diff() > 1).nonzero().flatten() + 1).tolist()] if n_images > 1 else [0]
    return [stop - start for start, stop in zip(starts, [*starts[1:], len(positions)], strict=True)]


def _raster_shape(size: Size, count: int, aspect: float) -> tuple[int, int]:
    """Return rows and columns of ``count`` cells over an image, whose width is about ``aspect`` times their height."""
    shapes = [(count // columns, columns) for columns in range(1, count + 1) if count % columns == 0]
    return min(shapes, key=lambda shape: abs(math.log(size[0] * shape[0] / (size[1] * shape[1] * aspect))))


def _raster_boxes(size: Size, shape: tuple[int, int]) -> Tensor:
    """Return the boxes of equal cells that cover an image, row by row."""
    (width, height), (rows, columns) = size, shape
    row, column = (t.flatten() for t in torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"))
    corners = torch.stack([column, row, column + 1, row + 1], dim=1)
    return corners * torch.tensor([width / columns, height / rows] * 2)


def _perturb_cells(image: Image.Image, cells: Tensor) -> Image.Image:
    """Return an image with other values inside some cells of a raster, bool (rows, columns), but not at their rims."""
    chosen, inside = cells, []
    for axis, length in enumerate((image.height, image.width)):
        place = (torch.arange(length) + 0.5) * (cells.shape[axis] / length)
        chosen = chosen.index_select(axis, place.long())
        inside.append((place.frac() - 0.5).abs() < 0.375)
    values = np.array(image)
    values[(chosen & inside[0][:, None] & inside[1]).numpy()] += 128
    return Image.fromarray(values)
