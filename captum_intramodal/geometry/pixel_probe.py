r"""Which pixels does each element of the processor's pixel tensors sample? Measured on synthetic images, in any layout.

:mod:`~captum_intramodal.geometry.measure` describes the method.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from captum_intramodal.errors import NoPixelMapError
from captum_intramodal.geometry.pixel_map import PixelMap, Prepare, Size, check_sizes
from captum_intramodal.models.families import NUMBERED_PATCHES

__all__ = ["measure_pixels"]

# Elements that change with less than this fraction of the image's contrast count as padding.
MIN_GAIN = 0.25
# Images of more pixels than this are measured at a smaller size if the processor shrinks them anyway.
LARGE = 1 << 20


def measure_pixels(prepare: Prepare, sizes: Sequence[Size]) -> dict[str, PixelMap]:
    r"""
    Measure which region of which image each element of the processor's pixel tensors samples.

    The processor runs on synthetic images: black, white, and per axis a ramp and two waves;
    see :mod:`~captum_intramodal.geometry.measure`.

    Args:

        prepare (Callable): Computes the model's inputs from a list of RGB images of the given sizes.
        sizes (Sequence[tuple[int, int]]): (width, height) of each image.

    Returns:
        **maps** (*dict[str, PixelMap]*):
            The map of each float tensor among the inputs that changes with the images, by its name.

    Raises:
        InvalidInputError: ``sizes`` does not hold the size of at least one image.
        NoPixelMapError: the tensors' shapes depend on the images' content, or their values do not follow the images'
            brightness linearly, as after a normalization by each image's own contrast.

    Examples::

        >>> from captum_intramodal.geometry import measure_pixels
        >>> prepare = lambda images: processor.image_processor(images=images, return_tensors="pt")
        >>> pixels = measure_pixels(prepare, [(320, 224)])["pixel_values"]
        >>> len(pixels.gain) == pixels.shape.numel(), pixels.image_sizes
        (True, ((320, 224),))
    """
    sizes = check_sizes(sizes)
    probe = _Probe(prepare, sizes)
    black, white = probe.constant([0.0] * len(sizes)), probe.constant([255.0] * len(sizes))
    numbered = {key: _numbered_patches(black.pop(key), sizes) for key in NUMBERED_PATCHES if key in black}
    gains = {key: gain for key, gain in _measure_gains(black, white, sizes).items() if bool((gain != 0).any())}
    if not gains:
        if numbered:
            return numbered
        shapes = {key: tuple(value.shape) for key, value in black.items()}
        raise NoPixelMapError(
            f"None of the processor's {len(shapes)} float tensors {shapes} differs between black and white images: "
            "it normalizes every image by its own contrast, or prepare ignores the images it is given."
        )
    image_index = {key: torch.zeros(len(gain), dtype=torch.int64) for key, gain in gains.items()}
    for i in range(1, len(sizes)):
        one_white = probe.constant([255.0 if j == i else 0.0 for j in range(len(sizes))])
        for key, gain in gains.items():
            image_index[key][_responses(key, one_white, black, gain) > 0.5] = i
    x, y = (_measure_axis(probe, black, gains, image_index, axis) for axis in (0, 1))
    return numbered | {
        key: PixelMap(
            shape=black[key].shape,
            lower=torch.stack([x[key][0], y[key][0]]),
            upper=torch.stack([x[key][1], y[key][1]]),
            gain=gain,
            image_index=image_index[key],
            image_sizes=tuple(sizes),
        )
        for key, gain in gains.items()
    }


class _Probe:
    """A processor, and the synthetic gray images on which it runs."""

    def __init__(self, prepare: Prepare, sizes: tuple[Size, ...]) -> None:
        self.prepare = prepare
        self.sizes = sizes

    def constant(self, levels: Sequence[float]) -> dict[str, Tensor]:
        """Process images that are constant, with one gray level (0 to 255) each."""
        return self._run([_gray(np.full(h, v), np.zeros(w)) for (w, h), v in zip(self.sizes, levels, strict=True)])

    def varying(self, axis: int, profile_of: Callable[[np.ndarray, int], np.ndarray]) -> dict[str, Tensor]:
        """Process images that vary along one axis: the profile maps the pixels' centers and the length to levels."""
        images = []
        for size in self.sizes:
            profile = profile_of(np.arange(size[axis]) + 0.5, size[axis])
            zeros = np.zeros(size[1 - axis])
            images.append(_gray(zeros, profile) if axis == 0 else _gray(profile, zeros))
        return self._run(images)

    def _run(self, images: list[Image.Image]) -> dict[str, Tensor]:
        return {key: value.float().cpu() for key, value in _float_tensors(self.prepare, images).items()}


