r"""Which box of the original image each visual token stands for: measured on the model, not looked up per family.

Three experiments, none of which knows the model's architecture:

1. *Coordinate probe.* The model's own processor runs on synthetic images (black, white, a ramp and two waves per
   axis). What each element of its pixel tensors becomes tells which point of the image that element samples, in
   whatever layout: flattened patches, tiles, thumbnails, channels first or last.
2. *Ownership.* Which visual tokens does each pixel element feed where the decoder reads them? That is at the input of
   its layer 0, or, where images do not enter its sequence, in the argument of its blocks that a change of the image
   moves: the states of a cross-attention, or an encoder's output. The vision tower's attention blocks are replaced by
   the identity meanwhile; what remains (patch embedding, merging, pooling, projection) is local. Where every element
   feeds one token, a few backward passes name that token, see :meth:`PerturbationSweep.owners`. Where elements are
   shared, or no gradient passes, a forward-only sweep changes the elements strip by strip and sees which tokens differ; a bisection
   finds the edges of all tokens at once, see :mod:`~captum_intramodal.geometry.bisection`.
3. *Oracle.* :func:`geometry_oracle` checks a geometry with small changes of the image itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from captum_intramodal.geometry.bisection import boxes_by_bisection, share_all_pixels, span_whole_image
from captum_intramodal.geometry.decoder_inputs import model_inputs, noise_image
from captum_intramodal.geometry.ownership import PerturbationSweep, boxes_by_owner, bypassed_attention
from captum_intramodal.geometry.pixel_map import Prepare, Size, check_sizes
from captum_intramodal.geometry.pixel_probe import measure_pixels, reduced_sizes
from captum_intramodal.geometry.raster import code_raster_geometry
from captum_intramodal.geometry.token_geometry import TokenGeometry
from captum_intramodal.models.families import family_of
from captum_intramodal.models.hooks import evaluation_mode
from captum_intramodal.models.placeholders import visual_positions

__all__ = ["measure_geometry"]


def _fill_image_index(index: Tensor, positions: Tensor, seen: Tensor) -> Tensor:
    """Gives tokens that see no image the index of the nearest that does, first of all within their own run."""
    if not bool(seen.any()):
        return torch.zeros_like(index)
    run = torch.cat([torch.zeros(1, dtype=torch.int64), (positions.diff() > 1).long().cumsum(0)])
    distance = (positions[:, None] - positions[None, seen]).abs()
    distance = distance + (run[:, None] != run[None, seen]) * (int(positions.max()) + 1)
    return torch.where(seen, index, index[seen][distance.argmin(dim=1)])


def measure_geometry(model: PreTrainedModel, prepare: Prepare, image_sizes: Sequence[Size]) -> TokenGeometry:
    r"""Measures which box of which image every visual token stands for.

    The boxes depend on the image sizes, the processor's settings and the model's structure, not on the weights, the
    text or what the images show. See the module's description for the method. Decoder layers never run, and the
    vision tower's attention hardly ever; what runs about 10 times, or 50 to 150 times where tokens share pixels, is the
    patch embedding and the projector. Images of more than a megapixel that the processor shrinks to less than half of
    their sides are measured on smaller ones, whose boxes are scaled up.

    A box is all that a token sees without the tower's attention. Where a convolutional tower gives tokens overlapping
    receptive fields (got_ocr2, fast_vlm), their boxes overlap as well.

    A token that spans nearly all that is seen of its image (95 % of both sides) counts as global unless some pixels
    feed it and no other token; so a thumbnail of a single token is local, and a pooled summary of the image is not.

    Args:

        model (PreTrainedModel): An image-text-to-text model in any floating point dtype, on any device. Hooks,
                    forwards, training flags and the random state are left as they were, after an exception as well.
        prepare (Callable): From a list of RGB images of the given sizes to the model's inputs (one example, batch
                    dimension 1), through the model's own processor, always with the same text.
        image_sizes (Sequence[tuple[int, int]]): (width, height) of each image of the prompt, in order.

    Returns:
        **geometry** (*TokenGeometry*):
            Boxes in pixels of the original images, on the CPU.

    Raises:
        ValueError: prepare does not return one example, its pixel tensors do not follow the images, or the sequence
            has no visual positions.
        TypeError: the model has no decoder layers to read.

    Examples::

        >>> text = processor.apply_chat_template(
        ...     [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is this ?"}]}]
        ... )
        >>> prepare = lambda images: processor(images=images, text=[text], return_tensors="pt")
        >>> geometry = measure_geometry(model, prepare, [(640, 400)])
        >>> geometry.boxes.shape, geometry.coverage()
        (torch.Size([322, 4]), (0.0, 0.0, 640.0, 400.0))
    """
    sizes = check_sizes(image_sizes)
    smaller = reduced_sizes(prepare, sizes)
    if smaller != sizes:
        geometry = measure_geometry(model, prepare, smaller)
        factors = torch.tensor([[w / v, h / u] * 2 for (w, h), (v, u) in zip(sizes, smaller, strict=True)])
        return replace(geometry, boxes=geometry.boxes * factors[geometry.image_index], image_sizes=sizes)
    generator = torch.Generator().manual_seed(0)
    with evaluation_mode(model):
        inputs = model_inputs(model, prepare([noise_image(size, generator) for size in sizes]))
        pixels = measure_pixels(prepare, sizes)
        for key, map_ in pixels.items():
            if inputs[key].shape != map_.shape:
                raise ValueError(
                    f"The processor returns {key!r} of shape {tuple(inputs[key].shape)} for noise and "
                    f"{tuple(map_.shape)} for black images of the same sizes {list(sizes)}; it crops by content, so "
                    "its tokens have no fixed boxes."
                )
        ends = family_of(model.config).code_raster_ends
        if ends is not None:
            n_tokens = len(visual_positions(model, inputs["input_ids"]))
            return code_raster_geometry(pixels, sizes, n_tokens, ends)
        with bypassed_attention(model, inputs):
            sweep = PerturbationSweep(model, inputs, pixels)
            owners = sweep.owners()
            if owners is not None:
                per_image, padding, boxes = boxes_by_owner(owners, pixels, len(sweep.positions), len(sizes))
            else:
                per_image, padding, boxes = boxes_by_bisection(sweep, pixels, sizes)
            seen = per_image.any(dim=0)
            boxes[~seen] = math.nan
            image_index = _fill_image_index(per_image.long().argmax(dim=0), sweep.positions, seen)
            last_index = image_index + (per_image.sum(dim=0) - 1).clamp_min(0)
            # Successive frames of a video may share tokens; what sees other images at once has no place.
            successive = per_image[last_index.clamp_max(len(sizes) - 1), torch.arange(len(seen))]
            overall = (last_index > image_index) & ~(successive & (len(set(sizes)) == 1))
            if owners is None and int(seen.sum()) > 1:
                overall |= share_all_pixels(
                    sweep, pixels, seen & span_whole_image(boxes, seen, image_index, len(sizes))
                )
        unknown = ~seen & ~padding
        if bool(unknown.any()):
            sweep.rebase()
            overall |= unknown & sweep.reacts({key: map_.gain != 0 for key, map_ in pixels.items()})

    boxes[overall] = math.nan
    kinds = tuple(
        "global" if is_global else "local" if is_seen else "padding" if is_padding else "separator"
        for is_global, is_seen, is_padding in zip(overall.tolist(), seen.tolist(), padding.tolist(), strict=True)
    )
    merged = bool((last_index > image_index).any())
    return TokenGeometry(boxes, kinds, image_index, sizes, last_index if merged else None, sweep.argument)
