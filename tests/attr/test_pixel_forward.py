from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from captum.attr import (
    FeatureAblation,
    GradientShap,
    GuidedBackprop,
    InputXGradient,
    IntegratedGradients,
    KernelShap,
    LayerIntegratedGradients,
    NoiseTunnel,
    Occlusion,
    Saliency,
)
from PIL import Image
from torch import Tensor, nn

from captum_intramodal import MSEA, ModelAdapter, PixelForward, ProcessedPixelForward, Resize
from captum_intramodal.models.hooks import evaluation_mode
from tests.testing.families import FAMILIES, LEFT_OUT, answer_logits, build, prepare

PROMPT, ANSWER = "describe the picture", "a red cat"
# One of each way to cut an image: packed patches, one square, tiles with a thumbnail thrice.
SOME = ("qwen2_vl", "llava", "llava_next", "idefics3", "internvl")
NO_GRADIENT = LEFT_OUT | {
    "chameleon": "quantizes its images",
    "emu3": "quantizes its images; its image processor takes PIL images only",
    "instructblipvideo": "takes videos only",
    "pp_formulanet": "its processor crops each image by what it shows, and reads no prompt",
    "udop": "its processor takes words with boxes from an OCR, not a prompt",
    "video_llava": "its image processor is PIL-backed",
}
adapters: dict[str, ModelAdapter] = {}


def adapter_of(model_type: str) -> ModelAdapter:
    if model_type not in adapters:
        adapters[model_type] = ModelAdapter(*build(model_type))
    return adapters[model_type]


