"""ContextRelevance: its comparison of rankings, its weightings, and the check of ARC's options."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch

from captum_intramodal import rank_biased_overlap
from captum_intramodal.errors import InvalidOptionError
from captum_intramodal.functional.context_relevance import (
    WEIGHTINGS,
    ContextRelevance,
    RankingPosition,
    check_arc_options,
)

OPTIONS: dict[str, Any] = {
    "k": 50,
    "p": 0.9,
    "normalization": "truncated",
    "weighting": "irrelevance",
    "ranking_position": "token",
    "strength": 1.0,
}


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_weightings(weighting: Any) -> None:
    relevance, activation = torch.tensor([[1.0, 0.25], [0.25, 1.0]]), torch.tensor([[3.0, 5.0], [4.0, 2.0]])
    context = ContextRelevance(relevance, activation, torch.tensor([[False, False], [True, False]]))
    expected = {
        "uniform": 1.0,
        "irrelevance": 0.75,
        "relevance": 0.25,
        "text_activation": 4.0,
        "irrelevance*text_activation": 3.0,
        "relevance*text_activation": 1.0,
    }
    assert torch.equal(context.weights(weighting), torch.tensor([[0.0, 0.0], [expected[weighting], 0.0]]))


def test_an_unknown_weighting_is_refused() -> None:
    context = ContextRelevance(torch.eye(2), torch.eye(2), torch.eye(2, dtype=torch.bool))
    with pytest.raises(InvalidOptionError, match=r"weighting must be one of .*'attention'"):
        context.weights("attention")  # type: ignore[arg-type]


def test_rankings_are_compared_pair_by_pair_and_averaged_over_layers() -> None:
    layers = [torch.stack([torch.randperm(30)[:8] for _ in range(4)]) for _ in range(2)]
    ids = torch.tensor([7, 8, 7, 9])
    related = ContextRelevance.from_rankings(layers, torch.ones(4, 4), ids, p=0.7, normalization="minimum")
    for t in range(4):
        for j in range(4):
            each = [rank_biased_overlap(rankings[t], rankings[j], 0.7, "minimum") for rankings in layers]
            assert related.relevance[t, j].item() == pytest.approx(float(sum(each)) / 2, abs=1e-6)
            assert related.context[t, j] == (j < t and ids[t] != ids[j])


def test_the_first_tokens_keep_their_relations() -> None:
    whole = ContextRelevance(torch.rand(4, 4), torch.rand(4, 4), torch.ones(4, 4, dtype=torch.bool).tril(-1))
    part = whole.first(3)
    assert torch.equal(part.relevance, whole.relevance[:3, :3])
    assert torch.equal(part.weights("relevance*text_activation"), whole.weights("relevance*text_activation")[:3, :3])


@pytest.mark.parametrize("position", get_args(RankingPosition))
def test_options_in_range_pass(position: str) -> None:
    check_arc_options(**OPTIONS | {"ranking_position": position, "k": 1, "strength": 0.0})


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"k": 0}, "k must be"),
        ({"p": 1.0}, "p must lie"),
        ({"weighting": "attention"}, "weighting must be one of"),
        ({"normalization": "none"}, "normalization must be one of"),
        ({"ranking_position": "before"}, "ranking_position must be"),
        ({"strength": -1.0}, "strength must not be negative"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_options_out_of_range_are_refused(option: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidOptionError, match=message):
        check_arc_options(**OPTIONS | option)
