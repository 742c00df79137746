r"""What the records of an evaluation say: means with intervals, paired comparisons, curves and coverage."""

from __future__ import annotations

import base64
import csv
import io
import json
import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import combinations_with_replacement, groupby
from statistics import median
from typing import Any, Literal, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath
from matplotlib.ticker import LogLocator, NullLocator

from captum_intramodal._utils.io import write_atomically
from captum_intramodal.metrics.curves import FRACTIONS
from captum_intramodal.metrics.statistics import Floats, Interval, permutation_p, resamples, swaps
from captum_intramodal.viz.overview import fonts
from captum_intramodal.viz.page import page_template

__all__ = ["Cell", "Column", "Comparison", "Coverage", "Leaderboard", "make_leaderboard"]

Record = Mapping[str, Any]

# The key, beside the indices of words, of what is measured on the whole answer.
ANSWER = "answer"

LEVEL = 0.95


@dataclass(frozen=True)
class Column:
    r"""A metric as a column of the leaderboard.

    Args:

        name (str): Its name among the scores of a record. The mean runs over words; where the records only have values
                    of whole answers, and with ``:answer`` behind the name, it runs over these.
        title (str): Its heading.
        higher_is_better (bool): Which values are good.
        of (tuple[str, str]): Names of the two columns whose means it is the harmonic mean of, as F1-IoU is; they need
                    not be columns of the leaderboard. Default: ``()``

    Raises:
        ValueError: If ``of`` names another number of columns.

    Examples::

        >>> Column("f1_iou", "F1-IoU", True, of=("obj_iou", "func_iou"))
    """

    name: str
    title: str
    higher_is_better: bool
    of: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.of) not in (0, 2):
            raise ValueError(f"Column {self.name!r} must derive from two columns or none, got {self.of}.")


class Cell(NamedTuple):
    r"""An explainer's value of a column.

    Args:

        interval (Interval): The mean over words, with its bootstrap interval over samples.
        words (int): Words with a value (of derived columns, in both).
        samples (int): Samples with such words.
    """

    interval: Interval
    words: int
    samples: int


class Comparison(NamedTuple):
    r"""Two explainers on the samples that both have a column's value for.

    Args:

        first (str): Label of an explainer.
        second (str): Label of the other.
        column (str): Name of the column.
        difference (Interval): First less second, with its paired bootstrap interval.
        p (float): Of the paired permutation test.
        adjusted_p (float): Holm's, among all pairs of this column.
        samples (int): Samples compared on.
    """

    first: str
    second: str
    column: str
    difference: Interval
    p: float
    adjusted_p: float
    samples: int


@dataclass(frozen=True)
class Coverage:
    r"""What the records hold.

    Args:

        samples (int): Number of records.
        words (Mapping[str, int]): Words of the answers, by type.
        scored (Mapping[str, int]): Samples with scores, by explainer.
        skipped (Mapping[str, Mapping[str, int]]): Samples skipped, by explainer and reason.
    """

    samples: int
    words: Mapping[str, int]
    scored: Mapping[str, int]
    skipped: Mapping[str, Mapping[str, int]]


