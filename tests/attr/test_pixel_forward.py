"""The answer as a function of pixels and prompt embeddings: its values, its gradients, and Captum's methods on it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from captum.attr import (
    FeatureAblation,
    GradientShap,
    InputXGradient,
    IntegratedGradients,
    KernelShap,
    NoiseTunnel,
    Occlusion,
    Saliency,
)
from PIL import Image
from torch import Tensor, nn

from captum_intramodal import MSEA, ModelAdapter, PixelForward, Resize
from captum_intramodal.errors import (
    InvalidInputError,
    InvalidOptionError,
    UnsupportedModelError,
)
from tests.attr.forward_helpers import (
    ANSWER,
    PROMPT,
    SPLITS,
    adapter_of,
    ids_of,
    own_log_probs,
    own_logits,
    prepared,
    random_image,
    to_tensor,
)
from tests.testing.families import FAMILIES, LEFT_OUT, answer_logits, build

NO_GRADIENT = LEFT_OUT | {
    "chameleon": "quantizes its images",
    "emu3": "quantizes its images; its image processor takes PIL images only",
    "instructblipvideo": "takes videos only",
    "pp_formulanet": "its processor crops each image by its content and ignores the prompt",
    "udop": "its processor takes words with boxes from an OCR, not a prompt",
    "video_llava": "its image processor is PIL-backed",
}


def deviation_of(logits: Tensor) -> float:
    return float(logits[logits.isfinite() & (logits > -1e30)].std())


@pytest.mark.parametrize("model_type", SPLITS)
def test_logits_are_the_models_own(model_type: str) -> None:
    adapter = adapter_of(model_type)
    images = [random_image(), random_image(seed=4)]
    forward = PixelForward(adapter, PROMPT, ANSWER)
    pixels = torch.cat([to_tensor(image) for image in images])
    expected = torch.stack([own_logits(adapter, image) for image in images])
    assert torch.allclose(forward(pixels), expected, atol=1e-5)
    differentiable = forward(pixels.requires_grad_())
    assert differentiable.requires_grad and torch.allclose(differentiable, expected, atol=1e-5)
    # Without rounding they differ slightly.
    smooth = PixelForward(adapter, PROMPT, ANSWER, exact=False)(pixels)
    assert 1e-5 < float((smooth - expected).detach().abs().max()) < 0.2 * deviation_of(expected)


def test_between_8_bit_values_the_logits_follow_the_gradient() -> None:
    adapter = adapter_of("llava")
    forward = PixelForward(adapter, PROMPT, ANSWER, "token_logits")
    x = to_tensor(random_image()).requires_grad_()
    (gradient,) = torch.autograd.grad(forward(x)[0, 1], x)
    step = gradient.sign() * (0.3 / 255)  # smaller than the distance to the next 8-bit value
    with torch.no_grad():
        change = forward(x + step) - forward(x - step)
    assert float(change[0, 1]) == pytest.approx(2 * float((gradient * step).sum()), rel=0.02)


@pytest.mark.parametrize("model_type", SPLITS)
def test_occlusion_equals_occluding_the_image_before_preprocessing(model_type: str) -> None:
    adapter = adapter_of(model_type)
    image = random_image()
    forward = PixelForward(adapter, PROMPT, ANSWER, "token_log_probs")
    attribution = Occlusion(forward).attribute(
        to_tensor(image), (3, 32, 48), strides=(3, 32, 48), target=2, perturbations_per_eval=3
    )
    whole, pixels = own_log_probs(adapter, image)[2], np.array(image)
    for top in (0, 32):
        for left in (0, 48):
            occluded = pixels.copy()
            occluded[top : top + 32, left : left + 48] = 0
            drop = whole - own_log_probs(adapter, Image.fromarray(occluded))[2]
            window = attribution[0, :, top : top + 32, left : left + 48]
            assert torch.allclose(window, torch.tensor(drop), atol=1e-4)


@pytest.mark.parametrize("model_type", ["qwen2_vl", "idefics3"])
def test_superpixels_are_ablated_and_have_shapley_values(model_type: str) -> None:
    forward = PixelForward(adapter_of(model_type), PROMPT, ANSWER, "answer_log_prob")
    x, coalitions = to_tensor(random_image()), []
    left = (torch.arange(96) < 40).expand(1, 1, 64, 96)
    options = dict(feature_mask=(~left).long(), baselines=0.5)  # gray, which Idefics3 treats as padding

    def recorded(images: Tensor) -> Tensor:
        coalitions.append((torch.equal(images[..., :40], x[..., :40]), torch.equal(images[..., 40:], x[..., 40:])))
        return forward(images)

    ablated = FeatureAblation(forward).attribute(x, perturbations_per_eval=2, **options)
    shapley = KernelShap(recorded).attribute(x, n_samples=8, **options)
    with torch.no_grad():
        none, first, second, whole = (
            float(forward(kept)) for kept in (0 * x + 0.5, torch.where(left, x, 0.5), torch.where(left, 0.5, x), x)
        )
    assert ablated[0, 0, 0, [0, 95]].tolist() == pytest.approx([whole - second, whole - first], abs=1e-4)
    # Least squares over the sampled coalitions, constrained to values that sum to the total effect.
    n, m = coalitions.count((True, False)), coalitions.count((False, True))
    value = (n * (first - none) + m * (whole - second)) / (n + m)
    assert n > 0 and m > 0
    assert shapley[0, 0, 0, [0, 95]].tolist() == pytest.approx([value, whole - none - value], abs=1e-3)


@pytest.mark.parametrize("model_type", SPLITS)
def test_noise_tunnel_is_the_mean_over_its_samples(model_type: str) -> None:
    forward = PixelForward(adapter_of(model_type), PROMPT, ANSWER, "token_logits")
    x, calls = to_tensor(random_image()), []

    def recorded(images: Tensor) -> Tensor:
        calls.append(images.detach().clone())
        return forward(images)

    tunnel = NoiseTunnel(Saliency(recorded)).attribute(x, nt_samples=3, stdevs=0.05, target=1, abs=False)
    samples = torch.cat(calls)
    assert len(samples) == 3 and not torch.equal(samples[0], samples[1])
    expected = torch.zeros_like(x)
    for sample in samples:
        leaf = sample[None].requires_grad_()
        (gradient,) = torch.autograd.grad(forward(leaf)[0, 1], leaf)
        expected += gradient / 3
    assert torch.allclose(tunnel, expected, atol=1e-5 * float(expected.abs().max()))


def test_gradient_shap_over_several_baselines() -> None:
    forward = PixelForward(adapter_of("qwen2_vl"), PROMPT, ANSWER, "token_logits")
    x, calls = to_tensor(random_image()), []
    baselines = torch.cat([torch.zeros_like(x), torch.ones_like(x)])

    def recorded(images: Tensor) -> Tensor:
        calls.append(images.detach().clone())
        return forward(images)

    np.random.seed(0)
    shap = GradientShap(recorded).attribute(x, baselines, n_samples=4, target=1)
    # A sample is a x + (1 - a) b with a black or white baseline b, which its pixels reveal.
    expected = torch.zeros_like(x)
    for sample in torch.cat(calls)[:4]:
        fits = [torch.linalg.lstsq((x - b).flatten()[:, None], (sample - b).flatten()[:, None]) for b in baselines]
        residuals = [
            float(((x - b) * fit.solution + b - sample).abs().max()) for fit, b in zip(fits, baselines, strict=True)
        ]
        baseline = baselines[int(np.argmin(residuals))]
        assert min(residuals) < 1e-4
        leaf = sample[None].requires_grad_()
        (gradient,) = torch.autograd.grad(forward(leaf)[0, 1], leaf)
        expected += gradient * (x - baseline) / 4
    assert torch.allclose(shap, expected, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("model_type", ["qwen2_vl", "llava_next"])
def test_msea_averages_the_attributions_of_both_sizes(model_type: str) -> None:
    forward = PixelForward(adapter_of(model_type), PROMPT, ANSWER)
    x = to_tensor(random_image())
    target = (1, forward.answer_ids[1])
    inner = IntegratedGradients(forward)
    both = MSEA(inner, scales=(1.0, 1.5)).attribute(x, target=target, n_steps=2)
    larger = nn.functional.interpolate(x, (96, 144), mode="bilinear", align_corners=False)
    resized = nn.functional.interpolate(
        inner.attribute(larger, target=target, n_steps=2),
        (64, 96),
        mode="bilinear",
        align_corners=False,
        antialias=True,
    )
    expected = (inner.attribute(x, target=target, n_steps=2) + 2.25 * resized) / 2
    assert torch.allclose(both, expected.float(), atol=1e-5)


def logits_with_word(adapter: ModelAdapter, image: Image.Image, old: str, new: str) -> Tensor:
    """Compute the model's own logits with one word of the prompt replaced by another."""
    inputs = prepared(adapter, image)
    (before,), (after,) = ids_of(adapter, old), ids_of(adapter, new)
    key = "input_ids" if "input_ids" in inputs else "decoder_input_ids"
    inputs[key] = torch.where(inputs[key] == before, after, inputs[key])
    return answer_logits(adapter.model, inputs, ids_of(adapter, ANSWER))


