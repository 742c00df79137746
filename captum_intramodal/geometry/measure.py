r"""Which box of the original image does each visual token cover? Measured on the model, not looked up per family.

Every model family turns images into tokens in its own way: its processor resizes, crops, tiles and pads, and its vision
tower embeds, merges, pools and projects patches. The measurement assumes none of this. It treats processor and model as
black boxes and composes two maps: from image pixels to the *elements* of the processor's pixel tensors, and from these
elements to the *visual tokens*.

**1. From pixels to elements** (:mod:`~captum_intramodal.geometry.pixel_probe`). The processor runs on synthetic images:
black, white, and along each axis a ramp and two waves, a sine and a cosine. An element whose value is :math:`b` for
black and :math:`w` for white has the gain :math:`w - b`, which is 0 for padding; if its value for another image is
:math:`v`, it responds to that image with the fraction :math:`r = (v - b) / (w - b)`. On an axis of length :math:`L`,
with waves of period :math:`P`, the ramp gives the coordinate :math:`x` that the element samples up to the rounding of
8-bit pixels, and the waves refine it to a fraction of a pixel:

.. math::

    x_0 = L \, r_\text{ramp}, \qquad
    \varphi = \frac{P}{2 \pi} \operatorname{atan2}(r_\text{sin} - \tfrac12, \; r_\text{cos} - \tfrac12), \qquad
    x = x_0 + \big((\varphi - x_0 + \tfrac{P}{2}) \bmod P\big) - \tfrac{P}{2}

Each element's region extends from this point half way to its neighbors. The layout of the tensor is irrelevant:
flattened patches, tiles, thumbnails, channels first or last. With several images, making one of them white tells which
elements belong to it.

**2. Locating the tokens** (:mod:`~captum_intramodal.geometry.decoder_inputs`). The visual tokens are at the image
placeholders in the input of decoder layer 0 if these states change with the image. Otherwise they are the states in the
first argument of the decoder's blocks that does: those of a cross-attention, or an encoder's output. Forward passes end
there; decoder layers never run.

**3. From elements to tokens** (:mod:`~captum_intramodal.geometry.ownership`). Attention in the vision tower lets every
token depend on every patch, so for this part each of the tower's attention blocks is replaced by the identity. The rest
(patch embedding, merging, pooling, projection) is local, and its receptive fields are found in one of two ways:

- *Ownership*, if each element feeds one token. Let :math:`y_v` be the projection of token :math:`v`'s state on a random
  direction. If element :math:`p_i` feeds token :math:`v` alone, its gradient

  .. math::

      \frac{\partial}{\partial p_i} \sum_u 2^{d_u} y_u = 2^{d_v} \frac{\partial y_v}{\partial p_i}

  grows by exactly :math:`2^{d_v}` over that for :math:`d = 0`: scaling by a power of two is exact in floating point. So
  if :math:`d_v` is a digit of the number :math:`v`, one backward pass reads this digit of the token of every element,
  and a few passes read all digits. The gradient of an element that feeds several tokens grows by no power of two, which
  reveals it. Forward passes confirm the result: perturbing the elements of a random half of the tokens must change
  exactly these tokens.
- *Bisection* (:mod:`~captum_intramodal.geometry.bisection`), if elements feed several tokens, as below a convolutional
  tower, or if no gradient passes, as through quantized layers. Elements are perturbed strip by strip to find which
  tokens change. The edges of all tokens are bisected at once, so that the number of forward passes grows with the
  logarithm of the resolution.

**4. Boxes and kinds.** A token's box is the smallest rectangle around the regions of the elements that feed it. If the
receptive fields of a convolutional tower overlap (got_ocr2, fast_vlm), so do the boxes. A token is *local* if it has a
box; *padding* if only padding feeds it; *global* if it has no pixels of its own and spans at least 95 % of both sides
of what its image's tokens cover, if it mixes images that are not successive frames, or if it changes with the image
through attention only; and a *separator* otherwise. So the thumbnail of a single token is local, and a pooled summary
of the image is global.

The result depends on the image sizes, the processor's settings and the model's structure, but not on weights, text or
image content. :func:`~captum_intramodal.geometry.geometry_oracle` checks it independently, by small changes of the
original image. Two shortcuts keep it cheap: large images that the processor shrinks are measured at a smaller size, and
regular rasters are derived from that of a small image (:mod:`~captum_intramodal.geometry.raster`). Models whose tokens
are discrete codes, which no small perturbation changes, are an exception listed in
:mod:`captum_intramodal.models.families`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from captum_intramodal._utils.image import noise_image
from captum_intramodal.errors import NoTokenGeometryError
from captum_intramodal.geometry.bisection import fields_by_bisection, share_all_pixels, span_whole_image
from captum_intramodal.geometry.decoder_inputs import model_inputs
from captum_intramodal.geometry.ownership import PerturbationSweep, bypassed_attention, fields_by_owner
from captum_intramodal.geometry.pixel_map import PixelMap, Prepare, Size, check_sizes
from captum_intramodal.geometry.pixel_probe import measure_pixels, reduced_sizes
from captum_intramodal.geometry.raster import code_raster_geometry
from captum_intramodal.geometry.token_geometry import TokenGeometry
from captum_intramodal.models.families import family_of
from captum_intramodal.models.hooks import evaluation_mode
from captum_intramodal.models.placeholders import visual_positions

__all__ = ["measure_geometry"]


def measure_geometry(model: PreTrainedModel, prepare: Prepare, image_sizes: Sequence[Size]) -> TokenGeometry:
    r"""
    Measure which box of which image each visual token covers.

    The boxes depend on the image sizes, the processor's settings and the model's structure, but not on the weights, the
    text or the images' content; :mod:`captum_intramodal.geometry.measure` describes the method. The patch embedding and
    the projector run about 10 times, or 50 to 150 times if tokens share pixels; decoder layers never run, and the
    vision tower's attention hardly ever. Images of more than a megapixel that the processor shrinks to less than half
    of their sides are measured at a smaller size, and the boxes scaled up.

    Args:

        model (PreTrainedModel): An image-text-to-text model in any floating point dtype, on any device. Its hooks,
                    forwards, training flags and the random state are restored, after an exception as well.
        prepare (Callable): Computes the model's inputs (one example, batch dimension 1) from a list of RGB images of
                    the given sizes, through the model's own processor, always with the same text.
        image_sizes (Sequence[tuple[int, int]]): (width, height) of each image of the prompt, in order.

    Returns:
        **geometry** (*TokenGeometry*): boxes in pixels of the original images, on the CPU.

    Raises:
        InvalidInputError: ``image_sizes`` does not hold the size of at least one image, or ``prepare`` does not return
            the inputs of one example.
        NoPixelMapError: the processor's pixel tensors do not follow the images.
        NoTokenGeometryError: the decoder receives no visual tokens, or these have no fixed boxes.
        UnsupportedModelError: the model's decoder layers cannot be found.

    Examples::

        >>> from captum_intramodal.geometry import measure_geometry
        >>> content = [{"type": "image"}, {"type": "text", "text": "describe the picture."}]
        >>> text = processor.apply_chat_template([{"role": "user", "content": content}])
        >>> prepare = lambda images: processor(images=images, text=[text], return_tensors="pt")
        >>> geometry = measure_geometry(model, prepare, [(320, 224)])
        >>> geometry.boxes.shape, geometry.coverage()
        (torch.Size([70, 4]), (0.0, 0.0, 320.0, 224.0))
    """
    sizes = check_sizes(image_sizes)
    smaller = reduced_sizes(prepare, sizes)
    if smaller != sizes:
        return _rescale(measure_geometry(model, prepare, smaller), sizes)
    generator = torch.Generator().manual_seed(0)
    with evaluation_mode(model):
        inputs = model_inputs(model, prepare([noise_image(size, generator) for size in sizes]))
        pixels = measure_pixels(prepare, sizes)
        _check_fixed_shapes(inputs, pixels, sizes)
        ends = family_of(model.config).code_raster_ends
        if ends is not None:
            n_tokens = len(visual_positions(model, inputs["input_ids"]))
            return code_raster_geometry(pixels, sizes, n_tokens, ends)
        return _measure_tokens(model, inputs, pixels, sizes)


def _rescale(geometry: TokenGeometry, sizes: tuple[Size, ...]) -> TokenGeometry:
    """Return a geometry with its boxes scaled to the same images at other (width, height)s."""
    pairs = zip(sizes, geometry.image_sizes, strict=True)
    factors = torch.tensor([[width / w, height / h] * 2 for (width, height), (w, h) in pairs])
    return replace(geometry, boxes=geometry.boxes * factors[geometry.image_index], image_sizes=sizes)


def _check_fixed_shapes(inputs: Mapping[str, Any], pixels: Mapping[str, PixelMap], sizes: Sequence[Size]) -> None:
    """Check that the processor does not crop by content: its tensors must have equal shapes for noise and for black."""
    for key, map_ in pixels.items():
        if inputs[key].shape != map_.shape:
            raise NoTokenGeometryError(
                f"The processor returns {key!r} of shape {tuple(inputs[key].shape)} for noise and {tuple(map_.shape)} "
                f"for black images of the same sizes {list(sizes)}; it crops by content, so the visual tokens have no "
                "fixed boxes."
            )


def _measure_tokens(
    model: PreTrainedModel, inputs: Mapping[str, Any], pixels: Mapping[str, PixelMap], sizes: tuple[Size, ...]
) -> TokenGeometry:
    """Measure the tokens' receptive fields without attention, and with it the kinds of the tokens that have none."""
    with bypassed_attention(model, inputs):
        sweep = PerturbationSweep(model, inputs, pixels)
        owners = sweep.find_owners()
        if owners is not None:
            fields = fields_by_owner(owners, pixels, len(sweep.positions), len(sizes))
        else:
            fields = fields_by_bisection(sweep, pixels, sizes)
        local = fields.per_image.any(dim=0)
        boxes = torch.where(local[:, None], fields.boxes, math.nan)
        image_index, last_index = _image_range(fields.per_image, local, sweep.positions)
        is_global = _mixes_images(fields.per_image, image_index, last_index, sizes)
        if owners is None and int(local.sum()) > 1:
            spans = local & span_whole_image(boxes, local, image_index, len(sizes))
            is_global |= share_all_pixels(sweep, pixels, spans)
    without_field = ~local & ~fields.padding
    if bool(without_field.any()):
        sweep.measure_base()  # Now with attention.
        is_global |= without_field & sweep.changed_tokens({key: map_.gain != 0 for key, map_ in pixels.items()})
    return TokenGeometry(
        boxes=boxes.masked_fill(is_global[:, None], math.nan),
        kinds=_kinds(is_global, local, fields.padding),
        image_index=image_index,
        image_sizes=sizes,
        last_image_index=last_index if bool((last_index > image_index).any()) else None,
        argument=sweep.argument,
    )


