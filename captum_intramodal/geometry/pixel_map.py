r"""TODO."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

__all__ = ["PixelMap", "PixelMaps", "Prepare", "Size", "check_sizes"]

Prepare = Callable[[list[Image.Image]], Mapping[str, Any]]


Size = tuple[int, int]


@dataclass(frozen=True)
class PixelMap:
    r"""What the N elements of one of the processor's pixel tensors sample, in the tensor's memory order.

    Attributes:
        shape (torch.Size): of the tensor.
        lower (Tensor): left and upper end of each element, in pixels of its image, float32 (2, N): x, y.
        upper (Tensor): right and lower end, float32 (2, N).
        gain (Tensor): change of the element from a black to a white image, float32 (N,); 0 for padding.
        image_index (Tensor): the element's image, int64 (N,).
        image_sizes (tuple): (width, height) of every image in pixels.
    """

    shape: torch.Size
    lower: Tensor
    upper: Tensor
    gain: Tensor
    image_index: Tensor
    image_sizes: tuple[Size, ...]

    def in_frame_of(self, image_sizes: tuple[Size, ...]) -> PixelMap:
        """The same elements on the same images at other (width, height)s."""
        scale = (torch.tensor(image_sizes) / torch.tensor(self.image_sizes))[self.image_index].T
        return replace(self, lower=self.lower * scale, upper=self.upper * scale, image_sizes=image_sizes)

    def _cells(self, image: int, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Elements that show an image, and the cell, counted row by row, that each one's center lies in."""
        shown = ((self.gain != 0) & (self.image_index == image)).nonzero().flatten()
        center = (self.lower[:, shown] + self.upper[:, shown]) / 2
        (width, height), (rows, columns) = self.image_sizes[image], grid
        column = (center[0] * (columns / width)).long().clamp(0, columns - 1)
        row = (center[1] * (rows / height)).long().clamp(0, rows - 1)
        return shown, row * columns + column

    def feature_mask(self, segmentations: Sequence[Tensor]) -> Tensor:
        r"""
        Segments of the images as a Captum ``feature_mask`` over the pixel tensor: a segment is one feature, wherever
        it appears, in tiles and thumbnail at once.

        Args:

            segmentations (Sequence[Tensor]): One int64 (height, width) tensor per image, segments counted from 0.

        Returns:
            **mask** (*Tensor*):
                int64, of the tensor's shape. The segments of the second image are counted on from those of the first;
                padding is one feature more, the last.

        Raises:
            ValueError: not one segmentation of its image's size for each image, or negative segments.

        Examples::

            >>> mask = pixels.feature_mask([segmentation])
            >>> FeatureAblation(forward).attribute(pixel_values, feature_mask=mask[None])
        """
        sizes = tuple((s.shape[1], s.shape[0]) if s.ndim == 2 else tuple(s.shape) for s in segmentations)
        if sizes != self.image_sizes:
            raise ValueError(f"Segmentations of (width, height) {sizes} for images of {self.image_sizes}.")
        mask = torch.full((len(self.gain),), -1)
        first = 0
        for image, segmentation in enumerate(segmentations):
            if segmentation.is_floating_point() or int(segmentation.min()) < 0:
                raise ValueError("Segments must be integers, counted from 0.")
            shown, cell = self._cells(image, (segmentation.shape[0], segmentation.shape[1]))
            mask[shown] = first + segmentation.flatten()[cell].long().cpu()
            first += int(segmentation.max()) + 1
        return mask.masked_fill(mask < 0, first).reshape(self.shape)

    def fold(self, attributions: Tensor, grid: tuple[int, int], image: int = 0) -> Tensor:
        r"""
        Attributions of the tensor's elements, summed up in the frame of the original image.

        Args:

            attributions (Tensor): float (*, shape of the pixel tensor).
            grid (tuple[int, int]): Rows and columns of the map; no finer than the processor's sampling, else cells stay
                        empty.
            image (int, optional): The image.
                        Default: 0

        Returns:
            **map** (*Tensor*):
                float32 (*, rows, columns); its sum is that of the attributions of all elements that show the image.

        Raises:
            ValueError: attributions of another shape.
        """
        n = len(self.shape)
        if attributions.shape[attributions.ndim - n :] != self.shape:
            raise ValueError(f"Attributions of shape {tuple(attributions.shape)} for elements {tuple(self.shape)}.")
        leading = attributions.shape[: attributions.ndim - n]
        values = attributions.reshape(-1, len(self.gain)).float()
        shown, cell = (index.to(values.device) for index in self._cells(image, grid))
        folded = torch.zeros(len(values), grid[0] * grid[1], device=values.device)
        return folded.index_add_(1, cell, values[:, shown]).reshape(*leading, *grid)


@dataclass(frozen=True)
class PixelMaps:
    r"""All pixel tensors that the processor makes of the images of one prompt.

    Attributes:
        maps (dict[str, PixelMap]): by the tensor's name among the model's inputs.
        image_sizes (tuple): (width, height) of every image in pixels.
    """

    maps: dict[str, PixelMap]
    image_sizes: tuple[Size, ...]

    def shows_same(self, other: object) -> bool:
        """Whether two sizes of the same images become the same tensors, up to 2 % of the images' sides."""
        if not isinstance(other, PixelMaps) or {key: m.shape for key, m in self.maps.items()} != {
            key: m.shape for key, m in other.maps.items()
        }:
            return False
        return all(
            bool(torch.allclose(_relative(pixels), _relative(other.maps[key]), atol=0.02, rtol=0))
            for key, pixels in self.maps.items()
        )


def _relative(pixels: PixelMap) -> Tensor:
    sizes = torch.tensor(pixels.image_sizes, dtype=torch.float32)[pixels.image_index].T
    return torch.where(pixels.gain != 0, torch.cat([pixels.lower / sizes, pixels.upper / sizes]), -1.0)


def check_sizes(image_sizes: Sequence[Size]) -> tuple[Size, ...]:
    """(width, height) of at least one image, each at least one pixel."""
    sizes = tuple((int(width), int(height)) for width, height in image_sizes)
    if not sizes or any(min(size) < 1 for size in sizes):
        raise ValueError(f"image_sizes must hold the (width, height) of at least one image, got {list(image_sizes)}.")
    return sizes
