r"""The options of MSEA and ARC that explainers have in common: around the logit lens, or around any explainer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from torch import Tensor

from captum_intramodal.attr.arc import ARC
from captum_intramodal.explanation.activations import Activations
from captum_intramodal.explanation.context import suppress_together
from captum_intramodal.explanation.options import ExplainOptions, Scales
from captum_intramodal.functional.aggregation import Aggregation, normalized_weights
from captum_intramodal.functional.context_relevance import (
    ContextRelevance,
    RankingPosition,
    Weighting,
    check_arc_options,
)
from captum_intramodal.functional.rank_overlap import Normalization
from captum_intramodal.models.logit_lens import LogitLens
from captum_intramodal.models.ranking import DEFAULT_RANKING_LENGTH

__all__ = ["RankingOptions", "ScaleOptions"]


@dataclass(kw_only=True)
class ScaleOptions:
    """Options of MSEA, see :func:`captum_intramodal.explain`."""

    scales: Scales = "auto"
    scale_weights: Sequence[float] | None = None
    aggregation: Aggregation = "mean"

    def __post_init__(self) -> None:
        checked = ExplainOptions(scales=self.scales, scale_weights=self.scale_weights, aggregation=self.aggregation)
        self.scales = checked.scales

    def weights_for(self, kept: Sequence[float]) -> Tensor:
        """Return the normalized weights of the scales that were kept."""
        if self.scale_weights is None or len(kept) < 2:
            return normalized_weights(kept, None)
        weight_of = dict(zip(self.scales, self.scale_weights, strict=True))
        return normalized_weights(kept, [weight_of[scale] for scale in kept])


@dataclass(kw_only=True)
class RankingOptions:
    """Options of ARC, see :class:`captum_intramodal.ActivationRankingCorrelation`."""

    layers: Sequence[int] = (-1,)
    k: int = DEFAULT_RANKING_LENGTH
    p: float = 0.9
    normalization: Normalization = "truncated"
    weighting: Weighting = "irrelevance"
    ranking_position: RankingPosition = "token"
    least_squares: bool = True
    strength: float = 1.0

    def __post_init__(self) -> None:
        check_arc_options(self.k, self.p, self.normalization, self.weighting, self.ranking_position, self.strength)
        self.layers = tuple(self.layers)

    def relate(self, lens: LogitLens, activations: Activations) -> tuple[ARC, ContextRelevance]:
        """Return ARC with these options, and the relevance of context between all text tokens."""
        arc = ARC(model=lens, **{f.name: getattr(self, f.name) for f in fields(RankingOptions)})
        states = [activations.ranking_states[layer] for layer in arc.layers]
        return arc, arc.compare(states, activations.last, activations.text.ids)

    def suppress(self, lens: LogitLens, maps: Sequence[Tensor], activations: Activations) -> list[Tensor]:
        """Suppress interference in the maps of the last text tokens, which are the only context of each other."""
        arc, context = self.relate(lens, activations)
        last = (slice(-len(maps[0]), None),) * 2
        explained = replace(
            context,
            relevance=context.relevance[last],
            text_activation=context.text_activation[last],
            context=context.context[last],
        )
        return suppress_together(arc, maps, explained)
