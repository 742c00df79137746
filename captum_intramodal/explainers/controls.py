r"""What does an explainer have to beat? Maps that ignore the model: noise, and a Gaussian at the center."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from captum_intramodal.adapter.text_tokens import text_positions
from captum_intramodal.explainers.base import BaseExplainer, Example, TextMaps, cell_grid, check_positive
from captum_intramodal.explainers.registry import register_explainer

__all__ = ["CenterGaussian", "RandomMaps"]


@register_explainer("random")
@dataclass(kw_only=True)
class RandomMaps(BaseExplainer):
    r"""
    Uniform noise, different for each image, token and seed: a baseline.

    Args:

        cells (int, optional): Number of cells along the longer side.
                    Default: 16
        seed (int, optional): Seed of the noise.
                    Default: 0
    """

    cells: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        check_positive("cells", self.cells)

    def explain(self, example: Example) -> list[Tensor]:
        maps = []
        for index, image in enumerate(example.images):
            generator = np.random.default_rng([self.seed, index, zlib.crc32(image.tobytes())])
            noise = generator.random((len(example.answer_ids), *cell_grid(image, self.cells)), np.float32)
            maps.append(torch.from_numpy(noise))
        return maps

    def relate_text(self, example: Example) -> TextMaps:
        """Return uniform noise, different for each answer and seed."""
        adapter, images, prompt, answer_ids = example
        encoding = adapter.encode(adapter.prepare(images, prompt), answer_ids)
        positions = text_positions(adapter, encoding)
        generator = np.random.default_rng([self.seed, *answer_ids])
        noise = torch.from_numpy(generator.random((len(answer_ids), len(positions)), np.float32))
        return TextMaps(positions, noise * (positions < positions[-len(answer_ids) :, None]))


@register_explainer("center_gaussian")
@dataclass(kw_only=True)
class CenterGaussian(BaseExplainer):
    r"""
    A Gaussian at the center of the image, the same for all tokens: the baseline for images whose objects are centered.

    Args:

        sigma (float, optional): Standard deviation, as a fraction of each side.
                    Default: 0.25
        cells (int, optional): Number of cells along the longer side.
                    Default: 32
    """

    sigma: float = 0.25
    cells: int = 32

    def __post_init__(self) -> None:
        check_positive("sigma", self.sigma)
        check_positive("cells", self.cells)

    def explain(self, example: Example) -> list[Tensor]:
        maps = []
        for image in example.images:
            y, x = (
                torch.exp(-(((torch.arange(n) + 0.5) / n - 0.5) ** 2) / (2 * self.sigma**2))
                for n in cell_grid(image, self.cells)
            )
            maps.append((y[:, None] * x).expand(len(example.answer_ids), -1, -1))
        return maps
