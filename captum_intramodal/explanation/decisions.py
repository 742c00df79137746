r"""TODO."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from captum_intramodal.adapter.answer_scorer import AnswerScorer
from captum_intramodal.adapter.model_adapter import ModelAdapter
from captum_intramodal.adapter.position_interpolation import ResizedInputView
from captum_intramodal.explanation.crops import CropView
from captum_intramodal.explanation.passes import Example
from captum_intramodal.explanation.scale_maps import resize_images
from captum_intramodal.explanation.scale_views import ScaleView

__all__ = ["Decision"]


class Decision(NamedTuple):
    """What the model decides at one scale, given the answer so far.

    Attributes:
        log_probability (Tensor): of the answer's T tokens, float32 (T,).
        likeliest (Tensor): the most likely tokens in their places, int64 (T,).
    """

    log_probability: Tensor
    likeliest: Tensor


def decide(adapter: ModelAdapter, example: Example, sights: Mapping[float, ScaleView]) -> dict[float, Decision]:
    """What the model would say at each scale and of the originals, in one teacher-forced pass each."""
    decided = {}
    for scale in dict.fromkeys((1.0, *sights)):
        sight = sights.get(scale)
        viewer, bare = (sight.adapter, sight.sight) if isinstance(sight, ResizedInputView) else (adapter, sight)
        if isinstance(bare, CropView):
            raise ValueError(
                "A cut-out shows the model a part of the image; what it would say of the whole at that scale is not "
                'known. Leave out crops, or changed_decisions="drop" or "weigh".'
            )
        shown = example.images if bare is None else resize_images(example.images, bare.image_sizes)
        scorer = AnswerScorer(viewer, example.prompt, example.encoding.answer_ids)
        log_probability, likeliest = scorer.predict([shown])
        decided[scale] = Decision(log_probability[0], likeliest[0])
    return decided
