r"""Which pixels of which image does each element of the processor's pixel tensors sample? The answer, and its uses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from captum_intramodal.errors import InvalidInputError

__all__ = ["PixelMap", "PixelMaps", "Prepare", "Size", "check_sizes"]

# From RGB images to the inputs of a model, always with the same text.
Prepare = Callable[[list[Image.Image]], Mapping[str, Any]]
# Width and height in pixels.
Size = tuple[int, int]


@dataclass(frozen=True)
class PixelMap:
    r"""
    Regions of the original images that the N elements of one pixel tensor sample, in the tensor's memory order.

    Attributes:
        shape (torch.Size): shape of the pixel tensor.
        lower (Tensor): x and y of each element's left and top edges, in pixels of its image, float32 (2, N).
        upper (Tensor): x and y of its right and bottom edges, float32 (2, N).
        gain (Tensor): change of the element from a black to a white image, float32 (N,); 0 for padding.
        image_index (Tensor): index of the element's image, int64 (N,).
        image_sizes (tuple[tuple[int, int], ...]): (width, height) of every image in pixels.
    """

    shape: torch.Size
    lower: Tensor
    upper: Tensor
    gain: Tensor
    image_index: Tensor
    image_sizes: tuple[Size, ...]

    def in_frame_of(self, image_sizes: tuple[Size, ...]) -> PixelMap:
        """Return the map with its regions scaled to the same images at other (width, height)s."""
        scale = (torch.tensor(image_sizes) / torch.tensor(self.image_sizes))[self.image_index].T
        return replace(self, lower=self.lower * scale, upper=self.upper * scale, image_sizes=image_sizes)

    def _elements_and_cells(self, image: int, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return the elements that sample an image, and the index of the grid cell, row by row, around each center."""
        elements = ((self.gain != 0) & (self.image_index == image)).nonzero().flatten()
        center = (self.lower[:, elements] + self.upper[:, elements]) / 2
        (width, height), (rows, columns) = self.image_sizes[image], grid
        column = (center[0] * (columns / width)).long().clamp(0, columns - 1)
        row = (center[1] * (rows / height)).long().clamp(0, rows - 1)
        return elements, row * columns + column

    def feature_mask(self, segmentations: Sequence[Tensor]) -> Tensor:
        r"""
        Convert segmentations of the images to a Captum ``feature_mask`` for the pixel tensor.

        A segment is one feature wherever it appears, for example in a tile and in the thumbnail.

        Args:

            segmentations (Sequence[Tensor]): One tensor of segment numbers, from 0, per image, int64 (height, width).

        Returns:
            **mask** (*Tensor*):
                int64, in the pixel tensor's shape. The segments of each image are numbered after those of the images
                before it. All padding is one feature, with the last number.

        Raises:
            InvalidInputError: the segmentations do not match the images in number or size, or are not integers from 0.

        Examples::

            >>> from captum_intramodal.geometry import measure_pixels
            >>> prepare = lambda images: processor.image_processor(images=images, return_tensors="pt")
            >>> pixels = measure_pixels(prepare, [image.size])["pixel_values"]
            >>> halves = torch.zeros(image.height, image.width, dtype=torch.int64)
            >>> halves[:, image.width // 2 :] = 1
            >>> mask = pixels.feature_mask([halves])
            >>> mask.shape == pixels.shape, mask.unique().tolist()
            (True, [0, 1])
        """
        sizes = tuple((s.shape[1], s.shape[0]) if s.ndim == 2 else tuple(s.shape) for s in segmentations)
        if sizes != self.image_sizes:
            raise InvalidInputError(
                f"segmentations must be one (height, width) tensor for each of the images of (width, height) "
                f"{list(self.image_sizes)}, got (width, height) {list(sizes)}."
            )
        mask = torch.full((len(self.gain),), -1)
        first = 0
        for image, segmentation in enumerate(segmentations):
            if segmentation.is_floating_point() or int(segmentation.min()) < 0:
                raise InvalidInputError(
                    f"segmentations must hold integers counted from 0, got {segmentation.dtype} with minimum "
                    f"{segmentation.min().item()}."
                )
            elements, cell = self._elements_and_cells(image, (segmentation.shape[0], segmentation.shape[1]))
            mask[elements] = first + segmentation.flatten()[cell].long().cpu()
            first += int(segmentation.max()) + 1
        return mask.masked_fill(mask < 0, first).reshape(self.shape)

    def fold(self, attributions: Tensor, grid: tuple[int, int], image: int = 0) -> Tensor:
        r"""
        Sum attributions of the pixel tensor's elements over the cells of a grid on the original image.

        Args:

            attributions (Tensor): Attributions of the elements, float (\*, shape of the pixel tensor).
            grid (tuple[int, int]): Rows and columns of the map. If it is finer than the processor's sampling, cells
                        stay empty.
            image (int, optional): Index of the image.
                        Default: 0

        Returns:
            **map** (*Tensor*):
                float32 (\*, rows, columns). Its sum is that of the attributions of all elements that sample the image.

        Raises:
            InvalidInputError: the last dimensions of the attributions are not the pixel tensor's shape.

        Examples::

            >>> (pixels,) = adapter.pixel_maps([image.size]).maps.values()
            >>> pixels.fold(torch.ones(pixels.shape), (14, 20)).shape
            torch.Size([14, 20])
        """
        n = len(self.shape)
        if attributions.shape[attributions.ndim - n :] != self.shape:
            raise InvalidInputError(
                f"Attributions of shape {tuple(attributions.shape)} do not end in the shape {tuple(self.shape)} of "
                "the pixel tensor."
            )
        leading = attributions.shape[: attributions.ndim - n]
        values = attributions.reshape(-1, len(self.gain)).float()
        elements, cell = (index.to(values.device) for index in self._elements_and_cells(image, grid))
        folded = torch.zeros(len(values), grid[0] * grid[1], device=values.device)
        return folded.index_add_(1, cell, values[:, elements]).reshape(*leading, *grid)