def random_image(width: int = 96, height: int = 64, seed: int = 3) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 9, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def tensor_of(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255


def image_of(tensor: Tensor) -> Image.Image:
    return Image.fromarray((tensor * 255).round().byte().permute(1, 2, 0).numpy())


def ids_of(adapter: ModelAdapter, words: str) -> list[int]:
    vocabulary = adapter.tokenizer.get_vocab()
    return [vocabulary.get(word, vocabulary.get(f"▁{word}")) for word in words.split()]


def prepared(adapter: ModelAdapter, image: Image.Image) -> dict[str, Any]:
    return prepare(adapter.model, adapter.processor, [image], PROMPT)


def ordinary(adapter: ModelAdapter, image: Image.Image, answer: str = ANSWER) -> Tensor:
    """The model's own logits (tokens, vocabulary), by the tests' own way to them."""
    return answer_logits(adapter.model, prepared(adapter, image), ids_of(adapter, answer))


def log_probs(adapter: ModelAdapter, image: Image.Image, answer: str = ANSWER) -> list[float]:
    logits = ordinary(adapter, image, answer)
    return [float(row.log_softmax(0)[i]) for row, i in zip(logits, ids_of(adapter, answer), strict=True)]


def spread(logits: Tensor) -> float:
    return float(logits[logits.isfinite() & (logits > -1e30)].std())


# ---------------------------------------------------------------------------------------------------- values, outputs


@pytest.mark.parametrize("model_type", SOME)
def test_logits_are_the_models_own(model_type: str) -> None:
    adapter = adapter_of(model_type)
    images = [random_image(), random_image(seed=4)]
    forward = PixelForward(adapter, PROMPT, ANSWER)
    pictures = torch.cat([tensor_of(image) for image in images])
    expected = torch.stack([ordinary(adapter, image) for image in images])
    assert torch.allclose(forward(pictures), expected, atol=1e-5)
    followed = forward(pictures.requires_grad_())
    assert followed.requires_grad and torch.allclose(followed, expected, atol=1e-5)
    # Without rounding they are not, but close.
    smooth = PixelForward(adapter, PROMPT, ANSWER, exact=False)(pictures)
    assert 1e-5 < float((smooth - expected).detach().abs().max()) < 0.2 * spread(expected)


def test_between_whole_levels_the_logits_follow_the_gradient() -> None:
    adapter = adapter_of("llava")
    forward = PixelForward(adapter, PROMPT, ANSWER, "token_logits")
    x = tensor_of(random_image()).requires_grad_()
    (gradient,) = torch.autograd.grad(forward(x)[0, 1], x)
    step = gradient.sign() * (0.3 / 255)  # does not reach the next level
    with torch.no_grad():
        change = forward(x + step) - forward(x - step)
    assert float(change[0, 1]) == pytest.approx(2 * float((gradient * step).sum()), rel=0.02)


def test_outputs() -> None:
    adapter = adapter_of("llava")
    image, other = random_image(), "a green dog"
    x, ids, others = tensor_of(image), ids_of(adapter, ANSWER), ids_of(adapter, other)
    logits = ordinary(adapter, image)
    probable = logits.log_softmax(1)
    tokens = torch.arange(3)

    def output(kind: Any, contrast: str | None = None) -> Tensor:
        return PixelForward(adapter, PROMPT, ANSWER, kind, contrast)(x)

    expected = {
        "logits": logits,
        "log_probs": probable,
        "token_logits": logits[tokens, ids],
        "token_log_probs": probable[tokens, ids],
        "answer_log_prob": probable[tokens, ids].sum(),
    }
    for kind, value in expected.items():
        assert torch.allclose(output(kind), value[None], atol=1e-4), kind
    assert torch.allclose(
        output("token_logits", other), (logits[tokens, ids] - logits[tokens, others])[None], atol=1e-4
    )
    # Of two tokens at one place, log-probabilities and logits have the same difference.
    assert torch.allclose(output("token_log_probs", other), output("token_logits", other), atol=1e-4)
    assert torch.allclose(output("answer_log_prob", other), output("token_logits", other).sum(1), atol=1e-4)


def test_ids_travel_with_the_examples() -> None:
    adapter = adapter_of("qwen2_vl")
    answers = ("a red cat", "the blue dog")
    ids = torch.tensor([ids_of(adapter, answer) for answer in answers])
    x = torch.cat([tensor_of(random_image()), tensor_of(random_image(seed=4))])
    forward = PixelForward(adapter, PROMPT, "yes", "answer_log_prob")
    expected = [sum(log_probs(adapter, image_of(p), a)) for p, a in zip(x, answers, strict=True)]
    assert forward(x, None, ids).tolist() == pytest.approx(expected, abs=1e-4)
    # Captum expands them together with the examples.
    options = dict(additional_forward_args=(None, ids), n_steps=3)
    whole = IntegratedGradients(forward).attribute(x, **options)
    batches = IntegratedGradients(forward).attribute(x, internal_batch_size=2, **options)
    each = [
        IntegratedGradients(PixelForward(adapter, PROMPT, answer, "answer_log_prob")).attribute(p[None], n_steps=3)
        for p, answer in zip(x, answers, strict=True)
    ]
    assert torch.allclose(whole, torch.cat(each), atol=1e-5) and torch.allclose(batches, whole, atol=1e-5)
    against = torch.tensor([ids_of(adapter, "a red dog")])
    contrast = forward(x[:1], None, ids[:1], against)
    logits = ordinary(adapter, image_of(x[0]))[2]
    assert float(contrast) == pytest.approx(float(logits[ids[0, 2]] - logits[against[0, 2]]), abs=1e-4)


# ---------------------------------------------------------------------------------------------------- Captum's methods


@pytest.mark.parametrize("model_type", SOME)
def test_occlusion_is_that_of_the_ordinary_way(model_type: str) -> None:
    adapter = adapter_of(model_type)
    image = random_image()
    forward = PixelForward(adapter, PROMPT, ANSWER, "token_log_probs")
    attribution = Occlusion(forward).attribute(
        tensor_of(image), (3, 32, 48), strides=(3, 32, 48), target=2, perturbations_per_eval=3
    )
    whole, pixels = log_probs(adapter, image)[2], np.array(image)
    for top in (0, 32):
        for left in (0, 48):
            occluded = pixels.copy()
            occluded[top : top + 32, left : left + 48] = 0
            drop = whole - log_probs(adapter, Image.fromarray(occluded))[2]
            window = attribution[0, :, top : top + 32, left : left + 48]
            assert torch.allclose(window, torch.tensor(drop), atol=1e-4)


@pytest.mark.parametrize("model_type", ["qwen2_vl", "idefics3"])
def test_superpixels(model_type: str) -> None:
    forward = PixelForward(adapter_of(model_type), PROMPT, ANSWER, "answer_log_prob")
    x, seen = tensor_of(random_image()), []
    left = (torch.arange(96) < 40).expand(1, 1, 64, 96)
    options = dict(feature_mask=(~left).long(), baselines=0.5)  # gray, which Idefics3 takes for padding

    def recorded(images: Tensor) -> Tensor:
        seen.append((torch.equal(images[..., :40], x[..., :40]), torch.equal(images[..., 40:], x[..., 40:])))
        return forward(images)

    ablated = FeatureAblation(forward).attribute(x, perturbations_per_eval=2, **options)
    shapley = KernelShap(recorded).attribute(x, n_samples=8, **options)
    with torch.no_grad():
        none, first, second, whole = (
            float(forward(kept)) for kept in (0 * x + 0.5, torch.where(left, x, 0.5), torch.where(left, 0.5, x), x)
        )
    assert ablated[0, 0, 0, [0, 95]].tolist() == pytest.approx([whole - second, whole - first], abs=1e-4)
    # Least squares of the sampled coalitions under the constraint that the values sum up.
    n, m = seen.count((True, False)), seen.count((False, True))
    value = (n * (first - none) + m * (whole - second)) / (n + m)
    assert n > 0 and m > 0
    assert shapley[0, 0, 0, [0, 95]].tolist() == pytest.approx([value, whole - none - value], abs=1e-3)


@pytest.mark.parametrize("model_type", SOME)
def test_noise_tunnel_is_the_mean_over_its_samples(model_type: str) -> None:
    forward = PixelForward(adapter_of(model_type), PROMPT, ANSWER, "token_logits")
    x, seen = tensor_of(random_image()), []

    def recorded(images: Tensor) -> Tensor:
        seen.append(images.detach().clone())
        return forward(images)

    tunnel = NoiseTunnel(Saliency(recorded)).attribute(x, nt_samples=3, stdevs=0.05, target=1, abs=False)
    samples = torch.cat(seen)
    assert len(samples) == 3 and not torch.equal(samples[0], samples[1])
    by_hand = torch.zeros_like(x)
    for sample in samples:
        leaf = sample[None].requires_grad_()
        (gradient,) = torch.autograd.grad(forward(leaf)[0, 1], leaf)
        by_hand += gradient / 3
    assert torch.allclose(tunnel, by_hand, atol=1e-5 * float(by_hand.abs().max()))


def test_gradient_shap_over_several_baselines() -> None:
    forward = PixelForward(adapter_of("qwen2_vl"), PROMPT, ANSWER, "token_logits")
    x, seen = tensor_of(random_image()), []
    baselines = torch.cat([torch.zeros_like(x), torch.ones_like(x)])

    def recorded(images: Tensor) -> Tensor:
        seen.append(images.detach().clone())
        return forward(images)

    np.random.seed(0)
    shap = GradientShap(recorded).attribute(x, baselines, n_samples=4, target=1)
    # A sample is a x + (1 - a) b: the baseline is black or white, and the pixels tell which.
    by_hand = torch.zeros_like(x)
    for sample in torch.cat(seen)[:4]:
        fits = [torch.linalg.lstsq((x - b).flatten()[:, None], (sample - b).flatten()[:, None]) for b in baselines]
        rest = [
            float(((x - b) * fit.solution + b - sample).abs().max()) for fit, b in zip(fits, baselines, strict=True)
        ]
        baseline = baselines[int(np.argmin(rest))]
        assert min(rest) < 1e-4
        leaf = sample[None].requires_grad_()
        (gradient,) = torch.autograd.grad(forward(leaf)[0, 1], leaf)
        by_hand += gradient * (x - baseline) / 4
    assert torch.allclose(shap, by_hand, atol=1e-4 * float(by_hand.abs().max()))


@pytest.mark.parametrize("model_type", ["qwen2_vl", "llava_next"])
def test_inside_msea(model_type: str) -> None:
    forward = PixelForward(adapter_of(model_type), PROMPT, ANSWER)
    x = tensor_of(random_image())
    target = (1, forward.answer_ids[1])
    inner = IntegratedGradients(forward)
    both = MSEA(inner, scales=(1.0, 1.5)).attribute(x, target=target, n_steps=2)
    larger = nn.functional.interpolate(x, (96, 144), mode="bilinear", align_corners=False)
    back = nn.functional.interpolate(
        inner.attribute(larger, target=target, n_steps=2),
        (64, 96),
        mode="bilinear",
        align_corners=False,
        antialias=True,
    )
    expected = (inner.attribute(x, target=target, n_steps=2) + 2.25 * back) / 2
    assert torch.allclose(both, expected.float(), atol=1e-5)


# ------------------------------------------------------------------------------------------------- prompt embeddings


def with_word(adapter: ModelAdapter, image: Image.Image, old: str, new: str) -> Tensor:
    inputs = prepared(adapter, image)
    (before,), (after,) = ids_of(adapter, old), ids_of(adapter, new)
    key = "input_ids" if "input_ids" in inputs else "decoder_input_ids"
    inputs[key] = torch.where(inputs[key] == before, after, inputs[key])
    return answer_logits(adapter.model, inputs, ids_of(adapter, ANSWER))


@pytest.mark.parametrize("model_type", SOME)
def test_other_embeddings_are_other_words(model_type: str) -> None:
    adapter = adapter_of(model_type)
    image = random_image()
    forward = PixelForward(adapter, PROMPT, ANSWER)
    x = tensor_of(image)
    rows, ids = forward.prompt_embeddings(x[0]), forward.prompt_ids(x[0])
    assert torch.equal(ids, forward.prompt_ids(tensor_of(random_image(300, 200))[0]))
    assert torch.equal(ids, forward.inputs(x[0])["input_ids"][0, forward.prompt_positions(x[0])])
    words = adapter.tokenizer.convert_ids_to_tokens(ids)
    assert words.index("describe") + 2 == words.index("picture") and "image" not in " ".join(words).replace("_pad", "")
    assert torch.equal(forward(x, rows), forward(x))
    (dog,) = ids_of(adapter, "dog")
    changed = rows.clone()
    changed[0, words.index("picture")] = adapter.model.get_input_embeddings().weight[dog]
    assert torch.allclose(forward(x, changed)[0], with_word(adapter, image, "picture", "dog"), atol=1e-5)
    assert not torch.allclose(forward(x, changed), forward(x), atol=1e-3)
    assert len(adapter.model.get_input_embeddings()._forward_hooks) == 0


def test_image_and_prompt_together() -> None:
    adapter = adapter_of("qwen2_vl")
    forward = PixelForward(adapter, PROMPT, ANSWER, "token_logits", exact=False)
    x = tensor_of(random_image())
    rows = forward.prompt_embeddings(x[0])
    inputs, baselines = (x, rows), (0.7 * x, 0.5 * rows)
    shown, said = IntegratedGradients(forward).attribute(inputs, baselines, target=2, n_steps=24, internal_batch_size=8)
    assert shown.shape == x.shape and said.shape == rows.shape and bool(said.any()) and bool(shown.any())
    with torch.no_grad():
        difference = float((forward(*inputs) - forward(*baselines))[0, 2])
        others = float((forward(x) - forward(0.7 * x))[0, 2])
    assert float(shown.sum() + said.sum()) == pytest.approx(difference, abs=0.02 * abs(difference))
    assert abs(difference - others) > 0.05 * abs(difference)  # the prompt has its share
    # The prompt alone: each word's ablation against the pass with its embedding at zero.
    words = torch.arange(rows.shape[1])[None, :, None]
    alone = FeatureAblation(lambda rows, images: forward(images, rows)).attribute(
        rows, additional_forward_args=x, target=2, feature_mask=words, perturbations_per_eval=2
    )
    erased = rows.clone()
    erased[0, 3] = 0
    assert float(alone[0, 3, 0]) == pytest.approx(float((forward(x) - forward(x, erased))[0, 2]), abs=1e-4)


# ---------------------------------------------------------------------------------------------------- pixel tensors


@pytest.mark.parametrize("model_type", ["qwen2_vl", "idefics3", "step3p7"])
def test_pixel_tensors(model_type: str) -> None:
    adapter = adapter_of(model_type)
    # Large enough for tiles next to the thumbnail, a tensor of their own in Step 3.7.
    image, black = random_image(192, 128), Image.new("RGB", (192, 128))
    forward = ProcessedPixelForward(adapter, PROMPT, ANSWER, image, "token_log_probs")
    assert len(forward.pixels) == (2 if model_type == "step3p7" else 1)
    assert forward(*forward.pixels)[0].tolist() == pytest.approx(log_probs(adapter, image), abs=1e-4)
    several = [torch.cat(pair) for pair in zip(forward.pixels, forward.process(black), strict=True)]
    assert forward(*several)[1].tolist() == pytest.approx(log_probs(adapter, black), abs=1e-4)

    # A region removed from tiles and thumbnail at once, and folded back to where it was.
    left = (torch.arange(192) >= 96).long().expand(128, 192)
    ablated = FeatureAblation(forward).attribute(
        forward.pixels,
        baselines=forward.process(black),
        feature_mask=forward.feature_mask(left),
        target=2,
        enable_cross_tensor_attribution=True,
    )
    pixels = np.array(image)
    pixels[:, :96] = 0
    drop = log_probs(adapter, image)[2] - log_probs(adapter, Image.fromarray(pixels))[2]
    shown = ablated[0].flatten()[forward.feature_mask(left)[0].flatten() == 0]
    assert float(shown[0]) == pytest.approx(drop, abs=0.1 * abs(drop) + 1e-3)
    folded = forward.fold(ablated, (4, 6))
    parts = forward.feature_mask(left)
    assert folded.shape == (1, 4, 6)
    assert float(folded[0, :, :3].sum()) == pytest.approx(
        sum(float(a[m == 0].sum()) for a, m in zip(ablated, parts, strict=True)), rel=1e-4
    )


def test_packed_patches_are_never_mixed() -> None:
    forward = ProcessedPixelForward(adapter_of("qwen2_vl"), PROMPT, ANSWER, random_image(), "answer_log_prob")
    seen: list[Tensor] = []

    def recorded(pixels: Tensor) -> Tensor:
        seen.append(pixels.detach().clone())
        return forward(pixels)

    tunnel = NoiseTunnel(InputXGradient(recorded)).attribute(forward.pixels[0], nt_samples=3, stdevs=0.1)
    by_hand = torch.zeros_like(tunnel)
    for sample in torch.cat(seen):
        leaf = sample[None].requires_grad_()
        (gradient,) = torch.autograd.grad(forward(leaf).sum(), leaf)
        by_hand += gradient * leaf.detach() / 3
    assert torch.allclose(tunnel, by_hand, atol=1e-5 * float(by_hand.abs().max()))


def test_a_blank_baseline_is_an_image_too() -> None:
    forward = ProcessedPixelForward(adapter_of("idefics3"), PROMPT, ANSWER, random_image(), "answer_log_prob")
    attributions = IntegratedGradients(forward).attribute(forward.pixels, n_steps=4, method="riemann_left")
    assert bool(attributions[0].isfinite().all()) and bool(attributions[0].any())


def test_where_no_gradient_passes_through_the_processor() -> None:
    adapter = adapter_of("video_llava")
    image = random_image()
    with pytest.raises(TypeError, match="ProcessedPixelForward"):
        PixelForward(adapter, PROMPT, ANSWER)(tensor_of(image).requires_grad_())
    forward = ProcessedPixelForward(adapter, PROMPT, ANSWER, image, "token_logits")
    x = forward.pixels
    attributions, gap = IntegratedGradients(forward).attribute(
        x, tuple(0.8 * t for t in x), target=1, n_steps=12, return_convergence_delta=True
    )
    assert forward.fold(attributions, (8, 8)).shape == (1, 8, 8)
    with torch.no_grad():
        difference = float((forward(*x) - forward(*(0.8 * t for t in x)))[0, 1])
    assert abs(float(gap)) < 0.02 * abs(difference)


def test_a_processor_that_cannot_be_measured() -> None:
    forward = ProcessedPixelForward(adapter_of("pp_formulanet"), PROMPT, [5, 6], random_image(), "answer_log_prob")
    (attribution,) = Saliency(forward).attribute(forward.pixels)
    assert bool(attribution.any())
    with pytest.raises(ValueError, match="no coordinates in the image"):
        forward.fold(attribution, (4, 4))
    with pytest.raises(ValueError, match="no coordinates in the image"):
        forward.feature_mask(torch.zeros(64, 96, dtype=torch.int64))


# ---------------------------------------------------------------------------------------------------- borrowed state


class Noisy(nn.Module):
    """Draws from the random state, even in evaluation mode."""

    error: type[BaseException] | None = None

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        torch.rand(3)
        if self.error is not None:
            raise self.error
        return self.inner(nn.functional.dropout(x, 0.5, self.training))


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_the_models_state_comes_back(error: type[BaseException] | None) -> None:
    model, processor = build("llava")
    model.requires_grad_(True).train()
    some = next(module for module in model.modules() if isinstance(module, nn.Linear))
    some.eval()
    model.lm_head = noisy = Noisy(model.lm_head)
    flags = [module.training for module in model.modules()]
    forward = PixelForward(ModelAdapter(model, processor), PROMPT, ANSWER, "token_logits")
    noisy.error = error
    x = tensor_of(random_image())
    rows = forward.prompt_embeddings(x[0])
    random = torch.get_rng_state()
    if error is None:
        first, second = (IntegratedGradients(forward).attribute((x, rows), target=1, n_steps=2) for _ in range(2))
        assert torch.equal(first[0], second[0])  # no dropout
    else:
        with pytest.raises(error):
            forward(x.requires_grad_(), rows)
    assert torch.equal(random, torch.get_rng_state())
    assert flags == [module.training for module in model.modules()]
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.get_input_embeddings().modules())


