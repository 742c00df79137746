r"""Which explainer is best, and how sure is that? Means with intervals, paired comparisons, curves and coverage."""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import median
from typing import Any

import numpy as np

from captum_intramodal._utils.io import write_atomically
from captum_intramodal.errors import InvalidInputError, InvalidOptionError
from captum_intramodal.evaluation._bootstrap import compare_explainers, holm, mean_curves
from captum_intramodal.evaluation._plots import draw_plots
from captum_intramodal.evaluation._tables import (
    describe_differences,
    describe_values,
    format_tables,
    pair_lines,
    render_markdown,
    value_lines,
    write_csv,
)
from captum_intramodal.evaluation.records import (
    Cell,
    Column,
    Comparison,
    LeaderboardData,
    Record,
    count_coverage,
    sums_and_counts,
)
from captum_intramodal.metrics.curves import FRACTIONS
from captum_intramodal.metrics.statistics import Interval
from captum_intramodal.viz.page import page_template

__all__ = ["Leaderboard", "make_leaderboard"]


@dataclass(frozen=True)
class Leaderboard(LeaderboardData):
    r"""
    The results of an evaluation, made by :func:`make_leaderboard`.

    Args:

        columns (tuple[Column, ...]): The columns, in order.
        reference (str): Label of the explainer that the others are compared with.
        rows (Mapping[str, Mapping[str, Cell]]): Values by label and column name, without those that are missing.
        pairs (tuple[Comparison, ...]): All pairs of explainers, column by column.
        fractions (tuple[float, ...]): Fractions at which the curves are evaluated.
        curves (Mapping[str, Mapping[str, tuple[Interval, ...]]]): Mean curves with pointwise intervals, by label and
                    name.
        seconds (Mapping[str, float]): Median seconds per sample, by label.
        coverage (Coverage): The numbers of samples and words.

    Examples::

        >>> from captum_intramodal.evaluation import Column, make_leaderboard
        >>> record = {"index": 0, "id": "a", "words": [], "scores": {"lens": {"pointing": {"1": 1.0, "2": 0.5}}}}
        >>> board = make_leaderboard([record], [Column("pointing", "pointing", True)])
        >>> board.rows["lens"]["pointing"].interval.estimate
        0.75
    """

    def to_markdown(self, digits: int = 3) -> str:
        r"""
        Format the values, the differences from the reference, and the coverage as Markdown tables.

        Args:

            digits (int, optional): Decimals of values near 1; smaller values get more, larger ones fewer.
                        Default: ``3``

        Returns:
            **markdown** (*str*):
                The tables, with a final newline.

        Examples::

            >>> from captum_intramodal.evaluation import Column, make_leaderboard
            >>> record = {"index": 0, "id": "a", "words": [], "scores": {"lens": {"pointing": {"1": 1.0}}}}
            >>> print(make_leaderboard([record], [Column("pointing", "pointing", True)]).to_markdown())
            Means with 95 % bootstrap intervals over 1 samples; ...
            | explainer | pointing ↑ |
            | --- | ---: |
            | lens | **1.000** [1.000, 1.000] |
            ...
        """
        return render_markdown(self, digits)

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        r"""
        Write one line per explainer to a CSV file.

        Its columns are ``explainer``; for each metric its name, alone and with the suffixes ``_low``, ``_high``,
        ``_words`` and ``_samples``; ``seconds`` and ``scored_samples``. Missing values are empty.

        Args:

            path (str or PathLike): The file, which is replaced atomically.

        Examples::

            >>> from captum_intramodal.evaluation import Column, make_leaderboard
            >>> record = {"index": 0, "id": "a", "words": [], "scores": {"lens": {"pointing": {"1": 1.0}}}}
            >>> make_leaderboard([record], [Column("pointing", "pointing", True)]).to_csv("leaderboard.csv")
        """
        write_csv(path, value_lines(self))

    def pairs_to_csv(self, path: str | os.PathLike[str]) -> None:
        r"""
        Write one line per pair of explainers and column to a CSV file.

        Args:

            path (str or PathLike): The file, which is replaced atomically.

        Examples::

            >>> from captum_intramodal.evaluation import Column, make_leaderboard
            >>> record = {"index": 0, "id": "a", "words": [], "scores": {"lens": {"pointing": {"1": 1.0}}}}
            >>> make_leaderboard([record], [Column("pointing", "pointing", True)]).pairs_to_csv("pairs.csv")
        """
        write_csv(path, pair_lines(self))

    def to_html(self, path: str | os.PathLike[str], manifest: Mapping[str, Any]) -> None:
        r"""
        Write a page with all tables and plots: one file that needs no network and runs no script.

        Args:

            path (str or PathLike): The file, which is replaced atomically.
            manifest (Mapping[str, Any]): How the evaluation was made, shown on the page as JSON.

        Examples::

            >>> from captum_intramodal.evaluation import Column, make_leaderboard
            >>> record = {"index": 0, "id": "a", "words": [], "scores": {"lens": {"pointing": {"1": 1.0}}}}
            >>> board = make_leaderboard([record], [Column("pointing", "pointing", True)])
            >>> board.to_html("leaderboard.html", {"model": "demo", "seed": 0})
        """
        page = page_template("leaderboard.html.j2").render(
            reference=self.reference,
            tables=format_tables(self, 3),
            legend=describe_values(self),
            difference_legend=describe_differences(self),
            plots=draw_plots(self),
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
    r"""
    Make a leaderboard from the records of an evaluation.

    Means are over words; intervals and tests are over samples, which are resampled or swapped together with all their
    words. In each column, samples without a value are left out, and pairs are compared on the samples for which both
    explainers have a value. The order of the records does not matter.

    Args:

        records (Iterable[Mapping]): One per sample, with "index", "id", "words", "scores" (explainer -> column ->
                    index of the word, or "answer" -> value), and optionally "curves" (explainer -> name -> word ->
                    values at the fractions), "seconds" (explainer -> seconds) and "skipped" (explainer -> reason).
        columns (Sequence[Column]): The metrics to show.
        reference (str, optional): Label of the explainer with which the tables compare the others.
                    Default: ``None``, the first
        n (int, optional): Number of resamples and of random swaps. It limits how small Holm's p-values can be: for
                    190 pairs of 20 explainers and 10,000 swaps, at least 0.019.
                    Default: ``10_000``
        seed (int, optional): Seed of the resamples and swaps.
                    Default: ``0``
        fractions (Sequence[float], optional): Fractions at which the curves are evaluated.
                    Default: 0, 0.1, ..., 1

    Returns:
        **leaderboard** (*Leaderboard*):
            The results, with the explainers in the order in which they first occur in the records.

    Raises:
        InvalidOptionError: ``n`` is not positive, or ``reference`` is not an explainer.
        InvalidInputError: There are no records, columns or explainers; an index or a column's name occurs twice; a
            value is not finite; or a curve does not have one value per fraction.

    Examples::

        >>> from captum_intramodal.evaluation import Column, make_leaderboard
        >>> scores = [{"lens": {"pointing": {"1": value}}, "random": {"pointing": {"1": 0.0}}} for value in (0.5, 1.0)]
        >>> records = [{"index": i, "id": str(i), "words": [], "scores": each} for i, each in enumerate(scores)]
        >>> board = make_leaderboard(records, [Column("pointing", "pointing", True)], reference="random")
        >>> board.rows["lens"]["pointing"].interval.estimate
        0.75
        >>> board.pairs[0].difference.estimate
        0.75
    """
    if n < 1:
        raise InvalidOptionError(f"n must be positive, but it is {n}.")
    _check_unique([column.name for column in columns], "columns")
    ordered = sorted(records, key=lambda record: record["index"])
    _check_unique([record["index"] for record in ordered], "records")
    labels = list(
        dict.fromkeys(label for record in ordered for label in (*record["scores"], *record.get("skipped", {})))
    )
    if not labels:
        raise InvalidInputError(f"None of {len(ordered)} records names an explainer.")
    if reference is not None and reference not in labels:
        raise InvalidOptionError(f"reference must be one of {labels}, but it is {reference!r}.")
    rows, pairs = _rows_and_pairs(ordered, labels, columns, n, seed)
    return Leaderboard(
        tuple(columns),
        labels[0] if reference is None else reference,
        rows,
        pairs,
        tuple(fractions),
        _curves(ordered, labels, len(fractions), n, seed),
        _median_seconds(ordered, labels),
        count_coverage(ordered, labels),
    )


def _check_unique(values: Sequence[Any], name: str) -> None:
    if not values:
        raise InvalidInputError(f"There are no {name}.")
    twice = [value for value, count in Counter(values).items() if count > 1]
    if twice:
        raise InvalidInputError(f"The {name} must differ, but there are several of {twice}.")


def _rows_and_pairs(
    records: Sequence[Record], labels: Sequence[str], columns: Sequence[Column], n: int, seed: int
) -> tuple[dict[str, dict[str, Cell]], tuple[Comparison, ...]]:
    """Estimate all values and differences."""
    tables = [
        np.concatenate([sums_and_counts(records, labels, "scores", name, 1) for name in column.of or (column.name,)])
        for column in columns
    ]
    rows: dict[str, dict[str, Cell]] = {label: {} for label in labels}
    pairs: list[Comparison] = []
    for k, i, j, interval, p, samples in compare_explainers(tables, n, seed):
        name = columns[k].name
        if i == j:
            rows[labels[i]][name] = Cell(interval, int(tables[k][:, 1, i].sum()), samples)
        else:
            pairs.append(Comparison(labels[i], labels[j], name, interval, p, p, samples))
    by_column = [list(same) for _, same in groupby(pairs, key=lambda pair: pair.column)]
    adjusted = [p for same in by_column for p in holm([pair.p for pair in same])]
    return rows, tuple(pair._replace(adjusted_p=p) for pair, p in zip(pairs, adjusted, strict=True))


def _curves(
    records: Sequence[Record], labels: Sequence[str], points: int, n: int, seed: int
) -> dict[str, dict[str, tuple[Interval, ...]]]:
    """Estimate all mean curves, by label and name."""
    recorded = [by_name for record in records for by_name in record.get("curves", {}).values()]
    names = list(dict.fromkeys(name for by_name in recorded for name in by_name))
    tables = [sums_and_counts(records, labels, "curves", name, points) for name in names]
    curves: dict[str, dict[str, tuple[Interval, ...]]] = defaultdict(dict)
    for k, i, curve in mean_curves(tables, n, seed):
        curves[labels[i]][names[k]] = curve
    return {label: curves[label] for label in labels if label in curves}


def _median_seconds(records: Sequence[Record], labels: Sequence[str]) -> dict[str, float]:
    seconds: dict[str, list[float]] = defaultdict(list)
    for record in records:
        for label, value in record.get("seconds", {}).items():
            seconds[label].append(value)
    return {label: median(seconds[label]) for label in labels if label in seconds}
