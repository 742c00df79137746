r"""TODO."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import matplotlib
import numpy as np
from PIL import Image

__all__ = []


def word_peaks(maps: Sequence[np.ndarray]) -> np.ndarray:
    """The highest value of each word over all images."""
    return np.max([grids.max((1, 2), initial=0) for grids in maps], axis=0)


def resize_grid(grid: np.ndarray, size: tuple[int, int], filter: Image.Resampling) -> np.ndarray:
    return np.asarray(Image.fromarray(grid.astype(np.float32)).resize(size, filter))


# --- colors and the sheet --------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def color_table() -> np.ndarray:
    """Color and opacity of the 256 heatmap values, uint8 (256, 4): weak values leave the image untouched."""
    value = np.linspace(0, 1, 256)
    table = matplotlib.colormaps["inferno"](0.3 + 0.65 * value)
    ramp = np.clip((value - 0.06) / 0.5, 0, 1)
    table[:, 3] = 0.85 * ramp**2 * (3 - 2 * ramp)
    return np.rint(255 * table).astype(np.uint8)
