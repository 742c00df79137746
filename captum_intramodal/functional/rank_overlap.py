r"""Rank-biased overlap: the similarity of two rankings, with more weight on their tops."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from captum_intramodal._utils.memory import WORKING_MEMORY, items_within, run_in_chunks
from captum_intramodal.errors import InvalidInputError, InvalidOptionError

__all__ = ["NORMALIZATIONS", "Normalization", "pairwise_rank_biased_overlap", "rank_biased_overlap"]

Normalization = Literal["truncated", "minimum", "extrapolated"]


NORMALIZATIONS: tuple[str, ...] = get_args(Normalization)


def rank_biased_overlap(a: Tensor, b: Tensor, p: float = 0.9, normalization: Normalization = "truncated") -> Tensor:
    r"""
    Compute the rank-biased overlap of rankings of the same length :math:`k` (paper, Eq. 7):

    .. math::
        \mathrm{RBO}(a, b) = \frac{1-p}{Z} \sum_{d=1}^{k} p^{d-1} \frac{|a_{1:d} \cap b_{1:d}|}{d}

    The infinite sum of the definition is truncated at depth :math:`k`, which ``normalization`` accounts for:

    - ``'truncated'``: :math:`Z = 1 - p^k`, so that equal rankings have 1 and disjoint ones 0;
    - ``'minimum'``: :math:`Z = 1`, the lower bound over all continuations; equal rankings have :math:`1 - p^k`;
    - ``'extrapolated'``: the lower bound plus :math:`p^k` times the agreement at depth :math:`k`, as if that agreement
      continued at all greater depths (Webber et al., equation 32, for rankings of equal length).

    Source: Webber, Moffat and Zobel, "A similarity measure for indefinite rankings", ACM TOIS 2010.

    Args:

        a (Tensor): Rankings of item ids, int64 (..., k), best first, each id at most once per ranking.
        b (Tensor): Rankings to compare with, of the same k and a shape that broadcasts with that of ``a``.
        p (float, optional): Persistence in (0, 1), the ratio of the weights of depths d + 1 and d. With 0.9, the first
                    10 ranks carry 86 % of the weight.
                    Default: 0.9
        normalization (str, optional): See above.
                    Default: ``'truncated'``

    Returns:
        **overlap** (*Tensor*): float32 in [0, 1], of the broadcast shape without its last dimension.

    Raises:
        InvalidOptionError: ``p`` is outside (0, 1), or ``normalization`` is unknown.
        InvalidInputError: rankings are empty or differ in length.

    Examples::

        >>> from captum_intramodal import rank_biased_overlap
        >>> a, b = torch.tensor([1, 2, 3]), torch.tensor([2, 1, 4])
        >>> rank_biased_overlap(a, a), rank_biased_overlap(a, torch.tensor([7, 8, 9]))
        (tensor(1.), tensor(0.))
        >>> rank_biased_overlap(a, b) == rank_biased_overlap(b, a)
        tensor(True)
    """
    weights = _match_weights(_common_length(a, b), p, normalization, a.device)
    ranks = torch.arange(a.shape[-1], device=a.device)
    # An item at rank i of one ranking and j of the other is in their overlap from depth max(i, j) on.
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
    Compute the rank-biased overlap of every ranking in ``a`` with every ranking in ``b``.

    Ranks are looked up in a table of all ids instead of comparing k x k pairs of ranks, so time grows with N x M x k.

    Args:

        a (Tensor): Rankings of item ids, int64 (N, k), see :func:`rank_biased_overlap`.
        b (Tensor): Rankings of item ids, int64 (M, k).
        p (float, optional): Persistence in (0, 1).
                    Default: 0.9
        normalization (str, optional): See :func:`rank_biased_overlap`.
                    Default: ``'truncated'``
        working_memory (int, optional): Bytes of the rankings that are compared at a time.
                    Default: 16 MiB

    Returns:
        **overlap** (*Tensor*): float32 (N, M) in [0, 1].

    Raises:
        InvalidOptionError: ``p`` is outside (0, 1), or ``normalization`` is unknown.
        InvalidInputError: rankings are empty or differ in length.

    Examples::

        >>> from captum_intramodal import pairwise_rank_biased_overlap
        >>> pairwise_rank_biased_overlap(torch.tensor([[1, 2, 3], [7, 8, 9]]), torch.tensor([[1, 2, 3]]))
        tensor([[1.],
                [0.]])
    """
    k = _common_length(a, b)
    weights = _match_weights(k, p, normalization, a.device)
    ids, inverse = torch.unique(torch.cat([a, b]), return_inverse=True)
    items, others = inverse.split([len(a), len(b)])

    def columns(chunk: slice) -> Tensor:
        # An item missing from the other ranking weighs 0; the deeper of two ranks has the smaller weight.
        weight_of = torch.zeros(len(others[chunk]), len(ids), device=a.device)
        weight_of.scatter_(1, others[chunk], weights.expand(len(weight_of), k))

        def overlaps(rows: slice) -> Tensor:
            return torch.minimum(weight_of[:, items[rows]], weights).sum(-1).T  # (m, n, k) -> (n, m)

        return torch.cat(
            list(run_in_chunks(overlaps, len(a), items_within((working_memory + 1) // 2, 8 * k * len(weight_of))))
        )

    if not len(a) or not len(b):
        return torch.zeros(len(a), len(b), device=a.device)
    return torch.cat(list(run_in_chunks(columns, len(b), items_within((working_memory + 1) // 2, 4 * len(ids)))), dim=1)


def _common_length(a: Tensor, b: Tensor) -> int:
    """Return the length of all rankings, after checking that they have one."""
    if a.ndim == 0 or b.ndim == 0 or a.shape[-1] != b.shape[-1] or a.shape[-1] == 0:
        raise InvalidInputError(
            f"Rankings must have the same length, at least 1; got shapes {tuple(a.shape)} and {tuple(b.shape)}."
        )
    return int(a.shape[-1])


def _match_weights(k: int, p: float, normalization: str, device: torch.device) -> Tensor:
    """Return what an item in both rankings adds to their overlap, by the deeper of its two ranks; float32 (k,)."""
    if not 0 < p < 1:
        raise InvalidOptionError(f"p must lie strictly between 0 and 1, got {p}.")
    if normalization not in NORMALIZATIONS:
        raise InvalidOptionError(f"normalization must be one of {NORMALIZATIONS}, got {normalization!r}.")
    depths = torch.arange(1, k + 1, dtype=torch.float64)
    per_depth = (1 - p) * p ** (depths - 1) / depths
    from_depth = per_depth.flip(0).cumsum(0).flip(0)
    if normalization == "truncated":
        # 1 - p^k without cancellation for p close to 1.
        from_depth = from_depth / -math.expm1(k * math.log(p))
    elif normalization == "extrapolated":
        from_depth = from_depth + p**k / k
    return from_depth.float().to(device)
