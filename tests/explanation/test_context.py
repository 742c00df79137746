"""An explanation without ARC has the text activation and probabilities of one with it, and ranks nothing."""

from __future__ import annotations

import pytest
import torch

from captum_intramodal import ARC, ModelAdapter, explain
from captum_intramodal.explanation.activations import collect_answer_activations
from captum_intramodal.explanation.context import relate, relate_without_rankings
from captum_intramodal.models.hooks import evaluation_mode
from captum_intramodal.models.logit_lens import LogitLens
from tests.testing.tiny import random_image, tiny


@pytest.mark.parametrize("answer", [None, "a red dog"])
def test_text_activation_and_probabilities_need_no_rankings(answer: str | None) -> None:
    adapter = ModelAdapter(*tiny("qwen2_vl"))
    with evaluation_mode(adapter.model):
        activations = collect_answer_activations(
            adapter, [random_image()], "describe the picture", answer, (1.0,), ranking_k=4, max_new_tokens=5
        )
        context, probabilities = relate(ARC(model=adapter.lens, k=4), activations)
        alone = relate_without_rankings(adapter.lens, activations)
    torch.testing.assert_close(alone.relevance, context.text_activation * context.context)
    torch.testing.assert_close(alone.probabilities, probabilities)


def test_without_arc_the_vocabulary_is_not_ranked(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = (*tiny("qwen2_vl"), random_image(), "describe the picture", "a red dog")
    expected = explain(*arguments, scales=(1.0,))

    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("nothing is to be ranked")

    # The normalizer of probabilities comes with the single most likely token.
    rank = LogitLens.rank
    monkeypatch.setattr(LogitLens, "rank", lambda self, h, k, *a: rank(self, h, k, *a) if k == 1 else refuse())
    monkeypatch.setattr(LogitLens, "topk", refuse)
    plain = explain(*arguments, scales=(1.0,), arc=None)
    torch.testing.assert_close(plain.relevance, expected.relevance)
    torch.testing.assert_close(plain.probabilities, expected.probabilities)
    with pytest.raises(AssertionError, match="to be ranked"):
        explain(*arguments, scales=(1.0,))
