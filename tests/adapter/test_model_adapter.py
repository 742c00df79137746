"""The adapter of a model and its processor."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from captum_intramodal import ModelAdapter
from captum_intramodal.errors import UnsupportedModelError
from tests.testing.tiny import random_image, tiny


def test_what_is_no_model_with_its_processor_is_refused() -> None:
    model, processor = tiny("llava")
    anything: Any = torch.nn.Linear(2, 2)
    with pytest.raises(TypeError, match="generates text, got Linear"):
        ModelAdapter(anything, processor)
    with pytest.raises(TypeError, match="needs a tokenizer"):
        ModelAdapter(model, processor.tokenizer)
    processor.video_processor = None
    with pytest.raises(UnsupportedModelError, match="takes no videos"):
        ModelAdapter(model, processor, video=True)


def test_a_compiled_model_is_unwrapped() -> None:
    model, processor = tiny("llava")
    assert ModelAdapter(torch.compile(model), processor).model is model


def test_the_lens_is_calibrated_once_per_model() -> None:
    model, processor = tiny("llava")
    calls: list[int] = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    first = ModelAdapter(model, processor, working_memory=2**20).lens
    calibrations = len(calls)
    second = ModelAdapter(model, processor, working_memory=2**21).lens
    handle.remove()
    assert calibrations > 0 and len(calls) == calibrations
    assert (first.working_memory, second.working_memory) == (2**20, 2**21)


def test_the_token_in_place_of_a_removed_one() -> None:
    model, processor = tiny("llava")
    adapter = ModelAdapter(model, processor)
    assert adapter.baseline_token == processor.tokenizer.unk_token_id
    processor.tokenizer.unk_token = None
    assert adapter.baseline_token == processor.tokenizer.pad_token_id
    processor.tokenizer.pad_token = processor.tokenizer.eos_token = None
    with pytest.raises(UnsupportedModelError, match="no unknown, padding or end token"):
        _ = adapter.baseline_token


def test_inputs_are_run_in_the_models_dtype() -> None:
    model, processor = tiny("llava")
    adapter = ModelAdapter(model.to(torch.bfloat16), processor)
    inputs = adapter.prepare([random_image()], "describe the picture")
    assert inputs["pixel_values"].dtype == torch.float32
    assert adapter.run(inputs).logits.dtype == torch.bfloat16