@dataclass(frozen=True)
class Leaderboard:
    r"""The results of an evaluation; :func:`make_leaderboard` makes it.

    Args:

        columns (tuple[Column, ...]): The columns, in their order.
        reference (str): Label of the explainer that the others are compared with.
        rows (Mapping[str, Mapping[str, Cell]]): By label and name of the column; a column without a value is missing.
        pairs (tuple[Comparison, ...]): All pairs of explainers, column by column.
        fractions (tuple[float, ...]): Where the curves are measured.
        curves (Mapping[str, Mapping[str, tuple[Interval, ...]]]): Mean curves with pointwise intervals, by label and
                    name.
        seconds (Mapping[str, float]): Median seconds per sample, by label.
        coverage (Coverage): How much was covered.
    """

    columns: tuple[Column, ...]
    reference: str
    rows: Mapping[str, Mapping[str, Cell]]
    pairs: tuple[Comparison, ...]
    fractions: tuple[float, ...]
    curves: Mapping[str, Mapping[str, tuple[Interval, ...]]]
    seconds: Mapping[str, float]
    coverage: Coverage

    def to_markdown(self, digits: int = 3) -> str:
        r"""Tables of the values, of the differences to the reference, and of what was covered.

        Args:

            digits (int): Digits behind the point for values about 1; smaller ones have more, larger ones fewer.
                        Default: ``3``

        Returns:
            **markdown** (*str*):
                The tables, ending with a line break.

        Examples::

            >>> print(make_leaderboard(records, columns).to_markdown())
        """
        tables = _tables(self, digits)
        values = [
            [_escape(row.label), *map(_markdown_cell, row.values), *([row.seconds or _MISSING] if self.seconds else [])]
            for row in tables.rows
        ]
        differences = [
            [_escape(row.label), *map(_markdown_cell, row.differences)]
            for row in tables.rows
            if row.label != self.reference
        ]
        headings = [_escape(heading) for heading in tables.headings]
        blocks = [
            f"{_legend(self)} **Best** in bold.",
            _markdown_table(["explainer", *headings, *(["seconds"] if self.seconds else [])], values),
        ]
        if differences:
            blocks += [
                _escape(_difference_legend(self)),
                _markdown_table(["explainer", *headings], differences),
            ]
        blocks += [
            _escape(tables.covered),
            _markdown_table(["column", "words", "samples"], [list(map(_escape, row)) for row in tables.coverage]),
        ]
        if tables.gaps:
            blocks.append("\n".join(f"- {_escape(gap)}" for gap in tables.gaps))
        return "\n\n".join(blocks) + "\n"

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        r"""Writes one line for each explainer.

        Its columns are ``explainer``; for each metric its name, with ``_low``, ``_high``, ``_words`` and ``_samples``
        behind it; ``seconds`` and ``scored_samples``. What is missing is empty.

        Args:

            path (str or PathLike): The file, which is replaced in one step.

        Examples::

            >>> make_leaderboard(records, columns).to_csv("leaderboard.csv")
        """
        header = ["explainer"]
        for column in self.columns:
            header += [column.name, *(f"{column.name}_{what}" for what in ("low", "high", "words", "samples"))]
        lines: list[list[Any]] = [[*header, "seconds", "scored_samples"]]
        for label, row in self.rows.items():
            line: list[Any] = [label]
            for column in self.columns:
                cell = row.get(column.name)
                line += [*cell.interval, cell.words, cell.samples] if cell else [None] * 5
            lines.append([*line, self.seconds.get(label), self.coverage.scored[label]])
        _write_csv(path, lines)

    def pairs_to_csv(self, path: str | os.PathLike[str]) -> None:
        r"""Writes one line for each pair of explainers and column.

        Args:

            path (str or PathLike): The file, which is replaced in one step.

        Examples::

            >>> make_leaderboard(records, columns).pairs_to_csv("pairs.csv")
        """
        header = ["first", "second", "column", "difference", "low", "high", "p", "adjusted_p", "samples"]
        lines = [
            [pair.first, pair.second, pair.column, *pair.difference, pair.p, pair.adjusted_p, pair.samples]
            for pair in self.pairs
        ]
        _write_csv(path, [header, *lines])

    def to_html(self, path: str | os.PathLike[str], manifest: Mapping[str, Any]) -> None:
        r"""Writes a page with the tables and plots, one file that needs no network and runs no script.

        Args:

            path (str or PathLike): The file, which is replaced in one step.
            manifest (Mapping[str, Any]): What the page shows as the making of the evaluation, in JSON.

        Examples::

            >>> make_leaderboard(records, columns).to_html("leaderboard.html", {"model": "demo", "seed": 0})
        """
        with _plotting():
            plots = {"values": _plot_values(self), "curves": _plot_curves(self), "cost": _plot_cost(self)}
        page = page_template("leaderboard.html.j2").render(
            reference=self.reference,
            tables=_tables(self, 3),
            legend=_legend(self),
            difference_legend=_difference_legend(self),
            plots=plots,
            timed=bool(self.seconds),
            manifest=json.dumps(manifest, indent=2, ensure_ascii=False, default=str),
        )
        write_atomically(path, page.encode())


