r"""How is a leaderboard written as Markdown, HTML tables and CSV?"""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from captum_intramodal._utils.io import write_atomically
from captum_intramodal.evaluation._bootstrap import LEVEL
from captum_intramodal.evaluation.records import Column, Comparison, Coverage, LeaderboardData
from captum_intramodal.metrics.statistics import Interval

__all__ = [
    "Tables",
    "compare_with_reference",
    "describe_differences",
    "describe_values",
    "format_tables",
    "heading",
    "pair_lines",
    "render_markdown",
    "significance",
    "value_lines",
    "write_csv",
]

_MISSING = "–"


class Entry(NamedTuple):
    """A value and its interval as text; ``mark`` is ▲ for better and ▼ for worse, ``note`` a tooltip."""

    value: str
    interval: str
    best: bool = False
    mark: str = ""
    note: str = ""


class Row(NamedTuple):
    label: str
    values: list[Entry | None]
    differences: list[Entry | None]
    seconds: str | None


class Tables(NamedTuple):
    """All tables of a leaderboard as text."""

    headings: list[str]
    rows: list[Row]
    covered: str
    coverage: list[tuple[str, str, str]]
    gaps: list[str]


def format_tables(board: LeaderboardData, digits: int) -> Tables:
    """Format the values, the differences from the reference, and the coverage."""
    comparisons = compare_with_reference(board)
    values: dict[str, list[Entry | None]] = {label: [] for label in board.rows}
    differences: dict[str, list[Entry | None]] = {label: [] for label in board.rows}
    coverage = []
    for column in board.columns:
        cells = {label: row[column.name] for label, row in board.rows.items() if column.name in row}
        estimates = [cell.interval.estimate for cell in cells.values()]
        decimals = _decimals(estimates, digits)
        best = _fixed((max if column.higher_is_better else min)(estimates), decimals) if cells else ""
        for label in board.rows:
            cell, pair = cells.get(label), comparisons.get((label, column.name))
            values[label].append(_entry(cell.interval, decimals, best) if cell else None)
            differences[label].append(_difference_entry(pair, column, decimals) if pair else None)
        words, samples = (_range([getattr(cell, what) for cell in cells.values()]) for what in ("words", "samples"))
        coverage.append((column.title, words, samples))
    seconds = {label: _fixed(value, _decimals([value], 2)) for label, value in board.seconds.items()}
    by_type = ", ".join(f"{kind} {count}" for kind, count in board.coverage.words.items())
    return Tables(
        [heading(column) for column in board.columns],
        [Row(label, values[label], differences[label], seconds.get(label)) for label in board.rows],
        f"Covered: {board.coverage.samples} samples; words by type: {by_type or 'none'}.",
        coverage,
        [_gap(board.coverage, label) for label in board.rows if board.coverage.scored[label] < board.coverage.samples],
    )


def render_markdown(board: LeaderboardData, digits: int) -> str:
    """Render all tables as Markdown."""
    tables = format_tables(board, digits)
    timed = bool(board.seconds)
    values = [
        [_escape_markdown(row.label), *map(_markdown_cell, row.values), *([row.seconds or _MISSING] if timed else [])]
        for row in tables.rows
    ]
    differences = [
        [_escape_markdown(row.label), *map(_markdown_cell, row.differences)]
        for row in tables.rows
        if row.label != board.reference
    ]
    headings = ["explainer", *map(_escape_markdown, tables.headings)]
    blocks = [
        f"{describe_values(board)} **Best** in bold.",
        _markdown_table([*headings, *(["seconds"] if timed else [])], values),
    ]
    if differences:
        blocks += [_escape_markdown(describe_differences(board)), _markdown_table(headings, differences)]
    blocks += [
        _escape_markdown(tables.covered),
        _markdown_table(["column", "words", "samples"], [list(map(_escape_markdown, row)) for row in tables.coverage]),
    ]
    if tables.gaps:
        blocks.append("\n".join(f"- {_escape_markdown(gap)}" for gap in tables.gaps))
    return "\n\n".join(blocks) + "\n"


def value_lines(board: LeaderboardData) -> list[list[Any]]:
    """Return the header and one line per explainer."""
    header = ["explainer"]
    for column in board.columns:
        header += [column.name, *(f"{column.name}_{what}" for what in ("low", "high", "words", "samples"))]
    lines: list[list[Any]] = [[*header, "seconds", "scored_samples"]]
    for label, row in board.rows.items():
        line: list[Any] = [label]
        for column in board.columns:
            cell = row.get(column.name)
            line += [*cell.interval, cell.words, cell.samples] if cell else [None] * 5
        lines.append([*line, board.seconds.get(label), board.coverage.scored[label]])
    return lines


