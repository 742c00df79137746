r"""What would the model predict at another scale, and how are scales weighted at which its prediction changes?

All code of the option ``changed_decisions`` is here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from captum_intramodal.adapter.answer_scorer import AnswerScorer
from captum_intramodal.adapter.model_adapter import ModelAdapter
from captum_intramodal.errors import InvalidOptionError
from captum_intramodal.explanation.options import ChangedDecisions
from captum_intramodal.explanation.passes import Example
from captum_intramodal.explanation.scale_views import ScaleView

__all__ = ["Decision", "predict_at_scales", "weight_by_decisions"]


class Decision(NamedTuple):
    """Predictions of the answer's tokens at one scale, each given all tokens before it.

    Attributes:
        log_probability (Tensor): of the answer's T tokens, float32 (T,), at most 0.
        likeliest (Tensor): ids of the most likely tokens in their places, int64 (T,).
    """

    log_probability: Tensor
    likeliest: Tensor


def predict_at_scales(
    adapter: ModelAdapter, example: Example, views: Mapping[float, ScaleView]
) -> dict[float, Decision]:
    r"""
    Predict the answer's tokens at every scale and for the original images, in one teacher-forced pass each.

    Raises:
        InvalidOptionError: a view shows cut-outs, for which there is no prediction of the whole.
    """
    decisions = {}
    for scale in dict.fromkeys((1.0, *views)):
        view = views.get(scale)
        if view is not None and view.crops:
            raise InvalidOptionError(
                "A cut-out shows the model a part of the image, so there is no prediction for the whole at that scale. "
                'Leave out crops, or changed_decisions="drop" or "weigh".'
            )
        (images,) = [example.images] if view is None else view.passes(example.images)
        scorer = AnswerScorer(adapter if view is None else view.adapter, example.prompt, example.encoding.answer_ids)
        log_probability, likeliest = scorer.predict([images])
        decisions[scale] = Decision(log_probability[0], likeliest[0])
    return decisions


def weight_by_decisions(
    weights: Tensor,
    decisions: Mapping[float, Decision],
    scales: Sequence[float],
    n_tokens: int,
    changed_decisions: ChangedDecisions,
) -> Tensor:
    r"""
    Weight each scale for each token by what the model would predict there.

    Args:

        weights (Tensor): Weight of each scale, float32 (S,).
        decisions (Mapping): By scale, the original images' included.
        scales (Sequence[float]): The S scales.
        n_tokens (int): Number of text tokens, of which the last ones are the answer's.
        changed_decisions (str): ``'drop'`` or ``'weigh'``, see :func:`captum_intramodal.explain`.

    Returns:
        **weights** (*Tensor*):
            float32 (S, n_tokens); each column sums to 1. Tokens of the prompt, and tokens that no scale agrees on, keep
            the scales' own weights.
    """
    original = decisions[1.0]
    factors = torch.ones(len(scales), n_tokens)
    for row, scale in zip(factors, scales, strict=True):
        decision = decisions[scale]
        row[-len(original.likeliest) :] = (
            (decision.likeliest == original.likeliest).float()
            if changed_decisions == "drop"
            else (decision.log_probability - original.log_probability).exp().clamp_max(1)
        )
    weighted = weights[:, None] * factors
    weighted = torch.where(weighted.sum(0) > 0, weighted, weights[:, None])
    return weighted / weighted.sum(0)