def make_leaderboard(
    records: Iterable[Record],
    columns: Sequence[Column],
    reference: str | None = None,
    n: int = 10_000,
    seed: int = 0,
    fractions: Sequence[float] = FRACTIONS,
) -> Leaderboard:
    r"""Leaderboard of the records of an evaluation.

    Means run over words; intervals and tests over samples, which are drawn or swapped with all their words. Samples
    without a value of a column are left out there, and pairs are compared on the samples that both explainers have.
    The order of the records does not matter.

    Args:

        records (Iterable[Mapping]): One for each sample, with "index", "id", "words", "scores" (explainer -> column ->
                    index of the word, or "answer" -> value), and optionally "curves" (explainer -> name -> word ->
                    values at the fractions), "seconds" (explainer -> seconds) and "skipped" (explainer -> reason).
        columns (Sequence[Column]): The metrics to show.
        reference (str, optional): Label of the explainer that the tables compare the others with.
                    Default: ``None`` (the first)
        n (int): Number of resamples and of random swaps. With few, Holm's p-values cannot be small: 190 pairs of 20
                    explainers at 10,000 swaps reach 0.019. Default: ``10_000``
        seed (int): Of the resamples and swaps. Default: ``0``
        fractions (Sequence[float]): Where the curves are measured. Default: 0, 0.1, ..., 1

    Returns:
        **leaderboard** (*Leaderboard*):
            The results, with explainers in the order in which the records name them.

    Raises:
        ValueError: No records, no explainer, no such reference, an index or a column's name twice, a value that is not
            a finite number, or a curve with another number of values than fractions.

    Examples::

        >>> records = map(json.loads, open("samples.jsonl"))
        >>> board = make_leaderboard(records, [Column("obj_iou", "Obj-IoU", True)], reference="logit lens")
        >>> board.rows["logit lens"]["obj_iou"].interval.estimate
    """
    if n < 1:
        raise ValueError(f"n must be positive, but it is {n}.")
    _unique([column.name for column in columns], "columns")
    ordered = sorted(records, key=lambda record: record["index"])
    _unique([record["index"] for record in ordered], "records")
    labels = list(
        dict.fromkeys(label for record in ordered for label in (*record["scores"], *record.get("skipped", {})))
    )
    if not labels:
        raise ValueError(f"None of {len(ordered)} records names an explainer.")
    if reference is not None and reference not in labels:
        raise ValueError(f"reference must be one of {labels}, but it is {reference!r}.")

    def table(part: Literal["scores", "curves"], name: str, points: int) -> Floats:
        return _sums_and_counts(ordered, labels, part, name, points)

    rows: dict[str, dict[str, Cell]] = {label: {} for label in labels}
    pairs: list[Comparison] = []
    tables = [np.concatenate([table("scores", name, 1) for name in column.of or (column.name,)]) for column in columns]
    for k, i, j, interval, p, samples in _compare(tables, n, seed):
        name = columns[k].name
        if i == j:
            rows[labels[i]][name] = Cell(interval, int(tables[k][:, 1, i].sum()), samples)
        else:
            pairs.append(Comparison(labels[i], labels[j], name, interval, p, p, samples))
    by_column = [list(same) for _, same in groupby(pairs, key=lambda pair: pair.column)]
    adjusted = [p for same in by_column for p in _holm([pair.p for pair in same])]

    curves: dict[str, dict[str, tuple[Interval, ...]]] = defaultdict(dict)
    measured = [row for record in ordered for row in record.get("curves", {}).values()]
    names = list(dict.fromkeys(name for row in measured for name in row))
    for k, i, curve in _mean_curves([table("curves", name, len(fractions)) for name in names], n, seed):
        curves[labels[i]][names[k]] = curve

    seconds: dict[str, list[float]] = defaultdict(list)
    skipped: dict[str, Counter[str]] = defaultdict(Counter)
    for record in ordered:
        for label, value in record.get("seconds", {}).items():
            seconds[label].append(value)
        for label, reason in record.get("skipped", {}).items():
            skipped[label][reason] += 1
    words = Counter(word["type"] for record in ordered for word in record["words"])
    return Leaderboard(
        tuple(columns),
        labels[0] if reference is None else reference,
        rows,
        tuple(pair._replace(adjusted_p=p) for pair, p in zip(pairs, adjusted, strict=True)),
        tuple(fractions),
        {label: curves[label] for label in labels if label in curves},
        {label: median(seconds[label]) for label in labels if label in seconds},
        Coverage(
            len(ordered),
            dict(sorted(words.items())),
            {label: sum(label in record["scores"] for record in ordered) for label in labels},
            {label: dict(sorted(skipped[label].items())) for label in labels if label in skipped},
        ),
    )