@pytest.mark.parametrize("model_type", SPLITS)
def test_replacing_an_embedding_replaces_the_word(model_type: str) -> None:
    adapter = adapter_of(model_type)
    image = random_image()
    forward = PixelForward(adapter, PROMPT, ANSWER)
    x = to_tensor(image)
    rows, ids = forward.prompt_embeddings(x[0]), forward.prompt_ids(x[0])
    assert torch.equal(ids, forward.prompt_ids(to_tensor(random_image(300, 200))[0]))
    assert torch.equal(ids, forward.inputs(x[0])["input_ids"][0, forward.prompt_positions(x[0])])
    words = adapter.tokenizer.convert_ids_to_tokens(ids)
    assert words.index("describe") + 2 == words.index("picture") and "image" not in " ".join(words).replace("_pad", "")
    assert torch.equal(forward(x, rows), forward(x))
    (dog,) = ids_of(adapter, "dog")
    changed = rows.clone()
    changed[0, words.index("picture")] = adapter.model.get_input_embeddings().weight[dog]
    assert torch.allclose(forward(x, changed)[0], logits_with_word(adapter, image, "picture", "dog"), atol=1e-5)
    assert not torch.allclose(forward(x, changed), forward(x), atol=1e-3)
    assert len(adapter.model.get_input_embeddings()._forward_hooks) == 0


