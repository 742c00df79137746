"""aggregate against its formulas, and the checks of scales and weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from captum_intramodal.errors import InvalidInputError, InvalidOptionError
from captum_intramodal.functional.aggregation import AGGREGATIONS, aggregate, check_scales, normalized_weights


def test_the_mean_is_weighted() -> None:
    maps, weights = torch.rand(3, 2, 4, 5), torch.tensor([0.5, 0.2, 0.3])
    assert torch.allclose(aggregate(iter(maps), weights), torch.einsum("s,snij->nij", weights, maps))


def test_the_maximum_counts_scales_with_a_weight() -> None:
    maps = torch.tensor([[1.0, 6.0], [4.0, 2.0], [9.0, 9.0]])
    assert torch.equal(aggregate(maps, torch.tensor([0.5, 0.5, 0.0]), "max"), torch.tensor([4.0, 6.0]))


def test_the_geometric_mean_keeps_what_all_scales_agree_on() -> None:
    maps = torch.tensor([[1.0, 6.0, 0.0], [4.0, 6.0, 5.0], [9.0, 0.0, 9.0]])
    result = aggregate(maps, torch.tensor([0.5, 0.5, 0.0]), "geometric_mean")
    assert torch.allclose(result, torch.tensor([2.0, 6.0, 0.0]))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_each_entry_may_have_its_own_weights(aggregation: Any) -> None:
    maps, weights = torch.rand(3, 2, 4), torch.tensor([[1.0, 0.2], [0.0, 0.3], [0.0, 0.5]])
    result = aggregate(maps, weights, aggregation)
    for entry in range(2):
        assert torch.allclose(result[entry], aggregate(maps[:, entry], weights[:, entry], aggregation))
    assert torch.allclose(result[0], maps[0, 0])


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_half_precision_is_aggregated_in_float32(aggregation: Any) -> None:
    weights = torch.tensor([0.5, 0.5])
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        assert aggregate(torch.rand(2, 3).to(dtype), weights, aggregation).dtype == expected


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_no_maps_are_refused(aggregation: Any) -> None:
    with pytest.raises(InvalidInputError, match="no maps to aggregate"):
        aggregate([], torch.empty(0), aggregation)


def test_an_unknown_aggregation_is_refused() -> None:
    with pytest.raises(InvalidOptionError, match=r"aggregation must be one of .*'median'"):
        aggregate([torch.rand(2)], torch.ones(1), "median")  # type: ignore[arg-type]


def test_scales_and_weights_are_checked() -> None:
    assert check_scales([1, 2.5]) == (1.0, 2.5)
    assert normalized_weights((1.0, 2.0), (3, 1)).tolist() == [0.75, 0.25]
    assert normalized_weights((1.0, 2.0), None).tolist() == [0.5, 0.5]
    with pytest.raises(TypeError, match="sequence of factors"):
        check_scales(2.0)  # type: ignore[arg-type]
    for scales, message in (((), "empty"), ((0.0, 1.0), "positive"), ((float("inf"),), "finite"), ((1, 1), "distinct")):
        with pytest.raises(InvalidOptionError, match=message):
            check_scales(scales)
    for weights, message in (((1.0,), "1 weights for 2 scales"), ((0.0, 0.0), "not all zero"), ((-1, 2), "non-neg")):
        with pytest.raises(InvalidOptionError, match=message):
            normalized_weights((1.0, 2.0), weights)
