"""The answer as a function of the processor's pixel tensors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from captum.attr import (
    FeatureAblation,
    InputXGradient,
    IntegratedGradients,
    NoiseTunnel,
    Saliency,
)
from PIL import Image
from torch import Tensor

from captum_intramodal import PixelForward, ProcessedPixelForward
from captum_intramodal.errors import (
    InvalidInputError,
    NoPixelMapError,
)
from tests.attr.forward_helpers import (
    ANSWER,
    PROMPT,
    adapter_of,
    own_log_probs,
    random_image,
    to_tensor,
)


@pytest.mark.parametrize("model_type", ["qwen2_vl", "idefics3", "step3p7"])
def test_pixel_tensors_are_attributed_and_folded_over_the_image(model_type: str) -> None:
    adapter = adapter_of(model_type)
    # Large enough for tiles besides the thumbnail, which Step 3.7 keeps in a separate tensor.
    image, black = random_image(192, 128), Image.new("RGB", (192, 128))
    forward = ProcessedPixelForward(adapter, PROMPT, ANSWER, image, "token_log_probs")
    assert len(forward.pixels) == (2 if model_type == "step3p7" else 1)
    assert forward(*forward.pixels)[0].tolist() == pytest.approx(own_log_probs(adapter, image), abs=1e-4)
    several = [torch.cat(pair) for pair in zip(forward.pixels, forward.process(black), strict=True)]
    assert forward(*several)[1].tolist() == pytest.approx(own_log_probs(adapter, black), abs=1e-4)

    # A region is removed from tiles and thumbnail at once, and folded back to its place.
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
    drop = own_log_probs(adapter, image)[2] - own_log_probs(adapter, Image.fromarray(pixels))[2]
    values = ablated[0].flatten()[forward.feature_mask(left)[0].flatten() == 0]
    assert float(values[0]) == pytest.approx(drop, abs=0.1 * abs(drop) + 1e-3)
    folded = forward.fold(ablated, (4, 6))
    masks = forward.feature_mask(left)
    assert folded.shape == (1, 4, 6)
    assert float(folded[0, :, :3].sum()) == pytest.approx(
        sum(float(a[m == 0].sum()) for a, m in zip(ablated, masks, strict=True)), rel=1e-4
    )


def test_packed_patches_are_never_mixed() -> None:
    forward = ProcessedPixelForward(adapter_of("qwen2_vl"), PROMPT, ANSWER, random_image(), "answer_log_prob")
    calls: list[Tensor] = []

    def recorded(pixels: Tensor) -> Tensor:
        calls.append(pixels.detach().clone())
        return forward(pixels)

    tunnel = NoiseTunnel(InputXGradient(recorded)).attribute(forward.pixels[0], nt_samples=3, stdevs=0.1)
    expected = torch.zeros_like(tunnel)
    for sample in torch.cat(calls):
        leaf = sample[None].requires_grad_()
        (gradient,) = torch.autograd.grad(forward(leaf).sum(), leaf)
        expected += gradient * leaf.detach() / 3
    assert torch.allclose(tunnel, expected, atol=1e-5 * float(expected.abs().max()))


def test_a_blank_baseline_is_not_dropped_as_padding() -> None:
    forward = ProcessedPixelForward(adapter_of("idefics3"), PROMPT, ANSWER, random_image(), "answer_log_prob")
    attributions = IntegratedGradients(forward).attribute(forward.pixels, n_steps=4, method="riemann_left")
    assert bool(attributions[0].isfinite().all()) and bool(attributions[0].any())


def test_pixel_tensors_serve_processors_that_are_not_differentiable() -> None:
    adapter = adapter_of("video_llava")
    image = random_image()
    with pytest.raises(TypeError, match="ProcessedPixelForward"):
        PixelForward(adapter, PROMPT, ANSWER)(to_tensor(image).requires_grad_())
    forward = ProcessedPixelForward(adapter, PROMPT, ANSWER, image, "token_logits")
    x = forward.pixels
    attributions, gap = IntegratedGradients(forward).attribute(
        x, tuple(0.8 * t for t in x), target=1, n_steps=12, return_convergence_delta=True
    )
    assert forward.fold(attributions, (8, 8)).shape == (1, 8, 8)
    with torch.no_grad():
        difference = float((forward(*x) - forward(*(0.8 * t for t in x)))[0, 1])
    assert abs(float(gap)) < 0.02 * abs(difference)


def test_a_processor_that_cannot_be_measured_has_attributions_but_no_map() -> None:
    forward = ProcessedPixelForward(adapter_of("pp_formulanet"), PROMPT, [5, 6], random_image(), "answer_log_prob")
    (attribution,) = Saliency(forward).attribute(forward.pixels)
    assert bool(attribution.any())
    with pytest.raises(NoPixelMapError, match="no coordinates in the image") as caught:
        forward.fold(attribution, (4, 4))
    with pytest.raises(NoPixelMapError, match="no coordinates in the image"):
        forward.feature_mask(torch.zeros(64, 96, dtype=torch.int64))
    assert isinstance(caught.value.__cause__, NoPixelMapError)


def test_unfit_tensors_and_images_are_refused() -> None:
    processed = ProcessedPixelForward(adapter_of("llava"), PROMPT, ANSWER, random_image())
    with pytest.raises(InvalidInputError, match="Expected 1 pixel tensors"):
        processed()
    with pytest.raises(InvalidInputError, match=r"must have shape \(N, "):
        processed(processed.pixels[0][0])
    with pytest.raises(InvalidInputError, match="2 attributions for 1"):
        processed.fold((*processed.pixels, *processed.pixels), (2, 2))
    with pytest.raises(InvalidInputError, match="the size of the explained one"):
        processed.process(random_image(32, 32))
