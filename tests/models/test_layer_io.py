from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from captum_intramodal.errors import InvalidInputError
from captum_intramodal.models.early_exit import run_layers
from captum_intramodal.models.layer_io import (
    first_tensor,
    hidden_rows,
    named_arguments,
    replace_first_tensor,
    replace_last_rows,
)

HIDDEN = torch.arange(6.0).reshape(1, 3, 2)


@pytest.mark.parametrize("output", [HIDDEN, (HIDDEN, None), [(HIDDEN,), 1], BaseModelOutput(last_hidden_state=HIDDEN)])
def test_hidden_states_are_the_first_tensor(output: Any) -> None:
    assert first_tensor(output) is HIDDEN


@pytest.mark.parametrize("output", [HIDDEN, (HIDDEN, None), [(HIDDEN,), 1]])
def test_hidden_states_are_replaced_where_they_are_found(output: Any) -> None:
    value = HIDDEN + 1
    replaced = replace_first_tensor(output, value)
    assert first_tensor(replaced) is value and type(replaced) is type(output)
    if not isinstance(output, Tensor):
        assert replaced[1:] == output[1:]


@pytest.mark.parametrize("output", [None, (), {"a": 1}, (None, HIDDEN)])
def test_outputs_without_hidden_states(output: Any) -> None:
    with pytest.raises(TypeError, match="tuple that begins with one; got "):
        first_tensor(output)
    if not isinstance(output, tuple):
        with pytest.raises(TypeError, match="expected a tensor, tuple or list"):
            replace_first_tensor(output, HIDDEN)


def test_rows_of_one_example() -> None:
    hidden = torch.randn(2, 5, 3)
    assert torch.equal(hidden_rows(hidden, 1, 2), hidden[1])
    streams_first, streams_inside = torch.randn(4, 2, 5, 3), torch.randn(2, 5, 4, 3)
    expected = torch.cat([streams_first[s, 1] for s in range(4)], dim=1)
    assert torch.equal(hidden_rows(streams_first, 1, 2), expected)
    expected = torch.cat([streams_inside[1, :, s] for s in range(4)], dim=1)
    assert torch.equal(hidden_rows(streams_inside, 1, 2), expected)


@pytest.mark.parametrize("shape", [(1, 5, 3), (1, 5, 4, 3), (4, 1, 5, 3)])
def test_last_rows_are_replaced_in_a_copy(shape: tuple[int, ...]) -> None:
    hidden = torch.randn(shape)
    before, rows = hidden_rows(hidden).clone(), torch.randn_like(hidden_rows(hidden)[:2])
    result = hidden_rows(replace_last_rows(hidden, rows))
    assert torch.equal(result[-2:], rows) and torch.equal(result[:-2], before[:-2])
    assert torch.equal(hidden_rows(hidden), before)


def test_arguments_are_named() -> None:
    class Layer(nn.Module):
        def forward(self, hidden_states: Tensor, mask: Any = None, **more: Any) -> Tensor:
            return hidden_states

    layer = Layer()
    layer.forward = lambda *args, **kwargs: None  # type: ignore[method-assign]
    assert named_arguments(layer, (1, 2), {"cache": 3}) == {"hidden_states": 1, "mask": 2, "cache": 3}
    assert named_arguments(layer, (), {"hidden_states": 1}) == {"hidden_states": 1}


def test_layers_run_until_the_deepest() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(3, 2))
    deeper: list[bool] = []
    net[2].register_forward_hook(lambda *args: deeper.append(True))
    x = torch.randn(1, 4)
    second, first = run_layers(lambda: net(x), [net[1], net[0]], lambda hidden: hidden * 2)
    assert torch.equal(first, 2 * net[0](x)) and torch.equal(second, 2 * net[1](net[0](x)))
    assert not deeper and not first.requires_grad


def test_a_layer_of_another_model_is_refused() -> None:
    net = nn.Sequential(nn.Linear(4, 3))
    with pytest.raises(InvalidInputError, match=r"1 of 2 layers \(Linear\) did not run"):
        run_layers(lambda: net(torch.zeros(1, 4)), [net[0], nn.Linear(1, 1)])
