r"""Which colors, opacities and fonts do the page, the overview and the leaderboard's plots share?"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import matplotlib
import numpy as np
from matplotlib.font_manager import get_font_names
from PIL import Image

__all__ = ["INK", "LINE", "MUTED", "font_families", "heatmap_colors", "resize_grid", "word_peaks"]

# Colors of text, of secondary text and of lines.
INK, MUTED, LINE = "#1c1f26", "#6a7080", "#d9dbe0"


def word_peaks(maps: Sequence[np.ndarray]) -> np.ndarray:
    """Return each word's highest value over all images."""
    return np.max([grids.max((1, 2), initial=0) for grids in maps], axis=0)


def resize_grid(grid: np.ndarray, size: tuple[int, int], filter: Image.Resampling) -> np.ndarray:
    """Resample a map of float values to a size (width, height) with one of Pillow's filters."""
    return np.asarray(Image.fromarray(grid.astype(np.float32)).resize(size, filter))


@lru_cache(maxsize=1)
def heatmap_colors() -> np.ndarray:
    """Return color and opacity for 256 heatmap values, uint8 (256, 4); low values leave the image untouched."""
    value = np.linspace(0, 1, 256)
    table = matplotlib.colormaps["inferno"](0.3 + 0.65 * value)
    ramp = np.clip((value - 0.06) / 0.5, 0, 1)
    table[:, 3] = 0.85 * ramp**2 * (3 - 2 * ramp)
    return np.rint(255 * table).astype(np.uint8)


@lru_cache(maxsize=1)
def font_families() -> list[str]:
    """Return matplotlib's default font, followed by installed fonts for the scripts that it lacks."""
    installed = set(get_font_names())
    wanted = ("Noto Sans CJK SC", "Noto Sans CJK JP", "PingFang SC", "Microsoft YaHei", "Noto Sans Devanagari")
    return ["DejaVu Sans", *(name for name in wanted if name in installed)]
