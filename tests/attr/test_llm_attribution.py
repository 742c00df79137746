"""Attributions to regions and words, compared with loops that remove one feature at a time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import captum
import pytest
import torch
from captum.attr import (
    FeatureAblation,
    FeaturePermutation,
    IntegratedGradients,
    KernelShap,
    Lime,
    LLMAttribution,
    Occlusion,
    ShapleyValues,
    ShapleyValueSampling,
)
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from captum_intramodal import ImageTextInput, ModelAdapter, MultimodalLLMAttribution
from captum_intramodal.demo import CHECKPOINT, compose
from captum_intramodal.errors import EmptyAnswerError, InvalidOptionError
from tests.attr.llm_helpers import ANSWER, PROMPT, log_probabilities, painted
from tests.testing.tiny import random_image, tiny


@pytest.fixture(scope="module")
def qwen() -> ModelAdapter:
    return ModelAdapter(*tiny("qwen2_vl"))


@pytest.fixture(scope="module")
def llava() -> ModelAdapter:
    return ModelAdapter(*tiny("llava"))


@contextmanager
def counted(model: Any) -> Iterator[list[int]]:
    """Collect the batch sizes of the model's passes."""
    sizes: list[int] = []

    def record(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        sizes.append(len(kwargs["input_ids"]))

    handle = model.register_forward_pre_hook(record, with_kwargs=True)
    try:
        yield sizes
    finally:
        handle.remove()


@pytest.mark.parametrize("model_type", ["qwen2_vl", "llava", "idefics3"])
def test_ablation_equals_a_loop_over_the_features(model_type: str) -> None:
    adapter, image = ModelAdapter(*tiny(model_type)), random_image()
    inp = ImageTextInput(adapter, image, PROMPT, grid=(2, 2))
    result = MultimodalLLMAttribution(FeatureAblation(adapter.model), adapter).attribute(
        inp, ANSWER, perturbations_per_eval=4
    )
    boxes = [(top, top + 68, left, left + 100) for top in (0, 68) for left in (0, 100)]
    without = [log_probabilities(adapter, [painted(image, box)]) for box in boxes]
    without += [log_probabilities(adapter, [image], without=word) for word in PROMPT.split()]
    expected = log_probabilities(adapter, [image]) - torch.stack(without)
    assert result.input_tokens == [*(f"image_0_feature_{i}" for i in range(4)), *PROMPT.split()]
    assert result.output_tokens == ANSWER.split()
    assert torch.allclose(result.token_attr, expected.T, atol=1e-5)
    assert torch.allclose(result.seq_attr, expected.sum(1), atol=1e-5)
    assert bool((result.token_attr.abs() > 1e-4).all())


def test_regions_of_two_images_and_tokens_are_features(qwen: ModelAdapter) -> None:
    images = [random_image(), random_image(120, 160, seed=1)]
    halves = torch.zeros(160, 120, dtype=torch.int32)
    halves[:, 50:] = 7  # segments may have any numbers
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


def score_combinations(adapter: ModelAdapter, image: Image.Image) -> dict[tuple[bool, ...], Tensor]:
    """Compute the log-probabilities for every combination of left half, right half and the word *picture*."""
    table = {}
    for row in itertools.product((False, True), repeat=3):
        boxes = [(0, 136, left, left + 100) for left, present in zip((0, 100), row, strict=False) if not present]
        table[row] = log_probabilities(adapter, [painted(image, *boxes)], "picture", None if row[2] else "picture")
    return table


def shapley_values(table: dict[tuple[bool, ...], Tensor]) -> Tensor:
    """Compute the Shapley values of three features, (tokens, features), from the scores of all combinations."""
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
    expected = shapley_values(score_combinations(qwen, image))
    assert torch.allclose(result.token_attr, expected, atol=1e-5)
    assert torch.allclose(result.seq_attr, expected.sum(0), atol=1e-5)
    # Six orders of three features lead to eight combinations, which run once each.
    assert sum(sizes) == 8


def test_shapley_sampling_is_random_and_repeatable_with_a_seed(qwen: ModelAdapter) -> None:
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
    # Efficiency: each token's attributions sum to the effect of removing all features.
    single = ImageTextInput(qwen, random_image(), PROMPT, grid=(1, 1))
    words = FeatureAblation(qwen.model)
    together = MultimodalLLMAttribution(words, qwen).attribute(
        single, ANSWER, feature_mask=torch.zeros(1, 4, dtype=torch.int64)
    )
    assert torch.allclose(first.token_attr.sum(1), together.token_attr[:, 0], atol=1e-5)


@pytest.mark.parametrize("method", [KernelShap, Lime])
def test_surrogates_explain_each_token_from_the_same_samples(qwen: ModelAdapter, method: Any) -> None:
    pytest.importorskip("sklearn")
    image = random_image()
    inp = ImageTextInput(qwen, image, "picture", grid=(1, 2))
    table = score_combinations(qwen, image)

    def score(features: Tensor) -> Tensor:
        return torch.stack([table[tuple(row)] for row in (features != 0).tolist()])

    torch.manual_seed(3)
    with counted(qwen.model) as sizes:
        result = MultimodalLLMAttribution(method(qwen.model), qwen).attribute(inp, ANSWER, n_samples=20)
    assert sum(sizes) <= 8
    for token in range(3):
        torch.manual_seed(3)
        expected = method(score).attribute(torch.ones(1, 3), target=token, n_samples=20)
        assert torch.allclose(result.token_attr[token], expected[0], atol=1e-4)
    torch.manual_seed(3)
    expected = method(lambda features: score(features).sum(1)).attribute(torch.ones(1, 3), n_samples=20)
    assert torch.allclose(result.seq_attr, expected[0], atol=1e-4)


def test_probabilities_are_attributed(qwen: ModelAdapter) -> None:
    image = random_image()
    inp = ImageTextInput(qwen, image, PROMPT, grid=(1, 1), text="none")
    result = MultimodalLLMAttribution(FeatureAblation(qwen.model), qwen, "prob").attribute(inp, ANSWER)
    whole, removed = (log_probabilities(qwen, [i]) for i in (image, painted(image, (0, 136, 0, 200))))
    assert torch.allclose(result.token_attr[:, 0], whole.exp() - removed.exp(), rtol=1e-3, atol=1e-7)
    assert float(result.seq_attr[0]) == pytest.approx(
        float(whole.sum().exp() - removed.sum().exp()), rel=1e-3, abs=1e-9
    )


def test_batches_do_not_change_the_attributions(llava: ModelAdapter) -> None:
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


def test_a_model_that_mixes_its_batch_runs_one_example_at_a_time(
    llava: ModelAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
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
        # A batch of 12 and 12 batches of one add up in different orders.
        torch.testing.assert_close(result.token_attr, expected.token_attr, atol=1e-5, rtol=1e-4)


@pytest.mark.skipif(not hasattr(captum.attr, "ImageMaskInput"), reason="Captum 0.8 takes no images")
def test_captums_cached_path_loses_the_image(llava: ModelAdapter) -> None:
    image = random_image()
    halves = (torch.arange(200) // 100).expand(136, 200)
    captum_inp = captum.attr.ImageMaskInput(
        image, mask=halves, baseline=(0, 0, 0), processor_fn=lambda perturbed: llava.prepare([perturbed], PROMPT)
    )
    ids = torch.tensor(llava.tokenize_answer(ANSWER))
    reference = LLMAttribution(FeatureAblation(llava.model), llava.tokenizer)
    cached, uncached = (reference.attribute(captum_inp, ids, use_cached_outputs=cache) for cache in (True, False))
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


def test_the_models_state_is_restored(qwen: ModelAdapter, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_other_methods_and_wrong_options_are_refused(qwen: ModelAdapter, monkeypatch: pytest.MonkeyPatch) -> None:
    for method in (IntegratedGradients, Occlusion, FeaturePermutation):
        with pytest.raises(TypeError, match="FeatureAblation, ShapleyValueSampling"):
            MultimodalLLMAttribution(method(qwen.model), qwen)
    with pytest.raises(InvalidOptionError, match="attr_target"):
        MultimodalLLMAttribution(FeatureAblation(qwen.model), qwen, "logit")  # type: ignore[arg-type]
    ablation = MultimodalLLMAttribution(FeatureAblation(qwen.model), qwen)
    inp = ImageTextInput(qwen, random_image(), PROMPT, grid=(1, 1))
    with pytest.raises(EmptyAnswerError, match="empty"):
        ablation.attribute(inp, "")
    with pytest.raises(InvalidOptionError, match="num_trials"):
        ablation.attribute(inp, ANSWER, num_trials=0)
    monkeypatch.setattr(qwen, "generate", lambda inputs, max_new_tokens: [])
    with pytest.raises(EmptyAnswerError, match="pass a target"):
        ablation.attribute(inp)
