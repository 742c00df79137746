"""TAM's release: label images become the masks that were drawn, and errors name file and record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from captum_intramodal.datasets import TAMDataset
from captum_intramodal.errors import DatasetError
from tests.datasets.helpers import CAT, DOG, EMPTY, grandf_folder, label_image, same_masks, save_image, write_file


def test_tam_release_as_grandf(tmp_path: Path) -> None:
    folder = grandf_folder(
        tmp_path / "GranDf",
        ["image/x.png", "A dog and a cat.", "label/x.png", {"dog": 4, "puppy": 4, "cat": 9, "boat": 2}],
        ["image/x.png", "Nothing.", "", {"dog": 4}],
    )
    first, second = dataset = TAMDataset(folder)
    assert same_masks(first, {"dog": DOG, "puppy": DOG, "cat": CAT, "boat": EMPTY})
    assert first.categories["dog"] is first.categories["puppy"]
    assert same_masks(second, {"dog": EMPTY})
    assert first.captions == ("A dog and a cat.",) and first.prompt == "describe the picture."
    assert [sample.id for sample in dataset] == ["0", "1"]
    assert TAMDataset(folder, prompt="what?")[0].prompt == "what?"


def test_tam_release_as_coco(tmp_path: Path) -> None:
    folder = tmp_path / "coco2014"
    for name in ("000000000042", "000000000043"):
        save_image(folder / "image" / f"{name}.jpg")
    save_image(folder / "seg_label" / "000000000042.png", label_image(dog=18, ball=37))
    write_file(
        folder / "annotations" / "instances_minival2014.json",
        {
            "images": [{"id": 42}, {"id": 43}],
            "categories": [{"id": 18, "name": "dog"}, {"id": 37, "name": "sports ball"}, {"id": 17, "name": "cat"}],
        },
    )
    captions = {"annotations": [{"image_id": 42, "caption": "a dog"}]}
    write_file(folder / "annotations" / "captions_val2014.json", captions)
    first, second = TAMDataset(folder)
    assert same_masks(first, {"dog": DOG, "ball": CAT, "cat": EMPTY})
    assert same_masks(second, {"dog": EMPTY, "ball": EMPTY, "cat": EMPTY})
    assert (first.id, first.captions, second.captions) == ("000000000042", ("a dog",), ())
    (folder / "image" / "000000000043.jpg").unlink()
    with pytest.raises(DatasetError, match=r"instances_minival2014\.json, images\[1\].*000000000043\.jpg"):
        TAMDataset(folder)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (["image/gone.png", "", "", {}], "gone.png"),
        (["image/x.png", "", "label/gone.png", {}], "gone.png"),
        (["image/x.png", "", ""], "expected .image, description, label image"),
        (["image/x.png", "", "", {" ": 3}], "non-empty"),
        (["image/x.png", "", "", {"dog": 0}], "1 to 255"),
        (["image/x.png", "", "", {"dog": "one"}], "wrong type"),
        (["image/x.png", "", "label/small.png", {"dog": 1}], r"small\.png has 4 x 3 pixels.*40 x 30"),
    ],
)
def test_broken_tam_records_are_named(tmp_path: Path, record: list[Any], message: str) -> None:
    folder = grandf_folder(tmp_path / "OpenPSG", ["image/x.png", "", "", {}], record)
    with pytest.raises(DatasetError, match=rf"anno\.json, \[1\].*{message}"):
        TAMDataset(folder)[1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[", "invalid JSON at line 1, column 2"),
        (b"{}", "must be a list, got dict"),
        (b"\xff", "invalid utf-8 at byte 0"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "anno.json").write_bytes(content)
    with pytest.raises(DatasetError, match=rf"anno\.json: .*{message}"):
        TAMDataset(tmp_path)
