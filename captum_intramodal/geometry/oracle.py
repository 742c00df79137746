r"""Do the boxes of a geometry hold? A check by small changes of the image, independent of how they were measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from captum_intramodal.errors import InvalidInputError, InvalidOptionError, NoTokenGeometryError
from captum_intramodal.geometry.decoder_inputs import decoder_states, model_inputs, visual_rows
from captum_intramodal.geometry.ownership import bypassed_attention
from captum_intramodal.geometry.pixel_map import Prepare
from captum_intramodal.geometry.token_geometry import TokenGeometry
from captum_intramodal.models.hooks import evaluation_mode

__all__ = ["geometry_oracle"]


def geometry_oracle(
    model: PreTrainedModel,
    prepare: Prepare,
    images: Sequence[Image.Image],
    geometry: TokenGeometry,
    blocks: int = 40,
    seed: int = 0,
    bypass: bool = True,
) -> float:
    r"""
    Compute how often the token that changes most with a small change of the image has a box around that change.

    The oracle is independent of how the geometry was measured: it changes blocks of an eighth of a token's size in the
    original image, at random places that tokens cover, and runs the processor again. A block is a hit if the box
    overlaps it: on the border of two tokens, either may change most. Correct boxes score 0.97 to 1 with ``bypass``;
    transposed or shuffled ones hardly ever hit.

    Args:

        model (PreTrainedModel): The model.
        prepare (Callable): Computes the model's inputs from images, as in :func:`measure_geometry`.
        images (Sequence[PIL.Image.Image]): Images of the geometry's sizes.
        geometry (TokenGeometry): The geometry to check.
        blocks (int, optional): Number of changes, spread evenly over the images.
                    Default: 40
        seed (int, optional): Seed of their places.
                    Default: 0
        bypass (bool, optional): Whether to bypass the vision tower's attention, which carries a change to other tokens.
                    Default: True

    Returns:
        **hit rate** (*float*): in [0, 1].

    Raises:
        InvalidInputError: the images do not have the geometry's sizes, or the inputs not its number of visual tokens.
        InvalidOptionError: ``blocks`` is not positive.
        NoTokenGeometryError: an image has no local tokens, so that there is nothing to check.

    Examples::

        >>> from captum_intramodal.geometry import geometry_oracle
        >>> prepare = lambda images: adapter.prepare(images, "describe the picture.")
        >>> geometry_oracle(model, prepare, [image], adapter.geometry([image.size]), blocks=8)
        1.0
    """
    _check_arguments(images, geometry, blocks)
    originals = [image.convert("RGB") for image in images]
    generator = torch.Generator().manual_seed(seed)
    with (
        evaluation_mode(model),
        bypassed_attention(model, model_inputs(model, prepare(originals))) if bypass else nullcontext(),
    ):
        base = _visual_states(model, prepare, originals, geometry)
        hits = 0
        for number in range(blocks):
            index = number % len(originals)
            block = _random_block(geometry, index, generator)
            changed = [*originals]
            changed[index] = _change_block(originals[index], block)
            change = (_visual_states(model, prepare, changed, geometry) - base).norm(dim=1)
            most = int(change.masked_fill(~geometry.is_local, -1.0).argmax())
            hits += _is_hit(geometry, most, index, block)
    return hits / blocks


def _check_arguments(images: Sequence[Image.Image], geometry: TokenGeometry, blocks: int) -> None:
    """Check that the images fit the geometry, and that there is something to check."""
    sizes = tuple(image.size for image in images)
    if sizes != geometry.image_sizes:
        raise InvalidInputError(
            f"The images have sizes {list(sizes)}, but the geometry is for {list(geometry.image_sizes)}."
        )
    if blocks < 1:
        raise InvalidOptionError(f"blocks must be at least 1, got {blocks}.")
    for index in range(len(sizes)):
        if not bool((geometry.is_local & geometry.sees(index)).any()):
            raise NoTokenGeometryError(
                f"The geometry has no local tokens in image {index} of {len(sizes)}, so there is nothing to check."
            )


def _visual_states(
    model: PreTrainedModel, prepare: Prepare, images: list[Image.Image], geometry: TokenGeometry
) -> Tensor:
    """Compute the visual tokens' states at the decoder's input, float32 (V, D) on the CPU."""
    inputs = model_inputs(model, prepare(images))
    states = decoder_states(model, inputs, geometry.argument)
    rows = visual_rows(model, inputs, geometry.argument, len(states))
    if len(rows) != len(geometry.kinds):
        raise InvalidInputError(
            f"The model's inputs have {len(rows)} visual tokens, but the geometry has {len(geometry.kinds)}."
        )
    return states[rows.to(states.device)].float().cpu()


def _random_block(geometry: TokenGeometry, index: int, generator: torch.Generator) -> tuple[int, int, int, int]:
    """Draw a block of an image that its tokens cover: left, top, right and bottom edge."""
    boxes = geometry.boxes[geometry.is_local & geometry.sees(index)]
    token = (boxes[:, 2:] - boxes[:, :2]).median(dim=0).values
    width, height = (max(2, round(float(length) / 8)) for length in token)
    image_width, image_height = geometry.image_sizes[index]
    x0, y0, x1, y1 = geometry.coverage(index)
    u, v = torch.rand(2, generator=generator).tolist()
    left = min(max(round(x0 + u * (x1 - x0) - width / 2), math.ceil(x0)), max(image_width - width, 0))
    top = min(max(round(y0 + v * (y1 - y0) - height / 2), math.ceil(y0)), max(image_height - height, 0))
    return left, top, left + width, top + height


def _change_block(image: Image.Image, block: tuple[int, int, int, int]) -> Image.Image:
    """Return an image with other values inside a block."""
    left, top, right, bottom = block
    values = np.array(image)
    values[top:bottom, left:right] += 128
    return Image.fromarray(values)


def _is_hit(geometry: TokenGeometry, token: int, index: int, block: tuple[int, int, int, int]) -> bool:
    """Return whether a token belongs to an image, and its box overlaps a block of that image."""
    box = geometry.boxes[token]
    overlaps = bool(((box[:2] <= torch.tensor(block[2:])) & (torch.tensor(block[:2]) <= box[2:])).all())
    return overlaps and bool(geometry.sees(index)[token])
