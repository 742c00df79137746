r"""Interpolate tensors at other sizes, and values of a processor's pixel tensors at other elements."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_intramodal.geometry.pixel_map import PixelMap

__all__ = ["resample_pixel_values", "resize_linear", "resize_nearest"]


def resize_nearest(value: Tensor, size: Sequence[int]) -> Tensor:
    """Resize the last dimensions by nearest neighbor, in any dtype."""
    for dim, new in zip(range(-len(size), 0), size, strict=True):
        index = (torch.arange(new, device=value.device) + 0.5) * (value.shape[dim] / new)
        value = value.index_select(dim, index.long())
    return value


def resize_linear(value: Tensor, size: Sequence[int]) -> Tensor:
    """Resize the last dimensions linearly, computing in float32 at least; shrinking is antialiased in 2D."""
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(size)]
    old = value.shape[-len(size) :]
    antialias = mode == "bilinear" and any(n < o for n, o in zip(size, old, strict=True))
    stack = value.reshape(-1, 1, *old).to(torch.promote_types(value.dtype, torch.float32))
    resized = F.interpolate(stack, size=tuple(size), mode=mode, align_corners=False, antialias=antialias)
    return resized.to(value.dtype).reshape(*value.shape[: -len(size)], *size)


def resample_pixel_values(values: Tensor, source: PixelMap, target: PixelMap, preserve_sum: bool) -> Tensor:
    """Interpolate values at a pixel tensor's elements at the elements of another tensor of the same images.

    Color channels share a value equally; elements that depend on no image, such as padding, get 0.
    """
    leading = values.shape[: values.ndim - len(source.shape)]
    flat = values.reshape(-1, *source.shape)
    result = torch.zeros(len(flat), len(target.gain), device=values.device)
    for image, ((width, height), size) in enumerate(zip(source.image_sizes, target.image_sizes, strict=True)):
        sources = (source.gain != 0) & (source.image_index == image)
        targets = ((target.gain != 0) & (target.image_index == image)).nonzero().flatten()
        pitch = (source.upper - source.lower)[:, sources].median(1).values.tolist()
        grid = (max(1, round(height / pitch[1])), max(1, round(width / pitch[0])))
        # Sums and counts are interpolated alike, so that their ratio is a mean in which empty cells have no weight.
        cells = torch.cat([source.fold(flat, grid, image), source.fold(torch.ones_like(flat[:1]), grid, image)])
        center = (target.lower + target.upper)[:, targets] / torch.tensor(size)[:, None] - 1
        points = center.T.to(cells)[None, None]
        sampled = F.grid_sample(cells[None], points, mode="bilinear", padding_mode="border", align_corners=False)[
            0, :, 0
        ]
        means = sampled[:-1] / sampled[-1:].clamp_min(1e-6)
        if preserve_sum:
            means = means * (float(sources.sum()) / len(targets))
        result[:, targets.to(result.device)] = means
    return result.reshape(*leading, *target.shape).to(values.dtype)
