from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from captum_intramodal import ARC, Explanation, LayerLogitLens, ModelAdapter, explain, explain_batch
from tests.testing.families import build
from tests.testing.tiny import tiny

FAMILIES = ["qwen2_vl", "llava", "llava_next", "idefics3", "smolvlm", "internvl", "gemma3"]
PROMPTS = ["describe the picture", "what is in the picture and where is the red cat ?"]


def random_image(width: int, height: int, seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (height // 8, width // 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


IMAGES_OF_TWO = [random_image(120, 88, 0), random_image(200, 136, 1)]


def assert_same(batched: Explanation, single: Explanation) -> None:
    assert batched.answer == single.answer and batched.prompt == single.prompt
    assert torch.equal(batched.token_ids, single.token_ids) and torch.equal(batched.spans, single.spans)
    assert batched.settings == single.settings
    for actual, expected in zip(batched.maps, single.maps, strict=True):
        torch.testing.assert_close(actual, expected, atol=2e-4, rtol=1e-3)
    torch.testing.assert_close(batched.relevance, single.relevance, atol=2e-4, rtol=1e-3)
    torch.testing.assert_close(batched.probabilities, single.probabilities, atol=1e-5, rtol=1e-3)


def batch_sizes(model: Any) -> tuple[list[int], Any]:
    """How many examples the decoder is given at a time, from now on."""
    sizes: list[int] = []
    layer = model.get_decoder().layers[0]
    return sizes, layer.register_forward_hook(lambda module, args, output: sizes.append(len(args[0])))


@pytest.mark.filterwarnings("ignore:Scales")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_says_what_its_examples_say(family: str) -> None:
    model, processor = build(family)
    options: dict[str, Any] = dict(scales=(1.0, 1.5), max_new_tokens=4)
    singles = [explain(model, processor, *each, **options) for each in zip(IMAGES_OF_TWO, PROMPTS, strict=True)]
    assert ModelAdapter(model, processor).batches
    sizes, handle = batch_sizes(model)
    batched = explain_batch(model, processor, IMAGES_OF_TWO, PROMPTS, **options)
    handle.remove()
    # The last passes are those of the scales, each of all examples that it shows something new of.
    scales = [scale for single in singles for scale in single.settings["scales"]]
    assert sizes[-len(set(scales)) :] == [scales.count(scale) for scale in sorted(set(scales))]
    for actual, expected in zip(batched, singles, strict=True):
        assert_same(actual, expected)


def test_several_images_and_given_answers() -> None:
    model, processor = tiny("qwen2_vl")
    images = [IMAGES_OF_TWO[0], IMAGES_OF_TWO, [IMAGES_OF_TWO[1]]]
    answers = ["a red dog and a blue cat", None, "cat"]
    options: dict[str, Any] = dict(scales=(1.0,), max_new_tokens=3)
    for batch_size in (2, 8):
        batched = explain_batch(model, processor, images, "describe the picture", answers, batch_size, **options)
        assert [len(explanation.maps) for explanation in batched] == [1, 2, 1]
        for actual, shown, answer in zip(batched, images, answers, strict=True):
            assert_same(actual, explain(model, processor, shown, "describe the picture", answer, **options))


def test_cut_outs_of_several_images() -> None:
    model, processor = tiny("llava")
    options: dict[str, Any] = dict(scales=(1.0, 2.0), crops=True)
    batched = explain_batch(model, processor, IMAGES_OF_TWO, PROMPTS, ["a dog", "a red cat"], **options)
    for actual, shown, prompt, answer in zip(batched, IMAGES_OF_TWO, PROMPTS, ["a dog", "a red cat"], strict=True):
        assert actual.settings["scales"] == [1.0, 2.0]
        assert_same(actual, explain(model, processor, shown, prompt, answer, **options))


def test_videos() -> None:
    model, processor = tiny("qwen2_vl")
    videos = [[random_image(56, 56, seed) for seed in range(2)], [random_image(84, 56, seed) for seed in range(4)]]
    options: dict[str, Any] = dict(scales=(1.0,), video=True)
    batched = explain_batch(model, processor, videos, PROMPTS, ["a dog", "a red cat"], **options)
    for actual, frames, prompt, answer in zip(batched, videos, PROMPTS, ["a dog", "a red cat"], strict=True):
        assert_same(actual, explain(model, processor, frames, prompt, answer, **options))


@pytest.mark.parametrize("family", ["mistral_large4", pytest.param("got_ocr2", marks=pytest.mark.slow), "git"])
def test_models_that_batches_change_run_one_by_one(family: str) -> None:
    """Positions that the padding moves, a processor that refuses, and images before the sequence."""
    model, processor = build(family)
    assert not ModelAdapter(model, processor).batches
    options: dict[str, Any] = dict(scales=(1.0,))
    batched = explain_batch(model, processor, IMAGES_OF_TWO, PROMPTS, ["a dog", "a cat"], **options)
    for actual, shown, prompt, answer in zip(batched, IMAGES_OF_TWO, PROMPTS, ["a dog", "a cat"], strict=True):
        assert_same(actual, explain(model, processor, shown, prompt, answer, **options))


@pytest.fixture(scope="module")
def padded() -> tuple[ModelAdapter, dict[str, Any], list[dict[str, Any]], list[int]]:
    """A user's own left-padded batch, each of its examples alone, and how far they are padded."""
    model, processor = tiny("qwen2_vl")
    adapter = ModelAdapter(model, processor)
    images = [[shown] for shown in IMAGES_OF_TWO]
    texts = [adapter.prompt_text(prompt, 1) for prompt in PROMPTS]
    options: dict[str, Any] = dict(
        return_tensors="pt", add_special_tokens=False, return_mm_token_type_ids=True, padding=True, padding_side="left"
    )
    batch = dict(processor(text=texts, images=images, **options))
    singles = [dict(processor(text=[t], images=i, **options)) for t, i in zip(texts, images, strict=True)]
    length = batch["input_ids"].shape[1]
    starts = [length - single["input_ids"].shape[1] for single in singles]
    assert starts[0] > 0 and starts[1] == 0
    return adapter, batch, singles, starts


def test_visual_positions_of_a_padded_row(padded: Any) -> None:
    adapter, batch, singles, starts = padded
    assert adapter.starts(batch) == starts
    for row, single, start in zip(batch["input_ids"], singles, starts, strict=True):
        assert torch.equal(
            adapter.visual_positions(row),
            start + (single["input_ids"][0] == adapter.model.config.image_token_id).nonzero()[:, 0],
        )


def test_the_lens_on_a_padded_batch(padded: Any) -> None:
    adapter, batch, singles, starts = padded
    model = adapter.model

    def attribute(inputs: dict[str, Any], target: Any) -> torch.Tensor:
        rest = {key: value for key, value in inputs.items() if key != "input_ids"}
        lens = LayerLogitLens(lambda ids: model(input_ids=ids, **rest), model.get_decoder().layers[1], adapter.lens)
        return lens.attribute(inputs["input_ids"], target, relu_attributions=False)

    whole = attribute(batch, [7, 11])
    for row, single, start, target in zip(whole, singles, starts, [7, 11], strict=True):
        torch.testing.assert_close(row[start:], attribute(single, target)[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("ranking_position", ["token", "prediction"])
def test_context_of_a_padded_batch(padded: Any, ranking_position: Any) -> None:
    adapter, batch, singles, starts = padded
    arc = ARC(model=adapter.model, layers=(0, -1), k=10, ranking_position=ranking_position)
    positions = []
    for single in singles:
        visual = set(adapter.visual_positions(single["input_ids"][0]).tolist())
        positions.append(torch.tensor([i for i in range(single["input_ids"].shape[1]) if i not in visual]))
    contexts = arc.context(batch, [start + p for start, p in zip(starts, positions, strict=True)])
    assert len(contexts) == 2
    for actual, single, p in zip(contexts, singles, positions, strict=True):
        expected = arc.context(single, p)
        torch.testing.assert_close(actual.relevance, expected.relevance, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(actual.text_activation, expected.text_activation, atol=1e-4, rtol=1e-4)
        assert torch.equal(actual.context, expected.context)
    with pytest.raises(ValueError, match="positions of each example: got 1 for input_ids"):
        arc.context(batch, positions[0])
    with pytest.raises(ValueError, match=r"lie in the padding"):
        arc.context(batch, positions)


def test_the_options_are_those_of_explain() -> None:
    def options(function: Any) -> dict[str, inspect.Parameter]:
        parameters = inspect.signature(function).parameters
        return {name: p for name, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}

    assert options(explain) == options(explain_batch)


def test_errors() -> None:
    model, processor = tiny("qwen2_vl")
    with pytest.raises(ValueError, match="2 images, 1 prompts and 2 answers"):
        explain_batch(model, processor, IMAGES_OF_TWO, ["describe"])
    with pytest.raises(ValueError, match="2 images, 2 prompts and 5 answers"):
        explain_batch(model, processor, IMAGES_OF_TWO, PROMPTS, "a dog")
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        explain_batch(model, processor, IMAGES_OF_TWO, PROMPTS, batch_size=0)
    with pytest.raises(ValueError, match="prompt is empty"):
        explain_batch(model, processor, IMAGES_OF_TWO, ["describe", " "])
    with pytest.raises(ValueError, match="cannot encode 'zebra'"):
        explain_batch(model, processor, IMAGES_OF_TWO, PROMPTS, ["a dog", "a zebra"])
    with pytest.raises(TypeError, match="got a single image"):
        explain_batch(model, processor, IMAGES_OF_TWO[0], "describe")  # type: ignore[arg-type]
    assert explain_batch(model, processor, [], []) == []
