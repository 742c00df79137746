r"""What is a metric of an evaluation? A class that measures one explainer's maps of one answer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from captum_intramodal._utils.spec import settings_of
from captum_intramodal.evaluation.example import AnsweredSample
from captum_intramodal.evaluation.records import Column
from captum_intramodal.explainers import Explainer

__all__ = ["Metric", "MetricResult", "word_map"]


@dataclass
class MetricResult:
    r"""
    The values that metrics give one explainer on one answer.

    Args:

        scores (dict[str, dict[str, float]], optional): Values by column, then by index of the word or ``'answer'``.
                    Default: empty
        curves (dict[str, dict[str, list[float]]], optional): Likewise, curves over the answered sample's fractions.
                    Default: empty

    Examples::

        >>> from captum_intramodal.evaluation import MetricResult
        >>> found = MetricResult()
        >>> found.add("pointing", 2, 1.0)
        >>> found.scores
        {'pointing': {'2': 1.0}}
    """

    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    curves: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def add(self, column: str, where: int | str, value: float) -> None:
        """Add a word's value to a column; ``where`` is the word's index, or ``'answer'``."""
        self.scores.setdefault(column, {})[str(where)] = float(value)

    def add_curve(self, name: str, where: int | str, values: np.ndarray) -> None:
        """Add a word's curve; ``where`` is the word's index, or ``'answer'``."""
        self.curves.setdefault(name, {})[str(where)] = [round(float(value), 6) for value in values]

    def update(self, other: MetricResult) -> None:
        """Add all values and curves of another result."""
        for column, scores in other.scores.items():
            self.scores.setdefault(column, {}).update(scores)
        for name, curves in other.curves.items():
            self.curves.setdefault(name, {}).update(curves)


@dataclass(kw_only=True)
class Metric(ABC):
    r"""
    A metric with its options, which are the fields of its dataclass.

    Attributes:
        name (str): Its name in specs and settings; :func:`register_metric` sets it.
        columns (tuple[Column, ...]): The columns that it adds to the leaderboard.
        settings (dict): Its name and all options, JSON-able.

    Examples::

        >>> from dataclasses import dataclass
        >>> from captum_intramodal.evaluation import Column, Metric, register_metric
        >>> @register_metric("largest")
        ... @dataclass(kw_only=True)
        ... class Largest(Metric):
        ...     columns = (Column("largest", "largest value", True),)
        ...
        ...     def measure(self, case, explainer, maps, found):
        ...         found.add("largest", "answer", float(maps.max()))
        >>> Largest().settings
        {'name': 'largest'}
    """

    name: ClassVar[str]
    columns: ClassVar[tuple[Column, ...]]

    @property
    def settings(self) -> dict[str, Any]:
        """The name and all options, JSON-able."""
        return settings_of(self)

    @abstractmethod
    def measure(self, case: AnsweredSample, explainer: Explainer, maps: Tensor, found: MetricResult) -> None:
        r"""
        Measure the maps of one answer and add the values to ``found``.

        Args:

            case (AnsweredSample): The sample with its answer.
            explainer (Explainer): The explainer that made the maps. Some metrics call it again, on modified images or
                        on a modified model.
            maps (Tensor): The maps of the answer's T tokens, float32 (T, rows, columns), not negative.
            found (MetricResult): Collects the values.

        Raises:
            NotApplicableError: The metric does not apply to this explainer or sample; it is recorded as skipped.
        """


def word_map(maps: Tensor, tokens: Sequence[int]) -> Tensor:
    """Average the maps of a word's tokens."""
    return maps[list(tokens)].mean(0)
