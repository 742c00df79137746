"""Larger input sizes by interpolated position embeddings."""

from __future__ import annotations

import pytest

from captum_intramodal import ModelAdapter
from captum_intramodal.adapter.position_interpolation import ResizedInputAdapter, measure_resized_input
from captum_intramodal.errors import UnsupportedModelError
from captum_intramodal.geometry.token_geometry import TokenGeometry
from tests.testing.families import build
from tests.testing.tiny import tiny

SIZES = [(120, 120)]


def test_the_wrapped_adapters_options_are_kept() -> None:
    model, processor = tiny("llava")
    adapter = ModelAdapter(model, processor, working_memory=2**20)
    resized = ResizedInputAdapter(adapter, 2.0, more_tokens=True)
    assert resized.working_memory == resized.lens.working_memory == 2**20
    assert resized.model is model and resized.processor is not processor


def test_a_larger_input_has_more_tokens() -> None:
    adapter = ModelAdapter(*tiny("llava"))
    original = adapter.geometry(SIZES)
    resized, layout = measure_resized_input(adapter, SIZES, 2.0, original, more_tokens=True)
    assert isinstance(resized, ResizedInputAdapter) and isinstance(layout, TokenGeometry)
    assert len(layout.kinds) == 4 * len(original.kinds)


def test_models_without_position_embeddings_to_interpolate() -> None:
    adapter = ModelAdapter(*tiny("smolvlm"))
    with pytest.raises(UnsupportedModelError, match=r"1.5 times its input size: none of its modules has.*crops=True"):
        ResizedInputAdapter(adapter, 1.5, more_tokens=True)


def test_models_that_fail_at_another_input_size() -> None:
    adapter = ModelAdapter(*build("gemma3"))
    with pytest.raises(UnsupportedModelError, match=r"at 1.5 times its input size: the model .* fails") as caught:
        measure_resized_input(adapter, SIZES, 1.5, adapter.geometry(SIZES), more_tokens=True)
    assert "invalid for" in str(caught.value.__cause__)
