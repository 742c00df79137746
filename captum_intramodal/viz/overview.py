r"""TODO."""

from __future__ import annotations

import io
import math
import os
import textwrap
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any
from unicodedata import east_asian_width

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, get_font_names
from PIL import Image

from captum_intramodal._utils.io import write_atomically
from captum_intramodal.viz.page import ExplanationLike
from captum_intramodal.viz.style import color_table, resize_grid, word_peaks

__all__ = ["draw_overview", "fonts"]

# Most panels on the overview sheet.
SHEET_WORDS = 60


def draw_overview(explanation: ExplanationLike, path: str | os.PathLike[str], columns: int | None = None) -> None:
    r"""Draws one sheet: the image, and the image with the heatmap of each word of the answer.

    All heatmaps share one scale, so that the colors of different words can be compared. Words without a letter or
    digit (punctuation) are left out; of a very long answer the 60 words with the strongest heatmaps are drawn, in
    reading order. The foot of the sheet says how many were left out.

    Args:
        explanation (Explanation): the explanation to draw; it needs at least one image.
        path (str or PathLike): the file to write, by its ending any format that matplotlib can write. It is
            replaced in one step.
        columns (int, optional): panels per row.
            Default: as many as give the sheet a landscape shape

    Raises:
        ValueError: where the explanation has no image.

    Examples::

        >>> draw_overview(explanation, "overview.png")
    """
    if not explanation.images:
        raise ValueError("the overview needs at least one image")
    maps = explanation.word_maps("answer")
    peaks = word_peaks(maps)
    spoken = [i for i, word in enumerate(explanation.words) if any(map(str.isalnum, word.text))]
    shown = sorted(sorted(spoken, key=lambda i: -peaks[i])[:SHEET_WORDS])

    strongest = float(peaks.max(initial=0)) or 1.0
    panels: list[tuple[np.ndarray, str, float | None]] = [(_panel(explanation.images, None), "input", None)]
    for i in shown:
        heat = [grids[i] / strongest for grids in maps]
        word = explanation.words[i]
        panels.append((_panel(explanation.images, heat), word.text.strip(), word.probability))
    counts = {"Punctuation": len(explanation.words) - len(spoken), "Weakest words": len(spoken) - len(shown)}
    left_out = [f"{what} left out: {count}." for what, count in counts.items() if count]
    figure = _sheet(panels, explanation.prompt, explanation.answer, " ".join(left_out), columns)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=Path(path).suffix[1:] or "png")
    write_atomically(path, buffer.getvalue())


