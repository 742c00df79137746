"""Data sets register by decorator or entry point."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from typing import Any, ClassVar

import pytest

from captum_intramodal import datasets
from captum_intramodal._utils import registry
from captum_intramodal.datasets import (
    DATASETS,
    CocoDataset,
    FolderDataset,
    SceneDataset,
    TAMDataset,
    open_dataset,
    register_dataset,
)
from captum_intramodal.errors import SpecError


class Numbers:
    settings: ClassVar[dict[str, Any]] = {"name": "numbers"}

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> int:
        return range(3)[index]


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restore the registered classes after the test."""
    monkeypatch.setattr(DATASETS, "_classes", dict(DATASETS._classes))


def test_own_data_sets_are_registered_on_import() -> None:
    own = {"coco": CocoDataset, "folder": FolderDataset, "scenes": SceneDataset, "tam": TAMDataset}
    assert {name: DATASETS[name] for name in own} == own
    assert set(datasets.__all__) >= {"DATASETS", "register_dataset"}


@pytest.mark.usefixtures("registered")
def test_a_decorated_class_opens_by_its_name() -> None:
    assert register_dataset("numbers")(Numbers) is Numbers
    assert isinstance(open_dataset("numbers"), Numbers)
    with pytest.raises(SpecError, match="'scenes' is already registered"):
        register_dataset("scenes")(Numbers)
    assert isinstance(open_dataset("scenes:count=1"), SceneDataset)


@pytest.mark.usefixtures("registered")
def test_an_entry_point_of_another_package_opens_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    points = {
        "numbers": EntryPoint("numbers", f"{__name__}:Numbers", "captum_intramodal.datasets"),
        "system": EntryPoint("system", "os:system", "captum_intramodal.datasets"),
    }
    monkeypatch.setattr(
        registry, "entry_points", lambda group: list(points.values()) if group == points["system"].group else []
    )
    assert isinstance(open_dataset("numbers"), Numbers)
    with pytest.raises(SpecError, match="'system' is not a dataset"):
        open_dataset("system:command=true")