def _unique(values: Sequence[Any], name: str) -> None:
    if not values:
        raise ValueError(f"There are no {name}.")
    twice = [value for value, count in Counter(values).items() if count > 1]
    if twice:
        raise ValueError(f"The {name} must differ, but there are several of {twice}.")


# --- statistics -------------------------------------------------------------------------------------------------------


def _sums_and_counts(
    records: Sequence[Record], labels: Sequence[str], part: Literal["scores", "curves"], name: str, points: int
) -> Floats:
    """Sum of the values over a sample's words, and number of these words: (points, 2, labels, samples)."""
    key = name.removesuffix(f":{ANSWER}")
    found = {
        (row, column): entries
        for column, record in enumerate(records)
        for row, label in enumerate(labels)
        if (entries := record.get(part, {}).get(label, {}).get(key))
    }
    whole = key != name or not any(index != ANSWER for entries in found.values() for index in entries)
    table = np.zeros((points, 2, len(labels), len(records)))
    for (row, column), entries in found.items():
        chosen = [value for index, value in entries.items() if (index == ANSWER) == whole]
        if not chosen:
            continue
        values = np.asarray(chosen, dtype=np.float64).reshape(len(chosen), -1)
        if values.shape[1] != points or not np.isfinite(values).all():
            raise ValueError(
                f"Sample {records[column]['id']!r}: the {part} {key!r} of {labels[row]!r} must be {points} finite "
                f"number(s) for each word, but they are {entries}."
            )
        table[:, 0, row, column] = values.sum(0)
        table[:, 1, row, column] = len(chosen)
    return table


class _Group(NamedTuple):
    """Pairs of explainers that share exactly these samples in a column, and the table of all explainers among them."""

    column: int
    pairs: list[tuple[int, int]]
    labels: list[int]
    table: Floats


def _groups(tables: Sequence[Floats], alone: bool) -> Iterator[list[_Group]]:
    """Groups with equally many samples, which can share draws; each explainer is a pair with itself."""
    members: dict[tuple[bytes, int], list[tuple[int, int]]] = defaultdict(list)
    for column, table in enumerate(tables):
        present = np.asarray(table[:, 1].any(0))
        for i, j in combinations_with_replacement(range(len(present)), 2):
            if i == j or not alone:
                members[np.logical_and(present[i], present[j]).tobytes(), column].append((i, j))

    # A mask's bytes are 0 or 1: their sum is the number of samples.
    def size(key: tuple[bytes, int]) -> int:
        return sum(key[0])

    for samples, same in groupby(sorted(members, key=size), key=size):
        if samples:
            yield [_group(column, members[mask, column], tables[column], mask) for mask, column in same]


def _group(column: int, pairs: list[tuple[int, int]], table: Floats, mask: bytes) -> _Group:
    labels = sorted({label for pair in pairs for label in pair})
    return _Group(column, pairs, labels, table[:, :, labels][..., np.frombuffer(mask, np.bool_)])


