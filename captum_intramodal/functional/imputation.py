r"""TODO."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d, interpolate

__all__ = ["IMPUTATIONS", "Imputation", "Imputer", "Masks", "check_imputation", "noisy_linear_imputation"]

Imputation = Literal["blur", "mean", "noisy_linear"]


IMPUTATIONS: tuple[str, ...] = get_args(Imputation)


Masks = npt.NDArray[np.bool_]


def check_imputation(imputation: str) -> None:
    """That it is the name of one."""
    if imputation not in IMPUTATIONS:
        raise ValueError(f"imputation must be one of {', '.join(IMPUTATIONS)}; got {imputation!r}.")


class Imputer:
    r"""
    Something else in the place of removed pixels.

    Args:

        image (PIL.Image.Image): The original.
        imputation (str or PIL.Image.Image, optional): What stands in the place of removed pixels. ``'blur'``: the
                    image blurred with a standard deviation of a tenth of its shorter side (RISE's choice for
                    insertion). ``'mean'``: its mean color. ``'noisy_linear'``: :func:`noisy_linear_imputation` of the
                    kept pixels. Or an image of the same size.
                    Default: ``'blur'``
        seed (int, optional): Of the noise.
                    Default: 0

    Raises:
        TypeError: no image.
        ValueError: an unknown imputation, or an image of another size; masks of another shape.

    Examples::

        >>> (half,) = Imputer(image, "mean")(np.arange(image.width) < np.full((1, image.height, 1), 100))
    """

    def __init__(self, image: Image.Image, imputation: Imputation | Image.Image = "blur", seed: int = 0) -> None:
        if not isinstance(image, Image.Image):
            raise TypeError(f"image must be a PIL image, got {type(image).__name__}; open a file with PIL.Image.open.")
        self.image = image = image.convert("RGB")
        self.seed = seed
        self._pixels = np.asarray(image)
        if isinstance(imputation, Image.Image):
            if imputation.size != image.size:
                raise ValueError(f"imputation has size {imputation.size}, the image {image.size}.")
            self._fill: npt.NDArray[np.uint8] | None = np.asarray(imputation.convert("RGB"))
        elif imputation == "blur":
            self._fill = np.asarray(image.filter(ImageFilter.GaussianBlur(min(image.size) / 10)))
        elif imputation == "mean":
            mean = np.rint(self._pixels.mean((0, 1))).astype(np.uint8)
            self._fill = np.broadcast_to(mean, self._pixels.shape)
        elif imputation == "noisy_linear":
            self._fill = None
        else:
            raise ValueError(f"imputation must be an image or one of {', '.join(IMPUTATIONS)}; got {imputation!r}.")

    def __call__(self, kept: Masks) -> list[Image.Image]:
        """The image with the pixels outside each mask, bool (N, height, width), imputed."""
        kept = np.asarray(kept, dtype=bool)
        if kept.ndim != 3 or kept.shape[1:] != self._pixels.shape[:2]:
            raise ValueError(f"Masks of shape {kept.shape} for images of {self._pixels.shape[:2]}.")
        if self._fill is None:
            imputed = noisy_linear_imputation(self._pixels, kept, seed=self.seed)
        else:
            imputed = np.where(kept[..., None], self._pixels, self._fill)
        return [Image.fromarray(pixels) for pixels in imputed]

    def nothing_kept(self) -> Image.Image:
        """The image with all pixels imputed."""
        return self(np.zeros((1, *self._pixels.shape[:2]), bool))[0]


def noisy_linear_imputation(
    pixels: npt.NDArray[np.uint8], kept: Masks, noise: float = 0.01, seed: int = 0
) -> npt.NDArray[np.uint8]:
    r"""
    Fills removed pixels so that a model can hardly tell where something was removed: each is the weighted mean of its
    eight neighbors (direct ones 1/6, diagonal ones 1/12), plus Gaussian noise. The equations of all of them are solved
    together, by conjugate gradients from coarse to fine; what is left of the error lies below the noise.

    Source: Rong et al., "A consistent and efficient evaluation strategy for attribution methods", 2022, section 4.2.

    Args:

        pixels (ndarray): The image, uint8 (height, width, channels).
        kept (ndarray): Which pixels are kept, bool (N, height, width).
        noise (float): Standard deviation of the noise, as a fraction of the range of values. Default: ``0.01``
        seed (int): Of the noise. Default: ``0``

    Returns:
        **imputed** (*ndarray*):
            uint8 (N, height, width, channels); kept pixels as they are. Where none is kept, the mean color and noise.

    Raises:
        ValueError: shapes that do not belong together.

    Examples::

        >>> image = np.full((8, 8, 3), 200, np.uint8)
        >>> kept = np.ones((1, 8, 8), bool)
        >>> kept[:, 2:5, 2:5] = False
        >>> bool((noisy_linear_imputation(image, kept, noise=0.0) == 200).all())
        True
    """
    if pixels.ndim != 3 or kept.ndim != 3 or kept.shape[1:] != pixels.shape[:2]:
        raise ValueError(
            f"pixels must be (height, width, channels) and kept (N, height, width), got {pixels.shape}, {kept.shape}."
        )
    values = torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)
    masks = torch.from_numpy(kept)[:, None]
    filled = _solve_means(values.expand(len(masks), -1, -1, -1), masks, values.mean((1, 2))[:, None, None])
    shaken = np.random.default_rng(seed).normal(0, noise * 255, pixels.shape).astype(np.float32)
    imputed = (filled.permute(0, 2, 3, 1).numpy() + shaken).round().clip(0, 255).astype(np.uint8)
    return np.where(kept[..., None], pixels, imputed)


def _solve_means(values: Tensor, kept: Tensor, otherwise: Tensor, iterations: int = 10) -> Tensor:
    """Kept values (N, C, H, W), elsewhere the means of their neighbors; ``otherwise`` if none is kept."""
    known = kept.to(values)
    if max(values.shape[2:]) == 1:
        return torch.where(kept, values, otherwise)
    weight = avg_pool2d(known, 2, ceil_mode=True)
    coarse = avg_pool2d(values * known, 2, ceil_mode=True) / weight.clamp_min(torch.finfo(values.dtype).tiny)
    solved = _solve_means(coarse, weight > 0, otherwise, iterations)
    guess = interpolate(solved, values.shape[2:], mode="bilinear", align_corners=False)

    channels = values.shape[1]
    kernel = torch.tensor([[1.0, 2.0, 1.0], [2.0, 0.0, 2.0], [1.0, 2.0, 1.0]]).to(values) / 12
    degree = conv2d(torch.ones_like(known[:1]), kernel[None, None], padding=1)

    def equations(x: Tensor) -> Tensor:
        neighbors = conv2d(x, kernel.expand(channels, 1, 3, 3), padding=1, groups=channels)
        return (degree * x - neighbors) * (1 - known)

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum((2, 3), keepdim=True)

    x = torch.where(kept, values, guess)
    residual = -equations(x)
    direction, energy = residual, dot(residual, residual)
    solved_below = 1e-6 * values.shape[2] * values.shape[3]
    for _ in range(iterations):
        image = equations(direction)
        step = torch.where(energy > solved_below, energy / dot(direction, image), 0.0)
        x, residual = x + step * direction, residual - step * image
        previous, energy = energy, dot(residual, residual)
        direction = residual + torch.where(previous > solved_below, energy / previous, 0.0) * direction
    return x