def _image_range(per_image: Tensor, local: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Return the indices of the first and the last image that feeds each token, int64 (V,) each.

    Tokens that no image feeds get the index of the nearest token that one does, preferably in their own run of
    successive positions.
    """
    first = per_image.long().argmax(dim=0)
    if bool(local.any()):
        run = torch.cat([torch.zeros(1, dtype=torch.int64), (positions.diff() > 1).long().cumsum(0)])
        distance = (positions[:, None] - positions[None, local]).abs()
        distance = distance + (run[:, None] != run[None, local]) * (int(positions.max()) + 1)
        first = torch.where(local, first, first[local][distance.argmin(dim=1)])
    return first, first + (per_image.sum(dim=0) - 1).clamp_min(0)


def _mixes_images(per_image: Tensor, image_index: Tensor, last_index: Tensor, sizes: tuple[Size, ...]) -> Tensor:
    """Return which tokens depend on several images that are not successive frames of a video, bool (V,)."""
    successive = per_image[last_index.clamp_max(len(sizes) - 1), torch.arange(len(image_index))]
    return (last_index > image_index) & ~(successive & (len(set(sizes)) == 1))


def _kinds(is_global: Tensor, local: Tensor, padding: Tensor) -> tuple[str, ...]:
    """Return the name of each token's kind."""
    flags = zip(is_global.tolist(), local.tolist(), padding.tolist(), strict=True)
    return tuple(
        "global" if whole else "local" if box else "padding" if padded else "separator" for whole, box, padded in flags
    )
