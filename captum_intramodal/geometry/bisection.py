r"""TODO."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from captum_intramodal.geometry.ownership import PerturbationSweep, disjoint_cells
from captum_intramodal.geometry.pixel_map import PixelMap, Size

__all__ = []

# Edges are found to this many pixels of the original image.
PRECISION = 0.5


# A token that spans this fraction of what its image's tokens see, in both directions, may be a global one.
GLOBAL_SPAN = 0.95


_CHUNKS = 32


def _edges(
    reacts: Callable[[Mapping[str, Tensor]], Tensor],
    lower: Mapping[str, Tensor],
    upper: Mapping[str, Tensor],
    tokens: Tensor,
    levels: int,
) -> tuple[Tensor, Tensor]:
    r"""First and last of :math:`2^{levels}` bins along an axis that each token sees.

    A bisection of all edges at once. At every level the axis is cut into cells, and the first and the last cell that a
    token sees are known. Changing the elements in the left half of a token's first cell tells in which half it begins,
    as long as no other changed cell lies inside the token's span; so one forward pass serves all tokens with disjoint
    spans, and neighbors take turns. Where all elements of a cell lie in the same half, no pass is needed. The number
    of passes thus grows with the logarithm of the resolution, not with the number of tokens in a row.

    Args:
        reacts: From masks of elements to the tokens that react.
        lower, upper: Bins of the elements' left and right ends, flat int tensors; bin 2**levels for elements to leave
            alone.
        tokens: Boolean, shape: V; tokens that see anything at all.
        levels: Logarithm of the number of bins.

    Returns:
        first, last: int64, shape: V; meaningless where tokens is false.
    """
    first = torch.zeros(len(tokens), dtype=torch.int64)
    last = torch.zeros(len(tokens), dtype=torch.int64)

    def sees_half(bins: Mapping[str, Tensor], shift: int, cell: Tensor, half: int) -> Tensor:
        """Whether each token sees elements in the given half (0 left, 1 right) of its cell."""
        children = {key: values >> shift for key, values in bins.items()}
        filled = torch.zeros((1 << (levels - shift)) + 1, dtype=torch.bool)
        for child in children.values():
            filled[child] = True
        own, sibling = filled[2 * cell + half], filled[2 * cell + 1 - half]
        seen = own & ~sibling
        pending = tokens & own & sibling
        while bool(pending.any()):
            chosen = torch.tensor(disjoint_cells(cell[pending], first[pending], last[pending]))
            change = torch.zeros_like(filled)
            change[2 * chosen + half] = True
            hit = reacts({key: change[child] for key, child in children.items()})
            count = torch.zeros(len(filled) // 2 + 1, dtype=torch.int64)
            count[chosen + 1] = 1
            count = count.cumsum(0)
            resolved = pending & (count[cell + 1] > count[cell]) & (count[last + 1] - count[first] == 1)
            seen = torch.where(resolved, hit, seen)
            pending &= ~resolved
        return seen

    for shift in reversed(range(levels)):
        begins_left = sees_half(lower, shift, first, 0)
        ends_right = sees_half(upper, shift, last, 1)
        first, last = 2 * first + ~begins_left, 2 * last + ends_right
    return first, last


def boxes_by_bisection(
    sweep: PerturbationSweep, pixels: Mapping[str, PixelMap], sizes: Sequence[Size]
) -> tuple[Tensor, Tensor, Tensor]:
    """The same from forward passes alone, also where tokens share elements."""
    per_image = torch.stack(
        [
            sweep.reacts({key: (map_.gain != 0) & (map_.image_index == i) for key, map_ in pixels.items()})
            for i in range(len(sizes))
        ]
    )
    seen = per_image.any(dim=0)
    padding = torch.zeros_like(seen)
    if not bool(seen.all()) and any(bool((map_.gain == 0).any()) for map_ in pixels.values()):
        padding = ~seen & sweep.reacts({key: map_.gain == 0 for key, map_ in pixels.items()})
    axes = [_measure_axis(sweep, pixels, axis, max(size[axis] for size in sizes), seen) for axis in (0, 1)]
    return per_image, padding, torch.stack([axes[0][:, 0], axes[1][:, 0], axes[0][:, 1], axes[1][:, 1]], dim=1)


def _measure_axis(
    sweep: PerturbationSweep, pixels: Mapping[str, PixelMap], axis: int, length: int, tokens: Tensor
) -> Tensor:
    """Both ends of every token along an axis in pixels, shape: V x 2."""
    levels = max(1, math.ceil(math.log2(length / PRECISION)))
    end = 1 << levels
    lower, upper = {}, {}
    # Where within a bin the elements really begin and end.
    start_at, stop_at = PRECISION * torch.arange(end + 1.0), PRECISION * torch.arange(1, end + 2.0)
    for key, map_ in pixels.items():
        padding = map_.gain == 0
        left, right = map_.lower[axis] / PRECISION, map_.upper[axis] / PRECISION
        lower[key] = left.floor().long().clamp(0, end - 1).masked_fill(padding, end)
        upper[key] = (right.ceil().long() - 1).clamp(0, end - 1).masked_fill(padding, end)
    starts = torch.cat([map_.lower[axis] for map_ in pixels.values()])
    stops = torch.cat([map_.upper[axis] for map_ in pixels.values()])
    start_at.scatter_reduce_(0, torch.cat([*lower.values()]), starts, "amin", include_self=False)
    stop_at.scatter_reduce_(0, torch.cat([*upper.values()]), stops, "amax", include_self=False)
    first, last = _edges(sweep.reacts, lower, upper, tokens, levels)
    return torch.stack([start_at[first], stop_at[last]], dim=1)


def share_all_pixels(sweep: PerturbationSweep, pixels: Mapping[str, PixelMap], suspects: Tensor) -> Tensor:
    """Which of the suspects have no pixels of their own: wherever they react, another token reacts as well."""
    if not bool(suspects.any()):
        return suspects
    alone = torch.zeros_like(suspects)
    nothing = {key: torch.zeros(len(map_.gain), dtype=torch.bool) for key, map_ in pixels.items()}
    for key, map_ in pixels.items():
        for chunk in map_.gain.nonzero().flatten().tensor_split(_CHUNKS):
            if len(chunk):
                mask = nothing[key].clone()
                mask[chunk] = True
                hit = sweep.reacts({**nothing, key: mask})
                if int(hit.sum()) == 1:
                    alone |= hit
    return suspects & ~alone


def span_whole_image(boxes: Tensor, seen: Tensor, image_index: Tensor, n_images: int) -> Tensor:
    """Which tokens span nearly all that is seen of their image, in both directions."""
    covered = torch.full((n_images, 2), math.nan)
    for i in range(n_images):
        if bool((mine := boxes[seen & (image_index == i)]).numel()):
            covered[i] = mine[:, 2:].amax(dim=0) - mine[:, :2].amin(dim=0)
    return ((boxes[:, 2:] - boxes[:, :2]) / covered[image_index] >= GLOBAL_SPAN).all(dim=1)