def _panel(images: Sequence[Image.Image], heat: Sequence[np.ndarray] | None, height: int = 300) -> np.ndarray:
    """The images side by side at one height, with their heatmaps (values in [0, 1]) over them; RGB."""
    parts: list[np.ndarray] = []
    for number, image in enumerate(images):
        size = max(1, round(image.width * height / image.height)), height
        pixels = np.asarray(image.convert("RGB").resize(size, Image.Resampling.LANCZOS), np.float32)
        if heat is not None:
            gray = pixels @ np.array([[0.299], [0.587], [0.114]], np.float32)
            pixels = gray + 0.4 * (pixels - gray)
            # Pillow's bicubic filter is the page's: values are interpolated before they become colors.
            values = np.clip(resize_grid(heat[number], size, Image.Resampling.BICUBIC), 0, 1)
            colors = color_table()[np.rint(255 * values).astype(np.uint8)].astype(np.float32)
            alpha = colors[..., 3:] / 255
            pixels = pixels * (1 - alpha) + colors[..., :3] * alpha
        if number:
            parts.append(np.full((height, height // 30, 3), 255, np.float32))
        parts.append(pixels)
    return np.rint(np.concatenate(parts, axis=1)).astype(np.uint8)


def _columns(n_panels: int, aspect: float) -> int:
    """Panels per row: a sheet near 3:2, with few empty cells in the last row."""

    def cost(columns: int) -> float:
        rows = math.ceil(n_panels / columns)
        shape = columns * aspect / (rows * 1.2)
        return abs(math.log(shape / 1.5)) + 0.8 * (columns * rows - n_panels) / n_panels

    return min(range(1, n_panels + 1), key=cost)


@lru_cache(maxsize=1)
def fonts() -> list[str]:
    """The default font, and the installed ones that know the scripts it lacks."""
    installed = set(get_font_names())
    wanted = ("Noto Sans CJK SC", "Noto Sans CJK JP", "PingFang SC", "Microsoft YaHei", "Noto Sans Devanagari")
    return ["DejaVu Sans", *(name for name in wanted if name in installed)]


def _sheet(
    panels: Sequence[tuple[np.ndarray, str, float | None]],
    prompt: str,
    answer: str,
    note: str,
    columns: int | None,
) -> Figure:
    """Lays the panels out on a figure; all lengths in inches."""
    ink, muted = "#1c1f26", "#6a7080"
    aspect = panels[0][0].shape[1] / panels[0][0].shape[0]
    columns = columns or _columns(len(panels), aspect)
    rows = math.ceil(len(panels) / columns)
    panel_height = min(max(1.5, 1.4 / aspect), max(1.0, 3.0 / aspect))
    panel_width = panel_height * aspect
    gap, title_height, margin, foot = 0.16, 0.34, 0.4, 0.42
    width = max(2 * margin + columns * panel_width + (columns - 1) * gap, 6.4)
    left = (width - columns * panel_width - (columns - 1) * gap) / 2
    # Letters per line; those of East Asian scripts are twice as wide.
    wide = any(east_asian_width(letter) in "WF" for letter in prompt + answer)
    per_line = int((width - 2 * margin) * (6 if wide else 12.5))
    prompt_lines = textwrap.wrap(prompt, per_line, max_lines=3, placeholder=" …")
    answer_lines = textwrap.wrap(answer, int(per_line * 0.84), max_lines=6, placeholder=" …")
    head = margin + 0.2 * len(prompt_lines) + 0.25 * len(answer_lines) + 0.12
    height = head + rows * (title_height + panel_height) + (rows - 1) * gap + foot + margin

    figure = Figure(figsize=(width, height), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)

    def write(x: float, y: float, text: str, size: float, color: str, weight: str = "normal", **kwargs: Any) -> Any:
        font = FontProperties(family=fonts(), size=size, weight=weight)
        # A dollar sign in an answer is a dollar sign, not mathematics.
        return figure.text(
            x / width, 1 - y / height, text, color=color, fontproperties=font, parse_math=False, **kwargs
        )

    y = margin
    for lines, size, color, step in ((prompt_lines, 10, muted, 0.2), (answer_lines, 12.5, ink, 0.25)):
        for line in lines:
            write(margin, y, line, size, color, va="top")
            y += step

    for number, (pixels, word, probability) in enumerate(panels):
        row, column = divmod(number, columns)
        x = left + column * (panel_width + gap)
        y = head + row * (title_height + panel_height + gap) + title_height
        axes = figure.add_axes((x / width, 1 - (y + panel_height) / height, panel_width / width, panel_height / height))
        axes.imshow(pixels, aspect="auto", interpolation="bilinear")
        axes.set_axis_off()
        room = max(4, int(panel_width * 10) - (5 if probability is not None else 0))
        shown = word if len(word) <= room else word[: room - 1] + "…"
        write(x, y - 0.09, shown, 10.5, ink if number else muted, "bold" if number else "normal")
        if probability is not None:
            percent = f"{100 * probability:.0f} %" if probability >= 0.01 else "< 1 %"
            write(x + panel_width, y - 0.09, percent, 8.5, muted, ha="right")

    y = height - margin - 0.05
    bar = figure.add_axes((margin / width, 1 - y / height, 1.3 / width, 0.11 / height))
    bar.imshow(color_table()[None], aspect="auto")
    bar.set_xticks([])
    bar.set_yticks([])
    bar.spines[:].set_color("#d9dbe0")
    scale = "none … strongest word, one scale for all words. % is the probability of the word."
    write(margin + 1.45, y, f"{scale} {note}", 8, muted)
    return figure