def _products(groups: list[_Group], weights: Iterable[Floats]) -> list[Floats]:
    """The groups' sums and counts in every draw of samples, by their weights (draws, samples)."""
    tables = [group.table.reshape(-1, group.table.shape[-1]) for group in groups]
    rows = np.concatenate(tables)
    products = np.concatenate([rows @ part.T for part in weights], axis=1)
    ends = np.cumsum([len(table) for table in tables])[:-1]
    return [
        product.reshape(*group.table.shape[:-1], -1)
        for product, group in zip(np.split(products, ends), groups, strict=True)
    ]


def _multiplicities(samples: int, n: int, seed: int) -> Iterator[Floats]:
    """How often each sample is in each bootstrap resample."""
    for rows in resamples(samples, n, seed):
        offsets = samples * np.arange(len(rows))[:, None]
        yield np.bincount((rows + offsets).ravel(), minlength=rows.size).reshape(rows.shape).astype(np.float64)


def _means(sums_and_counts: Floats) -> Floats:
    """NaN where there are no words."""
    sums, counts = sums_and_counts[:, 0], sums_and_counts[:, 1]
    return np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)


def _statistic(sums_and_counts: Floats) -> Floats:
    """The mean, or the harmonic mean of two means."""
    mean, *others = _means(sums_and_counts)
    for other in others:
        total = mean + other
        mean = 2 * mean * other / np.where(total == 0, 1, total)
    return mean


def _interval(estimate: float, drawn: Floats) -> Interval:
    # A derived column is not defined in a resample without any word of one of the two.
    low, high = np.nanquantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(estimate), float(low), float(high))


def _compare(tables: Sequence[Floats], n: int, seed: int) -> list[tuple[int, int, int, Interval, float, int]]:
    """Of each pair i < j the difference, of each i = j the value: column, i, j, interval, p-value, samples."""
    compared = []
    for groups in _groups(tables, alone=False):
        samples = groups[0].table.shape[-1]
        resampled = _products(groups, _multiplicities(samples, n, seed))
        swapped = _products(groups, (part.astype(np.float64) for part in swaps(samples, n, seed)))
        for group, products, moved in zip(groups, resampled, swapped, strict=True):
            total = group.table.sum(-1)
            estimate, drawn = _statistic(total), _statistic(products)
            row = {label: k for k, label in enumerate(group.labels)}
            for i, j in group.pairs:
                a, b = row[i], row[j]
                value = estimate[a] if i == j else estimate[a] - estimate[b]
                if not np.isfinite(value):
                    continue
                if i == j:
                    interval, p = _interval(value, drawn[a]), 1.0
                else:
                    interval = _interval(value, drawn[a] - drawn[b])
                    gained = moved[:, :, b] - moved[:, :, a]
                    first, second = total[:, :, a, None] + gained, total[:, :, b, None] - gained
                    p = permutation_p(_statistic(first) - _statistic(second))
                compared.append((group.column, i, j, interval, p, samples))
    return sorted(compared)


def _mean_curves(tables: Sequence[Floats], n: int, seed: int) -> list[tuple[int, int, tuple[Interval, ...]]]:
    """Name, explainer and points of each mean curve."""
    curves = []
    for groups in _groups(tables, alone=True):
        weights = _multiplicities(groups[0].table.shape[-1], n, seed)
        for group, products in zip(groups, _products(groups, weights), strict=True):
            estimates, drawn = _means(group.table.sum(-1)), _means(products)
            for k, label in enumerate(group.labels):
                curves.append((group.column, label, tuple(map(_interval, estimates[:, k], drawn[:, k]))))
    return sorted(curves)


def _holm(p: Sequence[float]) -> list[float]:
    """Source: Holm, "A simple sequentially rejective multiple test procedure", 1979."""
    values = np.asarray(p, dtype=np.float64)
    order = np.argsort(values, kind="stable")
    adjusted = np.empty_like(values)
    adjusted[order] = np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1)).clip(max=1)
    return [float(value) for value in adjusted]


# --- tables -----------------------------------------------------------------------------------------------------------

