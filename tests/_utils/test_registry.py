from __future__ import annotations

import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from captum_intramodal._utils import registry as registry_module
from captum_intramodal._utils.registry import Registry
from captum_intramodal.errors import SpecError

EXPECTED = "a class with a method area"


class Square:
    def area(self) -> float:
        return 1.0


class Line:
    pass


@pytest.fixture
def shapes() -> Registry:
    shapes = Registry("shape", lambda cls: hasattr(cls, "area"), EXPECTED)
    shapes.register("square")(Square)
    return shapes


@pytest.fixture
def my_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of the user's own."""
    monkeypatch.setitem(sys.modules, "my_shapes", SimpleNamespace(Square=Square, Line=Line))  # type: ignore[arg-type]


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[EntryPoint]:
    """A package with two entry points in the group of shapes."""
    (tmp_path / "plugin_of_shapes.py").write_text(
        "class Circle:\n    def area(self):\n        return 3.0\n\nclass Point:\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "plugin_of_shapes", raising=False)
    points = [
        EntryPoint("circle", "plugin_of_shapes:Circle", "captum_intramodal.shapes"),
        EntryPoint("point", "plugin_of_shapes:Point", "captum_intramodal.shapes"),
    ]
    monkeypatch.setattr(registry_module, "entry_points", lambda group: [p for p in points if p.group == group])
    return points


def test_the_decorator_registers_a_class_and_returns_it(shapes: Registry) -> None:
    @shapes.register("unit_circle")
    class Circle:
        def area(self) -> float:
            return 3.14

    assert Circle.__name__ == "Circle"
    assert list(shapes) == ["square", "unit_circle"] and len(shapes) == 2
    assert shapes["unit_circle"] is Circle and shapes.resolve("unit_circle") is Circle
    assert "unit_circle" in shapes and "circle" not in shapes
    with pytest.raises(KeyError):
        shapes["circle"]


def test_a_name_belongs_to_one_class(shapes: Registry) -> None:
    class Other(Square):
        pass

    with pytest.raises(SpecError, match=r"shape 'square' is already registered, as .*Square; choose another name"):
        shapes.register("square")(Other)
    assert shapes["square"] is Square


def test_a_class_may_be_registered_again_after_its_module_was_reloaded(shapes: Registry) -> None:
    reloaded = type("Square", (), {"area": Square.area, "__module__": Square.__module__})
    assert shapes.register("square")(reloaded) is shapes["square"]


@pytest.mark.parametrize("name", ["my_shapes:Square", "my_shapes.Square"])
def test_a_dotted_name_is_that_of_a_class(shapes: Registry, my_shapes: None, name: str) -> None:
    assert shapes.resolve(name) is Square
    assert list(shapes) == ["square"]


@pytest.mark.parametrize("name", ["os.system", "os:system", "os.path.sep", "my_shapes.Line"])
def test_a_dotted_name_of_anything_but_a_class_of_the_kind_is_refused(
    shapes: Registry, my_shapes: None, name: str
) -> None:
    with pytest.raises(SpecError, match=f"'{name}' is not a shape: expected {EXPECTED}, got "):
        shapes.resolve(name)


@pytest.mark.parametrize("name", ["no_such_package.Square", "os.no_such_class", "os:path:join:more", "not a name."])
def test_a_dotted_name_of_nothing_is_refused(shapes: Registry, name: str) -> None:
    with pytest.raises(SpecError, match=r"neither a registered shape \(square\) nor the dotted name of a class"):
        shapes.resolve(name)


def test_an_unknown_name_lists_the_registered_ones(shapes: Registry, plugin: Any) -> None:
    with pytest.raises(SpecError, match="There is no shape 'triangle'; registered are square, circle, point"):
        shapes.resolve("triangle")


def test_entry_points_are_loaded_when_they_are_looked_up(shapes: Registry, plugin: list[EntryPoint]) -> None:
    assert list(shapes) == ["square", "circle", "point"] and len(shapes) == 3 and "circle" in shapes
    assert "plugin_of_shapes" not in sys.modules
    assert shapes.resolve("circle").__name__ == "Circle"
    assert shapes["circle"]().area() == 3.0
    # It counts once, although it is registered now.
    assert sorted(shapes) == ["circle", "point", "square"] and len(shapes) == 3


def test_an_entry_point_must_be_a_class_of_the_kind(shapes: Registry, plugin: list[EntryPoint]) -> None:
    with pytest.raises(SpecError, match=f"'point' is not a shape: expected {EXPECTED}"):
        shapes.resolve("point")


def test_a_registered_class_hides_an_entry_point_of_its_name(shapes: Registry, plugin: list[EntryPoint]) -> None:
    shapes.register("circle")(Square)
    assert shapes["circle"] is Square and len(shapes) == 3


def test_entry_points_of_other_groups_are_ignored(plugin: list[EntryPoint]) -> None:
    assert list(Registry("color", lambda cls: True, "any class")) == []
