r"""Relevance of context from a model: run it, rank its likely next tokens at each text position, compare rankings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, overload

import torch
from torch import Tensor
from transformers import PreTrainedModel

from captum_intramodal.errors import InvalidInputError, InvalidOptionError
from captum_intramodal.functional.context_relevance import ContextRelevance, RankingPosition
from captum_intramodal.functional.rank_overlap import Normalization
from captum_intramodal.models.early_exit import run_layers
from captum_intramodal.models.layer_io import hidden_rows
from captum_intramodal.models.logit_lens import LogitLens, select_layers

__all__ = ["RelevanceEstimator", "check_positions"]


class RelevanceEstimator:
    """Relevance of a sequence's text tokens to each other: the part of :class:`~captum_intramodal.ARC`, which documents
    the options, that needs no attribution method."""

    def __init__(
        self,
        model: PreTrainedModel | LogitLens,
        layers: Sequence[int],
        k: int,
        p: float,
        normalization: Normalization,
        ranking_position: RankingPosition,
    ) -> None:
        self.lens = model if isinstance(model, LogitLens) else LogitLens(model)
        self.model = model if isinstance(model, PreTrainedModel) else None
        self.layers = tuple(layers)
        self.modules = select_layers(self.lens, self.layers)
        self.k = k
        self.p = p
        self.normalization: Normalization = normalization
        self.ranking_position: RankingPosition = ranking_position

    @overload
    def context(self, inputs: Mapping[str, Any], positions: Tensor) -> ContextRelevance: ...

    @overload
    def context(self, inputs: Mapping[str, Any], positions: Sequence[Tensor]) -> list[ContextRelevance]: ...

    def context(
        self, inputs: Mapping[str, Any], positions: Tensor | Sequence[Tensor]
    ) -> ContextRelevance | list[ContextRelevance]:
        r"""
        Rank the likely next tokens in one forward pass without gradients, and compare the rankings.

        Args:

            inputs (Mapping): Keyword arguments of the model's forward, as its processor returns them, with
                        ``input_ids`` (B, sequence); for several examples padded on the left, with ``attention_mask``.
            positions (Tensor or Sequence[Tensor]): Positions in the sequence, padding included, of the text tokens to
                        explain and of all that may be their context; increasing, int64 (T,). A tensor for one example,
                        a list of B tensors for a batch.

        Returns:
            **relevance** (*ContextRelevance* or *list[ContextRelevance]*): of the T tokens; a list of B for a batch.

        Raises:
            InvalidOptionError: if there is no model to run.
            InvalidInputError: if ``input_ids`` are missing, the number of positions differs from the number of
                examples, or positions do not increase or lie outside the sequence or in its padding.
        """
        if self.model is None:
            raise InvalidOptionError("context needs a transformers model to run; pass it as model=, not its LogitLens.")
        ids = inputs.get("input_ids")
        if not isinstance(ids, Tensor):
            raise InvalidInputError(f"context needs inputs with a tensor 'input_ids', got the keys {sorted(inputs)}.")
        each = [positions] if isinstance(positions, Tensor) else list(positions)
        if ids.ndim != 2 or len(each) != len(ids):
            raise InvalidInputError(
                f"context needs the positions of each example: got {len(each)} for input_ids of shape "
                f"{tuple(ids.shape)}; pass a list of tensors for a batch."
            )
        checked = [check_positions(p, ids.shape[1]) for p in each]
        mask = inputs.get("attention_mask")
        if not isinstance(mask, Tensor) or mask.shape != ids.shape:
            mask = torch.ones_like(ids)
        starts = mask.long().argmax(dim=1).tolist()
        if padded := [i for i, (row, start) in enumerate(zip(checked, starts, strict=True)) if int(row[0]) < start]:
            raise InvalidInputError(
                f"Positions of the examples {padded} lie in the padding; positions count from the start of the padding."
            )
        model = self.model
        tokens = [ids[i].cpu()[row] for i, row in enumerate(checked)]
        results = self._relevance_of_pass(lambda: model(**inputs), checked, tokens, starts)
        return results[0] if isinstance(positions, Tensor) else results

    def compare(self, states: Sequence[Tensor], last: Tensor, tokens: Tensor) -> ContextRelevance:
        r"""
        Compute the relevance of context from hidden states.

        Args:

            states (Sequence[Tensor]): For each of ``layers`` the hidden states (2T, D): at the T text tokens, then at
                        the positions before them.
            last (Tensor): Those of the last layer, likewise (2T, D).
            tokens (Tensor): Ids of the T tokens, int64 (T,).

        Returns:
            **relevance** (*ContextRelevance*): of the T tokens.
        """
        rankings = [self.lens.topk(self.ranked_states(hidden), self.k) for hidden in states]
        return self.relate(rankings, last, tokens)

    def ranked_states(self, hidden: Tensor) -> Tensor:
        """Select from the states (2T, D) that :meth:`compare` takes the T whose predictions are ranked, (T, D)."""
        at_tokens, before = hidden.chunk(2)
        return at_tokens if self.ranking_position == "token" else before

    def relate(self, rankings: Sequence[Tensor], last: Tensor, tokens: Tensor) -> ContextRelevance:
        r"""
        Compute the relevance of context from rankings.

        Args:

            rankings (Sequence[Tensor]): For each of ``layers`` the T rankings, int64 (T, k), best first.
            last, tokens: See :meth:`compare`.

        Returns:
            **relevance** (*ContextRelevance*): of the T tokens.
        """
        # In row j, column t: the logit of token t at position j.
        activation = self.lens.activation(last[: len(tokens)], tokens).clamp_min(0).cpu()
        return ContextRelevance.from_rankings(
            rankings, activation.T.contiguous(), tokens, self.p, self.normalization, self.lens.working_memory
        )

    def _relevance_of_pass(
        self,
        forward: Callable[[], Any],
        positions: Sequence[Tensor],
        tokens: Sequence[Tensor],
        starts: Sequence[int] = (0,),
    ) -> list[ContextRelevance]:
        """Run a forward pass up to the last layer needed and compute each example's relevance."""
        # Rankings at the prediction need the position before each token; the first token of a sequence has none.
        rows = [torch.cat([p, (p - 1).clamp_min(start)]) for p, start in zip(positions, starts, strict=True)]
        modules = [*self.modules, self.lens.layers[-1]]

        def select(hidden: Tensor) -> Tensor:
            if hidden.ndim == 3 and len(hidden) != len(rows):
                raise InvalidInputError(
                    f"Got positions for {len(rows)} examples, but the model ran a batch of {len(hidden)}; pass as many."
                )
            each = [hidden_rows(hidden, i, len(rows))[row.to(hidden.device)] for i, row in enumerate(rows)]
            return torch.cat(each)

        *states, last = (h.split([len(row) for row in rows]) for h in run_layers(forward, modules, select))
        return [self.compare([h[i] for h in states], last[i], tokens[i]) for i in range(len(rows))]


def check_positions(positions: Tensor, length: int | None) -> Tensor:
    """Return positions on the CPU, after checking that they increase within a sequence of some length, if known."""
    positions = torch.as_tensor(positions).cpu()
    if positions.ndim != 1 or positions.is_floating_point() or positions.numel() == 0:
        raise InvalidInputError(
            f"positions must be a non-empty 1-D integer tensor, got {positions.dtype} {tuple(positions.shape)}."
        )
    too_large = length is not None and int(positions[-1]) >= length
    if bool((positions.diff() <= 0).any()) or int(positions[0]) < 0 or too_large:
        raise InvalidInputError(
            f"positions must increase within the sequence{'' if length is None else f' of {length}'}, "
            f"got {positions.tolist()[:8]}{'...' if len(positions) > 8 else ''}."
        )
    return positions
