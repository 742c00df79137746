r"""Which point of which picture every element of the processor's pixel tensors samples: measured, in any layout."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

__all__ = ["PixelMap", "PixelMaps", "Prepare", "Size", "check_sizes", "measure_pixels"]

Prepare = Callable[[list[Image.Image]], Mapping[str, Any]]
Size = tuple[int, int]

# Pixel tensors whose patches say where they are, as Pix2Struct's: (picture, patch, 2 + elements), each of which begins
# with the patch's row and column, counted from 1 and 0 for padding. They are normalised by each picture's own contrast.
NUMBERED_PATCHES = ("flattened_patches",)

# Elements that pass on less than this fraction of the picture's contrast count as padding.
MIN_GAIN = 0.25


@dataclass(frozen=True)
class PixelMap:
    r"""What the N elements of one of the processor's pixel tensors sample, in the tensor's memory order.

    Attributes:
        shape (torch.Size): of the tensor.
        lower (Tensor): left and upper end of each element, in pixels of its picture, float32 (2, N): x, y.
        upper (Tensor): right and lower end, float32 (2, N).
        gain (Tensor): change of the element from a black to a white picture, float32 (N,); 0 for padding.
        image_index (Tensor): the element's picture, int64 (N,).
        image_sizes (tuple): (width, height) of every picture in pixels.
    """

    shape: torch.Size
    lower: Tensor
    upper: Tensor
    gain: Tensor
    image_index: Tensor
    image_sizes: tuple[Size, ...]

    def in_frame_of(self, image_sizes: tuple[Size, ...]) -> PixelMap:
        """The same elements on the same pictures at other (width, height)s."""
        scale = (torch.tensor(image_sizes) / torch.tensor(self.image_sizes))[self.image_index].T
        return replace(self, lower=self.lower * scale, upper=self.upper * scale, image_sizes=image_sizes)

    def _cells(self, image: int, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Elements that show a picture, and the cell, counted row by row, that each one's centre lies in."""
        shown = ((self.gain != 0) & (self.image_index == image)).nonzero().flatten()
        centre = (self.lower[:, shown] + self.upper[:, shown]) / 2
        (width, height), (rows, columns) = self.image_sizes[image], grid
        column = (centre[0] * (columns / width)).long().clamp(0, columns - 1)
        row = (centre[1] * (rows / height)).long().clamp(0, rows - 1)
        return shown, row * columns + column

    def feature_mask(self, segmentations: Sequence[Tensor]) -> Tensor:
        r"""
        Segments of the pictures as a Captum ``feature_mask`` over the pixel tensor: a segment is one feature, wherever
        it appears, in tiles and thumbnail at once.

        Args:

            segmentations (Sequence[Tensor]): One int64 (height, width) tensor per picture, segments counted from 0.

        Returns:
            **mask** (*Tensor*):
                int64, of the tensor's shape. The segments of the second picture are counted on from those of the first;
                padding is one feature more, the last.

        Raises:
            ValueError: not one segmentation of its picture's size for each picture, or negative segments.

        Examples::

            >>> mask = pixels.feature_mask([segmentation])
            >>> FeatureAblation(forward).attribute(pixel_values, feature_mask=mask[None])
        """
        sizes = tuple((s.shape[1], s.shape[0]) if s.ndim == 2 else tuple(s.shape) for s in segmentations)
        if sizes != self.image_sizes:
            raise ValueError(f"Segmentations of (width, height) {sizes} for pictures of {self.image_sizes}.")
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
        Attributions of the tensor's elements, summed up in the frame of the original picture.

        Args:

            attributions (Tensor): float (*, shape of the pixel tensor).
            grid (tuple[int, int]): Rows and columns of the map; no finer than the processor's sampling, else cells stay
                        empty.
            image (int, optional): The picture.
                        Default: 0

        Returns:
            **map** (*Tensor*):
                float32 (*, rows, columns); its sum is that of the attributions of all elements that show the picture.

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
    r"""All pixel tensors that the processor makes of the pictures of one prompt.

    Attributes:
        maps (dict[str, PixelMap]): by the tensor's name among the model's inputs.
        image_sizes (tuple): (width, height) of every picture in pixels.
    """

    maps: dict[str, PixelMap]
    image_sizes: tuple[Size, ...]

    def shows_same(self, other: object) -> bool:
        """Whether two sizes of the same pictures become the same tensors, up to 2 % of the pictures' sides."""
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


