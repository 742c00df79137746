r"""Image helpers: checks, conversion to and from tensors, resizing, blur and noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from captum_intramodal.errors import InvalidInputError

__all__ = [
    "blur_image",
    "check_images",
    "image_to_tensor",
    "noise_image",
    "resize_images",
    "stack_frames",
    "tensor_to_image",
]


def check_images(images: Image.Image | Sequence[Image.Image]) -> list[Image.Image]:
    r"""
    Return one or several images as a list of RGB images.

    Args:

        images (PIL.Image.Image or Sequence[PIL.Image.Image]): The images, of any mode.

    Returns:
        **images** (*list[PIL.Image.Image]*): at least one, all RGB.

    Raises:
        TypeError: something is not a PIL image, or there is none.

    Examples::

        >>> from captum_intramodal._utils.image import check_images
        >>> [checked.mode for checked in check_images(image.convert("L"))]
        ['RGB']
    """
    listed = [images] if isinstance(images, Image.Image) else list(images)
    if not listed or not all(isinstance(image, Image.Image) for image in listed):
        raise TypeError(
            f"images must be one or several PIL images, got {[type(image).__name__ for image in listed] or 'none'}; "
            "open a file with PIL.Image.open(path)."
        )
    return [image.convert("RGB") for image in listed]


def image_to_tensor(image: Image.Image) -> Tensor:
    """Convert an RGB image to a tensor, float32 (1, 3, height, width) in [0, 1]."""
    return _channels_first(image)[None].float() / 255


def tensor_to_image(pixels: Tensor) -> Image.Image:
    """Convert a tensor, float (3, height, width) in [0, 1], to the nearest 8-bit image."""
    levels = (pixels.detach() * 255).round().clamp(0, 255).byte()
    return Image.fromarray(levels.permute(1, 2, 0).cpu().numpy())


def stack_frames(frames: Sequence[Image.Image | Tensor]) -> Tensor:
    r"""
    Stack the frames of a video into one tensor.

    Args:

        frames (Sequence[PIL.Image.Image or Tensor]): RGB images, or tensors (3, height, width); all of one size.

    Returns:
        **video** (*Tensor*): (frames, 3, height, width); uint8 for images, for tensors in their dtype.

    Raises:
        InvalidInputError: the frames differ in size.
    """
    if len(sizes := {frame.shape[1:] if isinstance(frame, Tensor) else frame.size for frame in frames}) > 1:
        raise InvalidInputError(f"The frames of a video must have one size, got {sorted(map(tuple, sizes))}.")
    return torch.stack([frame if isinstance(frame, Tensor) else _channels_first(frame) for frame in frames])


def _channels_first(image: Image.Image) -> Tensor:
    """Convert an RGB image to uint8 (3, height, width)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def resize_images(images: Sequence[Image.Image], sizes: Sequence[tuple[int, int]]) -> list[Image.Image]:
    """Resize images to (width, height)s, bicubically; an image that already has its size is returned unchanged."""
    return [
        image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)
        for image, size in zip(images, sizes, strict=True)
    ]


def blur_image(image: Image.Image, use: Literal["imputation", "baseline"]) -> Image.Image:
    r"""
    Blur an image with a Gaussian, wide enough that its objects cannot be recognized.

    Args:

        image (PIL.Image.Image): The image.
        use (str): What the blurred image is for, which determines the standard deviation of the Gaussian:
            ``'imputation'`` (pixels that insertion and deletion curves remove), a tenth of the shorter side;
            ``'baseline'`` (absent regions of perturbation methods), a sixteenth of the longer side.

    Returns:
        **blurred** (*PIL.Image.Image*): of the same size and mode.
    """
    radius = min(image.size) / 10 if use == "imputation" else max(image.size) / 16
    return image.filter(ImageFilter.GaussianBlur(radius))


def noise_image(size: tuple[int, int], source: int | torch.Generator = 0) -> Image.Image:
    r"""
    Draw an RGB image whose values are independent and uniform.

    Use it where any image will do: some processors drop an image that is black throughout.

    Args:

        size (tuple[int, int]): Width and height.
        source (int or torch.Generator, optional): A seed, or a generator to draw the values from.
                    Default: 0

    Returns:
        **image** (*PIL.Image.Image*): RGB.

    Examples::

        >>> from captum_intramodal._utils.image import noise_image
        >>> noise_image((4, 2), seed := 3) == noise_image((4, 2), seed)
        True
    """
    shape = (size[1], size[0], 3)
    if isinstance(source, torch.Generator):
        return Image.fromarray(torch.randint(0, 256, shape, generator=source, dtype=torch.uint8).numpy())
    return Image.fromarray(np.random.default_rng(source).integers(0, 256, shape, np.uint8))
