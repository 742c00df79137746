r"""Relevance of context: how strongly the text tokens of a sequence relate to each other, and what that weighs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from captum_intramodal._utils.memory import WORKING_MEMORY
from captum_intramodal.errors import InvalidOptionError
from captum_intramodal.functional.rank_overlap import NORMALIZATIONS, Normalization, pairwise_rank_biased_overlap

__all__ = ["WEIGHTINGS", "ContextRelevance", "RankingPosition", "Weighting", "check_arc_options"]

Weighting = Literal[
    "uniform",
    "irrelevance",
    "relevance",
    "text_activation",
    "irrelevance*text_activation",
    "relevance*text_activation",
]

WEIGHTINGS: tuple[str, ...] = get_args(Weighting)

RankingPosition = Literal["token", "prediction"]


@dataclass(frozen=True)
class ContextRelevance:
    r"""
    Relations between the T text tokens of a sequence; in row t, column j: those of token t to its context token j.

    Attributes:
        relevance (Tensor): Rank-biased overlap of the two tokens' rankings, float32 (T, T) in [0, 1], symmetric.
        text_activation (Tensor): :math:`r_t(j) = \max(0, \mathrm{norm}(h_j) \cdot w_t)`, float32 (T, T).
        context (Tensor): bool (T, T), True if j is context of t: an earlier token with a different id.
    """

    relevance: Tensor
    text_activation: Tensor
    context: Tensor

    @classmethod
    def from_rankings(
        cls,
        rankings: Sequence[Tensor],
        text_activation: Tensor,
        token_ids: Tensor,
        p: float = 0.9,
        normalization: Normalization = "truncated",
        working_memory: int = WORKING_MEMORY,
    ) -> ContextRelevance:
        r"""
        Compare the rankings of every pair of tokens (arXiv 2509.22415, Eq. 7), averaged over layers.

        Args:

            rankings (Sequence[Tensor]): For each layer the T rankings, int64 (T, k), best first.
            text_activation (Tensor): See :class:`ContextRelevance`.
            token_ids (Tensor): int64 (T,).
            p, normalization, working_memory (optional): See
                        :func:`~captum_intramodal.pairwise_rank_biased_overlap`.

        Returns:
            **relevance** (*ContextRelevance*): of the T tokens, on the CPU.

        Examples::

            >>> from captum_intramodal.functional.context_relevance import ContextRelevance
            >>> rankings = torch.tensor([[1, 2], [1, 2], [8, 9]])
            >>> related = ContextRelevance.from_rankings([rankings], torch.ones(3, 3), torch.tensor([5, 6, 5]))
            >>> related.relevance[2], related.context[2]
            (tensor([0., 0., 1.]), tensor([False,  True, False]))
        """
        count = len(token_ids)
        relevance = torch.zeros(count, count)
        for ranking in rankings:
            relevance += pairwise_rank_biased_overlap(ranking, ranking, p, normalization, working_memory).cpu()
        earlier = torch.ones(count, count, dtype=torch.bool).tril(-1)
        return cls(
            relevance=relevance / len(rankings),
            text_activation=text_activation,
            context=earlier & (token_ids[:, None] != token_ids[None, :]),
        )

    def weights(self, weighting: Weighting) -> Tensor:
        r"""
        Return the weights of context tokens in the interference.

        Args:

            weighting (str): One of :data:`WEIGHTINGS`, see :class:`~captum_intramodal.ARC`.

        Returns:
            **weights** (*Tensor*): float32 (T, T), not normalized; 0 for tokens that are not context.

        Raises:
            InvalidOptionError: if ``weighting`` is unknown.
        """
        _check_weighting(weighting)
        factors = {
            "uniform": torch.ones_like(self.relevance),
            "irrelevance": 1 - self.relevance,
            "relevance": self.relevance,
            "text_activation": self.text_activation,
        }
        result = self.context.float()
        for name in weighting.split("*"):
            result = result * factors[name]
        return result

    def first(self, count: int) -> ContextRelevance:
        """Return the relations between the first ``count`` tokens."""
        part = (slice(count), slice(count))
        return ContextRelevance(self.relevance[part], self.text_activation[part], self.context[part])


def _check_weighting(weighting: str) -> None:
    """Raise if the weighting is unknown."""
    if weighting not in WEIGHTINGS:
        raise InvalidOptionError(f"weighting must be one of {WEIGHTINGS}, got {weighting!r}.")


def check_arc_options(
    k: int, p: float, normalization: str, weighting: str, ranking_position: str, strength: float
) -> None:
    """Raise :class:`InvalidOptionError` if an option of :class:`~captum_intramodal.ARC` is out of range."""
    if k < 1:
        raise InvalidOptionError(f"k must be at least 1, got {k}.")
    if not 0 < p < 1:
        raise InvalidOptionError(f"p must lie strictly between 0 and 1, got {p}.")
    if normalization not in NORMALIZATIONS:
        raise InvalidOptionError(f"normalization must be one of {NORMALIZATIONS}, got {normalization!r}.")
    _check_weighting(weighting)
    if ranking_position not in get_args(RankingPosition):
        raise InvalidOptionError(f"ranking_position must be 'token' or 'prediction', got {ranking_position!r}.")
    if strength < 0:
        raise InvalidOptionError(f"strength must not be negative, got {strength}.")