def _gray(rows: np.ndarray, columns: np.ndarray) -> Image.Image:
    """Gray picture with the values (0 to 255) that vary along one of the axes."""
    values = np.broadcast_to(rows[:, None] + columns[None, :], (len(rows), len(columns)))
    return Image.fromarray(np.rint(values).clip(0, 255).astype(np.uint8)).convert("RGB")


def _wave_period(length: int) -> float:
    """Long against the sampling pitch of any processor, short enough that 8 bits resolve a fraction of a pixel."""
    return max(64.0, length / 8)


def _spacing(coordinates: Tensor, length: float) -> Tensor:
    """Distance of every element to the nearest element with another coordinate next to it in memory.

    The smaller of the distances to the previous and to the next run of equal coordinates is the sampling pitch in any
    layout that keeps rows or columns of pixels together; the jumps between rows, channels and tiles are larger.
    """
    new = torch.cat([torch.ones(1, dtype=torch.bool), coordinates.diff().abs() > 0.02])
    runs = coordinates[new]
    gaps = torch.cat([torch.tensor([length]), runs.diff().abs(), torch.tensor([length])])
    nearest = torch.minimum(gaps[:-1], gaps[1:]).clamp_max(length)
    return nearest[new.cumsum(0) - 1]


def _numbered_patches(patches: Tensor, sizes: Sequence[Size]) -> PixelMap:
    """Pixel map of patches that begin with their row and column; all elements of a patch have its box."""
    cells = patches[:, :, :2].long()
    count = cells.amax(dim=1, keepdim=True)  # columns and rows of each picture
    picture = torch.arange(len(patches))[:, None, None].expand(patches.shape)
    unit = torch.tensor([[h, w] for w, h in sizes])[:, None] / count
    lower, upper = (cells - 1) * unit, cells * unit
    gain = (cells[..., :1] > 0).float().expand(patches.shape).clone()
    gain[:, :, :2] = 0

    def spread(ends: Tensor) -> Tensor:
        return ends.flip(-1).permute(2, 0, 1)[..., None].expand(2, *patches.shape).reshape(2, -1)

    return PixelMap(
        shape=patches.shape,
        lower=spread(lower),
        upper=spread(upper),
        gain=gain.flatten(),
        image_index=picture.flatten(),
        image_sizes=tuple(sizes),
    )


def check_sizes(image_sizes: Sequence[Size]) -> tuple[Size, ...]:
    """(width, height) of at least one picture, each at least one pixel."""
    sizes = tuple((int(width), int(height)) for width, height in image_sizes)
    if not sizes or any(min(size) < 1 for size in sizes):
        raise ValueError(f"image_sizes must hold the (width, height) of at least one picture, got {list(image_sizes)}.")
    return sizes


