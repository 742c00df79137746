from __future__ import annotations

from typing import Any

import pytest
import torch

from captum_intramodal import LogitLens
from captum_intramodal.models.ranking import DEFAULT_RANKING_LENGTH, rank_all, rankings_from_keys, top_keys
from tests.testing.tiny import tiny


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("qwen2_vl")[0]


def test_keys_of_blocks_of_the_vocabulary_merge_into_one_ranking() -> None:
    logits = torch.randint(5, (4, 30), generator=torch.Generator().manual_seed(0)).float()
    keys = torch.cat([top_keys(logits[:, start : start + 7], start, 6) for start in range(0, 30, 7)], dim=1)
    assert torch.equal(rankings_from_keys(keys, 6), rank_all(logits, 6).ids)
    assert torch.equal(rankings_from_keys(keys, 6), logits.argsort(dim=1, descending=True, stable=True)[:, :6])


def test_rankings_are_no_longer_than_the_vocabulary(model: Any) -> None:
    assert rank_all(torch.rand(2, 3), 9).ids.shape == (2, 3)
    lens = LogitLens(model)
    assert lens.topk(torch.zeros(1, lens.hidden_size)).shape == (1, DEFAULT_RANKING_LENGTH)


def test_ties_at_the_end_of_a_ranking_go_to_the_smaller_id(model: Any) -> None:
    lens = LogitLens(model)
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0, -0.0, 0.0], [5.0, 1.0, 2.0, 3.0, 4.0, 0.0, 0.0]])
    lens._product = lambda normed, rows: logits[:, rows]
    assert lens.vocab_size > 7
    lens.__class__ = type("SevenTokens", (LogitLens,), {"vocab_size": 7})
    hidden = torch.zeros(2, lens.hidden_size)
    for block in (7, 4, 1):
        assert lens.topk(hidden, 3, block).tolist() == [[1, 2, 3], [0, 4, 3]]
        assert lens.topk(hidden, 7, block).tolist() == [[1, 2, 3, 4, 0, 5, 6], [0, 4, 3, 2, 1, 5, 6]]


@pytest.mark.parametrize("values", [5, 200, None])
@pytest.mark.parametrize("length", [128 * 24, 128 * 24 + 1, 5000])
def test_rankings_of_long_rows(model: Any, length: int, values: int | None) -> None:
    """Long rows are searched in parts; with few distinct values, most logits tie."""
    generator = torch.Generator().manual_seed(length)
    logits = torch.randn(3, length, generator=generator)
    if values is not None:
        logits = torch.randint(values, (3, length), generator=generator).float()
    logits[0, -1] = logits[1, 128] = 1e3
    ranked = LogitLens(model).rank_logits(logits, 5)
    assert torch.equal(ranked.ids, logits.argsort(dim=1, descending=True, stable=True)[:, :5])
    torch.testing.assert_close(ranked.log_normalizer, logits.logsumexp(1))