def test_image_and_prompt_are_attributed_together() -> None:
    adapter = adapter_of("qwen2_vl")
    forward = PixelForward(adapter, PROMPT, ANSWER, "token_logits", exact=False)
    x = to_tensor(random_image())
    rows = forward.prompt_embeddings(x[0])
    inputs, baselines = (x, rows), (0.7 * x, 0.5 * rows)
    image_attr, text_attr = IntegratedGradients(forward).attribute(
        inputs, baselines, target=2, n_steps=24, internal_batch_size=8
    )
    assert (
        image_attr.shape == x.shape
        and text_attr.shape == rows.shape
        and bool(text_attr.any())
        and bool(image_attr.any())
    )
    with torch.no_grad():
        difference = float((forward(*inputs) - forward(*baselines))[0, 2])
        image_difference = float((forward(x) - forward(0.7 * x))[0, 2])
    assert float(image_attr.sum() + text_attr.sum()) == pytest.approx(difference, abs=0.02 * abs(difference))
    assert abs(difference - image_difference) > 0.05 * abs(difference)  # the prompt contributes
    # Ablating a word equals setting its embedding to zero.
    words = torch.arange(rows.shape[1])[None, :, None]
    alone = FeatureAblation(lambda rows, images: forward(images, rows)).attribute(
        rows, additional_forward_args=x, target=2, feature_mask=words, perturbations_per_eval=2
    )
    erased = rows.clone()
    erased[0, 3] = 0
    assert float(alone[0, 3, 0]) == pytest.approx(float((forward(x) - forward(x, erased))[0, 2]), abs=1e-4)


def test_msea_scales_the_image_and_not_the_prompt() -> None:
    forward = PixelForward(adapter_of("qwen2_vl"), PROMPT, ANSWER, "answer_log_prob", exact=False)
    x = to_tensor(random_image())
    rows = forward.prompt_embeddings(x[0])
    msea = MSEA(InputXGradient(forward), scales=(1.0, 1.5), pyramid=Resize(inputs=(0,)))
    image_attr, text_attr = msea.attribute((x, rows))
    assert image_attr.shape == x.shape and text_attr.shape == rows.shape
    larger = nn.functional.interpolate(x, (96, 144), mode="bilinear")
    each = [InputXGradient(forward).attribute((size, rows))[1].detach() for size in (x, larger)]
    torch.testing.assert_close(text_attr, (each[0] + each[1]) / 2, atol=1e-5, rtol=1e-4)


def family_adapter(model_type: str) -> ModelAdapter:
    adapter = ModelAdapter(*build(model_type))
    if model_type == "gemma3n":
        # The model scales its tower's output in place, which the ReLU at the end of the test model's tower saves.
        def copy(module: nn.Module, args: Any, output: Any) -> None:
            output.last_hidden_state = output.last_hidden_state.clone()

        adapter.model.model.vision_tower.register_forward_hook(copy)
    return adapter


def convergence_delta(forward: PixelForward, x: Tensor, baseline: Tensor, n_steps: int) -> float:
    """Compute the convergence delta of IntegratedGradients."""
    attribution = IntegratedGradients(forward).attribute(
        x, baseline, target=1, n_steps=n_steps, internal_batch_size=1, method="riemann_right"
    )
    with torch.no_grad():
        return abs(float(attribution.sum() - (forward(x) - forward(baseline))[0, 1]))