def measure_pixels(prepare: Prepare, sizes: Sequence[Size]) -> dict[str, PixelMap]:
    r"""
    Measures what every element of every float tensor that the processor makes of pictures samples, by running the
    processor on synthetic ones: black, white, a ramp and two waves per axis.

    Args:

        prepare (Callable): From a list of RGB pictures of the given sizes to the model's inputs.
        sizes (Sequence[tuple[int, int]]): (width, height) of each picture.

    Returns:
        **maps** (*dict*):
            By the tensor's name among the inputs; tensors that do not follow the pictures are left out.

    Raises:
        ValueError: no picture; the tensors' shapes depend on what the pictures show, or their values do not follow
            brightness linearly, as where a processor normalises each picture by its own contrast.

    Examples::

        >>> prepare = lambda images: processor.image_processor(images=images, return_tensors="pt")
        >>> pixels = measure_pixels(prepare, [(320, 224)])["pixel_values"]
        >>> mask = pixels.feature_mask([segmentation])       # int64, of the shape of pixel_values
    """
    sizes = check_sizes(sizes)

    def constant(levels: Sequence[float]) -> dict[str, Tensor]:
        pictures = [_gray(np.full(h, v), np.zeros(w)) for (w, h), v in zip(sizes, levels, strict=True)]
        return run(pictures)

    def pattern(axis: int, profile_of: Callable[[np.ndarray, int], np.ndarray]) -> dict[str, Tensor]:
        pictures = []
        for size in sizes:
            profile = profile_of(np.arange(size[axis]) + 0.5, size[axis])
            zeros = np.zeros(size[1 - axis])
            pictures.append(_gray(zeros, profile) if axis == 0 else _gray(profile, zeros))
        return run(pictures)

    def run(pictures: list[Image.Image]) -> dict[str, Tensor]:
        inputs = prepare(pictures)
        return {k: v.float().cpu() for k, v in inputs.items() if isinstance(v, Tensor) and v.is_floating_point()}

    black, white = constant([0.0] * len(sizes)), constant([255.0] * len(sizes))
    numbered = {key: _numbered_patches(black.pop(key), sizes) for key in NUMBERED_PATCHES if key in black}
    gains: dict[str, Tensor] = {}
    for key, low in black.items():
        high = white.get(key)
        if high is None or high.shape != low.shape:
            raise ValueError(
                f"The processor returns {key!r} of shape {tuple(low.shape)} for black pictures and "
                f"{None if high is None else tuple(high.shape)} for white ones of the same sizes {list(sizes)}; it "
                "crops by content, so its tokens have no fixed boxes."
            )
        gain = torch.where((high - low).isfinite(), high - low, 0.0).flatten()
        # Where a resize mixes picture and padding, 8 bits no longer resolve the picture's share.
        gain = gain.masked_fill(gain.abs() < MIN_GAIN * gain.abs().max(), 0.0)
        if bool((gain != 0).any()):
            gains[key] = gain
    if numbered and not gains:
        return numbered
    if not gains:
        shapes = {key: tuple(value.shape) for key, value in black.items()}
        raise ValueError(
            f"None of the processor's {len(shapes)} float tensors {shapes} differs between black and white pictures: "
            "it normalises every picture by its own contrast, or prepare ignores the pictures it is given."
        )

    def level(results: Mapping[str, Tensor], key: str) -> Tensor:
        result = results.get(key)
        if result is None or result.shape != black[key].shape:
            raise ValueError(f"The shape of the processor's {key!r} depends on the picture's content; no fixed boxes.")
        return torch.where(gains[key] != 0, (result - black[key]).flatten() / gains[key], 0.0)

    owners = {key: torch.zeros(len(gain), dtype=torch.int64) for key, gain in gains.items()}
    for i in range(1, len(sizes)):
        single = constant([255.0 if j == i else 0.0 for j in range(len(sizes))])
        for key in gains:
            owners[key][level(single, key) > 0.5] = i

    extents: dict[str, list[tuple[Tensor, Tensor]]] = {key: [] for key in gains}
    for axis in (0, 1):
        lengths = torch.tensor([float(size[axis]) for size in sizes])
        # The ramp tells which period of the wave a point lies in, and the wave's phase where: 8 bits resolve a fraction
        # of a pixel this way, and a resize that dampens the wave does not shift its phase.
        periods = torch.tensor([_wave_period(size[axis]) for size in sizes])
        ramp = pattern(axis, lambda t, n: 255 * t / n)
        sine = pattern(axis, lambda t, n: 127.5 + 127.5 * np.sin(2 * np.pi * t / _wave_period(n)))
        cosine = pattern(axis, lambda t, n: 127.5 + 127.5 * np.cos(2 * np.pi * t / _wave_period(n)))
        for key, gain in gains.items():
            length, period = lengths[owners[key]], periods[owners[key]]
            coarse = level(ramp, key) * length
            phase = torch.atan2(level(sine, key) - 0.5, level(cosine, key) - 0.5) / (2 * math.pi) * period
            position = coarse + torch.remainder(phase - coarse + period / 2, period) - period / 2
            seen = gain != 0
            if bool(((position < -period / 4) | (position > length + period / 4))[seen].any()):
                raise ValueError(
                    f"The processor's {key!r} does not follow the picture's brightness linearly, so the pixels that "
                    "its elements sample cannot be told; does it normalise every picture by its own contrast?"
                )
            half = torch.zeros_like(position)
            half[seen] = _spacing(position[seen], float(lengths.max())) / 2
            lower, upper = position - half, position + half
            # A resampling filter is cut off at the picture's border, which pulls the outermost elements inwards.
            slack = half.clamp_min(0.5)
            lower = torch.where(lower < slack, 0.0, lower)
            upper = torch.where(upper > length - slack, length, upper)
            extents[key].append((lower, upper))

    return numbered | {
        key: PixelMap(
            shape=black[key].shape,
            lower=torch.stack([low for low, _ in extents[key]]),
            upper=torch.stack([high for _, high in extents[key]]),
            gain=gains[key],
            image_index=owners[key],
            image_sizes=tuple(sizes),
        )
        for key in gains
    }
