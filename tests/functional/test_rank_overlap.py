from __future__ import annotations

import itertools

import pytest
import torch

from captum_intramodal import pairwise_rank_biased_overlap, rank_biased_overlap


def literal_rbo(a: list[int], b: list[int], p: float, normalization: str) -> float:
    """The definition, with Python sets."""
    k = len(a)
    agreement = [len(set(a[:d]) & set(b[:d])) / d for d in range(1, k + 1)]
    total = (1 - p) * sum(p ** (d - 1) * agreement[d - 1] for d in range(1, k + 1))
    if normalization == "truncated":
        return total / (1 - p**k)
    return total + p**k * agreement[-1] if normalization == "extrapolated" else total


def random_rankings(count: int, k: int, vocabulary: int) -> torch.Tensor:
    return torch.stack([torch.randperm(vocabulary)[:k] for _ in range(count)])


@pytest.mark.parametrize("normalization", ["truncated", "minimum", "extrapolated"])
@pytest.mark.parametrize(("p", "k", "vocabulary"), [(0.9, 50, 80), (0.5, 7, 9), (0.99, 20, 500), (0.1, 1, 2)])
def test_overlaps_equal_the_definition(normalization: str, p: float, k: int, vocabulary: int) -> None:
    a, b = random_rankings(5, k, vocabulary), random_rankings(4, k, vocabulary)
    pairwise = pairwise_rank_biased_overlap(a, b, p, normalization, working_memory=200)
    assert pairwise.shape == (5, 4)
    for i, j in itertools.product(range(5), range(4)):
        expected = literal_rbo(a[i].tolist(), b[j].tolist(), p, normalization)
        assert rank_biased_overlap(a[i], b[j], p, normalization).item() == pytest.approx(expected, abs=1e-6)
        assert pairwise[i, j].item() == pytest.approx(expected, abs=1e-6)


def test_published_example() -> None:
    # Webber, Moffat and Zobel (2010), section 4: with p = 0.9 the first 10 ranks carry 85.56 % of the weight.
    a = torch.arange(50)
    b = torch.cat([torch.arange(10), torch.arange(100, 140)])
    same_top = rank_biased_overlap(a, b, 0.9, "minimum")
    tail = 0.1 * sum(0.9 ** (d - 1) * 10 / d for d in range(11, 51))
    assert same_top.item() - tail == pytest.approx(1 - 0.9**10, abs=1e-6)


def test_equal_disjoint_and_reversed_rankings() -> None:
    a = random_rankings(3, 50, 1000)
    assert torch.allclose(rank_biased_overlap(a, a), torch.ones(3))
    assert torch.equal(rank_biased_overlap(a, a + 1000), torch.zeros(3))
    b = random_rankings(3, 50, 60)
    assert torch.equal(rank_biased_overlap(b, b.flip(0)), rank_biased_overlap(b.flip(0), b))
    assert rank_biased_overlap(b[0], b).shape == (3,)


def test_top_weighs_more_than_bottom() -> None:
    a = torch.arange(10)
    top, bottom = a.clone(), a.clone()
    top[0], bottom[9] = 99, 99
    assert rank_biased_overlap(a, top) < rank_biased_overlap(a, bottom)


@pytest.mark.parametrize("p", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_p_must_lie_between_0_and_1(p: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        rank_biased_overlap(torch.arange(3), torch.arange(3), p)


def test_errors_of_shapes_and_options() -> None:
    with pytest.raises(ValueError, match="same length"):
        rank_biased_overlap(torch.arange(3), torch.arange(4))
    with pytest.raises(ValueError, match="at least 1"):
        rank_biased_overlap(torch.zeros(2, 0), torch.zeros(2, 0))
    with pytest.raises(ValueError, match="normalization"):
        rank_biased_overlap(torch.arange(3), torch.arange(3), normalization="none")  # type: ignore[arg-type]
