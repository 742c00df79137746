r"""TODO."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from captum_intramodal.geometry.pixel_map import Size

__all__ = ["logits_gap"]


def logits_gap(actual: Tensor, expected: Tensor) -> float:
    """Mean absolute difference of logits or states in standard deviations; some models pad or mask the vocabulary."""
    width = min(actual.shape[-1], expected.shape[-1])
    actual, expected = actual[..., :width].float().cpu(), expected[..., :width].float().cpu()
    seen = expected.isfinite() & (expected > torch.finfo(torch.float32).min / 4)
    return float((actual - expected)[seen].abs().mean() / expected[seen].std())


def noise_image(size: Size, seed: int = 0) -> Image.Image:
    """All-black images are dropped by some processors."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8))
