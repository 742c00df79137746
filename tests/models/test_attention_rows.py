"""Interception of attention lasts for one thread and one ``with`` block."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from captum_intramodal.models.attention_rows import intercept_attention
from tests.testing.tiny import tiny

IDS = torch.tensor([[5, 6, 7]])


def test_calls_of_other_threads_go_to_their_implementation() -> None:
    model, _ = tiny("llava")
    handled: list[Any] = []

    def handle(function: Any, module: Any, *args: Any, **options: Any) -> Any:
        handled.append(module)
        return function(module, *args, **options)

    def forward() -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = model(input_ids=IDS).logits
        return logits

    expected = forward()
    with ThreadPoolExecutor(1) as other, intercept_attention(handle):
        assert torch.equal(other.submit(forward).result(), expected) and not handled
        assert torch.equal(forward(), expected)
        assert len(handled) == len(model.get_decoder().layers)


def test_two_threads_that_intercept_leave_nothing_behind() -> None:
    barrier = Barrier(2, timeout=30)

    def intercept(_: int) -> None:
        barrier.wait()
        for _ in range(50):
            with intercept_attention(lambda function, *args, **options: function(*args, **options)):
                pass

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(intercept, range(2)))
    assert "get_interface" not in vars(ALL_ATTENTION_FUNCTIONS)


def test_exceptions_restore_the_interface() -> None:
    with pytest.raises(RuntimeError, match="stop"), intercept_attention(lambda *args: None):
        raise RuntimeError("stop")
    assert "get_interface" not in vars(ALL_ATTENTION_FUNCTIONS)
