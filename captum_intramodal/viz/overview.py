r"""How are the heatmaps of all words shown at once, in one image?"""

from __future__ import annotations

import io
import math
import os
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unicodedata import east_asian_width

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from PIL import Image

from captum_intramodal._utils.io import write_atomically
from captum_intramodal.errors import InvalidInputError
from captum_intramodal.viz.page import ExplanationLike
from captum_intramodal.viz.style import INK, LINE, MUTED, font_families, heatmap_colors, resize_grid, word_peaks

__all__ = ["draw_overview"]

# Most words on the overview.
MAX_WORDS = 60


def draw_overview(explanation: ExplanationLike, path: str | os.PathLike[str], columns: int | None = None) -> None:
    r"""
    Draw one image: the input, and the input with the heatmap of each word of the answer.

    All heatmaps share one scale, so colors can be compared between words. Words without a letter or digit
    (punctuation) are left out. Of very long answers, the 60 words with the strongest heatmaps are drawn, in reading
    order. The footer says how many words were left out.

    Args:

        explanation (Explanation): The explanation to draw, with at least one image.
        path (str or PathLike): The file to write, in any format that matplotlib supports, by its suffix. It is replaced
                    atomically.
        columns (int, optional): Panels per row.
                    Default: as many as make the overview a landscape format

    Raises:
        InvalidInputError: the explanation has no image.

    Examples::

        >>> from captum_intramodal.viz.overview import draw_overview
        >>> draw_overview(explanation, "overview.png")
    """
    if not explanation.images:
        raise InvalidInputError("An overview needs an explanation with at least one image, got none.")
    maps = explanation.word_maps("answer")
    peaks = word_peaks(maps)
    lexical = [i for i, word in enumerate(explanation.words) if any(map(str.isalnum, word.text))]
    drawn = sorted(sorted(lexical, key=lambda i: -peaks[i])[:MAX_WORDS])

    strongest = float(peaks.max(initial=0)) or 1.0
    panels = [_Panel(_overlay(explanation.images, None), "input", None)]
    for i in drawn:
        word = explanation.words[i]
        pixels = _overlay(explanation.images, [grids[i] / strongest for grids in maps])
        panels.append(_Panel(pixels, word.text.strip(), word.probability))
    omitted = {"Punctuation": len(explanation.words) - len(lexical), "Weakest words": len(lexical) - len(drawn)}
    note = " ".join(f"{kind} left out: {count}." for kind, count in omitted.items() if count)
    figure = _draw_figure(panels, explanation.prompt, explanation.answer, note, columns)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=Path(path).suffix[1:] or "png")
    write_atomically(path, buffer.getvalue())


class _Panel(NamedTuple):
    pixels: np.ndarray
    title: str
    probability: float | None


