r"""What do Captum's methods attribute to the image? Grad-CAM at visual tokens, and gradients or occlusion of pixels."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from captum.attr import Attribution, InputXGradient, IntegratedGradients, LayerGradCam, NoiseTunnel, Occlusion
from PIL import Image
from torch import Tensor

from captum_intramodal._utils.image import image_to_tensor
from captum_intramodal.attr.pixel_forward import PixelForward
from captum_intramodal.attr.visual_token_attribution import VisualTokenAttribution
from captum_intramodal.errors import InvalidOptionError
from captum_intramodal.explainers.base import (
    BaseExplainer,
    Example,
    cell_grid,
    check_decoder_sequence,
    check_layer,
    check_positive,
    single_image,
)
from captum_intramodal.explainers.registry import register_explainer
from captum_intramodal.functional.imputation import Imputer
from captum_intramodal.models.decoder import decoder_layers

__all__ = ["GradCAM", "InputXGradientMaps", "IntegratedGradientsMaps", "LLaVACAM", "OcclusionMaps"]

Baseline = Literal["black", "mean", "blur"]
Target = int | tuple[int, int]


@register_explainer("grad_cam")
@dataclass(kw_only=True)
class GradCAM(BaseExplainer):
    r"""
    Grad-CAM at visual tokens: Captum's ``LayerGradCam`` of each token's log-probability at the output of a decoder
    layer, clipped at 0.

    Args:

        layer (int, optional): The decoder layer. Not the last one: its visual tokens predict no token of the answer,
                    so that their gradient is 0.
                    Default: -2
    """

    layer: int = -2

    def explain(self, example: Example) -> list[Tensor]:
        pixels = image_to_tensor(single_image(self, example))
        check_decoder_sequence(self, example)
        layers = decoder_layers(example.adapter.model)
        check_layer(self.layer, len(layers))
        forward = _forward(example)
        method = VisualTokenAttribution(LayerGradCam(forward, layers[self.layer]))
        return [torch.cat([self.attribute(method, pixels, target)[0] for target in forward.targets])]

    def attribute(self, method: VisualTokenAttribution, pixels: Tensor, target: Target) -> Tensor:
        """Return the attribution of one target, (1, 1, height, width)."""
        maps: Tensor = method.attribute(pixels, target=target)
        return maps


@register_explainer("llava_cam")
@dataclass(kw_only=True)
class LLaVACAM(GradCAM):
    r"""
    Grad-CAM at a decoder layer, averaged over noisy copies of the image, in the manner of LLaVA-CAM.

    Source: Zhang et al., "From Redundancy to Relevance: Information Flow in LVLMs Across Reasoning Tasks", 2025.

    Args:

        layer (int, optional): See :class:`GradCAM`.
                    Default: -2
        samples (int, optional): Number of copies.
                    Default: 10
        noise (float, optional): Standard deviation of the noise, for pixels in [0, 1].
                    Default: 0.1
        seed (int, optional): Seed of the noise, which is the same for all tokens.
                    Default: 0
    """

    samples: int = 10
    noise: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        check_positive("samples", self.samples)
        if not self.noise >= 0:
            raise InvalidOptionError(f"noise must not be negative, got {self.noise}.")

    def attribute(self, method: VisualTokenAttribution, pixels: Tensor, target: Target) -> Tensor:
        torch.manual_seed(self.seed)  # The caller restores the random state.
        maps: Tensor = NoiseTunnel(method).attribute(
            pixels, nt_type="smoothgrad", nt_samples=self.samples, nt_samples_batch_size=1, stdevs=float(self.noise),
            target=target,
        )  # fmt: skip
        return maps


@dataclass(kw_only=True)
class _PixelExplainer(BaseExplainer):
    """Base class of pixel attributions: summed over channels, averaged over cells, clipped at 0."""

    cells: int = 24

    def __post_init__(self) -> None:
        check_positive("cells", self.cells)

    def explain(self, example: Example) -> list[Tensor]:
        image = single_image(self, example)
        values = self.attribute(_forward(example), image)
        return [F.adaptive_avg_pool2d(values.detach().float().sum(1), cell_grid(image, self.cells))]

    @abstractmethod
    def attribute(self, forward: PixelForward, image: Image.Image) -> Tensor:
        """Return the attributions of the T tokens, (T, 3, height, width), of either sign."""


@register_explainer("input_x_gradient")
@dataclass(kw_only=True)
class InputXGradientMaps(_PixelExplainer):
    r"""
    Captum's ``InputXGradient`` of each token's log-probability.

    Args:

        cells (int, optional): Number of cells along the longer side, over which pixels are averaged.
                    Default: 24
    """

    def attribute(self, forward: PixelForward, image: Image.Image) -> Tensor:
        return _attribute_targets(InputXGradient(forward), forward, image)


@register_explainer("integrated_gradients")
@dataclass(kw_only=True)
class IntegratedGradientsMaps(_PixelExplainer):
    r"""
    Captum's ``IntegratedGradients`` of each token's log-probability.

    Args:

        cells (int, optional): See :class:`InputXGradientMaps`.
                    Default: 24
        n_steps (int, optional): Number of steps of the integral.
                    Default: 20
        baseline (str, optional): Start of the integral: ``'black'``, ``'mean'`` (the mean color of the image) or
                    ``'blur'`` (the blurred image, see :class:`~captum_intramodal.metrics.Imputer`).
                    Default: ``'black'``
    """

    n_steps: int = 20
    baseline: Baseline = "black"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_baseline(self.baseline)
        check_positive("n_steps", self.n_steps)

    def attribute(self, forward: PixelForward, image: Image.Image) -> Tensor:
        options = {"baselines": _make_baseline(image, self.baseline), "n_steps": self.n_steps}
        return _attribute_targets(IntegratedGradients(forward), forward, image, internal_batch_size=1, **options)


@register_explainer("occlusion")
@dataclass(kw_only=True)
class OcclusionMaps(_PixelExplainer):
    r"""
    Captum's ``Occlusion``, of the log-probabilities of all tokens at once.

    Args:

        cells (int, optional): See :class:`InputXGradientMaps`.
                    Default: 24
        window (float, optional): Side of the occluded square, as a fraction of the image's shorter side.
                    Default: 0.25
        stride (float, optional): Step of the square, as a fraction of its side.
                    Default: 0.5
        baseline (str, optional): What replaces the pixels of the square, see :class:`IntegratedGradientsMaps`.
                    Default: ``'mean'``
        batch_size (int, optional): Number of images that run together; it does not affect the result.
                    Default: 16
    """

    window: float = 0.25
    stride: float = 0.5
    baseline: Baseline = "mean"
    batch_size: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_baseline(self.baseline)
        if not (0 < self.window <= 1 and 0 < self.stride <= 1):
            raise InvalidOptionError(
                f"window and stride must be above 0 and at most 1, got {self.window} and {self.stride}."
            )

    def attribute(self, forward: PixelForward, image: Image.Image) -> Tensor:
        side = max(1, round(self.window * min(image.size)))
        step = max(1, round(self.stride * side))
        with torch.no_grad():
            values: Tensor = Occlusion(forward).attribute(
                image_to_tensor(image), (3, side, side), strides=(3, step, step),
                baselines=_make_baseline(image, self.baseline), perturbations_per_eval=self.batch_size,
            )  # fmt: skip
        return values


def _forward(example: Example) -> PixelForward:
    return PixelForward(example.adapter, example.prompt, example.answer_ids, "token_log_probs")


def _attribute_targets(method: Attribution, forward: PixelForward, image: Image.Image, **options: Any) -> Tensor:
    """Attribute each target in turn."""
    pixels = image_to_tensor(image).requires_grad_()  # Captum warns if it has to require gradients itself.
    return torch.cat([method.attribute(pixels, target=target, **options).detach() for target in forward.targets])


def _check_baseline(baseline: str) -> None:
    if baseline not in get_args(Baseline):
        raise InvalidOptionError(f"baseline must be one of {', '.join(get_args(Baseline))}; got {baseline!r}.")


def _make_baseline(image: Image.Image, kind: Baseline) -> Tensor:
    if kind == "black":
        return torch.zeros(1, 3, image.height, image.width)
    return image_to_tensor(Imputer(image, kind).nothing_kept())
