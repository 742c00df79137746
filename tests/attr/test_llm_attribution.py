"""Captum's LLM results for images and text, against loops that hide one feature at a time by hand."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import captum
import matplotlib
import numpy as np
import pytest
import torch
from captum.attr import (
    FeatureAblation,
    FeaturePermutation,
    IntegratedGradients,
    KernelShap,
    Lime,
    LLMAttribution,
    LLMAttributionResult,
    Occlusion,
    ShapleyValues,
    ShapleyValueSampling,
    visualization,
)
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from captum_intramodal import Explanation, ImageTextInput, ModelAdapter, MultimodalLLMAttribution, explain
from captum_intramodal.demo import CHECKPOINT, compose
from tests.testing.tiny import tiny

matplotlib.use("Agg")

PROMPT, ANSWER = "describe the picture", "a red dog"


def random_image(width: int = 200, height: int = 136, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (height // 8, width // 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def qwen() -> ModelAdapter:
    return ModelAdapter(*tiny("qwen2_vl"))


@pytest.fixture(scope="module")
def llava() -> ModelAdapter:
    return ModelAdapter(*tiny("llava"))


@contextmanager
def counted(model: Any) -> Iterator[list[int]]:
    """Batch sizes of the model's passes."""
    sizes: list[int] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        sizes.append(len(kwargs["input_ids"]))

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield sizes
    finally:
        handle.remove()


def painted(image: Image.Image, *boxes: tuple[int, int, int, int]) -> Image.Image:
    """The image with boxes (top, bottom, left, right) in its mean color."""
    pixels = np.asarray(image).copy()
    mean = np.asarray(image).reshape(-1, 3).mean(0).round()
    for top, bottom, left, right in boxes:
        pixels[top:bottom, left:right] = mean
    return Image.fromarray(pixels)


