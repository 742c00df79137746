"""Metrics by name: specs, registration and what is refused."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
from torch import Tensor

from captum_intramodal import evaluation
from captum_intramodal.errors import SpecError
from captum_intramodal.evaluation import (
    METRICS,
    AnsweredSample,
    Column,
    Metric,
    MetricResult,
    make_metric,
    register_metric,
)


@dataclass(kw_only=True)
class Largest(Metric):
    columns = (Column("largest", "largest value", True),)

    power: float = 1.0

    def measure(self, case: AnsweredSample, explainer: Any, maps: Tensor, found: MetricResult) -> None:
        found.add("largest", "answer", float(maps.max()) ** self.power)


@pytest.fixture
def largest(monkeypatch: pytest.MonkeyPatch) -> type[Metric]:
    """Register a metric for one test."""
    monkeypatch.setattr(METRICS, "_classes", dict(METRICS._classes))

    @register_metric("largest")
    class Registered(Largest): ...

    return Registered


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("iou", "There is no metric 'iou'"),
        ("deletion:imputation=black", "'black'"),
        ("deletion:of=tokens", "'words' or 'answer'"),
        ("pointing:seed=1", "has no option seed"),
    ],
)
def test_unknown_metrics_and_options_are_refused(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_metric(spec)


@pytest.mark.parametrize("spec", ["iou", "no.such.Metric", "collections.OrderedDict"])
def test_unknown_names_and_classes_that_are_no_metrics_raise_spec_errors(spec: str) -> None:
    with pytest.raises(SpecError):
        make_metric(spec)


def test_every_metric_has_settings_and_columns() -> None:
    for name in METRICS:
        metric = make_metric(name)
        assert metric.settings["name"] == name and metric.columns


def test_a_registered_metric_is_made_from_text(largest: type[Metric]) -> None:
    metric = make_metric("largest:power=2")
    assert type(metric) is largest and metric.settings == {"name": "largest", "power": 2}
    with pytest.raises(SpecError, match="'largest' is already registered"):
        register_metric("largest")(Largest)


def test_a_metric_is_made_from_its_dotted_name(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("my_metrics")

    class Named(Largest):
        name = "named"

    module.Named, module.Nameless = Named, Largest  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_metrics", module)
    assert make_metric("my_metrics.Named:power=3").settings == {"name": "named", "power": 3}
    with pytest.raises(SpecError, match="with a name"):
        make_metric("my_metrics.Nameless")


def test_former_names_stay_importable() -> None:
    assert evaluation.Case is AnsweredSample and evaluation.Measured is MetricResult