def _overlay(images: Sequence[Image.Image], heat: Sequence[np.ndarray] | None, height: int = 300) -> np.ndarray:
    """Draw the images side by side at one height, below their heatmaps with values in [0, 1]; RGB."""
    parts: list[np.ndarray] = []
    for number, image in enumerate(images):
        size = max(1, round(image.width * height / image.height)), height
        pixels = np.asarray(image.convert("RGB").resize(size, Image.Resampling.LANCZOS), np.float32)
        if heat is not None:
            gray = pixels @ np.array([[0.299], [0.587], [0.114]], np.float32)
            pixels = gray + 0.4 * (pixels - gray)
            # As on the page: Pillow's bicubic filter is Catmull-Rom, and values are interpolated, not colors.
            values = np.clip(resize_grid(heat[number], size, Image.Resampling.BICUBIC), 0, 1)
            colors = heatmap_colors()[np.rint(255 * values).astype(np.uint8)].astype(np.float32)
            alpha = colors[..., 3:] / 255
            pixels = pixels * (1 - alpha) + colors[..., :3] * alpha
        if number:
            parts.append(np.full((height, height // 30, 3), 255, np.float32))
        parts.append(pixels)
    return np.rint(np.concatenate(parts, axis=1)).astype(np.uint8)


def _best_columns(n_panels: int, aspect: float) -> int:
    """Choose the panels per row: a format near 3:2 with few empty cells in the last row."""

    def cost(columns: int) -> float:
        rows = math.ceil(n_panels / columns)
        shape = columns * aspect / (rows * 1.2)
        return abs(math.log(shape / 1.5)) + 0.8 * (columns * rows - n_panels) / n_panels

    return min(range(1, n_panels + 1), key=cost)


@dataclass
class _Layout:
    """Positions on the figure, all lengths in inches from its top left corner."""

    n_panels: int
    aspect: float
    columns: int
    prompt: str
    answer: str

    gap = 0.16
    title_height = 0.34
    margin = 0.4
    footer = 0.42

    def __post_init__(self) -> None:
        rows = math.ceil(self.n_panels / self.columns)
        self.panel_height = min(max(1.5, 1.4 / self.aspect), max(1.0, 3.0 / self.aspect))
        self.panel_width = self.panel_height * self.aspect
        panels = self.columns * self.panel_width
        self.width = max(2 * self.margin + panels + (self.columns - 1) * self.gap, 6.4)
        self.left = (self.width - panels - (self.columns - 1) * self.gap) / 2
        # Letters of East Asian scripts are twice as wide.
        wide = any(east_asian_width(letter) in "WF" for letter in self.prompt + self.answer)
        per_line = int((self.width - 2 * self.margin) * (6 if wide else 12.5))
        self.prompt_lines = textwrap.wrap(self.prompt, per_line, max_lines=3, placeholder=" …")
        self.answer_lines = textwrap.wrap(self.answer, int(per_line * 0.84), max_lines=6, placeholder=" …")
        self.header = self.margin + 0.2 * len(self.prompt_lines) + 0.25 * len(self.answer_lines) + 0.12
        row_height = self.title_height + self.panel_height
        self.height = self.header + rows * row_height + (rows - 1) * self.gap + self.footer + self.margin

    def place(self, number: int) -> tuple[float, float]:
        """Return x and y of a panel's top left corner, below its title."""
        row, column = divmod(number, self.columns)
        x = self.left + column * (self.panel_width + self.gap)
        y = self.header + row * (self.title_height + self.panel_height + self.gap) + self.title_height
        return x, y


def _draw_figure(panels: Sequence[_Panel], prompt: str, answer: str, note: str, columns: int | None) -> Figure:
    """Draw prompt, answer, panels and color scale."""
    aspect = panels[0].pixels.shape[1] / panels[0].pixels.shape[0]
    layout = _Layout(len(panels), aspect, columns or _best_columns(len(panels), aspect), prompt, answer)
    figure = Figure(figsize=(layout.width, layout.height), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    y = layout.margin
    for lines, size, color, step in (
        (layout.prompt_lines, 10, MUTED, 0.2),
        (layout.answer_lines, 12.5, INK, 0.25),
    ):
        for line in lines:
            _write(figure, layout, (layout.margin, y), line, size, color, va="top")
            y += step
    for number, panel in enumerate(panels):
        _draw_panel(figure, layout, number, panel)
    _draw_color_scale(figure, layout, note)
    return figure


def _draw_panel(figure: Figure, layout: _Layout, number: int, panel: _Panel) -> None:
    """Draw one panel with its title and probability; number 0 is the input."""
    x, y = layout.place(number)
    width, height = layout.panel_width, layout.panel_height
    box = (x / layout.width, 1 - (y + height) / layout.height, width / layout.width, height / layout.height)
    axes = figure.add_axes(box)
    axes.imshow(panel.pixels, aspect="auto", interpolation="bilinear")
    axes.set_axis_off()
    room = max(4, int(width * 10) - (5 if panel.probability is not None else 0))
    title = panel.title if len(panel.title) <= room else panel.title[: room - 1] + "…"
    color, weight = (INK, "bold") if number else (MUTED, "normal")
    _write(figure, layout, (x, y - 0.09), title, 10.5, color, weight)
    if panel.probability is not None:
        percent = f"{100 * panel.probability:.0f} %" if panel.probability >= 0.01 else "< 1 %"
        _write(figure, layout, (x + width, y - 0.09), percent, 8.5, MUTED, ha="right")


def _draw_color_scale(figure: Figure, layout: _Layout, note: str) -> None:
    """Draw the legend of the heatmaps' colors, followed by a note."""
    x, y = layout.margin, layout.height - layout.margin - 0.05
    bar = figure.add_axes((x / layout.width, 1 - y / layout.height, 1.3 / layout.width, 0.11 / layout.height))
    bar.imshow(heatmap_colors()[None], aspect="auto")
    bar.set_xticks([])
    bar.set_yticks([])
    bar.spines[:].set_color(LINE)
    scale = "none … strongest word, one scale for all words. % is the probability of the word."
    _write(figure, layout, (x + 1.45, y), f"{scale} {note}", 8, MUTED)


def _write(
    figure: Figure,
    layout: _Layout,
    position: tuple[float, float],
    text: str,
    size: float,
    color: str,
    weight: str = "normal",
    **alignment: Any,
) -> None:
    """Write text, in which a dollar sign is a dollar sign and not mathematics."""
    font = FontProperties(family=font_families(), size=size, weight=weight)
    x, y = position[0] / layout.width, 1 - position[1] / layout.height
    figure.text(x, y, text, color=color, fontproperties=font, parse_math=False, **alignment)
