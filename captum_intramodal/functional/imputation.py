r"""Impute removed pixels: what replaces the pixels that an explanation marks as important, or as unimportant?"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d, interpolate

from captum_intramodal._utils.image import blur_image
from captum_intramodal.errors import InvalidInputError, InvalidOptionError

__all__ = ["IMPUTATIONS", "Imputation", "Imputer", "Masks", "check_imputation", "noisy_linear_imputation"]

Imputation = Literal["blur", "mean", "noisy_linear"]
IMPUTATIONS: tuple[str, ...] = get_args(Imputation)

Masks = npt.NDArray[np.bool_]


def check_imputation(imputation: str) -> None:
    """Raise :class:`InvalidOptionError` unless this is the name of an imputation."""
    if imputation not in IMPUTATIONS:
        raise InvalidOptionError(f"imputation must be one of {', '.join(IMPUTATIONS)}; got {imputation!r}.")


class Imputer:
    r"""Replace the pixels of an image outside a mask: a function from masks of the kept pixels,
    bool (N, height, width), to N images.

    Args:

        image (PIL.Image.Image): The original image.
        imputation (str or PIL.Image.Image, optional): How to fill removed pixels. ``'blur'``: from the image blurred
                    with a standard deviation of a tenth of its shorter side (RISE's choice for insertion). ``'mean'``:
                    with its mean color. ``'noisy_linear'``: by :func:`noisy_linear_imputation` from the kept pixels.
                    Or from a given image of the same size.
                    Default: ``'blur'``
        seed (int, optional): Seed for the noise of ``'noisy_linear'``.
                    Default: ``0``

    Raises:
        TypeError: ``image`` is not a PIL image.
        InvalidOptionError: ``imputation`` is unknown.
        InvalidInputError: ``imputation`` is an image of a different size; when called, masks of a different shape.

    Examples::

        >>> from captum_intramodal.metrics import Imputer
        >>> left = np.arange(image.width) < np.full((1, image.height, 1), 100)  # keep 100 columns
        >>> (imputed,) = Imputer(image, "mean")(left)
        >>> imputed.size == image.size
        True
    """

    def __init__(self, image: Image.Image, imputation: Imputation | Image.Image = "blur", seed: int = 0) -> None:
        if not isinstance(image, Image.Image):
            raise TypeError(f"image must be a PIL image, got {type(image).__name__}; open a file with PIL.Image.open.")
        self.image = image = image.convert("RGB")
        self.seed = seed
        self._pixels = np.asarray(image)
        self._fill: npt.NDArray[np.uint8] | None = None  # None: computed from the kept pixels.
        if isinstance(imputation, Image.Image):
            if imputation.size != image.size:
                raise InvalidInputError(
                    f"imputation has size {imputation.size}, but the image has {image.size}; resize it."
                )
            self._fill = np.asarray(imputation.convert("RGB"))
            return
        check_imputation(imputation)
        if imputation == "blur":
            self._fill = np.asarray(blur_image(image, "imputation"))
        elif imputation == "mean":
            mean = np.rint(self._pixels.mean((0, 1))).astype(np.uint8)
            self._fill = np.broadcast_to(mean, self._pixels.shape)

    def __call__(self, kept: Masks) -> list[Image.Image]:
        """Impute the pixels outside each mask."""
        kept = np.asarray(kept, dtype=bool)
        if kept.ndim != 3 or kept.shape[1:] != self._pixels.shape[:2]:
            height, width = self._pixels.shape[:2]
            raise InvalidInputError(f"Masks must have shape (N, {height}, {width}), got {kept.shape}.")
        if self._fill is None:
            imputed = noisy_linear_imputation(self._pixels, kept, seed=self.seed)
        else:
            imputed = np.where(kept[..., None], self._pixels, self._fill)
        return [Image.fromarray(pixels) for pixels in imputed]

    def nothing_kept(self) -> Image.Image:
        """Impute all pixels."""
        return self(np.zeros((1, *self._pixels.shape[:2]), bool))[0]


def noisy_linear_imputation(
    pixels: npt.NDArray[np.uint8], kept: Masks, noise: float = 0.01, seed: int = 0
) -> npt.NDArray[np.uint8]:
    r"""Fill removed pixels such that a model can hardly detect the removal.

    Each removed pixel becomes the weighted mean of its eight neighbors (direct ones 1/6, diagonal ones 1/12), plus
    Gaussian noise. The equations of all removed pixels are solved together by conjugate gradients, from coarse to fine;
    the remaining error is below the noise.

    Source: Rong et al., "A consistent and efficient evaluation strategy for attribution methods", 2022, section 4.2.

    Args:

        pixels (ndarray): The image, uint8 (height, width, channels).
        kept (ndarray): Masks of the kept pixels, bool (N, height, width).
        noise (float): Standard deviation of the noise, as a fraction of the value range.
                    Default: ``0.01``
        seed (int): Seed for the noise.
                    Default: ``0``

    Returns:
        **imputed** (*ndarray*):
            uint8 (N, height, width, channels), with kept pixels unchanged. If no pixel is kept, the mean color with
            noise.

    Raises:
        InvalidInputError: The shapes of ``pixels`` and ``kept`` do not match.

    Examples::

        >>> from captum_intramodal.metrics import noisy_linear_imputation
        >>> gray = np.full((8, 8, 3), 200, np.uint8)
        >>> kept = np.ones((1, 8, 8), bool)
        >>> kept[:, 2:5, 2:5] = False
        >>> bool((noisy_linear_imputation(gray, kept, noise=0.0) == 200).all())
        True
    """
    if pixels.ndim != 3 or kept.ndim != 3 or kept.shape[1:] != pixels.shape[:2]:
        raise InvalidInputError(
            f"pixels must be (height, width, channels) and kept (N, height, width), got {pixels.shape}, {kept.shape}."
        )
    values = torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)
    masks = torch.from_numpy(kept)[:, None]
    means = _solve_neighbor_means(values.expand(len(masks), -1, -1, -1), masks, values.mean((1, 2))[:, None, None])
    added = np.random.default_rng(seed).normal(0, noise * 255, pixels.shape).astype(np.float32)
    imputed = (means.permute(0, 2, 3, 1).numpy() + added).round().clip(0, 255).astype(np.uint8)
    return np.where(kept[..., None], pixels, imputed)


def _solve_neighbor_means(values: Tensor, kept: Tensor, fallback: Tensor, iterations: int = 10) -> Tensor:
    """Replace values (N, C, H, W) that are not kept by the means of their neighbors; by a fallback if none is kept."""
    known = kept.to(values)
    if max(values.shape[2:]) == 1:
        return torch.where(kept, values, fallback)
    weight = avg_pool2d(known, 2, ceil_mode=True)
    coarse = avg_pool2d(values * known, 2, ceil_mode=True) / weight.clamp_min(torch.finfo(values.dtype).tiny)
    solved = _solve_neighbor_means(coarse, weight > 0, fallback, iterations)
    guess = interpolate(solved, values.shape[2:], mode="bilinear", align_corners=False)

    channels = values.shape[1]
    kernel = torch.tensor([[1.0, 2.0, 1.0], [2.0, 0.0, 2.0], [1.0, 2.0, 1.0]]).to(values) / 12
    degree = conv2d(torch.ones_like(known[:1]), kernel[None, None], padding=1)

    def apply_equations(x: Tensor) -> Tensor:
        neighbors = conv2d(x, kernel.expand(channels, 1, 3, 3), padding=1, groups=channels)
        return (degree * x - neighbors) * (1 - known)

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum((2, 3), keepdim=True)

    # Conjugate gradients. A channel that has converged takes no further steps.
    x = torch.where(kept, values, guess)
    residual = -apply_equations(x)
    direction, energy = residual, dot(residual, residual)
    tolerance = 1e-6 * values.shape[2] * values.shape[3]
    for _ in range(iterations):
        product = apply_equations(direction)
        step = torch.where(energy > tolerance, energy / dot(direction, product), 0.0)
        x, residual = x + step * direction, residual - step * product
        previous, energy = energy, dot(residual, residual)
        direction = residual + torch.where(previous > tolerance, energy / previous, 0.0) * direction
    return x
