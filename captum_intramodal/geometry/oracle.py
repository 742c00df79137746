r"""TODO."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from captum_intramodal.geometry.decoder_inputs import model_inputs, read_states, visual_rows
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
    r"""How often the token that reacts most to a small change of the image has a box around that change.

    Independent of how the geometry was measured: it changes the original image, at random places of the seen
    rectangle, by blocks of an eighth of a token's size, and lets the processor run again. A hit is a box that contains
    the block's center, give or take half a block: a change across the border of two tokens may show in either. Right
    boxes score 0.97 to 1 with ``bypass``, transposed or shuffled ones hardly ever.

    Args:

        model (PreTrainedModel): The model.
        prepare (Callable): As in :func:`measure_geometry`.
        images (Sequence[PIL.Image.Image]): Images of the geometry's sizes.
        geometry (TokenGeometry): The geometry to check.
        blocks (int): Number of changes, spread evenly over the images.
                    Default: 40
        seed (int): Seed of the places.
                    Default: 0
        bypass (bool): Whether to skip the vision tower's attention, which also carries a change to other tokens.
                    Default: ``True``

    Returns:
        **hit rate** (*float*):
            Between 0 and 1.

    Raises:
        ValueError: the images do not have the geometry's sizes, the number of visual positions differs, an image has
            no local tokens, or ``blocks`` is not positive.
    """
    originals = [image.convert("RGB") for image in images]
    sizes = tuple(image.size for image in images)
    if sizes != geometry.image_sizes:
        raise ValueError(f"The images have sizes {list(sizes)}, the geometry is for {list(geometry.image_sizes)}.")
    if blocks < 1:
        raise ValueError(f"blocks must be at least 1, got {blocks}.")
    local = geometry.is_local
    if missing := [i for i in range(len(sizes)) if not bool((local & geometry.sees(i)).any())]:
        raise ValueError(f"The geometry has no local tokens for image {missing[0]} of {len(sizes)}; nothing to check.")
    generator = torch.Generator().manual_seed(seed)

    def hidden(changed: list[Image.Image]) -> Tensor:
        inputs = model_inputs(model, prepare(changed))
        states = read_states(model, inputs, geometry.argument)
        rows = visual_rows(model, inputs, geometry.argument, len(states))
        if len(rows) != len(geometry.kinds):
            raise ValueError(f"The model input has {len(rows)} visual positions, the geometry {len(geometry.kinds)}.")
        return states[rows.to(states.device)].float().cpu()

    def hits() -> int:
        base = hidden(originals)
        count = 0
        for block in range(blocks):
            index = block % len(originals)
            width, height = sizes[index]
            boxes = geometry.boxes[local & geometry.sees(index)]
            token = (boxes[:, 2:] - boxes[:, :2]).median(dim=0).values
            side = [max(2, round(float(t) / 8)) for t in token]
            x0, y0, x1, y1 = geometry.coverage(index)
            u, v = torch.rand(2, generator=generator).tolist()
            left = min(max(round(x0 + u * (x1 - x0) - side[0] / 2), math.ceil(x0)), max(width - side[0], 0))
            top = min(max(round(y0 + v * (y1 - y0) - side[1] / 2), math.ceil(y0)), max(height - side[1], 0))
            values = np.array(originals[index])
            values[top : top + side[1], left : left + side[0]] += 128
            changed = [*originals]
            changed[index] = Image.fromarray(values)
            change = (hidden(changed) - base).norm(dim=1).masked_fill(~local, -1.0)
            strongest = int(change.argmax())
            box = geometry.boxes[strongest]
            corner = torch.tensor([left, top])
            touches = bool(((box[:2] <= corner + torch.tensor(side)) & (corner <= box[2:])).all())
            count += touches and bool(geometry.sees(index)[strongest])
        return count

    with evaluation_mode(model):
        if not bypass:
            return hits() / blocks
        with bypassed_attention(model, model_inputs(model, prepare(originals))):
            return hits() / blocks