def test_without_gradients_none_are_kept() -> None:
    with evaluation_mode(nn.Linear(2, 2), gradients=True), torch.no_grad():
        pass
    forward = PixelForward(adapter_of("llava"), PROMPT, ANSWER)
    with torch.no_grad():
        assert not forward(tensor_of(random_image()).requires_grad_()).requires_grad


# ---------------------------------------------------------------------------------------------------------- misuse


def test_bad_calls() -> None:
    adapter = adapter_of("llava")
    x = tensor_of(random_image())
    with pytest.raises(ValueError, match="output must be one of"):
        PixelForward(adapter, PROMPT, ANSWER, "probability")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="every token already"):
        PixelForward(adapter, PROMPT, ANSWER, contrast="a red dog")(x)
    with pytest.raises(ValueError, match="2 tokens for an answer of 3"):
        PixelForward(adapter, PROMPT, ANSWER, "token_logits", contrast="a dog")(x)
    forward = PixelForward(adapter, PROMPT, ANSWER, "token_logits")
    ids = torch.tensor([forward.answer_ids])
    with pytest.raises(ValueError, match=r"\(N, 3, height, width\)"):
        forward(x[0])
    with pytest.raises(ValueError, match=r"\(None, ids\)"):
        forward(x, ids)
    with pytest.raises(ValueError, match="answer_ids must be integers"):
        forward(x, None, ids[0])
    with pytest.raises(ValueError, match="2 answer_ids for 3 examples"):
        forward(x.repeat(3, 1, 1, 1), None, ids.repeat(2, 1))
    with pytest.raises(ValueError, match="1 embeddings for a prompt of"):
        forward(x, forward.prompt_embeddings(x[0])[:, :1])
    processed = ProcessedPixelForward(adapter, PROMPT, ANSWER, random_image())
    with pytest.raises(ValueError, match="Expected 1 pixel tensors"):
        processed()
    with pytest.raises(ValueError, match="must be"):
        processed(processed.pixels[0][0])
    with pytest.raises(ValueError, match="2 attributions for 1"):
        processed.fold((*processed.pixels, *processed.pixels), (2, 2))
    with pytest.raises(ValueError, match="are explained"):
        processed.process(random_image(32, 32))


