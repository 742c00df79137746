r"""Which point of which image every element of the processor's pixel tensors samples: measured, in any layout."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from captum_intramodal.geometry.pixel_map import PixelMap, Prepare, Size, check_sizes
from captum_intramodal.models.families import NUMBERED_PATCHES

__all__ = ["measure_pixels"]

# Elements that pass on less than this fraction of the image's contrast count as padding.
MIN_GAIN = 0.25


def _gray(rows: np.ndarray, columns: np.ndarray) -> Image.Image:
    """Gray image with the values (0 to 255) that vary along one of the axes."""
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
    count = cells.amax(dim=1, keepdim=True)  # columns and rows of each image
    image = torch.arange(len(patches))[:, None, None].expand(patches.shape)
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
        image_index=image.flatten(),
        image_sizes=tuple(sizes),
    )


def measure_pixels(prepare: Prepare, sizes: Sequence[Size]) -> dict[str, PixelMap]:
    r"""
    Measures what every element of every float tensor that the processor makes of images samples, by running the
    processor on synthetic ones: black, white, a ramp and two waves per axis.

    Args:

        prepare (Callable): From a list of RGB images of the given sizes to the model's inputs.
        sizes (Sequence[tuple[int, int]]): (width, height) of each image.

    Returns:
        **maps** (*dict*):
            By the tensor's name among the inputs; tensors that do not follow the images are left out.

    Raises:
        ValueError: no image; the tensors' shapes depend on what the images show, or their values do not follow
            brightness linearly, as where a processor normalizes each image by its own contrast.

    Examples::

        >>> prepare = lambda images: processor.image_processor(images=images, return_tensors="pt")
        >>> pixels = measure_pixels(prepare, [(320, 224)])["pixel_values"]
        >>> mask = pixels.feature_mask([segmentation])       # int64, of the shape of pixel_values
    """
    sizes = check_sizes(sizes)

    def constant(levels: Sequence[float]) -> dict[str, Tensor]:
        images = [_gray(np.full(h, v), np.zeros(w)) for (w, h), v in zip(sizes, levels, strict=True)]
        return run(images)

    def pattern(axis: int, profile_of: Callable[[np.ndarray, int], np.ndarray]) -> dict[str, Tensor]:
        images = []
        for size in sizes:
            profile = profile_of(np.arange(size[axis]) + 0.5, size[axis])
            zeros = np.zeros(size[1 - axis])
            images.append(_gray(zeros, profile) if axis == 0 else _gray(profile, zeros))
        return run(images)

    def run(images: list[Image.Image]) -> dict[str, Tensor]:
        inputs = prepare(images)
        return {k: v.float().cpu() for k, v in inputs.items() if isinstance(v, Tensor) and v.is_floating_point()}

    black, white = constant([0.0] * len(sizes)), constant([255.0] * len(sizes))
    numbered = {key: _numbered_patches(black.pop(key), sizes) for key in NUMBERED_PATCHES if key in black}
    gains: dict[str, Tensor] = {}
    for key, low in black.items():
        high = white.get(key)
        if high is None or high.shape != low.shape:
            raise ValueError(
                f"The processor returns {key!r} of shape {tuple(low.shape)} for black images and "
                f"{None if high is None else tuple(high.shape)} for white ones of the same sizes {list(sizes)}; it "
                "crops by content, so its tokens have no fixed boxes."
            )
        gain = torch.where((high - low).isfinite(), high - low, 0.0).flatten()
        # Where a resize mixes image and padding, 8 bits no longer resolve the image's share.
        gain = gain.masked_fill(gain.abs() < MIN_GAIN * gain.abs().max(), 0.0)
        if bool((gain != 0).any()):
            gains[key] = gain
    if numbered and not gains:
        return numbered
    if not gains:
        shapes = {key: tuple(value.shape) for key, value in black.items()}
        raise ValueError(
            f"None of the processor's {len(shapes)} float tensors {shapes} differs between black and white images: "
            "it normalizes every image by its own contrast, or prepare ignores the images it is given."
        )

    def level(results: Mapping[str, Tensor], key: str) -> Tensor:
        result = results.get(key)
        if result is None or result.shape != black[key].shape:
            raise ValueError(f"The shape of the processor's {key!r} depends on the image's content; no fixed boxes.")
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
                    f"The processor's {key!r} does not follow the image's brightness linearly, so the pixels that "
                    "its elements sample cannot be told; does it normalize every image by its own contrast?"
                )
            half = torch.zeros_like(position)
            half[seen] = _spacing(position[seen], float(lengths.max())) / 2
            lower, upper = position - half, position + half
            # A resampling filter is cut off at the image's border, which pulls the outermost elements inwards.
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


# Images of more pixels than this are measured on reduced ones where the processor shrinks them anyway.
LARGE = 1 << 20


def reduced_sizes(prepare: Prepare, sizes: tuple[Size, ...]) -> tuple[Size, ...]:
    """Smaller sizes with the same geometry: the processor makes tensors of the same shapes, and still shrinks them."""
    n_pixels = sum(width * height for width, height in sizes)
    if n_pixels <= LARGE:
        return sizes

    def shapes(sizes: tuple[Size, ...]) -> dict[str, torch.Size]:
        inputs = prepare([Image.new("RGB", size) for size in sizes])
        return {k: v.shape for k, v in inputs.items() if isinstance(v, Tensor) and v.is_floating_point()}

    original = shapes(sizes)
    if any(key in NUMBERED_PATCHES for key in original):  # As many patches of another image may lie otherwise.
        return sizes
    # What the model sees, at least: more where the processor repeats pixels (frames, a thumbnail).
    kept = sum(shape.numel() for shape in original.values()) / 3
    factor = math.floor(math.sqrt(n_pixels / (4 * max(kept, 1))))
    smaller = tuple(
        (max(1, round(width / factor)), max(1, round(height / factor))) for width, height in sizes if factor
    )
    return smaller if factor > 1 and shapes(smaller) == original else sizes
