"""Data sets open by folder, registered name or dotted name of a class; nothing else is called."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from captum_intramodal.datasets import EvaluationDataset, FolderDataset, Sample, TAMDataset, open_dataset
from captum_intramodal.demo.scenes import CLASSES
from captum_intramodal.errors import DatasetError, SpecError
from tests.datasets.helpers import SIZE, folder_with_lines, grandf_folder


class Pets:
    def __init__(self, count: int = 2) -> None:
        self.settings: dict[str, Any] = {"name": "pets", "count": count}

    def __len__(self) -> int:
        return int(self.settings["count"])

    def __getitem__(self, index: int) -> Sample:
        return Sample(f"pet-{range(len(self))[index]}", Image.new("RGB", SIZE), "what is this?")


def test_open_by_name_folder_and_class(tmp_path: Path) -> None:
    scenes = open_dataset("scenes:count=3,seed=1,objects=[2, 3],overlap=0.25,task=absent")
    options = {"count": 3, "seed": 1, "objects": [2, 3], "overlap": 0.25, "task": "absent"}
    assert {key: scenes.settings[key] for key in options} == options
    assert len(open_dataset("scenes")) == 100
    longer_than_a_file_name = f"scenes:count=2,classes={json.dumps(CLASSES)}"
    assert len(longer_than_a_file_name) > 255 and len(open_dataset(longer_than_a_file_name)) == 2
    line = {"image": "1.png"}
    folder = folder_with_lines(tmp_path / "plain", line)
    assert isinstance(open_dataset(str(folder)), FolderDataset)
    assert open_dataset(f'folder:folder={folder},prompt="a, b=c"')[0].prompt == "a, b=c"
    assert isinstance(open_dataset(str(grandf_folder(tmp_path / "GranDf"))), TAMDataset)
    pets = open_dataset(f"{__name__}.Pets:count=4")
    assert isinstance(pets, EvaluationDataset) and [sample.id for sample in pets][-1] == "pet-3"


def test_specs_that_name_nothing_are_refused(tmp_path: Path) -> None:
    for spec, error, message in (
        (str(tmp_path), DatasetError, "annotations.jsonl"),
        (str(tmp_path / "gone"), SpecError, "neither a folder nor a registered data set"),
        ("sceens:count=1", SpecError, r"coco, folder, .*scenes"),
        ("no.such.Pets", SpecError, "'no.such.Pets' is neither a registered dataset"),
        ("scenes:cuont=1", SpecError, "cuont.*count"),
        ("scenes:count", SpecError, "name=value"),
        (f"folder:folder={tmp_path}/gone", DatasetError, "cannot be read"),
    ):
        with pytest.raises(error, match=message):
            open_dataset(spec)


def called(command: str = "") -> None:
    pytest.fail("open_dataset called a function")


class Launched:
    """A class that is not a data set: it has a length, but no items."""

    def __init__(self, command: str = "") -> None:
        pytest.fail("open_dataset created an object that is not a data set")

    def __len__(self) -> int:
        return 1


@pytest.mark.parametrize(
    "name", ["os.system", "subprocess.Popen", "subprocess.run", f"{__name__}.called", f"{__name__}.Launched"]
)
def test_only_data_set_classes_are_called(name: str, tmp_path: Path) -> None:
    file = tmp_path / "called"
    with pytest.raises(SpecError, match=rf"{name!r} is not a dataset"):
        open_dataset(f"{name}:{'args' if 'subprocess' in name else 'command'}=touch {file}")
    assert not file.exists()


def test_objects_without_settings_are_refused() -> None:
    with pytest.raises(SpecError, match=r"'collections\.UserList' is not a data set.*no settings"):
        open_dataset("collections.UserList")
