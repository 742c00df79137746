from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest

from captum_intramodal._utils.spec import build, parse_spec, settings_of
from captum_intramodal.errors import InvalidOptionError, SpecError


@dataclass(frozen=True)
class Box:
    name: ClassVar[str] = "box"
    width: int
    height: int = 2
    inner: Any = None

    def __post_init__(self) -> None:
        if self.width < 1:
            raise InvalidOptionError(f"width must be at least 1, got {self.width}.")

    @property
    def settings(self) -> dict[str, Any]:
        return settings_of(self)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("box", ("box", {})),
        (" box:width=3 ", ("box", {"width": 3})),
        ('box:a=[1,2], b = "x,y",c=null', ("box", {"a": [1, 2], "b": "x,y", "c": None})),
        ("box:a=plain text,b=1e3,c=1.5x", ("box", {"a": "plain text", "b": 1000.0, "c": "1.5x"})),
        ("box:a=path/with:colon,b=", ("box", {"a": "path/with:colon", "b": ""})),
        ("box:width=1,", ("box", {"width": 1})),
    ],
)
def test_parsing(spec: str, expected: tuple[str, dict[str, Any]]) -> None:
    assert parse_spec(spec) == expected


@pytest.mark.parametrize("spec", ["box:width", "box:width=1,width=2", "box:=1"])
def test_options_need_a_name_and_a_value_once(spec: str) -> None:
    with pytest.raises(SpecError, match="options are name=value, each once"):
        parse_spec(spec)


def test_build_calls_the_factory() -> None:
    assert build("box:width=3", Box, {"width": 3}) == Box(3)


def test_unknown_and_missing_options() -> None:
    with pytest.raises(SpecError, match="'box:w=3' has no option w; its options are width, height, inner"):
        build("box:w=3", Box, {"w": 3})
    with pytest.raises(SpecError, match=r"'box' needs width: add width=\.\.\. to it"):
        build("box", Box, {})
    with pytest.raises(SpecError, match="its options are none"):
        build("nothing:a=1", lambda: None, {"a": 1})


def test_variadic_parameters_need_no_option() -> None:
    assert build("any", lambda *args, **options: len(args), {}) == 0


def test_a_value_of_a_wrong_type_names_the_options_given() -> None:
    with pytest.raises(SpecError, match="of a wrong type; got width='wide'") as raised:
        build("box:width=wide", Box, {"width": "wide"})
    assert isinstance(raised.value.__cause__, TypeError)


def test_errors_of_the_factory_propagate() -> None:
    with pytest.raises(InvalidOptionError, match=r"^width must be at least 1, got 0\.$"):
        build("box:width=0", Box, {"width": 0})


def test_settings_are_json_and_include_those_of_options() -> None:
    expected = {
        "name": "box",
        "width": 1,
        "height": 2,
        "inner": {"name": "box", "width": 3, "height": 4, "inner": None},
    }
    assert Box(1, inner=Box(3, 4)).settings == expected
