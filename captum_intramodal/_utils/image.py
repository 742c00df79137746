r"""TODO."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

__all__ = ["check_images", "image_to_tensor"]


def check_images(images: Any) -> list[Image.Image]:
    """One or several PIL images, in RGB."""
    listed = [images] if isinstance(images, Image.Image) else list(images)
    if not listed or not all(isinstance(image, Image.Image) for image in listed):
        raise TypeError(
            f"images must be one or several PIL images, got {[type(image).__name__ for image in listed] or 'none'}; "
            "open a file with PIL.Image.open(path)."
        )
    return [image.convert("RGB") for image in listed]


def stack_frames(frames: Sequence[Image.Image | Tensor]) -> Tensor:
    if len(sizes := {frame.shape[1:] if isinstance(frame, Tensor) else frame.size for frame in frames}) > 1:
        raise ValueError(f"The frames of a video must have one size, got {sorted(map(tuple, sizes))}.")
    return torch.stack([_channels_first(frame) for frame in frames])


def _channels_first(frame: Image.Image | Tensor) -> Tensor:
    """A frame as videos take them: uint8 (3, height, width), or a float tensor as it is."""
    return frame if isinstance(frame, Tensor) else torch.from_numpy(np.array(frame)).permute(2, 0, 1)


def image_to_tensor(image: Image.Image) -> Tensor:
    """An RGB image as :class:`PixelForward` takes it, float32 (1, 3, height, width) in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255


def tensor_to_image(levels: Tensor) -> Image.Image:
    return Image.fromarray(levels.byte().permute(1, 2, 0).cpu().numpy())