@dataclass(frozen=True)
class PixelMaps:
    r"""
    Maps of all pixel tensors that the processor computes from the images of one prompt.

    Attributes:
        maps (dict[str, PixelMap]): the maps, by the tensor's name among the model's inputs.
        image_sizes (tuple[tuple[int, int], ...]): (width, height) of every image in pixels.
    """

    maps: dict[str, PixelMap]
    image_sizes: tuple[Size, ...]

    def shows_same(self, other: object) -> bool:
        r"""
        Return whether the processor samples the same images equally at two sizes.

        Args:

            other (object): The maps of the images at another size; the result for anything else is False.

        Returns:
            **same** (*bool*):
                True if the pixel tensors have equal shapes, and their elements equal regions up to 2 % of the image.
        """
        if not isinstance(other, PixelMaps) or {key: m.shape for key, m in self.maps.items()} != {
            key: m.shape for key, m in other.maps.items()
        }:
            return False
        return all(
            bool(torch.allclose(_relative_regions(pixels), _relative_regions(other.maps[key]), atol=0.02, rtol=0))
            for key, pixels in self.maps.items()
        )


def _relative_regions(pixels: PixelMap) -> Tensor:
    """Return the elements' regions as fractions of the image's sides, (4, N); -1 for padding."""
    sizes = torch.tensor(pixels.image_sizes, dtype=torch.float32)[pixels.image_index].T
    return torch.where(pixels.gain != 0, torch.cat([pixels.lower / sizes, pixels.upper / sizes]), -1.0)


def check_sizes(image_sizes: Sequence[Size]) -> tuple[Size, ...]:
    """Return (width, height)s as integers.

    Raises:
        InvalidInputError: there is none, or one is not positive.
    """
    sizes = tuple((int(width), int(height)) for width, height in image_sizes)
    if not sizes or any(min(size) < 1 for size in sizes):
        raise InvalidInputError(
            f"image_sizes must hold the (width, height) of at least one image, got {list(image_sizes)}."
        )
    return sizes