# -------------------------------------------------------------------------------------------------------- all families


def family(model_type: str) -> ModelAdapter:
    adapter = ModelAdapter(*build(model_type))
    if model_type == "gemma3n":
        # The model scales its tower's output in place; the ReLU at the end of the tests' tower keeps that output.
        def copy(module: nn.Module, args: Any, output: Any) -> None:
            output.last_hidden_state = output.last_hidden_state.clone()

        adapter.model.model.vision_tower.register_forward_hook(copy)
    return adapter


def gap(forward: PixelForward, x: Tensor, baseline: Tensor, n_steps: int) -> float:
    """What IntegratedGradients' attributions miss of the difference that they explain."""
    attribution = IntegratedGradients(forward).attribute(
        x, baseline, target=1, n_steps=n_steps, internal_batch_size=1, method="riemann_right"
    )
    with torch.no_grad():
        return abs(float(attribution.sum() - (forward(x) - forward(baseline))[0, 1]))


def test_left_out() -> None:
    assert set(NO_GRADIENT) <= set(FAMILIES) and len(FAMILIES) - len(NO_GRADIENT) == 88


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [t for t in FAMILIES if t not in NO_GRADIENT])
def test_family(model_type: str) -> None:
    adapter = family(model_type)
    random = torch.get_rng_state()  # DiffusionGemma draws what it begins with.
    x, own = tensor_of(random_image()), ordinary(adapter, random_image())
    torch.set_rng_state(random)
    forward = PixelForward(adapter, PROMPT, ids_of(adapter, ANSWER))
    usual, deviation = own > -1e30, spread(own)
    for images in (x, x.clone().requires_grad_()):
        assert torch.allclose(forward(images)[0][usual], own[usual], atol=1e-4 * deviation)

    smooth = PixelForward(adapter, PROMPT, ids_of(adapter, ANSWER), "token_logits", exact=False)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(smooth(leaf)[0, 1], leaf)
    # One step is short enough for how the model curves and long enough for its precision: float32, or the bfloat16 of
    # Llama 4's processor.
    ratios = []
    for size in (3e-4, 3e-5, 0.03):
        step = size * gradient / gradient.abs().max()
        with torch.no_grad():
            ratios.append(float((smooth(x + step) - smooth(x - step))[0, 1] / 2 / (gradient * step).sum()))
    assert min(abs(ratio - 1) for ratio in ratios) < 0.05, ratios

    # Where another expert is chosen on the way the logits jump, which no number of steps follows; not on a short way.
    found = []
    for share in (0.95, 0.998, 1.002):
        few, many = (gap(smooth, x, share * x, n_steps) for n_steps in (2, 16))
        found.append((few, many))
        if many < max(0.4 * few, 1e-5 * deviation):
            break
    else:
        pytest.fail(f"the gap does not shrink: {found}")


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [t for t in FAMILIES if t not in NO_GRADIENT])
def test_prompt_of_family(model_type: str) -> None:
    adapter = family(model_type)
    random, x = torch.get_rng_state(), tensor_of(random_image())
    own = ordinary(adapter, random_image())
    torch.set_rng_state(random)
    other = with_word(adapter, random_image(), "picture", "dog")
    torch.set_rng_state(random)
    forward = PixelForward(adapter, PROMPT, ids_of(adapter, ANSWER))
    rows, ids = forward.prompt_embeddings(x[0]), forward.prompt_ids(x[0])
    usual, tolerance = own > -1e30, 1e-4 * spread(own)
    assert torch.allclose(forward(x, rows)[0][usual], own[usual], atol=tolerance)
    (word,), (dog,) = ids_of(adapter, "picture"), ids_of(adapter, "dog")
    rows[0, ids == word] = adapter.model.get_input_embeddings()(torch.tensor([[dog]]))[0]
    # Gemma 3n and 4 embed the ids once more in every layer.
    tolerance *= 1000 if model_type in ("gemma3n", "gemma4") else 1
    assert torch.allclose(forward(x, rows)[0][usual], other[usual], atol=tolerance)
    assert float((own - other)[usual].abs().max()) > 5e-3 * spread(own)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "idefics3"])
