"""Trials of what a model can do in a batch, and the tolerances they use."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from captum_intramodal import ModelAdapter
from captum_intramodal.adapter.trials import logits_gap, tolerance_of, trial_images, trial_succeeds
from tests.testing.tiny import tiny


def test_a_model_that_attends_to_its_padding_does_not_batch() -> None:
    model, processor = tiny("llava")

    def no_mask(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, kwargs | {"attention_mask": torch.ones_like(kwargs["attention_mask"])}

    assert ModelAdapter(model, processor).batches
    handle = model.register_forward_pre_hook(no_mask, with_kwargs=True)
    assert not ModelAdapter(model, processor).batches
    handle.remove()


def test_a_model_that_mixes_its_batch_does_not_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = tiny("llava")
    assert ModelAdapter(model, processor).stacks
    forward = model.forward

    def first_image_only(pixel_values: torch.Tensor, **inputs: Any) -> Any:
        return forward(pixel_values=pixel_values[:1].expand_as(pixel_values), **inputs)

    monkeypatch.setattr(model, "forward", first_image_only)
    assert not ModelAdapter(model, processor).stacks


def test_a_trial_that_raises_fails_and_restores_the_model() -> None:
    model = torch.nn.Linear(2, 2).train()

    def trial() -> bool:
        assert not model.training
        raise KeyError("position_ids")

    assert not trial_succeeds(model, trial)
    assert trial_succeeds(model, lambda: not model.training and not torch.is_grad_enabled())
    assert model.training and torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("dtype", "passes", "generation"),
    [(torch.float32, 1e-3, 1e-2), (torch.float64, 1e-3, 1e-2), (torch.bfloat16, 5e-2, 0.1), (torch.float16, 5e-2, 0.1)],
)
def test_tolerances_by_dtype(dtype: torch.dtype, passes: float, generation: float) -> None:
    assert tolerance_of(dtype) == (passes, generation)


def test_the_gap_ignores_masked_and_padded_vocabulary() -> None:
    expected = torch.tensor([[1.0, 3.0, 5.0, -torch.inf]])
    assert logits_gap(torch.tensor([[1.5, 3.5, 5.5, 7.0, 9.0]]), expected) == pytest.approx(0.25)


def test_a_video_trial_has_two_frames() -> None:
    assert [image.size for image in trial_images((40, 24), video=True)] == [(40, 24)] * 2
    assert len(trial_images((40, 24), video=False)) == 1
