r"""What does a run record for each sample, and what do the records add up to? The data behind a leaderboard."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from captum_intramodal.errors import InvalidInputError, InvalidOptionError
from captum_intramodal.metrics.arrays import Floats
from captum_intramodal.metrics.statistics import Interval

__all__ = [
    "ANSWER",
    "Cell",
    "Column",
    "Comparison",
    "Coverage",
    "LeaderboardData",
    "Record",
    "count_coverage",
    "describe_coverage",
    "sums_and_counts",
]

# One sample's results, JSON-able; make_leaderboard lists the keys.
Record = Mapping[str, Any]

# Key of a value of the whole answer, among indices of words.
ANSWER = "answer"


@dataclass(frozen=True)
class Column:
    r"""
    A metric as a column of the leaderboard.

    Args:

        name (str): Its name in the scores of a record. The mean is over words. It is over whole answers if the name
                    ends with ``:answer``, or if no record has a value of a word.
        title (str): Its heading.
        higher_is_better (bool): Whether high values are good.
        of (tuple[str, str], optional): Names of the two columns of which this one is the harmonic mean of the means,
                    as F1-IoU is. They need not be columns of the leaderboard.
                    Default: ``()``

    Raises:
        InvalidOptionError: ``of`` does not name two columns.

    Examples::

        >>> from captum_intramodal.evaluation import Column
        >>> Column("f1_iou", "F1-IoU", True, of=("obj_iou", "func_iou")).title
        'F1-IoU'
    """

    name: str
    title: str
    higher_is_better: bool
    of: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.of) not in (0, 2):
            raise InvalidOptionError(f"Column {self.name!r} must derive from two columns or none, got {self.of}.")


class Cell(NamedTuple):
    r"""
    An explainer's value in a column.

    Args:

        interval (Interval): The mean over words, with its bootstrap interval over samples.
        words (int): Number of words with a value; of derived columns, in both columns.
        samples (int): Number of samples with such words.
    """

    interval: Interval
    words: int
    samples: int


class Comparison(NamedTuple):
    r"""
    Two explainers, compared on the samples for which both have a value.

    Args:

        first (str): Label of the first explainer.
        second (str): Label of the second explainer.
        column (str): Name of the column.
        difference (Interval): First minus second, with its paired bootstrap interval.
        p (float): p-value of the paired permutation test.
        adjusted_p (float): p-value adjusted for all pairs in this column by Holm's method.
        samples (int): Number of samples compared.
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
    r"""
    The numbers of samples and words that the records cover.

    Args:

        samples (int): Number of records.
        words (Mapping[str, int]): Words of the answers, by type.
        scored (Mapping[str, int]): Samples with scores, by explainer.
        skipped (Mapping[str, Mapping[str, int]]): Skipped samples, by explainer and reason.
    """

    samples: int
    words: Mapping[str, int]
    scored: Mapping[str, int]
    skipped: Mapping[str, Mapping[str, int]]


@dataclass(frozen=True)
class LeaderboardData:
    """The fields of a :class:`~captum_intramodal.evaluation.Leaderboard`, which tables and plots are made from."""

    columns: tuple[Column, ...]
    reference: str
    rows: Mapping[str, Mapping[str, Cell]]
    pairs: tuple[Comparison, ...]
    fractions: tuple[float, ...]
    curves: Mapping[str, Mapping[str, tuple[Interval, ...]]]
    seconds: Mapping[str, float]
    coverage: Coverage


def sums_and_counts(
    records: Sequence[Record], labels: Sequence[str], part: Literal["scores", "curves"], name: str, points: int
) -> Floats:
    """Sum each sample's values over its words, and count these words: float64 (points, 2, labels, samples)."""
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
        sizes = sorted({np.size(value) for value in chosen})
        values = np.asarray(chosen if sizes == [points] else np.nan, dtype=np.float64)
        if not np.isfinite(values).all():
            raise InvalidInputError(
                f"Sample {records[column]['id']!r}: the {part} {key!r} of {labels[row]!r} must be {points} finite "
                f"number(s) for each word, got {' or '.join(map(str, sizes))}"
                f"{', some of them NaN or infinite' if sizes == [points] else ''}."
            )
        values = values.reshape(len(chosen), points)
        table[:, 0, row, column] = values.sum(0)
        table[:, 1, row, column] = len(chosen)
    return table


def count_coverage(records: Sequence[Record], labels: Sequence[str]) -> Coverage:
    """Count the samples and words of the records."""
    skipped: dict[str, Counter[str]] = defaultdict(Counter)
    for record in records:
        for label, reason in record.get("skipped", {}).items():
            skipped[label][reason] += 1
    words = Counter(word["type"] for record in records for word in record["words"])
    return Coverage(
        len(records),
        dict(sorted(words.items())),
        {label: sum(label in record["scores"] for record in records) for label in labels},
        {label: dict(sorted(skipped[label].items())) for label in labels if label in skipped},
    )


def describe_coverage(records: Sequence[Record], coverage: Coverage) -> dict[str, Any]:
    r"""
    Describe for the manifest how much of a data set a run covers.

    Args:

        records (Sequence[Mapping]): The records of all samples.
        coverage (Coverage): Their coverage.

    Returns:
        **coverage** (*dict*):
            JSON-able: numbers of samples, answers and words; how many of the categories that the images show the
            answers name; the reasons for skipped samples by explainer, and by explainer and metric.
    """
    types = coverage.words
    named = [{w["category"] for w in record["words"]} - {None} for record in records]
    shown = [set(record["categories"]) for record in records]
    skipped_metrics: dict[str, dict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
    for record in records:
        for label, reasons in record.get("skipped_metrics", {}).items():
            for metric, reason in reasons.items():
                skipped_metrics[label][metric][reason] += 1
    return {
        "samples": len(records),
        "answers": sum(bool(record["words"]) for record in records),
        "words": sum(types.values()),
        "nouns": types.get("noun", 0),
        "function_words": types.get("function", 0),
        "categories_shown": sum(map(len, shown)),
        "categories_shown_and_named": sum(len(a & b) for a, b in zip(shown, named, strict=True)),
        "categories_named_but_not_shown": sum(len(b - a) for a, b in zip(shown, named, strict=True)),
        "skipped": {label: dict(reasons) for label, reasons in coverage.skipped.items()},
        "skipped_metrics": skipped_metrics,
    }
