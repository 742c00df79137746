"""The options of an explanation are checked once, before anything runs."""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import Any

import pytest

from captum_intramodal import explain, explain_batch
from captum_intramodal.errors import IntramodalError, InvalidOptionError
from captum_intramodal.explanation.options import ExplainOptions


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "gradcam"}, "method must be one of"),
        ({"aggregation": "median"}, "aggregation must be one of"),
        ({"changed_decisions": "forget"}, "changed_decisions must be one of"),
        ({"scales": "all"}, "'auto' or a sequence"),
        ({"scale_weights": (1, 2)}, "scale_weights need the scales"),
        ({"crops": True, "interpolate_pos_encoding": True}, "choose one"),
    ],
)
def test_wrong_values_are_refused_with_the_option_and_the_value(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidOptionError, match=message):
        ExplainOptions(**options)


@pytest.mark.parametrize("scales", [(), (0.0,), (1.0, -2.0), (1.0, float("nan"))])
def test_scales_are_positive_and_finite(scales: tuple[float, ...]) -> None:
    with pytest.raises(IntramodalError):
        ExplainOptions(scales=scales)


def test_scales_and_weights_are_normalized() -> None:
    assert ExplainOptions(scales=[1, 2], scale_weights=[1, 3]).weight_of == {1.0: 0.25, 2.0: 0.75}
    assert ExplainOptions().weight_of == {}


@pytest.mark.parametrize(("arc", "expected"), [(True, {}), (None, None), (False, None), ({"k": 5}, {"k": 5})])
def test_arc_is_on_off_or_a_mapping(arc: Any, expected: Any) -> None:
    assert ExplainOptions(arc=arc).arc_options == expected


def test_both_functions_take_every_option_with_its_default() -> None:
    for function in (explain, explain_batch):
        parameters = inspect.signature(function).parameters
        for option in fields(ExplainOptions):
            assert parameters[option.name].default == option.default, (function.__name__, option.name)