def test_captums_layer_methods_see_all_examples(family: str) -> None:
    forward = PixelForward(adapter_of(family), PROMPT, ANSWER, "token_logits", exact=False)
    assert forward.stacks
    layer, x = forward.model.get_decoder().layers[0], tensor_of(random_image())
    method = LayerIntegratedGradients(forward, layer)
    together, one_by_one = (
        method.attribute(x, target=1, n_steps=4, attribute_to_layer_input=True, internal_batch_size=size)
        for size in (None, 1)
    )
    torch.testing.assert_close(together, one_by_one, atol=1e-5, rtol=1e-3)


def test_captums_layer_methods_are_refused_where_examples_run_one_by_one() -> None:
    forward = PixelForward(adapter_of("llava"), PROMPT, ANSWER, "token_logits")
    forward.stacks = False
    method = LayerIntegratedGradients(forward, forward.model.get_decoder().layers[0])
    with pytest.raises(ValueError, match="internal_batch_size=1"):
        method.attribute(tensor_of(random_image()), target=1, n_steps=4)
    method.attribute(tensor_of(random_image()), target=1, n_steps=4, internal_batch_size=1)
    # Other hooks do not mind.
    GuidedBackprop(forward).attribute(tensor_of(random_image()).expand(2, -1, -1, -1), target=1)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "internvl"])
def test_a_batch_is_what_each_example_is_alone(family: str) -> None:
    forward = PixelForward(adapter_of(family), PROMPT, ANSWER)
    x = torch.cat([tensor_of(random_image(seed=seed)) for seed in (1, 2)])
    torch.testing.assert_close(forward(x), torch.cat([forward(x[:1]), forward(x[1:])]), atol=1e-5, rtol=1e-4)


def test_image_and_prompt_together_at_several_scales() -> None:
    forward = PixelForward(adapter_of("qwen2_vl"), PROMPT, ANSWER, "answer_log_prob", exact=False)
    x = tensor_of(random_image())
    rows = forward.prompt_embeddings(x[0])
    msea = MSEA(InputXGradient(forward), scales=(1.0, 1.5), pyramid=Resize(inputs=(0,)))
    shown, said = msea.attribute((x, rows))
    assert shown.shape == x.shape and said.shape == rows.shape
    larger = nn.functional.interpolate(x, (96, 144), mode="bilinear")
    each = [InputXGradient(forward).attribute((size, rows))[1].detach() for size in (x, larger)]
    torch.testing.assert_close(said, (each[0] + each[1]) / 2, atol=1e-5, rtol=1e-4)
