r"""How is a leaderboard plotted? Values with intervals, curves, and quality over cost, as SVG inside the page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath
from matplotlib.ticker import LogLocator, NullLocator

from captum_intramodal.evaluation._tables import compare_with_reference, heading, significance
from captum_intramodal.evaluation.records import Column, Comparison, LeaderboardData
from captum_intramodal.metrics.statistics import Interval
from captum_intramodal.viz.style import INK, LINE, MUTED, font_families

__all__ = ["Plot", "Plots", "draw_plots"]

_COLORS = {"▲": "#1f6fb4", "": "#8b919e", "▼": "#d1651a"}
_CURVE_COLORS = ("#1f6fb4", "#d1651a", "#3b8f5a", "#8458a8", "#a8456b", "#7a6a2f")

# Longest label in a plot, in letters.
_LABEL = 32


class Plot(NamedTuple):
    """An image for the page: data URL, size in CSS pixels, alternative text."""

    url: str
    width: int
    height: int
    alt: str


class Plots(NamedTuple):
    """All plots of the page."""

    values: list[Plot]
    curves: list[Plot]
    cost: Plot | None


def draw_plots(board: LeaderboardData) -> Plots:
    """Draw all plots of a leaderboard."""
    with _plot_settings():
        return Plots(_plot_values(board), _plot_curves(board), _plot_cost(board))


def _plot_settings() -> AbstractContextManager[None]:
    """Set up matplotlib for plots that are reproducible to the byte and whose text is never parsed as mathematics."""
    return matplotlib.rc_context(
        {
            "svg.hashsalt": "captum_intramodal", "svg.fonttype": "path", "text.parse_math": False,
            "font.family": font_families(), "font.size": 8.5, "text.color": INK, "axes.labelcolor": MUTED,
            "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left",
            "axes.edgecolor": LINE, "axes.spines.top": False, "axes.spines.right": False,
            "xtick.color": MUTED, "ytick.color": MUTED, "xtick.labelsize": 7.5, "ytick.labelsize": 7.5,
        }
    )  # fmt: skip


def _plot_values(board: LeaderboardData) -> list[Plot]:
    """Draw one panel per column: each explainer's value and interval, colored by the difference from the reference."""
    comparisons = compare_with_reference(board)
    labels, left = list(board.rows), _label_width(board)
    plots = []
    for column in board.columns:
        figure, axes = _axes(left + 2.15, 0.8 + 0.21 * len(labels), left, bottom=0.3)
        for y, label in enumerate(labels):
            cell = board.rows[label].get(column.name)
            if cell is None:
                continue
            color = _color(board, label, column, comparisons)
            if label == board.reference:
                axes.axvline(cell.interval.estimate, color=LINE, linewidth=1, zorder=0)
            axes.hlines(y, cell.interval.low, cell.interval.high, color=color, linewidth=2)
            axes.plot(cell.interval.estimate, y, "o", color=color, markersize=5)
        axes.set_title(heading(column))
        axes.set_yticks(range(len(labels)), [_shorten(label) for label in labels])
        axes.set_ylim(len(labels) - 0.4, -0.6)
        axes.tick_params(left=False)
        axes.spines.left.set_visible(False)
        axes.locator_params(axis="x", nbins=5)
        plots.append(_embed(figure, f"{column.title} of every explainer with its interval, as in the first table."))
    return plots


def _plot_curves(board: LeaderboardData) -> list[Plot]:
    """Draw one panel per explainer: its mean curves, and those of the reference dashed."""
    names = list(dict.fromkeys(name for curves in board.curves.values() for name in curves))
    if not names:
        return []
    points = np.array([point for curves in board.curves.values() for curve in curves.values() for point in curve])
    span = float(np.ptp(points)) or 1.0
    plots = []
    for label, curves in board.curves.items():
        figure, axes = _axes(2.9, 2.4, 0.45)
        for index, name in enumerate(names):
            color = _CURVE_COLORS[index % len(_CURVE_COLORS)]
            if label != board.reference and (dashed := board.curves.get(board.reference, {}).get(name)):
                axes.plot(board.fractions, [p.estimate for p in dashed], "--", color=color, linewidth=1, alpha=0.6)
            if name in curves:
                estimate, low, high = np.array(curves[name]).T
                axes.fill_between(board.fractions, low, high, color=color, alpha=0.18, linewidth=0)
                axes.plot(board.fractions, estimate, color=color, linewidth=1.8, label=name)
        axes.set_title(_shorten(label), fontsize=8.5)
        axes.set_xlabel("fraction")
        axes.set_ylim(points.min() - 0.04 * span, points.max() + 0.04 * span)
        axes.legend(frameon=False, fontsize=7.5, labelcolor=MUTED)
        plots.append(_embed(figure, f"Mean curves of {label} with their intervals."))
    return plots