def _float_tensors(prepare: Prepare, images: list[Image.Image]) -> dict[str, Tensor]:
    """Return the float tensors among the inputs that are computed from some images."""
    inputs = prepare(images)
    return {k: v for k, v in inputs.items() if isinstance(v, Tensor) and v.is_floating_point()}


def _gray(rows: np.ndarray, columns: np.ndarray) -> Image.Image:
    """Return a gray image whose levels (0 to 255) are the sum of a profile along each axis."""
    values = np.broadcast_to(rows[:, None] + columns[None, :], (len(rows), len(columns)))
    return Image.fromarray(np.rint(values).clip(0, 255).astype(np.uint8)).convert("RGB")


def _numbered_patches(patches: Tensor, sizes: Sequence[Size]) -> PixelMap:
    """Return the map of patches that begin with their row and column; all elements of a patch have its box."""
    cells = patches[:, :, :2].long()
    count = cells.amax(dim=1, keepdim=True)  # Rows and columns of each image.
    image = torch.arange(len(patches))[:, None, None].expand(patches.shape)
    unit = torch.tensor([[h, w] for w, h in sizes])[:, None] / count
    lower, upper = (cells - 1) * unit, cells * unit
    gain = (cells[..., :1] > 0).float().expand(patches.shape).clone()
    gain[:, :, :2] = 0

    def per_element(edges: Tensor) -> Tensor:
        return edges.flip(-1).permute(2, 0, 1)[..., None].expand(2, *patches.shape).reshape(2, -1)

    return PixelMap(
        shape=patches.shape,
        lower=per_element(lower),
        upper=per_element(upper),
        gain=gain.flatten(),
        image_index=image.flatten(),
        image_sizes=tuple(sizes),
    )


def _measure_gains(
    black: Mapping[str, Tensor], white: Mapping[str, Tensor], sizes: Sequence[Size]
) -> dict[str, Tensor]:
    """Return by how much each element changes from black to white images, float32 (N,) by tensor; 0 for padding."""
    gains = {}
    for key, low in black.items():
        high = white.get(key)
        if high is None or high.shape != low.shape:
            raise NoPixelMapError(
                f"The processor returns {key!r} of shape {tuple(low.shape)} for black images and "
                f"{None if high is None else tuple(high.shape)} for white ones of the same sizes {list(sizes)}; it "
                "crops by content, so its elements have no fixed place in the image."
            )
        gain = torch.where((high - low).isfinite(), high - low, 0.0).flatten()
        # If a resize mixes image and padding, 8 bits do not resolve a small share of the image.
        gains[key] = gain.masked_fill(gain.abs() < MIN_GAIN * gain.abs().max(), 0.0)
    return gains


def _responses(key: str, processed: Mapping[str, Tensor], black: Mapping[str, Tensor], gain: Tensor) -> Tensor:
    """Return by which fraction of its gain each element of one tensor responds to processed images, float32 (N,)."""
    result = processed.get(key)
    if result is None or result.shape != black[key].shape:
        raise NoPixelMapError(
            f"The processor returns {key!r} of shape {tuple(black[key].shape)} for black images and "
            f"{None if result is None else tuple(result.shape)} for a pattern of the same size; it crops by content, "
            "so its elements have no fixed place in the image."
        )
    return torch.where(gain != 0, (result - black[key]).flatten() / gain, 0.0)


