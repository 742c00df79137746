"""Visual states without the text around the images."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from captum_intramodal import ModelAdapter, explain
from captum_intramodal.adapter import prefix_cache
from captum_intramodal.adapter.prefix_cache import (
    TextPrefix,
    can_reuse_prefix,
    reusable_prefix,
    truncate_after_images,
    visual_states,
)
from captum_intramodal.models.early_exit import run_layers
from captum_intramodal.models.layer_io import first_tensor, hidden_rows
from tests.testing.families import build
from tests.testing.tiny import random_image, tiny

LONG = "describe the picture . what is the red cat ? " * 3


@pytest.mark.parametrize(
    "model_type", ["qwen2_vl", "gemma3", "molmo2", "qwen2_5_omni_thinker", "idefics3", "paligemma"]
)
def test_visual_states_do_not_depend_on_the_text_after_the_images(model_type: str) -> None:
    adapter = ModelAdapter(*build(model_type))
    inputs = adapter.prepare([random_image(160, 120)], "describe the picture . what is the red cat ?")
    prefix = truncate_after_images(adapter, inputs)
    length, shorter = inputs["input_ids"].shape[1], prefix["input_ids"].shape[1]
    # All tokens of a PaliGemma's prompt attend to each other.
    assert shorter == length if model_type == "paligemma" else shorter <= length - 10
    assert prefix["attention_mask"].shape[1] == shorter
    layer = adapter.lens.layers[-1]
    visual = adapter.visual_positions(inputs["input_ids"][0])
    (whole,) = run_layers(lambda: adapter.run(inputs), [layer], lambda hidden: hidden_rows(hidden)[visual])
    (states,) = visual_states(adapter, inputs, layer)
    torch.testing.assert_close(states, whole, atol=1e-5 * float(whole.abs().max()), rtol=1e-4)


def test_a_batch_is_cut_after_the_last_visual_token_of_all_examples() -> None:
    adapter = ModelAdapter(*tiny("qwen2_vl"))
    inputs = adapter.prepare_batch(
        [[random_image(160, 120)], [random_image(96, 64)]], ["what is this ?", "describe the picture . what is it ?"]
    )
    layer = adapter.lens.layers[-1]
    states = visual_states(adapter, inputs, layer)
    for image, prompt, actual in (
        (random_image(160, 120), "what is this ?", states[0]),
        (random_image(96, 64), "describe the picture . what is it ?", states[1]),
    ):
        (expected,) = visual_states(adapter, adapter.prepare([image], prompt), layer)
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-3)


def after_text(n_images: int = 1) -> list[dict[str, Any]]:
    """Return a prompt whose images follow a text."""
    return [{"role": "user", "content": [{"type": "text", "text": LONG}, *[{"type": "image"}] * n_images]}]


@pytest.mark.parametrize("model_type", ["qwen2_vl", "llava", "idefics3", "internvl", "gemma3", "qwen3_vl"])
@pytest.mark.parametrize("n_images", [1, 2])
def test_states_after_a_prefix_captured_in_another_pass(model_type: str, n_images: int) -> None:
    adapter = ModelAdapter(*build(model_type))
    first, second = (
        adapter.prepare([random_image(*size)] * n_images, after_text(n_images)) for size in ((96, 64), (200, 136))
    )
    layer = adapter.lens.layers[-1]
    (plain,) = visual_states(adapter, first, layer)
    (expected,) = visual_states(adapter, second, layer)
    prefix = TextPrefix(adapter, first)
    assert len(prefix.ids) >= 30
    assert not prefix.is_prefix_of(second)
    with prefix.captured():
        (captured,) = visual_states(adapter, first, layer)
    assert prefix.is_prefix_of(second)
    lengths: list[int] = []
    handle = adapter.lens.layers[0].register_forward_hook(
        lambda module, args, output: lengths.append(len(hidden_rows(first_tensor(output))))
    )
    try:
        (reused,) = visual_states(adapter, second, layer, prefix)
        (again,) = visual_states(adapter, second, layer, prefix)
    finally:
        handle.remove()
    assert lengths == [truncate_after_images(adapter, second)["input_ids"].shape[1] - len(prefix.ids)] * 2
    scale = float(expected.abs().max())
    torch.testing.assert_close(captured, plain, atol=1e-5 * scale, rtol=1e-4)
    torch.testing.assert_close(reused, expected, atol=1e-5 * scale, rtol=1e-4)
    assert torch.equal(again, reused)
    # Another text must be processed itself.
    other = adapter.prepare([random_image(96, 64)] * n_images, [{**after_text(n_images)[0], "role": "assistant"}])
    assert not prefix.is_prefix_of(other)


@pytest.mark.parametrize("answer", [None, "a red dog"])
def test_scales_reuse_a_long_text_before_the_image(answer: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = tiny("qwen2_vl")
    lengths: list[int] = []
    handle = model.get_decoder().layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append((args[0] if args else kwargs["hidden_states"]).shape[1]),
        with_kwargs=True,
    )  # fmt: skip
    options = dict(scales=(1.0, 1.5, 2.0), max_new_tokens=3)
    explain(model, processor, random_image(), after_text(), answer, **options)
    try:
        lengths.clear()
        apart = explain(model, processor, random_image(), after_text(), answer, **options)
        lengths_apart = list(lengths)
        monkeypatch.setattr(prefix_cache, "MIN_TOKENS", 30)
        assert can_reuse_prefix(ModelAdapter(model, processor))
        lengths.clear()
        together = explain(model, processor, random_image(), after_text(), answer, **options)
    finally:
        handle.remove()
    adapter = ModelAdapter(model, processor)
    inputs = adapter.prepare([random_image()], after_text())
    before = len(TextPrefix(adapter, inputs).ids)
    assert lengths[:-2] == lengths_apart[:-2]
    assert [whole - rest for whole, rest in zip(lengths_apart[-2:], lengths[-2:], strict=True)] == [before] * 2
    torch.testing.assert_close(together.maps[0], apart.maps[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(together.relevance, apart.relevance, atol=1e-5, rtol=1e-4)


def test_a_model_that_generates_without_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = tiny("qwen2_vl")
    options = dict(scales=(1.0, 1.5), max_new_tokens=4)
    expected = explain(model, processor, random_image(), after_text(), **options)
    monkeypatch.setattr(prefix_cache, "MIN_TOKENS", 30)
    model.generation_config.use_cache = False
    result = explain(model, processor, random_image(), after_text(), **options)
    assert result.answer == expected.answer
    torch.testing.assert_close(result.maps[0], expected.maps[0], atol=1e-5, rtol=1e-4)


def test_a_short_prefix_is_not_reused() -> None:
    adapter = ModelAdapter(*tiny("qwen2_vl"))
    assert reusable_prefix(adapter, adapter.prepare([random_image()], after_text())) is None