def _plot_cost(board: LeaderboardData) -> Plot | None:
    """Draw the first column that has values and times, over the median seconds per sample."""
    for column in board.columns:
        points = [
            (board.seconds[label], row[column.name].interval, label)
            for label, row in board.rows.items()
            if column.name in row and board.seconds.get(label, 0) > 0
        ]
        if points:
            return _plot_column_cost(board, column, sorted(points, key=lambda point: point[1].estimate))
    return None


def _plot_column_cost(board: LeaderboardData, column: Column, points: list[tuple[float, Interval, str]]) -> Plot:
    """Draw points (seconds, value, label), which are sorted by value."""
    comparisons = compare_with_reference(board)
    right = _label_width(board)
    figure, axes = _axes(5.4 + right, max(3.4, 1.0 + 0.19 * len(points)), 0.65, right + 0.2)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    for seconds, interval, label in points:
        color = _color(board, label, column, comparisons)
        axes.vlines(seconds, interval.low, interval.high, color=color, linewidth=1, alpha=0.5)
        axes.plot(seconds, interval.estimate, "o", color=color, markersize=5)
    # The labels form a column beside the axes, in the order of the values, each with a line to its point.
    low, high = axes.get_ylim()
    heights = _spread([(p[1].estimate - low) / (high - low) for p in points], 1 / max(len(points), 16))
    for (seconds, interval, label), height in zip(points, heights, strict=True):
        axes.annotate(
            _shorten(label), (seconds, interval.estimate), (1.03, height), textcoords=axes.transAxes, va="center",
            fontsize=7.5, annotation_clip=False, arrowprops={"arrowstyle": "-", "color": LINE, "linewidth": 0.7},
        )  # fmt: skip
    axes.set_title(heading(column))
    axes.set_xlabel("median seconds per sample")
    return _embed(figure, f"{column.title} of every explainer over its median seconds per sample.")


def _color(board: LeaderboardData, label: str, column: Column, comparisons: dict[tuple[str, str], Comparison]) -> str:
    """Return the color of an explainer: by significance, or black for the reference."""
    if label == board.reference:
        return INK
    pair = comparisons.get((label, column.name))
    return _COLORS[significance(pair.difference, column) if pair else ""]


def _axes(width: float, height: float, left: float, right: float = 0.15, bottom: float = 0.45) -> tuple[Figure, Axes]:
    """Create a figure of this size with axes inside these margins, all in inches."""
    figure = Figure(figsize=(width, height), facecolor="white")
    top = 0.35
    box = (left / width, bottom / height, (width - left - right) / width, (height - top - bottom) / height)
    return figure, figure.add_axes(box)


def _embed(figure: Figure, alt: str) -> Plot:
    """Convert a figure to SVG in a data URL."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    width, height = (round(96 * inches) for inches in figure.get_size_inches())
    return Plot("data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode(), width, height, alt)


def _shorten(label: str) -> str:
    return label if len(label) <= _LABEL else label[: _LABEL - 1] + "…"


def _label_width(board: LeaderboardData) -> float:
    """Measure the width that the widest label needs, in inches."""
    font = FontProperties(family=font_families(), size=7.5)
    labels = [_shorten(label) for label in board.rows if label.strip()]  # TextPath fails on blank text.
    return 0.2 + max((TextPath((0, 0), label, prop=font).get_extents().x1 for label in labels), default=0.0) / 72


def _spread(heights: Sequence[float], gap: float) -> list[float]:
    """Move increasing heights apart to at least the gap, within 0 to 1 if they fit."""
    placed: list[float] = []
    for height in heights:
        placed.append(max(height, placed[-1] + gap) if placed else max(height, 0))
    for index in range(len(placed) - 1, -1, -1):
        placed[index] = min(placed[index], 1 - gap * (len(placed) - 1 - index))
    return placed
