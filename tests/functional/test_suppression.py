"""suppress_interference against loops, values by hand, and the cases in which a map stays as it is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from captum_intramodal.errors import InvalidInputError
from captum_intramodal.functional.suppression import suppress_interference


def suppress_in_loops(maps: Tensor, weights: Tensor, least_squares: bool, strength: float) -> Tensor:
    result = []
    for t in range(len(maps)):
        total = sum(float(weights[t, j]) for j in range(len(maps)))
        if total == 0:
            result.append(maps[t].clamp_min(0))
            continue
        interference = sum(float(weights[t, j]) * maps[j].double() for j in range(len(maps))) / total
        energy = float((interference * interference).sum())
        scale = float((maps[t].double() * interference).sum()) / energy if least_squares else 1.0
        result.append((maps[t].double() - strength * scale * interference).clamp_min(0).float())
    return torch.stack(result)


@pytest.mark.parametrize("least_squares", [True, False])
@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_suppression_equals_loops(least_squares: bool, strength: float) -> None:
    maps, weights = torch.rand(9, 4, 5), torch.rand(9, 9).tril(-1)
    weights[3] = 0
    actual = suppress_interference(maps, weights, least_squares, strength, working_memory=200)
    assert torch.allclose(actual, suppress_in_loops(maps, weights, least_squares, strength), atol=1e-6)
    assert torch.equal(actual[0], maps[0]) and torch.equal(actual[3], maps[3])


def test_suppression_by_hand() -> None:
    # The second map is the first plus a part of its own, and only that part remains.
    maps = torch.tensor([[2.0, 0.0, 0.0], [2.0, 0.0, 3.0]])
    weights = torch.tensor([[0.0, 0.0], [0.7, 0.0]])
    assert torch.allclose(suppress_interference(maps, weights), torch.tensor([[2.0, 0, 0], [0, 0, 3.0]]))
    signed = suppress_interference(-maps, weights, relu_attributions=False)
    assert torch.allclose(signed, torch.tensor([[-2.0, 0, 0], [0, 0, -3.0]]))


def test_context_without_activation_changes_nothing() -> None:
    maps = torch.rand(3, 6)
    maps[0] = 0
    weights = torch.tensor([[0.0, 0, 0], [1.0, 0, 0], [1.0, 0, 0]])
    assert torch.equal(suppress_interference(maps, weights), maps)


def test_sums_are_taken_in_float32_or_float64() -> None:
    maps, weights = torch.rand(5, 7, dtype=torch.float64), torch.rand(5, 5).tril(-1)
    exact = suppress_interference(maps, weights)
    assert exact.dtype == torch.float64
    single = suppress_interference(maps.float(), weights)
    assert single.dtype == torch.float32 and torch.allclose(single.double(), exact, atol=1e-6)
    half = maps.half()
    assert torch.equal(suppress_interference(half, weights), suppress_interference(half.float(), weights))


def test_no_tokens_and_no_values_give_empty_maps() -> None:
    assert suppress_interference(torch.rand(0, 4, 5), torch.rand(0, 0)).shape == (0, 4, 5)
    assert suppress_interference(torch.rand(2, 0), torch.rand(2, 2)).shape == (2, 0)


def test_gradients_flow_through_suppression() -> None:
    maps, weights = torch.rand(4, 6, dtype=torch.float64, requires_grad=True), torch.rand(4, 4).tril(-1)
    assert torch.autograd.gradcheck(lambda a: suppress_interference(a, weights, relu_attributions=False), maps)


@pytest.mark.parametrize(("maps", "weights"), [((3, 4), (2, 2)), ((3, 4), (3,)), ((3,), (3, 3)), ((), (0, 0))])
def test_shapes_that_do_not_fit_are_refused(maps: tuple[int, ...], weights: tuple[int, ...]) -> None:
    with pytest.raises(InvalidInputError, match=r"\(T, \.\.\.\)"):
        suppress_interference(torch.rand(maps), torch.rand(weights))
