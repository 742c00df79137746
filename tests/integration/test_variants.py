"""A model that is compiled, offloaded, adapted, quantized or in another dtype gets the same explanation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from captum_intramodal import Explanation, explain
from captum_intramodal.geometry import cache
from tests.testing.tiny import random_image, tiny


@pytest.fixture(autouse=True)
def fresh_geometry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_cache", type(cache._cache)())


def explain_two_scales(model: Any, processor: Any) -> Explanation:
    return explain(model, processor, random_image(160, 120), "describe the picture", "a red dog", scales=(1.0, 1.5))


def compiled(model: Any) -> Any:
    return torch.compile(model, backend="eager")


def offloaded(model: Any) -> Any:
    accelerate = pytest.importorskip("accelerate")
    return accelerate.cpu_offload(model)


def split(model: Any) -> Any:
    """Offload the language model only, as ``device_map`` does if a device has no room for all parts."""
    accelerate = pytest.importorskip("accelerate")
    accelerate.cpu_offload(model.model.language_model)
    return model


def with_lora(model: Any) -> Any:
    peft = pytest.importorskip("peft")
    # LoRA's matrices are initialized so that outputs do not change.
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"]))


def eager(model: Any) -> Any:
    model.set_attn_implementation("eager")
    return model


@pytest.mark.parametrize("change", [compiled, offloaded, split, with_lora, eager])
def test_a_variant_of_the_model_gets_the_same_explanation(change: Callable[[Any], Any]) -> None:
    model, processor = tiny("qwen2_vl")
    expected = explain_two_scales(model, processor)
    cache._cache.clear()
    actual = explain_two_scales(change(tiny("qwen2_vl")[0]), processor)
    torch.testing.assert_close(actual.maps[0], expected.maps[0], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(actual.relevance, expected.relevance, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("model_type", ["qwen2_vl", "internvl"])
def test_int8_keeps_the_maps_correlated(model_type: str) -> None:
    model, processor = tiny(model_type)
    expected = explain_two_scales(model, processor)
    cache._cache.clear()
    quantized = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    actual = explain_two_scales(quantized, processor)
    assert actual.maps[0].shape == expected.maps[0].shape
    both = torch.stack([actual.maps[0].flatten(), expected.maps[0].flatten()])
    assert torch.corrcoef(both)[0, 1] > 0.9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_maps_correlated(dtype: torch.dtype) -> None:
    model, processor = tiny("internvl")
    expected = explain_two_scales(model, processor)
    cache._cache.clear()
    actual = explain_two_scales(model.to(dtype), processor)
    both = torch.stack([actual.maps[0].flatten(), expected.maps[0].flatten()])
    assert torch.corrcoef(both)[0, 1] > 0.95