_MISSING = "–"


class _Shown(NamedTuple):
    """A value and its interval in print; ``mark`` says better or worse, ``note`` what else is known."""

    value: str
    interval: str
    best: bool = False
    mark: str = ""
    note: str = ""


class _Row(NamedTuple):
    label: str
    values: list[_Shown | None]
    differences: list[_Shown | None]
    seconds: str | None


class _Tables(NamedTuple):
    headings: list[str]
    rows: list[_Row]
    covered: str
    coverage: list[tuple[str, str, str]]
    gaps: list[str]


def _tables(board: Leaderboard, digits: int) -> _Tables:
    against = _against_reference(board)
    values: dict[str, list[_Shown | None]] = {label: [] for label in board.rows}
    differences: dict[str, list[_Shown | None]] = {label: [] for label in board.rows}
    coverage = []
    for column in board.columns:
        cells = {label: row[column.name] for label, row in board.rows.items() if column.name in row}
        estimates = [cell.interval.estimate for cell in cells.values()]
        decimals = _decimals(estimates, digits)
        best = _fixed((max if column.higher_is_better else min)(estimates), decimals) if cells else ""
        for label in board.rows:
            cell, pair = cells.get(label), against.get((label, column.name))
            values[label].append(_shown(cell.interval, decimals, best) if cell else None)
            differences[label].append(
                _shown(pair.difference, decimals, "", "+")._replace(
                    mark=_mark(pair.difference, column),
                    note=f"p = {pair.p:.2g}, {pair.adjusted_p:.2g} by Holm's method, {pair.samples} samples",
                )
                if pair
                else None
            )
        words, samples = (_range([getattr(cell, what) for cell in cells.values()]) for what in ("words", "samples"))
        coverage.append((column.title, words, samples))
    seconds = {label: _fixed(value, _decimals([value], 2)) for label, value in board.seconds.items()}
    of_types = ", ".join(f"{kind} {count}" for kind, count in board.coverage.words.items())
    return _Tables(
        [f"{column.title} {'↑' if column.higher_is_better else '↓'}" for column in board.columns],
        [_Row(label, values[label], differences[label], seconds.get(label)) for label in board.rows],
        f"Covered: {board.coverage.samples} samples; words by type: {of_types or 'none'}.",
        coverage,
        [_gap(board.coverage, label) for label in board.rows if board.coverage.scored[label] < board.coverage.samples],
    )


def _against_reference(board: Leaderboard) -> dict[tuple[str, str], Comparison]:
    """Comparisons of every explainer with the reference, which is second, by label and column."""
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


def _mark(difference: Interval, column: Column) -> str:
    if difference.low <= 0 <= difference.high:
        return ""
    return "▲" if (difference.low > 0) == column.higher_is_better else "▼"


def _decimals(values: Sequence[float], digits: int) -> int:
    """So many that the largest value has about as many digits as are asked for."""
    peak = max(map(abs, values), default=0)
    exponent = math.floor(math.log10(peak)) if peak else 0
    return max(0, digits - (exponent if exponent > 0 else min(0, exponent + 1)))


def _fixed(value: float, decimals: int, sign: str = "-") -> str:
    return f"{round(value, decimals) + 0.0:{sign}.{decimals}f}"  # no minus before a zero


def _shown(interval: Interval, decimals: int, best: str, sign: str = "-") -> _Shown:
    value, low, high = (_fixed(number, decimals, sign) for number in interval)
    return _Shown(value, f"[{low}, {high}]", value == best)


def _range(numbers: Sequence[int]) -> str:
    low, high = min(numbers, default=0), max(numbers, default=0)
    return str(low) if low == high else f"{low} to {high}"


def _gap(coverage: Coverage, label: str) -> str:
    scored, reasons = coverage.scored[label], dict(coverage.skipped.get(label, {}))
    unknown = coverage.samples - scored - sum(reasons.values())
    if unknown > 0:
        reasons["no result"] = unknown
    why = "; ".join(f"{count} x {reason}" for reason, count in reasons.items())
    return f"{label}: {scored} of {coverage.samples} samples. Left out: {why}"