def log_probabilities(
    adapter: ModelAdapter, images: Sequence[Image.Image], prompt: str = PROMPT, without: str | None = None
) -> Tensor:
    """Of the answer's tokens, with one word of the prompt unknown: the processor's inputs, made longer by hand."""
    processor, tokenizer = adapter.processor, adapter.tokenizer
    messages = [{"role": "user", "content": [*[{"type": "image"}] * len(images), {"type": "text", "text": prompt}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = dict(processor(images=list(images), text=[text], return_tensors="pt", add_special_tokens=False))
    if without is not None:
        word = inputs["input_ids"] == tokenizer.convert_tokens_to_ids(without)
        inputs["input_ids"] = inputs["input_ids"].masked_fill(word, tokenizer.unk_token_id)
    answer = torch.tensor(tokenizer.convert_tokens_to_ids(ANSWER.split()))
    goes_on = {"input_ids": answer, "attention_mask": torch.ones(3), "mm_token_type_ids": torch.zeros(3)}
    for key in goes_on.keys() & inputs.keys():
        inputs[key] = torch.cat([inputs[key], goes_on[key][None].to(inputs[key])], dim=1)
    with torch.no_grad():
        logits = adapter.model(**inputs, use_cache=False).logits[0, -4:-1]
    return logits.log_softmax(-1)[range(3), answer]


@pytest.mark.parametrize("family", ["qwen2_vl", "llava", "idefics3"])
def test_ablation_is_the_loop_by_hand(family: str) -> None:
    adapter, image = ModelAdapter(*tiny(family)), random_image()
    inp = ImageTextInput(adapter, image, PROMPT, grid=(2, 2))
    result = MultimodalLLMAttribution(FeatureAblation(adapter.model), adapter).attribute(
        inp, ANSWER, perturbations_per_eval=4
    )
    boxes = [(top, top + 68, left, left + 100) for top in (0, 68) for left in (0, 100)]
    hidden = [log_probabilities(adapter, [painted(image, box)]) for box in boxes]
    hidden += [log_probabilities(adapter, [image], without=word) for word in PROMPT.split()]
    expected = log_probabilities(adapter, [image]) - torch.stack(hidden)
    assert result.input_tokens == [*(f"image_0_feature_{i}" for i in range(4)), *PROMPT.split()]
    assert result.output_tokens == ANSWER.split()
    assert torch.allclose(result.token_attr, expected.T, atol=1e-5)
    assert torch.allclose(result.seq_attr, expected.sum(1), atol=1e-5)
    assert bool((result.token_attr.abs() > 1e-4).all())


def test_features_of_two_images_and_tokens(qwen: ModelAdapter) -> None:
    images = [random_image(), random_image(120, 160, seed=1)]
    halves = torch.zeros(160, 120, dtype=torch.int32)
    halves[:, 50:] = 7  # any numbers will do
    inp = ImageTextInput(
        qwen, images, "the cat the dog", segmentations=[torch.zeros(136, 200, dtype=torch.uint8), halves], text="tokens"
    )
    assert inp.values[:3] == ["image_0_feature_0", "image_1_feature_0", "image_1_feature_7"]
    assert inp.values[3:] == ["the", "cat", "the", "dog"]
    result = MultimodalLLMAttribution(FeatureAblation(qwen.model), qwen).attribute(inp, ANSWER)
    whole = log_probabilities(qwen, images, "the cat the dog")
    without = log_probabilities(qwen, [images[0], painted(images[1], (0, 160, 50, 120))], "the cat the dog")
    assert torch.allclose(result.token_attr[:, 2], whole - without, atol=1e-5)
    heat = result.heatmap((0, 2), image=1)
    assert heat.shape == (160, 120)
    assert float(heat[10, 60]) == pytest.approx(float(result.token_attr[:2, 2].sum()))
    assert float(heat[10, 40]) == pytest.approx(float(result.token_attr[:2, 1].sum()))


def test_baselines(qwen: ModelAdapter) -> None:
    image = random_image()
    present = torch.tensor([[0.0, 1, 1, 1, 0, 1, 1]])
    white = ImageTextInput(qwen, image, PROMPT, grid=(2, 2), image_baseline=(255, 254, 253), text_baseline="cat")
    (shown,) = white.perturb_images(present)
    assert np.array_equal(np.asarray(shown)[:68, :100], np.full((68, 100, 3), (255, 254, 253)))
    assert np.array_equal(np.asarray(shown)[68:], np.asarray(image)[68:])
    asked = qwen.prepare([shown], "cat the picture")
    given = white.to_model_input(present)
    assert asked.keys() == given.keys() and all(torch.equal(asked[key], given[key]) for key in asked)
    (blurred,) = ImageTextInput(qwen, image, PROMPT, grid=(1, 1), image_baseline="blur").perturb_images(torch.zeros(4))
    assert np.asarray(blurred).std() < 0.5 * np.asarray(image).std()
    assert not ImageTextInput(qwen, image, PROMPT, text="none").values[36:]


def combinations_by_hand(adapter: ModelAdapter, image: Image.Image) -> dict[tuple[bool, ...], Tensor]:
    """Log-probabilities for every combination of left half, right half and the word *image*."""
    table = {}
    for row in itertools.product((False, True), repeat=3):
        boxes = [(0, 136, left, left + 100) for left, present in zip((0, 100), row, strict=False) if not present]
        table[row] = log_probabilities(adapter, [painted(image, *boxes)], "picture", None if row[2] else "picture")
    return table


def shapley_by_hand(table: dict[tuple[bool, ...], Tensor]) -> Tensor:
    values = torch.zeros(3, 3)
    for row, value in table.items():
        for feature in range(3):
            others = sum(row) - row[feature]
            weight = math.factorial(others) * math.factorial(2 - others) / math.factorial(3)
            values[:, feature] += weight * value * (1 if row[feature] else -1)
    return values


@pytest.mark.parametrize("perturbations", [1, 3])
def test_shapley_values_are_those_of_all_combinations(qwen: ModelAdapter, perturbations: int) -> None:
    image = random_image()
    inp = ImageTextInput(qwen, image, "picture", grid=(1, 2))
    assert qwen.batches
    with counted(qwen.model) as sizes:
        result = MultimodalLLMAttribution(ShapleyValues(qwen.model), qwen).attribute(
            inp, ANSWER, perturbations_per_eval=perturbations
        )
    expected = shapley_by_hand(combinations_by_hand(qwen, image))
    assert torch.allclose(result.token_attr, expected, atol=1e-5)
    assert torch.allclose(result.seq_attr, expected.sum(0), atol=1e-5)
    # Six orders of three features meet eight combinations, which run once each.
    assert sum(sizes) == 8


def test_shapley_sampling_draws_anew_and_repeats_with_a_seed(qwen: ModelAdapter) -> None:
    inp = ImageTextInput(qwen, random_image(), PROMPT, grid=(1, 3))
    sampled = MultimodalLLMAttribution(ShapleyValueSampling(qwen.model), qwen)
    torch.manual_seed(5)
    first, second = (sampled.attribute(inp, ANSWER, n_samples=1, perturbations_per_eval=4) for _ in range(2))
    torch.manual_seed(5)
    again = sampled.attribute(inp, ANSWER, n_samples=1, perturbations_per_eval=4)
    assert torch.equal(first.token_attr, again.token_attr)
    assert not torch.allclose(first.token_attr, second.token_attr, atol=1e-5)
    torch.manual_seed(5)
    mean = sampled.attribute(inp, ANSWER, num_trials=2, n_samples=1, perturbations_per_eval=4)
    assert torch.allclose(mean.token_attr, (first.token_attr + second.token_attr) / 2, atol=1e-6)
    # Efficiency: the shares of every token sum up to the effect of hiding all.
    nothing = ImageTextInput(qwen, random_image(), PROMPT, grid=(1, 1))
    words = FeatureAblation(qwen.model)
    together = MultimodalLLMAttribution(words, qwen).attribute(
        nothing, ANSWER, feature_mask=torch.zeros(1, 4, dtype=torch.int64)
    )
    assert torch.allclose(first.token_attr.sum(1), together.token_attr[:, 0], atol=1e-5)


@pytest.mark.parametrize("method", [KernelShap, Lime])
def test_surrogates_explain_each_token_from_the_same_samples(qwen: ModelAdapter, method: Any) -> None:
    pytest.importorskip("sklearn")
    image = random_image()
    inp = ImageTextInput(qwen, image, "picture", grid=(1, 2))
    table = combinations_by_hand(qwen, image)

    def by_hand(features: Tensor) -> Tensor:
        return torch.stack([table[tuple(row)] for row in (features != 0).tolist()])

    torch.manual_seed(3)
    with counted(qwen.model) as sizes:
        result = MultimodalLLMAttribution(method(qwen.model), qwen).attribute(inp, ANSWER, n_samples=20)
    assert sum(sizes) <= 8
    for token in range(3):
        torch.manual_seed(3)
        expected = method(by_hand).attribute(torch.ones(1, 3), target=token, n_samples=20)
        assert torch.allclose(result.token_attr[token], expected[0], atol=1e-4)
    torch.manual_seed(3)
    expected = method(lambda features: by_hand(features).sum(1)).attribute(torch.ones(1, 3), n_samples=20)
    assert torch.allclose(result.seq_attr, expected[0], atol=1e-4)


def test_probabilities(qwen: ModelAdapter) -> None:
    image = random_image()
    inp = ImageTextInput(qwen, image, PROMPT, grid=(1, 1), text="none")
    result = MultimodalLLMAttribution(FeatureAblation(qwen.model), qwen, "prob").attribute(inp, ANSWER)
    whole, hidden = (log_probabilities(qwen, [i]) for i in (image, painted(image, (0, 136, 0, 200))))
    assert torch.allclose(result.token_attr[:, 0], whole.exp() - hidden.exp(), rtol=1e-3, atol=1e-7)
    assert float(result.seq_attr[0]) == pytest.approx(float(whole.sum().exp() - hidden.sum().exp()), rel=1e-3, abs=1e-9)


def test_batches(llava: ModelAdapter) -> None:
    inp = ImageTextInput(llava, random_image(), PROMPT, grid=(2, 4))
    ablation = MultimodalLLMAttribution(FeatureAblation(llava.model), llava)
    assert llava.batches
    with counted(llava.model) as alone:
        expected = ablation.attribute(inp, ANSWER)
    with counted(llava.model) as together:
        result = ablation.attribute(inp, ANSWER, perturbations_per_eval=4)
    assert alone == [1] * (1 + 11)
    # The original, then eleven features.
    assert together == [1, 4, 4, 3]
    assert torch.allclose(result.token_attr, expected.token_attr, atol=1e-6)


def test_a_model_that_mixes_its_batch_runs_alone(llava: ModelAdapter, monkeypatch: pytest.MonkeyPatch) -> None:
    inp = ImageTextInput(llava, random_image(), PROMPT, grid=(2, 4))
    expected = MultimodalLLMAttribution(FeatureAblation(llava.model), llava).attribute(inp, ANSWER)
    forward = llava.model.forward

    def first_image_only(pixel_values: Tensor, **inputs: Any) -> Any:
        return forward(pixel_values=pixel_values[:1].expand_as(pixel_values), **inputs)

    def no_batches(input_ids: Tensor, **inputs: Any) -> Any:
        if len(input_ids) > 1:
            raise RuntimeError("one at a time")
        return forward(input_ids=input_ids, **inputs)

    for broken in (first_image_only, no_batches):
        monkeypatch.setattr(llava.model, "forward", broken)
        adapter = ModelAdapter(llava.model, llava.processor)
        assert not adapter.batches
        inp = ImageTextInput(adapter, random_image(), PROMPT, grid=(2, 4))
        with counted(llava.model) as sizes:
            ablation = MultimodalLLMAttribution(FeatureAblation(llava.model), adapter)
            result = ablation.attribute(inp, ANSWER, perturbations_per_eval=4)
        assert sizes == [1] * (1 + 11)
        # A batch of 12 and 12 batches of one are summed up in different orders.
        torch.testing.assert_close(result.token_attr, expected.token_attr, atol=1e-5, rtol=1e-4)


@pytest.mark.skipif(not hasattr(captum.attr, "ImageMaskInput"), reason="Captum 0.8 takes no images")
def test_captums_cached_path_loses_the_picture(llava: ModelAdapter) -> None:
    image = random_image()
    halves = (torch.arange(200) // 100).expand(136, 200)
    theirs = captum.attr.ImageMaskInput(
        image, mask=halves, baseline=(0, 0, 0), processor_fn=lambda shown: llava.prepare([shown], PROMPT)
    )
    ids = torch.tensor(llava.tokenize_answer(ANSWER))
    reference = LLMAttribution(FeatureAblation(llava.model), llava.tokenizer)
    cached, uncached = (reference.attribute(theirs, ids, use_cached_outputs=cache) for cache in (True, False))
    inp = ImageTextInput(llava, image, PROMPT, segmentations=[halves], image_baseline=(0, 0, 0), text="none")
    result = MultimodalLLMAttribution(FeatureAblation(llava.model), llava).attribute(inp, ids)
    assert torch.allclose(result.token_attr, uncached.token_attr, atol=1e-5)
    assert torch.allclose(result.seq_attr, uncached.seq_attr, atol=1e-5)
    assert bool((result.token_attr.abs() > 1e-3).all())
    if captum.__version__ == "0.9.0":
        assert not cached.token_attr.any()


def test_an_object_matters_most_for_its_word() -> None:
    model, processor = (auto.from_pretrained(CHECKPOINT) for auto in (AutoModelForImageTextToText, AutoProcessor))
    adapter = ModelAdapter(model.float(), processor)
    scene = compose(34, (320, 224), 3)
    segmentation = torch.zeros(224, 320, dtype=torch.int64)
    for index, mask in enumerate(scene.masks):
        segmentation[torch.from_numpy(mask)] = index + 1
    inp = ImageTextInput(adapter, scene.image, "describe the picture.", segmentations=[segmentation])
    ablation = MultimodalLLMAttribution(FeatureAblation(adapter.model), adapter)
    result = ablation.attribute(inp, perturbations_per_eval=8)
    assert inp.values[4:] == ["describe", "the", "picture", "."]
    for index, item in enumerate(scene.objects):
        attr = result.token_attr[result.output_tokens.index(item.name)]
        assert int(attr.argmax()) == index + 1
        assert float(attr[index + 1]) > 5 and float(attr[4:].abs().max()) < 0.5


def test_borrowed_state_comes_back(qwen: ModelAdapter, monkeypatch: pytest.MonkeyPatch) -> None:
    inp = ImageTextInput(qwen, random_image(), PROMPT, grid=(1, 2))
    method = FeatureAblation(qwen.model)
    qwen.model.train()
    try:
        MultimodalLLMAttribution(method, qwen).attribute(inp, max_new_tokens=3)
        monkeypatch.setattr(qwen, "run", lambda inputs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            MultimodalLLMAttribution(method, qwen).attribute(inp, ANSWER)
        assert all(module.training for module in qwen.model.modules())
    finally:
        qwen.model.eval()
    assert method.forward_func is qwen.model


def test_errors(qwen: ModelAdapter) -> None:
    image = random_image()
    refused = (IntegratedGradients, Occlusion, FeaturePermutation)
    for method in refused:
        with pytest.raises(TypeError, match="FeatureAblation, ShapleyValueSampling"):
            MultimodalLLMAttribution(method(qwen.model), qwen)
    ablation = MultimodalLLMAttribution(FeatureAblation(qwen.model), qwen)
    inp = ImageTextInput(qwen, image, PROMPT, grid=(1, 1))
    for call, message in (
        (lambda: MultimodalLLMAttribution(FeatureAblation(qwen.model), qwen, "logit"), "attr_target"),  # type: ignore[arg-type]
        (lambda: ablation.attribute(inp, ""), "empty"),
        (lambda: ablation.attribute(inp, ANSWER, num_trials=0), "num_trials"),
        (lambda: inp.to_model_input(torch.ones(1, 3)), "4 features"),
        (lambda: ImageTextInput(qwen, image, PROMPT, grid=(0, 2)), "136 x 200"),
        (lambda: ImageTextInput(qwen, image, PROMPT, segmentations=[torch.zeros(200, 136)]), r"\(136, 200\)"),
        (lambda: ImageTextInput(qwen, image, PROMPT, segmentations=[]), "Segmentations"),
        (lambda: ImageTextInput(qwen, image, PROMPT, segmentations=[torch.zeros(136, 200)]), "float32"),
        (lambda: ImageTextInput(qwen, image, PROMPT, image_baseline="gray"), "image_baseline"),  # type: ignore[arg-type]
        (lambda: ImageTextInput(qwen, image, PROMPT, image_baseline=(0, 0, 256)), "image_baseline"),
        (lambda: ImageTextInput(qwen, image, PROMPT, text="letters"), "text must be"),  # type: ignore[arg-type]
        (lambda: ImageTextInput(qwen, image, PROMPT, text_baseline="a cat"), "are 2"),
        (lambda: ImageTextInput(qwen, image, PROMPT, text_baseline=10**6), "vocabulary"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.fixture(scope="module")
def explanation(qwen: ModelAdapter) -> Explanation:
    images = [random_image(224, 168), random_image(112, 112, seed=1)]
    return explain(qwen.model, qwen.processor, images, PROMPT, "a red dog and a cat", scales=(1.0,))


def test_an_explanation_as_captums_result(explanation: Explanation) -> None:
    result = explanation.to_llm_attribution_result(grid=(3, 4))
    assert isinstance(result, LLMAttributionResult)
    assert bool((explanation.relevance[3:] > 0).any()) and bool(explanation.maps[0][3:].any())
    assert result.output_tokens == explanation.tokens
    assert result.input_tokens[12:24] == [f"image_1_feature_{i}" for i in range(12)]
    assert result.input_tokens[24:] == [*PROMPT.split(), "a", "red", "dog", "and", "a"]
    assert result.token_attr.shape == (6, 32)
    # The first image's map is a grid that 3 x 4 divides.
    maps = explanation.maps[0][3:]
    rows, columns = maps.shape[1] // 3, maps.shape[2] // 4
    for cell in range(12):
        top, left = cell // 4 * rows, cell % 4 * columns
        expected = maps[:, top : top + rows, left : left + columns].mean((1, 2))
        assert torch.allclose(result.token_attr[:, cell], expected, atol=1e-5)
    for token in range(6):
        relevance = result.token_attr[token, 24 : 24 + 3 + token]
        assert torch.allclose(relevance, relevance.max() * explanation.text_relevance(token))
        assert not result.token_attr[token, 24 + 3 + token :].any()
    assert torch.allclose(result.seq_attr, result.token_attr.sum(0))
    heat = result.heatmap(2, image=1)
    assert heat.shape == (112, 112)
    assert float(heat[-1, -1]) == pytest.approx(float(result.token_attr[2, 23]))


def test_captums_plots(explanation: Explanation) -> None:
    import matplotlib.pyplot as plt

    result = explanation.to_llm_attribution_result(grid=(2, 2))
    _, axes = result.plot_token_attr()
    assert np.array_equal(axes.images[0].get_array(), result.token_attr.numpy())
    assert [label.get_text() for label in axes.get_yticklabels()] == explanation.tokens
    _, axes = result.plot_seq_attr()
    heights = [bar.get_height() for bar in axes.patches[: len(result.seq_attr)]]
    assert heights == pytest.approx(result.seq_attr.tolist())
    assert result.seq_attr_dict["image_1_feature_3"] == pytest.approx(float(result.seq_attr[7]))
    _, axes = result.plot_image_heatmap(target_token_pos=2, image=1)
    assert np.array_equal(axes.images[1].get_array(), result.heatmap(2, image=1).numpy())
    plt.close("all")


def test_captums_visualizations(explanation: Explanation) -> None:
    pytest.importorskip("IPython")
    page = visualization.visualize_text([explanation.to_visualization_record("dog")]).data
    assert all(f"> {word} " in " ".join(page.split()) for word in (*PROMPT.split(), "red"))
    probability = float(explanation.probabilities[2])
    assert f"dog ({probability:.2f})" in page
    assert f"{float(explanation.text_relevance('dog').sum()):.2f}" in page
    heat = explanation.heatmap("dog").numpy()
    _, axes = visualization.visualize_image_attr(
        heat[..., None], np.asarray(explanation.images[0]), "heat_map", "positive", outlier_perc=0, use_pyplot=False
    )
    assert np.allclose(axes.images[0].get_array(), heat / heat.max(), atol=1e-5)