def _measure_axis(
    probe: _Probe,
    black: Mapping[str, Tensor],
    gains: Mapping[str, Tensor],
    image_index: Mapping[str, Tensor],
    axis: int,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the edges of each element's region along an axis in pixels, two float32 (N,) by tensor."""
    lengths = torch.tensor([float(size[axis]) for size in probe.sizes])
    periods = torch.tensor([_wave_period(size[axis]) for size in probe.sizes])
    ramp = probe.varying(axis, lambda t, n: 255 * t / n)
    sine = probe.varying(axis, lambda t, n: 127.5 + 127.5 * np.sin(2 * np.pi * t / _wave_period(n)))
    cosine = probe.varying(axis, lambda t, n: 127.5 + 127.5 * np.cos(2 * np.pi * t / _wave_period(n)))
    edges = {}
    for key, gain in gains.items():
        length, period = lengths[image_index[key]], periods[image_index[key]]
        # The ramp determines the period of the wave around a point, and the wave's phase the place in the period: so 8
        # bits resolve a fraction of a pixel, and a resize that dampens the wave does not shift its phase.
        coarse = _responses(key, ramp, black, gain) * length
        y, x = (_responses(key, wave, black, gain) - 0.5 for wave in (sine, cosine))
        phase = torch.atan2(y, x) / (2 * math.pi) * period
        position = coarse + torch.remainder(phase - coarse + period / 2, period) - period / 2
        samples = gain != 0
        if bool(((position < -period / 4) | (position > length + period / 4))[samples].any()):
            raise NoPixelMapError(
                f"The processor's {key!r} does not follow the image's brightness linearly, so the pixels that its "
                "elements sample cannot be measured. Some processors normalize every image by its own contrast; turn "
                "that off if the processor has an option for it."
            )
        half = torch.zeros_like(position)
        half[samples] = _pitch(position[samples], float(lengths.max())) / 2
        lower, upper = position - half, position + half
        # A resampling filter is cut off at the image's border, which moves the outermost elements inwards.
        slack = half.clamp_min(0.5)
        lower = torch.where(lower < slack, 0.0, lower)
        upper = torch.where(upper > length - slack, length, upper)
        edges[key] = lower, upper
    return edges


def _wave_period(length: int) -> float:
    """Return a period that is long compared with any sampling pitch, and short enough for 8 bits to resolve a pixel."""
    return max(64.0, length / 8)


def _pitch(coordinates: Tensor, length: float) -> Tensor:
    """Return the sampling pitch around every element, from the coordinates of its neighbors in memory.

    It is the smaller of the distances to the previous and to the next run of equal coordinates, in any layout that
    keeps rows or columns of pixels together; the jumps between rows, channels and tiles are larger.
    """
    new = torch.cat([torch.ones(1, dtype=torch.bool), coordinates.diff().abs() > 0.02])
    runs = coordinates[new]
    gaps = torch.cat([torch.tensor([length]), runs.diff().abs(), torch.tensor([length])])
    nearest = torch.minimum(gaps[:-1], gaps[1:]).clamp_max(length)
    return nearest[new.cumsum(0) - 1]


def reduced_sizes(prepare: Prepare, sizes: tuple[Size, ...]) -> tuple[Size, ...]:
    """Return smaller sizes with the same geometry: pixel tensors keep their shapes, and images are still shrunk."""
    n_pixels = sum(width * height for width, height in sizes)
    if n_pixels <= LARGE:
        return sizes

    def shapes(sizes: tuple[Size, ...]) -> dict[str, torch.Size]:
        return {k: v.shape for k, v in _float_tensors(prepare, [Image.new("RGB", size) for size in sizes]).items()}

    original = shapes(sizes)
    if any(key in NUMBERED_PATCHES for key in original):  # Their grid may differ in spite of equal shapes.
        return sizes
    # At most as many distinct pixels reach the model: processors may repeat some (frames, a thumbnail).
    kept = sum(shape.numel() for shape in original.values()) / 3
    factor = math.floor(math.sqrt(n_pixels / (4 * max(kept, 1))))
    smaller = tuple(
        (max(1, round(width / factor)), max(1, round(height / factor))) for width, height in sizes if factor
    )
    return smaller if factor > 1 and shapes(smaller) == original else sizes
