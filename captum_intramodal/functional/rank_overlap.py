r"""Rank-biased overlap: how similar two rankings are, with more weight on their tops."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from captum_intramodal._utils.memory import WORKING_MEMORY, items_within, run_in_chunks

__all__ = ["NORMALIZATIONS", "Normalization", "pairwise_rank_biased_overlap", "rank_biased_overlap"]

Normalization = Literal["truncated", "minimum", "extrapolated"]


NORMALIZATIONS: tuple[str, ...] = get_args(Normalization)


def rank_biased_overlap(a: Tensor, b: Tensor, p: float = 0.9, normalization: Normalization = "truncated") -> Tensor:
    r"""
    Rank-biased overlap (Webber, Moffat and Zobel, 2010) of rankings of the same length :math:`k` (paper, Eq. 7):

    .. math::
        \mathrm{RBO}(a, b) = \frac{1-p}{Z} \sum_{d=1}^{k} p^{d-1} \frac{|a_{1:d} \cap b_{1:d}|}{d}

    The infinite sum is cut at :math:`k`. ``normalization`` says what that means:

    - ``'truncated'``: :math:`Z = 1 - p^k`, so that equal rankings have 1 and disjoint ones 0;
    - ``'minimum'``: :math:`Z = 1`, the lower bound over all continuations; equal rankings have :math:`1 - p^k`;
    - ``'extrapolated'``: the lower bound plus :math:`p^k` times the agreement at depth :math:`k`, as if that agreement
      went on for ever (the paper's equation 32 for rankings of equal length).

    Args:

        a (Tensor): Rankings of item ids, int64 (..., k), best first, each id at most once per ranking.
        b (Tensor): Rankings to compare with, of a shape that broadcasts with ``a``'s; the same k.
        p (float, optional): Persistence in (0, 1): the weight of depth d + 1 over that of depth d. With 0.9 the first
                    10 ranks carry 86 % of the weight.
                    Default: 0.9
        normalization (str, optional): See above.
                    Default: ``'truncated'``

    Returns:
        *Tensor* float32 of the broadcast shape without its last dimension, in [0, 1].

    Raises:
        ValueError: p outside (0, 1), empty rankings or rankings of different lengths.

    Examples::

        >>> a, b = torch.tensor([1, 2, 3]), torch.tensor([2, 1, 4])
        >>> rank_biased_overlap(a, a), rank_biased_overlap(a, torch.tensor([7, 8, 9]))
        (tensor(1.), tensor(0.))
        >>> rank_biased_overlap(a, b) == rank_biased_overlap(b, a)
        tensor(True)
    """
    weights = _match_weights(_common_length(a, b), p, normalization, a.device)
    ranks = torch.arange(a.shape[-1], device=a.device)
    # An item at rank i of one and j of the other ranking belongs to their overlap from depth max(i, j) on.
    depth = torch.maximum(ranks[:, None], ranks[None, :])
    return ((a[..., :, None] == b[..., None, :]) * weights[depth]).sum((-1, -2))


def pairwise_rank_biased_overlap(
    a: Tensor,
    b: Tensor,
    p: float = 0.9,
    normalization: Normalization = "truncated",
    working_memory: int = WORKING_MEMORY,
) -> Tensor:
    r"""
    Rank-biased overlap of every ranking in ``a`` with every one in ``b``, see :func:`rank_biased_overlap`.

    Instead of comparing k x k pairs of ranks, ranks are looked up in a table over the ids that occur: time grows with
    N x M x k.

    Args:

        a (Tensor): int64 (N, k).
        b (Tensor): int64 (M, k).
        p (float, optional): Persistence in (0, 1).
                    Default: 0.9
        normalization (str, optional): See :func:`rank_biased_overlap`.
                    Default: ``'truncated'``
        working_memory (int, optional): Bytes that the rankings which are compared at a time may take.
                    Default: 16 MiB

    Returns:
        *Tensor* float32 (N, M).
    """
    k = _common_length(a, b)
    weights = _match_weights(k, p, normalization, a.device)
    ids, inverse = torch.unique(torch.cat([a, b]), return_inverse=True)
    items, others = inverse.split([len(a), len(b)])

    def columns(part: slice) -> Tensor:
        # An item that is not in the other ranking has no weight; of two ranks the deeper one has the smaller weight.
        weight_of = torch.zeros(len(others[part]), len(ids), device=a.device)
        weight_of.scatter_(1, others[part], weights.expand(len(weight_of), k))

        def overlaps(rows: slice) -> Tensor:
            return torch.minimum(weight_of[:, items[rows]], weights).sum(-1).T  # (m, n, k) -> (n, m)

        return torch.cat(
            list(run_in_chunks(overlaps, len(a), items_within((working_memory + 1) // 2, 8 * k * len(weight_of))))
        )

    if not len(a) or not len(b):
        return torch.zeros(len(a), len(b), device=a.device)
    return torch.cat(list(run_in_chunks(columns, len(b), items_within((working_memory + 1) // 2, 4 * len(ids)))), dim=1)


def _common_length(a: Tensor, b: Tensor) -> int:
    if a.ndim == 0 or b.ndim == 0 or a.shape[-1] != b.shape[-1] or a.shape[-1] == 0:
        raise ValueError(
            f"Rankings must have the same length of at least 1, got shapes {tuple(a.shape)} and {tuple(b.shape)}."
        )
    return int(a.shape[-1])


def _match_weights(k: int, p: float, normalization: str, device: torch.device) -> Tensor:
    """What an item found in both rankings adds, by the (0-based) depth at which both have shown it; float32 (k,)."""
    if not 0 < p < 1:
        raise ValueError(f"p must lie strictly between 0 and 1, got {p}.")
    if normalization not in NORMALIZATIONS:
        raise ValueError(f"normalization must be one of {NORMALIZATIONS}, got {normalization!r}.")
    depths = torch.arange(1, k + 1, dtype=torch.float64)
    per_depth = (1 - p) * p ** (depths - 1) / depths
    from_depth = per_depth.flip(0).cumsum(0).flip(0)
    if normalization == "truncated":
        # 1 - p^k without cancellation for p close to 1.
        from_depth = from_depth / -math.expm1(k * math.log(p))
    elif normalization == "extrapolated":
        from_depth = from_depth + p**k / k
    return from_depth.float().to(device)
