r"""Top-k rankings of the vocabulary at hidden states, with ties broken by token id."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Rankings",
]

# Neighbors among a row of logits whose largest is looked at first.
_PART = 128


class Rankings(NamedTuple):
    """What :meth:`LogitLens.rank` reads at N hidden states."""

    ids: Tensor
    log_normalizer: Tensor


def _rank_keys(logits: Tensor, start: int, ids: Tensor | None = None) -> Tensor:
    """int64 keys that order by (logit, smaller token id): the order of top-k is then the same on every machine. Ids
    count from ``start``; all in their order if they are not given."""
    # Adding 0.0 turns -0.0 into 0.0, which would otherwise rank below it.
    bits = (logits.float() + 0.0).view(torch.int32).long()
    ordered = torch.where(bits >= 0, bits, -(bits & 0x7FFFFFFF))
    if ids is None:
        ids = torch.arange(logits.shape[1], device=logits.device)
    return (ordered << 32) | (0xFFFFFFFF - start - ids)


def top_keys(logits: Tensor, start: int, k: int) -> Tensor:
    """The k largest of :func:`_rank_keys`, in any order."""
    if k < logits.shape[1]:
        values, ids = _largest(logits, k + 1)
        # Of several that are as likely as the last of them, those with the smallest ids would count.
        if not bool((values[:, k] == values[:, k - 1]).any()):
            return _rank_keys(values[:, :k], start, ids[:, :k])
    return _rank_keys(logits, start)


def _largest(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """``logits.topk(count)``; of long rows from those parts alone whose own largest values are the largest."""
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


def rank_all(logits: Tensor, k: int) -> Rankings:
    return Rankings(rankings_from_keys(top_keys(logits, 0, k), k), logits.logsumexp(1))


def rankings_from_keys(keys: Tensor, k: int) -> Tensor:
    """The token ids of the k largest keys, best first."""
    return 0xFFFFFFFF - (keys.topk(min(k, keys.shape[1]), dim=1).values & 0xFFFFFFFF)
