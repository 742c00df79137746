r"""Where do the maps of one scale lie over the original images? Values at visual tokens, or over the pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_intramodal._utils.memory import WORKING_MEMORY
from captum_intramodal.adapter.encoding import Encoding
from captum_intramodal.adapter.gradients import input_x_gradient
from captum_intramodal.adapter.model_adapter import ModelAdapter
from captum_intramodal.functional.rasterize import raster_grid, rasterize
from captum_intramodal.geometry.pixel_map import PixelMaps
from captum_intramodal.geometry.token_geometry import TokenGeometry

__all__ = ["PixelScaleMaps", "ScaleMaps", "TokenScaleMaps"]

# Gradients at single pixels are noise; they are summed over cells, this many along the longer side.
_CELLS = 24


class ScaleMaps(Protocol):
    """Maps of the text tokens at one scale.

    Attributes:
        scale (float): factor of the images' size.
        n_visual (int): number of values per map: visual tokens, or cells.
    """

    @property
    def scale(self) -> float: ...

    @property
    def n_visual(self) -> int: ...

    def cell_size(self, size: tuple[int, int]) -> list[float]:
        """Return the typical width and height, in pixels of the first image, of the region behind one value."""

    def grid(self, image: int, size: tuple[int, int]) -> tuple[int, int]:
        """Return rows and columns of the coarsest raster over an image of (width, height) that loses nothing."""

    def rasterize(self, image: int, size: tuple[int, int], grid: tuple[int, int], working_memory: int) -> Tensor:
        """Return the text tokens' maps over an image, float32 (T, rows, columns)."""


@dataclass(frozen=True)
class TokenScaleMaps:
    """Values at the visual tokens, and the regions that these cover in the original images.

    Attributes:
        scale (float): factor of the images' size.
        activation (Tensor): the text tokens' logit lens, or activation times gradient, at each visual token; float32
            (T, V), clipped at 0.
        geometry (TokenGeometry): of the resized images.
    """

    scale: float
    activation: Tensor
    geometry: TokenGeometry

    @property
    def n_visual(self) -> int:
        return self.activation.shape[1]

    def boxes(self, image: int, size: tuple[int, int]) -> Tensor:
        """Return the boxes in pixels of the original image; NaN for tokens of other images."""
        width, height = self.geometry.image_sizes[image]
        boxes = self.geometry.boxes * torch.tensor([size[0] / width, size[1] / height] * 2)
        return boxes.masked_fill(~self.geometry.sees(image)[:, None], torch.nan)

    def cell_size(self, size: tuple[int, int]) -> list[float]:
        boxes = self.boxes(0, size)
        boxes = boxes[~boxes.isnan().any(1)]
        return [round(float((boxes[:, 2 + axis] - boxes[:, axis]).median()), 2) for axis in (0, 1)]

    def grid(self, image: int, size: tuple[int, int]) -> tuple[int, int]:
        return raster_grid(self.boxes(image, size), size)

    def rasterize(
        self, image: int, size: tuple[int, int], grid: tuple[int, int], working_memory: int = WORKING_MEMORY
    ) -> Tensor:
        return rasterize(self.activation, self.boxes(image, size), size, grid, working_memory)


@dataclass(frozen=True)
class PixelScaleMaps:
    """Input times gradient of the text tokens' log-probabilities, summed over cells of the image.

    Attributes:
        scale (float): factor of the images' size.
        maps (list[Tensor]): per image float32 (T, rows, columns), clipped at 0.
    """

    scale: float
    maps: list[Tensor]

    @classmethod
    def from_gradients(
        cls, adapter: ModelAdapter, scale: float, pixels: PixelMaps, encoding: Encoding, positions: Tensor
    ) -> PixelScaleMaps:
        """Compute maps from one pass over prompt and answer and one backward pass per text token at ``positions``."""
        grids = [_square_cells(size) for size in pixels.image_sizes]
        maps: list[list[Tensor]] = [[] for _ in grids]
        for attribution in input_x_gradient(adapter, encoding, list(pixels.maps), positions):
            for image, grid in enumerate(grids):
                folded = [pixels.maps[key].fold(value, grid, image) for key, value in attribution.items()]
                maps[image].append(torch.stack(folded).sum(0).clamp_min(0))
        return cls(scale, [torch.stack(m) for m in maps])

    @property
    def n_visual(self) -> int:
        return sum(m[0].numel() for m in self.maps)

    def cell_size(self, size: tuple[int, int]) -> list[float]:
        rows, columns = self.grid(0, size)
        return [round(size[0] / columns, 2), round(size[1] / rows, 2)]

    def grid(self, image: int, size: tuple[int, int]) -> tuple[int, int]:
        rows, columns = self.maps[image].shape[1:]
        return rows, columns

    def rasterize(
        self, image: int, size: tuple[int, int], grid: tuple[int, int], working_memory: int = WORKING_MEMORY
    ) -> Tensor:
        maps = self.maps[image]
        if grid == self.grid(image, size):
            return maps
        return F.interpolate(maps[:, None], grid, mode="bilinear", align_corners=False)[:, 0]


def _square_cells(size: tuple[int, int]) -> tuple[int, int]:
    """Return rows and columns of square cells."""
    width, height = size
    cell = max(max(size) / _CELLS, 1.0)
    return max(1, round(height / cell)), max(1, round(width / cell))
