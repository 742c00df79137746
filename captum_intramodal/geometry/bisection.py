r"""Where are the edges of each token's receptive field if tokens share pixels? A bisection by forward passes alone.

:mod:`~captum_intramodal.geometry.measure` describes the method.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from captum_intramodal.geometry.ownership import PerturbationSweep, ReceptiveFields
from captum_intramodal.geometry.pixel_map import PixelMap, Size

__all__ = []

# Edges are found to this many pixels of the original image.
PRECISION = 0.5
# A token may be global if it spans this fraction of what its image's tokens cover, in both directions.
GLOBAL_SPAN = 0.95
# Number of groups of elements in which a token's own pixels are searched for.
_N_GROUPS = 32


def fields_by_bisection(
    sweep: PerturbationSweep, pixels: Mapping[str, PixelMap], sizes: Sequence[Size]
) -> ReceptiveFields:
    """Compute receptive fields from forward passes alone; tokens may share elements."""
    per_image = torch.stack(
        [
            sweep.changed_tokens({key: (map_.gain != 0) & (map_.image_index == i) for key, map_ in pixels.items()})
            for i in range(len(sizes))
        ]
    )
    local = per_image.any(dim=0)
    padding = torch.zeros_like(local)
    if not bool(local.all()) and any(bool((map_.gain == 0).any()) for map_ in pixels.values()):
        padding = ~local & sweep.changed_tokens({key: map_.gain == 0 for key, map_ in pixels.items()})
    x, y = (_measure_axis(sweep, pixels, axis, max(size[axis] for size in sizes), local) for axis in (0, 1))
    return ReceptiveFields(per_image, padding, torch.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], dim=1))


def _measure_axis(
    sweep: PerturbationSweep, pixels: Mapping[str, PixelMap], axis: int, length: int, tokens: Tensor
) -> Tensor:
    """Return both edges of every token along an axis in pixels, (V, 2)."""
    n_halvings = max(1, math.ceil(math.log2(length / PRECISION)))
    end = 1 << n_halvings
    lower, upper = {}, {}
    # Outermost edges of the elements in each bin.
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
    first, last = _bisect_edges(sweep.changed_tokens, lower, upper, tokens, n_halvings)
    return torch.stack([start_at[first], stop_at[last]], dim=1)


def _bisect_edges(
    changed_tokens: Callable[[Mapping[str, Tensor]], Tensor],
    lower: Mapping[str, Tensor],
    upper: Mapping[str, Tensor],
    tokens: Tensor,
    n_halvings: int,
) -> tuple[Tensor, Tensor]:
    r"""
    Find the first and the last of :math:`2^n` bins along an axis that each token depends on.

    All edges are bisected at once. After each halving the axis consists of cells, and the first and last cell that each
    token depends on are known. Perturbing the elements in the left half of a token's first cell tells in which half the
    token begins, as long as no other perturbed cell is inside the token's span. So one forward pass serves all tokens
    with disjoint spans, and neighbors take turns. If all elements of a cell are in the same half, no pass is needed.
    The number of passes grows with the logarithm of the resolution, and not with the number of tokens in a row.

    Args:

        changed_tokens (Callable): Maps masks of the elements to perturb to the tokens that change.
        lower (Mapping[str, Tensor]): Bin of each element's left edge, int64 (N,); :math:`2^n` for padding.
        upper (Mapping[str, Tensor]): Bin of its right edge.
        tokens (Tensor): True for tokens that depend on an image, bool (V,).
        n_halvings (int): Logarithm :math:`n` of the number of bins.

    Returns:
        **first, last** (*tuple[Tensor, Tensor]*): int64 (V,) each; meaningless if ``tokens`` is false.
    """
    first = torch.zeros(len(tokens), dtype=torch.int64)
    last = torch.zeros(len(tokens), dtype=torch.int64)

    def depends_on_half(bins: Mapping[str, Tensor], shift: int, cell: Tensor, half: int) -> Tensor:
        """Return whether each token depends on elements in a half (0: left, 1: right) of its cell."""
        children = {key: values >> shift for key, values in bins.items()}
        filled = torch.zeros((1 << (n_halvings - shift)) + 1, dtype=torch.bool)
        for child in children.values():
            filled[child] = True
        own, sibling = filled[2 * cell + half], filled[2 * cell + 1 - half]
        depends = own & ~sibling
        pending = tokens & own & sibling
        while bool(pending.any()):
            chosen = torch.tensor(_disjoint_cells(cell[pending], first[pending], last[pending]))
            perturbed = torch.zeros_like(filled)
            perturbed[2 * chosen + half] = True
            changed = changed_tokens({key: perturbed[child] for key, child in children.items()})
            count = torch.zeros(len(filled) // 2 + 1, dtype=torch.int64)
            count[chosen + 1] = 1
            count = count.cumsum(0)
            resolved = pending & (count[cell + 1] > count[cell]) & (count[last + 1] - count[first] == 1)
            depends = torch.where(resolved, changed, depends)
            pending &= ~resolved
        return depends

    for shift in reversed(range(n_halvings)):
        begins_left = depends_on_half(lower, shift, first, 0)
        ends_right = depends_on_half(upper, shift, last, 1)
        first, last = 2 * first + ~begins_left, 2 * last + ends_right
    return first, last


def _disjoint_cells(cell: Tensor, first: Tensor, last: Tensor) -> list[int]:
    """Choose cells of as many tokens as possible whose spans [first, last] are disjoint, greedily by their ends."""
    chosen: list[int] = []
    end = -1
    for stop, start, own in sorted(set(zip(last.tolist(), first.tolist(), cell.tolist(), strict=True))):
        if start > end:
            chosen.append(own)
            end = stop
    return chosen


def share_all_pixels(sweep: PerturbationSweep, pixels: Mapping[str, PixelMap], candidates: Tensor) -> Tensor:
    """Return which candidates have no pixels of their own: all that they depend on feeds other tokens as well."""
    if not bool(candidates.any()):
        return candidates
    has_own = torch.zeros_like(candidates)
    nothing = {key: torch.zeros(len(map_.gain), dtype=torch.bool) for key, map_ in pixels.items()}
    for key, map_ in pixels.items():
        for group in map_.gain.nonzero().flatten().tensor_split(_N_GROUPS):
            if len(group):
                mask = nothing[key].clone()
                mask[group] = True
                changed = sweep.changed_tokens({**nothing, key: mask})
                if int(changed.sum()) == 1:
                    has_own |= changed
    return candidates & ~has_own


def span_whole_image(boxes: Tensor, local: Tensor, image_index: Tensor, n_images: int) -> Tensor:
    """Return which tokens span nearly all that their image's tokens cover, in both directions, bool (V,)."""
    covered = torch.full((n_images, 2), math.nan)
    for i in range(n_images):
        if bool((in_image := boxes[local & (image_index == i)]).numel()):
            covered[i] = in_image[:, 2:].amax(dim=0) - in_image[:, :2].amin(dim=0)
    return ((boxes[:, 2:] - boxes[:, :2]) / covered[image_index] >= GLOBAL_SPAN).all(dim=1)