def pair_lines(board: LeaderboardData) -> list[list[Any]]:
    """Return the header and one line per pair of explainers and column."""
    header = ["first", "second", "column", "difference", "low", "high", "p", "adjusted_p", "samples"]
    lines: list[list[Any]] = [
        [pair.first, pair.second, pair.column, *pair.difference, pair.p, pair.adjusted_p, pair.samples]
        for pair in board.pairs
    ]
    return [header, *lines]


def write_csv(path: str | os.PathLike[str], lines: Iterable[Sequence[Any]]) -> None:
    """Write lines as a CSV file, atomically."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    write_atomically(path, text.getvalue().encode())


def compare_with_reference(board: LeaderboardData) -> dict[tuple[str, str], Comparison]:
    """Return each explainer's comparison with the reference as the second, by label and column."""
    found = {}
    for pair in board.pairs:
        if pair.second == board.reference:
            found[pair.first, pair.column] = pair
        elif pair.first == board.reference:
            estimate, low, high = pair.difference
            found[pair.second, pair.column] = pair._replace(
                first=pair.second, second=pair.first, difference=Interval(-estimate, -high, -low)
            )
    return found


def heading(column: Column) -> str:
    """Return a column's title with an arrow toward better values."""
    return f"{column.title} {'↑' if column.higher_is_better else '↓'}"


def significance(difference: Interval, column: Column) -> str:
    """Return ▲ for significantly better, ▼ for significantly worse, or an empty string."""
    if difference.low <= 0 <= difference.high:
        return ""
    return "▲" if (difference.low > 0) == column.higher_is_better else "▼"


def describe_values(board: LeaderboardData) -> str:
    """Return the legend of the table of values."""
    return (
        f"Means with {100 * LEVEL:.0f} % bootstrap intervals over {board.coverage.samples} samples; "
        "↑ higher is better, ↓ lower is better."
    )


def describe_differences(board: LeaderboardData) -> str:
    """Return the legend of the table of differences."""
    return (
        f"Difference from {board.reference} on the samples that both cover, with paired intervals; "
        "▲ better and ▼ worse if the interval excludes 0."
    )


def _decimals(values: Sequence[float], digits: int) -> int:
    """Choose the decimals with which the largest value has about this many digits."""
    peak = max(map(abs, values), default=0)
    exponent = math.floor(math.log10(peak)) if peak else 0
    return max(0, digits - (exponent if exponent > 0 else min(0, exponent + 1)))


def _fixed(value: float, decimals: int, sign: str = "-") -> str:
    return f"{round(value, decimals) + 0.0:{sign}.{decimals}f}"  # Adding 0.0 removes the sign of a negative zero.


def _entry(interval: Interval, decimals: int, best: str, sign: str = "-") -> Entry:
    value, low, high = (_fixed(number, decimals, sign) for number in interval)
    return Entry(value, f"[{low}, {high}]", value == best)


def _difference_entry(pair: Comparison, column: Column, decimals: int) -> Entry:
    return _entry(pair.difference, decimals, "", "+")._replace(
        mark=significance(pair.difference, column),
        note=f"p = {pair.p:.2g}, {pair.adjusted_p:.2g} by Holm's method, {pair.samples} samples",
    )


def _range(numbers: Sequence[int]) -> str:
    low, high = min(numbers, default=0), max(numbers, default=0)
    return str(low) if low == high else f"{low} to {high}"


def _gap(coverage: Coverage, label: str) -> str:
    """Describe why samples of an explainer are missing."""
    scored, reasons = coverage.scored[label], dict(coverage.skipped.get(label, {}))
    unknown = coverage.samples - scored - sum(reasons.values())
    if unknown > 0:
        reasons["no result"] = unknown
    why = "; ".join(f"{count} x {reason}" for reason, count in reasons.items())
    return f"{label}: {scored} of {coverage.samples} samples. Left out: {why}"


def _escape_markdown(text: str) -> str:
    """Escape text for a cell of a Markdown table."""
    return "".join(f"\\{letter}" if letter in "\\`*[]<>|&~" else letter for letter in " ".join(text.split()))


def _markdown_cell(entry: Entry | None) -> str:
    if entry is None:
        return _MISSING
    return f"{f'**{entry.value}**' if entry.best else entry.value} {entry.interval} {entry.mark}".rstrip()


def _markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
