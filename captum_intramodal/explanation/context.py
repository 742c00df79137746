r"""Which earlier text matters, and how is its interference subtracted? ARC applied to collected activations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from captum_intramodal.attr.arc import ARC
from captum_intramodal.explanation.activations import Activations
from captum_intramodal.functional.context_relevance import ContextRelevance
from captum_intramodal.models.logit_lens import LogitLens

__all__ = ["relate", "relate_without_rankings", "suppress_together"]


class TextContext(NamedTuple):
    """Text activation and probabilities of an answer.

    Attributes:
        relevance (Tensor): text activation of each earlier token (column) for each text token (row), 0 for the same
            token, float32 (T, T), not negative.
        probabilities (Tensor): of the answer's tokens, each given all before it, float32 (n_answer,).
    """

    relevance: Tensor
    probabilities: Tensor


def relate_without_rankings(lens: LogitLens, activations: Activations) -> TextContext:
    """Compute text activation and probabilities only; the vocabulary is not ranked."""
    n, ids, known = activations.n_answer, activations.text.ids, activations.answer_rankings
    predicting = activations.last[-n:]
    normalizer = None if known is None else known.log_normalizer[:-1]
    log_probability = lens.log_probability(predicting, ids[-n:].to(predicting.device), log_normalizer=normalizer)
    activation = lens.activation(activations.last[: len(ids)], ids).clamp_min(0).cpu().T
    earlier = torch.ones(activation.shape, dtype=torch.bool).tril(-1)
    return TextContext(activation * (earlier & (ids[:, None] != ids[None, :])), log_probability.exp().cpu())


def relate(ranking: ARC, activations: Activations) -> tuple[ContextRelevance, Tensor]:
    r"""
    Compute the relevance of context, and the probabilities of the answer's tokens.

    Both need the whole vocabulary, which is swept once for both if they need the same layer, and not again for
    positions that were ranked while the answer was generated.

    Args:

        ranking (ARC): Its rankings' layers, position and length.
        activations (Activations): Of one example.

    Returns:
        **context, probabilities** (*tuple[ContextRelevance, Tensor]*):
            Of the T text tokens; and float32 (n_answer,).
    """
    lens, ids, last, known = ranking.lens, activations.text.ids, activations.last, activations.answer_rankings
    n = activations.n_answer
    predicting = last[-n:]
    at_token = ranking.ranking_position == "token"
    rankings, normalizer = [], None if known is None else known.log_normalizer[:-1]
    for layer, module in zip(ranking.layers, ranking.modules, strict=True):
        states = ranking.ranked_states(activations.ranking_states[layer])
        if module is not lens.layers[-1]:
            rankings.append(lens.topk(states, ranking.k))
        elif known is not None:
            prompt = lens.topk(states[:-n], ranking.k)
            rankings.append(torch.cat([prompt, (known.ids[1:] if at_token else known.ids[:-1]).to(prompt.device)]))
        elif at_token:
            ranked, sums = lens.rank(torch.cat([predicting[:1], states]), ranking.k)
            rankings.append(ranked[1:])
            normalizer = torch.cat([sums[:1], sums[-n:-1]])
        else:
            ranked, sums = lens.rank(states, ranking.k)
            rankings.append(ranked)
            normalizer = sums[-n:]
    log_probability = lens.log_probability(predicting, ids[-n:].to(predicting.device), log_normalizer=normalizer)
    return ranking.relate(rankings, last, ids), log_probability.exp().cpu()


def suppress_together(arc: ARC, maps: Sequence[Tensor], context: ContextRelevance) -> list[Tensor]:
    """Suppress interference in the maps of several images, with one factor per token for all of them."""
    flat = arc.suppress(torch.cat([m.flatten(1) for m in maps], dim=1), context)
    parts = flat.split([m[0].numel() for m in maps], dim=1)
    return [part.reshape(m.shape) for part, m in zip(parts, maps, strict=True)]