def test_88_families_have_gradients() -> None:
    assert set(NO_GRADIENT) <= set(FAMILIES) and len(FAMILIES) - len(NO_GRADIENT) == 88


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [t for t in FAMILIES if t not in NO_GRADIENT])
def test_logits_and_gradients_of_every_family(model_type: str) -> None:
    adapter = family_adapter(model_type)
    random = torch.get_rng_state()  # DiffusionGemma starts from random numbers.
    x, own = to_tensor(random_image()), own_logits(adapter, random_image())
    torch.set_rng_state(random)
    forward = PixelForward(adapter, PROMPT, ids_of(adapter, ANSWER))
    finite, deviation = own > -1e30, deviation_of(own)
    for images in (x, x.clone().requires_grad_()):
        assert torch.allclose(forward(images)[0][finite], own[finite], atol=1e-4 * deviation)

    smooth = PixelForward(adapter, PROMPT, ids_of(adapter, ANSWER), "token_logits", exact=False)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(smooth(leaf)[0, 1], leaf)
    # One of these steps is short enough for the model's curvature and long enough for its precision, which is float32,
    # or bfloat16 in Llama 4's processor.
    ratios = []
    for size in (3e-4, 3e-5, 0.03):
        step = size * gradient / gradient.abs().max()
        with torch.no_grad():
            ratios.append(float((smooth(x + step) - smooth(x - step))[0, 1] / 2 / (gradient * step).sum()))
    assert min(abs(ratio - 1) for ratio in ratios) < 0.05, ratios

    # A change of expert along the path makes the logits jump, however many steps there are; short paths avoid it.
    deltas = []
    for share in (0.95, 0.998, 1.002):
        few, many = (convergence_delta(smooth, x, share * x, n_steps) for n_steps in (2, 16))
        deltas.append((few, many))
        if many < max(0.4 * few, 1e-5 * deviation):
            break
    else:
        pytest.fail(f"the convergence delta does not shrink: {deltas}")


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [t for t in FAMILIES if t not in NO_GRADIENT])
def test_prompt_embeddings_of_every_family(model_type: str) -> None:
    adapter = family_adapter(model_type)
    random, x = torch.get_rng_state(), to_tensor(random_image())
    own = own_logits(adapter, random_image())
    torch.set_rng_state(random)
    other = logits_with_word(adapter, random_image(), "picture", "dog")
    torch.set_rng_state(random)
    forward = PixelForward(adapter, PROMPT, ids_of(adapter, ANSWER))
    rows, ids = forward.prompt_embeddings(x[0]), forward.prompt_ids(x[0])
    finite, tolerance = own > -1e30, 1e-4 * deviation_of(own)
    assert torch.allclose(forward(x, rows)[0][finite], own[finite], atol=tolerance)
    (word,), (dog,) = ids_of(adapter, "picture"), ids_of(adapter, "dog")
    rows[0, ids == word] = adapter.model.get_input_embeddings()(torch.tensor([[dog]]))[0]
    # Gemma 3n and 4 embed the ids again in every layer.
    tolerance *= 1000 if model_type in ("gemma3n", "gemma4") else 1
    assert torch.allclose(forward(x, rows)[0][finite], other[finite], atol=tolerance)
    assert float((own - other)[finite].abs().max()) > 5e-3 * deviation_of(own)


def test_the_whole_answers_log_probability_has_no_target_per_token() -> None:
    adapter = adapter_of("llava")
    assert PixelForward(adapter, PROMPT, ANSWER, "token_logits").targets == [0, 1, 2]
    assert PixelForward(adapter, PROMPT, ANSWER).targets == list(enumerate(ids_of(adapter, ANSWER)))
    with pytest.raises(InvalidOptionError, match="no target per token"):
        _ = PixelForward(adapter, PROMPT, ANSWER, "answer_log_prob").targets


def test_unfit_images_and_embeddings_are_refused() -> None:
    forward = PixelForward(adapter_of("llava"), PROMPT, ANSWER, "token_logits")
    x, ids = to_tensor(random_image()), torch.tensor([forward.answer_ids])
    with pytest.raises(InvalidInputError, match=r"\(N, 3, height, width\)"):
        forward(x[0])
    with pytest.raises(InvalidInputError, match=r"\(None, ids\)"):
        forward(x, ids)
    with pytest.raises(InvalidInputError, match="1 embeddings for a prompt of"):
        forward(x, forward.prompt_embeddings(x[0])[:, :1])


def test_models_without_input_embeddings_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = adapter_of("llava")
    forward, x = PixelForward(adapter, PROMPT, ANSWER), to_tensor(random_image())

    def missing() -> nn.Module:
        raise NotImplementedError

    monkeypatch.setattr(adapter.model, "get_input_embeddings", missing)
    with pytest.raises(UnsupportedModelError, match="get_input_embeddings"):
        forward.prompt_embeddings(x[0])
