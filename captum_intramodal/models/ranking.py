r"""Top-k rankings of the vocabulary at hidden states, with ties broken by token id."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["DEFAULT_RANKING_LENGTH", "Rankings", "rank_all", "rankings_from_keys", "top_keys"]

# Default length of rankings.
DEFAULT_RANKING_LENGTH = 50

# Long rows are searched in parts of this many neighbors.
_PART = 128
_LARGEST_ID = 0xFFFFFFFF


class Rankings(NamedTuple):
    r"""
    Rankings of the most likely next tokens at N hidden states.

    Attributes:
        ids (Tensor): token ids, best first, int64 (N, k).
        log_normalizer (Tensor): logarithm of the sum that a softmax over the vocabulary divides by, float32 (N,).
    """

    ids: Tensor
    log_normalizer: Tensor


def rank_all(logits: Tensor, k: int) -> Rankings:
    """Rank all tokens by their logits, (N, vocabulary), and keep the first ``k``."""
    return Rankings(rankings_from_keys(top_keys(logits, 0, k), k), logits.logsumexp(1))


def top_keys(logits: Tensor, start: int, k: int) -> Tensor:
    r"""
    Return keys whose order is that of the ranking, of at least the k best tokens.

    Keys of several blocks of the vocabulary may be concatenated before :func:`rankings_from_keys`.

    Args:

        logits (Tensor): Logits of a block of the vocabulary, (N, block).
        start (int): Id of the block's first token.
        k (int): Length of the ranking.

    Returns:
        **keys** (*Tensor*): int64 (N, k), or (N, block) if all tokens are needed; in any order.
    """
    if k < logits.shape[1]:
        values, ids = _top_values(logits, k + 1)
        # If the k-th and the next logit are equal, the smaller ids count, which only all keys tell.
        if not bool((values[:, k] == values[:, k - 1]).any()):
            return _keys(values[:, :k], start, ids[:, :k])
    return _keys(logits, start)


def rankings_from_keys(keys: Tensor, k: int) -> Tensor:
    """Return the token ids of the k largest keys, best first, int64 (N, min(k, keys))."""
    return _LARGEST_ID - (keys.topk(min(k, keys.shape[1]), dim=1).values & _LARGEST_ID)


def _keys(logits: Tensor, start: int, ids: Tensor | None = None) -> Tensor:
    """Return int64 keys ordered by (logit, smaller token id), which makes top-k the same on every machine.

    Ids count from ``start``; None are those of a whole block.
    """
    # Adding 0.0 turns -0.0 into 0.0, which would otherwise rank below it.
    bits = (logits.float() + 0.0).view(torch.int32).long()
    ordered = torch.where(bits >= 0, bits, -(bits & 0x7FFFFFFF))
    if ids is None:
        ids = torch.arange(logits.shape[1], device=logits.device)
    return (ordered << 32) | (_LARGEST_ID - start - ids)


def _top_values(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return ``logits.topk(count)``; in long rows, search only the parts whose maxima are the largest."""
    parts = logits.shape[1] // _PART
    if parts < 4 * count:
        values, ids = logits.topk(count, dim=1)
        return values, ids
    split = logits[:, : parts * _PART].unflatten(1, (parts, _PART))
    best = split.amax(2).topk(count, dim=1).indices[:, :, None]
    candidates = split.gather(1, best.expand(-1, -1, _PART)).flatten(1)
    ids = (best * _PART + torch.arange(_PART, device=best.device)).flatten(1)
    if rest := logits.shape[1] - parts * _PART:
        candidates = torch.cat([candidates, logits[:, -rest:]], dim=1)
        last = torch.arange(logits.shape[1] - rest, logits.shape[1], device=ids.device)
        ids = torch.cat([ids, last.expand(len(ids), -1)], dim=1)
    values, places = candidates.topk(count, dim=1)
    return values, ids.gather(1, places)