def _legend(board: Leaderboard) -> str:
    return (
        f"Means with {100 * LEVEL:.0f} % bootstrap intervals over {board.coverage.samples} samples; "
        "↑ higher is better, ↓ lower is better."
    )


def _difference_legend(board: Leaderboard) -> str:
    return (
        f"Difference to {board.reference}, on the samples that both have, with paired intervals; "
        "▲ better and ▼ worse where the interval leaves out 0."
    )


def _escape(text: str) -> str:
    """Text as text in a cell of a Markdown table."""
    return "".join(f"\\{letter}" if letter in "\\`*[]<>|&~" else letter for letter in " ".join(text.split()))


def _markdown_cell(shown: _Shown | None) -> str:
    if shown is None:
        return _MISSING
    return f"{f'**{shown.value}**' if shown.best else shown.value} {shown.interval} {shown.mark}".rstrip()


def _markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _write_csv(path: str | os.PathLike[str], lines: Iterable[Sequence[Any]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    write_atomically(path, text.getvalue().encode())


# --- plots ------------------------------------------------------------------------------------------------------------

_INK, _MUTED, _LINE = "#1c1f26", "#6a7080", "#d9dbe0"
_COLORS = {"▲": "#1f6fb4", "": "#8b919e", "▼": "#d1651a"}
_CURVE_COLORS = ("#1f6fb4", "#d1651a", "#3b8f5a", "#8458a8", "#a8456b", "#7a6a2f")

# Longest label in a plot, in letters.
_LABEL = 32


class _Plot(NamedTuple):
    url: str
    width: int
    height: int
    alt: str


def _plotting() -> AbstractContextManager[None]:
    """Settings of matplotlib under which a plot is the same bytes each time, and text is no mathematics."""
    return matplotlib.rc_context(
        {
            "svg.hashsalt": "captum_intramodal", "svg.fonttype": "path", "text.parse_math": False,
            "font.family": fonts(), "font.size": 8.5, "text.color": _INK, "axes.labelcolor": _MUTED,
            "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left",
            "axes.edgecolor": _LINE, "axes.spines.top": False, "axes.spines.right": False,
            "xtick.color": _MUTED, "ytick.color": _MUTED, "xtick.labelsize": 7.5, "ytick.labelsize": 7.5,
        }
    )  # fmt: skip


def _axes(width: float, height: float, left: float, right: float = 0.15, bottom: float = 0.45) -> tuple[Figure, Axes]:
    """Axes with these margins in a figure of this size, all in inches."""
    figure = Figure(figsize=(width, height), facecolor="white")
    top = 0.35
    box = (left / width, bottom / height, (width - left - right) / width, (height - top - bottom) / height)
    return figure, figure.add_axes(box)


def _embed(figure: Figure, alt: str) -> _Plot:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    width, height = (round(96 * inches) for inches in figure.get_size_inches())
    return _Plot("data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode(), width, height, alt)


def _short(label: str) -> str:
    return label if len(label) <= _LABEL else label[: _LABEL - 1] + "…"


def _margin(board: Leaderboard) -> float:
    """Room for the widest label, in inches."""
    font = FontProperties(family=fonts(), size=7.5)
    labels = [_short(label) for label in board.rows if label.strip()]  # A path of nothing cannot be made.
    return 0.2 + max((TextPath((0, 0), label, prop=font).get_extents().x1 for label in labels), default=0.0) / 72


def _plot_values(board: Leaderboard) -> list[_Plot]:
    """One panel for each column: every explainer's value and interval, colored by the difference to the reference."""
    against = _against_reference(board)
    labels, left = list(board.rows), _margin(board)
    plots = []
    for column in board.columns:
        cells = [(y, label, board.rows[label].get(column.name)) for y, label in enumerate(labels)]
        figure, axes = _axes(left + 2.15, 0.8 + 0.21 * len(labels), left, bottom=0.3)
        for y, label, cell in cells:
            if cell is None:
                continue
            pair = against.get((label, column.name))
            color = _COLORS[_mark(pair.difference, column)] if pair else _COLORS[""]
            if label == board.reference:
                color = _INK
                axes.axvline(cell.interval.estimate, color=_LINE, linewidth=1, zorder=0)
            axes.hlines(y, cell.interval.low, cell.interval.high, color=color, linewidth=2)
            axes.plot(cell.interval.estimate, y, "o", color=color, markersize=5)
        axes.set_title(f"{column.title} {'↑' if column.higher_is_better else '↓'}")
        axes.set_yticks(range(len(labels)), [_short(label) for label in labels])
        axes.set_ylim(len(labels) - 0.4, -0.6)
        axes.tick_params(left=False)
        axes.spines.left.set_visible(False)
        axes.locator_params(axis="x", nbins=5)
        plots.append(_embed(figure, f"{column.title} of every explainer with its interval, as in the first table."))
    return plots


def _plot_curves(board: Leaderboard) -> list[_Plot]:
    """One panel for each explainer: its mean curves, and the reference's dashed."""
    names = list(dict.fromkeys(name for curves in board.curves.values() for name in curves))
    if not names:
        return []
    every = np.array([point for curves in board.curves.values() for curve in curves.values() for point in curve])
    span = float(np.ptp(every)) or 1.0
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
        axes.set_title(_short(label), fontsize=8.5)
        axes.set_xlabel("fraction")
        axes.set_ylim(every.min() - 0.04 * span, every.max() + 0.04 * span)
        axes.legend(frameon=False, fontsize=7.5, labelcolor=_MUTED)
        plots.append(_embed(figure, f"Mean curves of {label} with their intervals."))
    return plots


def _plot_cost(board: Leaderboard) -> _Plot | None:
    """The first column that has values, over the median seconds per sample."""
    against = _against_reference(board)
    for column in board.columns:
        points = [
            (board.seconds[label], row[column.name].interval, label)
            for label, row in board.rows.items()
            if column.name in row and board.seconds.get(label, 0) > 0
        ]
        if points:
            break
    else:
        return None
    points.sort(key=lambda point: point[1].estimate)
    right = _margin(board)
    figure, axes = _axes(5.4 + right, max(3.4, 1.0 + 0.19 * len(points)), 0.65, right + 0.2)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    for seconds, interval, label in points:
        pair = against.get((label, column.name))
        color = _INK if label == board.reference else _COLORS[_mark(pair.difference, column) if pair else ""]
        axes.vlines(seconds, interval.low, interval.high, color=color, linewidth=1, alpha=0.5)
        axes.plot(seconds, interval.estimate, "o", color=color, markersize=5)
    # The labels stand in a column beside the axes, in the order of the values, with a line to each point.
    low, high = axes.get_ylim()
    heights = _spread([(p[1].estimate - low) / (high - low) for p in points], 1 / max(len(points), 16))
    for (seconds, interval, label), height in zip(points, heights, strict=True):
        axes.annotate(
            _short(label), (seconds, interval.estimate), (1.03, height), textcoords=axes.transAxes, va="center",
            fontsize=7.5, annotation_clip=False, arrowprops={"arrowstyle": "-", "color": _LINE, "linewidth": 0.7},
        )  # fmt: skip
    axes.set_title(f"{column.title} {'↑' if column.higher_is_better else '↓'}")
    axes.set_xlabel("median seconds per sample")
    return _embed(figure, f"{column.title} of every explainer over its median seconds per sample.")


def _spread(heights: Sequence[float], gap: float) -> list[float]:
    """The increasing heights, moved apart to at least the gap, within 0 to 1 where they fit."""
    placed: list[float] = []
    for height in heights:
        placed.append(max(height, placed[-1] + gap) if placed else max(height, 0))
    for index in range(len(placed) - 1, -1, -1):
        placed[index] = min(placed[index], 1 - gap * (len(placed) - 1 - index))
    return placed
