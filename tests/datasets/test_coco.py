"""COCO annotations become the masks that were drawn, and errors name file and record."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from captum_intramodal.datasets import CocoDataset
from captum_intramodal.errors import DatasetError
from tests.datasets.helpers import (
    BALL,
    CAT,
    DOG,
    EMPTY,
    HEIGHT,
    SIZE,
    WIDTH,
    rectangle,
    same_masks,
    save_image,
    write_file,
)


def polygon(left: int, top: int, right: int, bottom: int) -> list[int]:
    return [left, top, right, top, right, bottom, left, bottom]


def run_lengths(mask: np.ndarray) -> list[int]:
    """Return uncompressed run lengths: column by column, beginning with the zeros."""
    flat = mask.flatten(order="F").astype(int)
    ends = [0, *(np.flatnonzero(np.diff(flat)) + 1), flat.size]
    return [0] * int(flat[0]) + np.diff(ends).tolist()


def coco_file(folder: Path, **changes: Any) -> Path:
    save_image(folder / "images" / "a.png")
    save_image(folder / "images" / "b.png")
    content = {
        "images": [{"id": 7, "file_name": "a.png", "width": WIDTH, "height": HEIGHT}, {"id": 9, "file_name": "b.png"}],
        "categories": [{"id": 1, "name": "dog"}, {"id": 3, "name": "cat"}, {"id": 4, "name": "sports ball"}],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 1, "segmentation": [polygon(2, 3, 12, 20), polygon(0, 0, 5, 2)]},
            {
                "id": 2,
                "image_id": 7,
                "category_id": 3,
                "segmentation": {"size": [HEIGHT, WIDTH], "counts": run_lengths(CAT)},
            },
            {"id": 3, "image_id": 7, "category_id": 3, "segmentation": [polygon(30, 20, 38, 29)]},
        ],
    }
    return write_file(folder / "instances.json", {**content, **changes})


def test_coco_masks_are_those_drawn(tmp_path: Path) -> None:
    coder = pytest.importorskip("pycocotools.mask")
    captions = write_file(
        tmp_path / "captions.json",
        {"annotations": [{"image_id": 7, "caption": "a dog"}, {"image_id": 7, "caption": "and a cat"}]},
    )
    dataset = CocoDataset(coco_file(tmp_path), tmp_path / "images", captions)
    assert len(dataset) == 2
    first, second = dataset
    assert same_masks(first, {"dog": DOG | rectangle(0, 0, 5, 2), "cat": CAT | BALL, "sports ball": EMPTY})
    assert same_masks(second, {"dog": EMPTY, "cat": EMPTY, "sports ball": EMPTY})
    assert (first.id, first.captions, second.captions) == ("7", ("a dog", "and a cat"), ())
    assert first.image.size == SIZE and first.image.mode == "RGB"
    compressed = coder.encode(np.asfortranarray(BALL.astype(np.uint8)))
    compressed["counts"] = compressed["counts"].decode()
    annotation = {"image_id": 9, "category_id": 4, "segmentation": compressed, "iscrowd": 1}
    assert np.array_equal(
        CocoDataset(coco_file(tmp_path, annotations=[annotation]), tmp_path / "images")[1].categories["sports ball"],
        BALL,
    )


def test_coco_polygons_agree_with_the_reader_of_pycocotools(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reader = pytest.importorskip("pycocotools.coco")
    polygons = np.random.default_rng(0).uniform(0, 30, (6, 10)).round(2).tolist()
    annotations = [
        {"id": i, "image_id": 7, "category_id": 1, "segmentation": [corners]} for i, corners in enumerate(polygons)
    ]
    file = coco_file(tmp_path, annotations=annotations)
    reference = reader.COCO(str(file))
    expected = np.any([reference.annToMask(annotation) for annotation in reference.anns.values()], 0)
    assert expected.any() and np.array_equal(CocoDataset(file, tmp_path / "images")[0].categories["dog"], expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": [{"id": 1, "file_name": "gone.png"}]}, r"images\[0\].*gone.png"),
        ({"images": [{"id": 7, "file_name": "a.png"}] * 2}, r"images\[1\].*7 appears twice"),
        ({"images": [{"id": 7}]}, r"images\[0\].*'file_name' is missing"),
        ({"images": None}, r"'images' must be a list"),
        ({"categories": [{"id": 1, "name": ""}]}, r"categories\[0\].*non-empty"),
        ({"categories": [{"id": 1}]}, r"categories\[0\].*'name' is missing"),
        ({"annotations": [{"image_id": 7, "category_id": 8}]}, r"annotations\[0\].*8 is not among the categories"),
        ({"annotations": [{"image_id": 8, "category_id": 1}]}, r"annotations\[0\].*8 is not among the images"),
    ],
)
def test_broken_annotations_are_named_on_opening(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    pytest.importorskip("pycocotools")
    with pytest.raises(DatasetError, match=rf"instances\.json.*{message}"):
        CocoDataset(coco_file(tmp_path, **changes), tmp_path / "images")


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ([[1, 2, 3, 4]], "three or more"),
        ([], "three or more"),
        ({"size": [3, 4], "counts": [12]}, r"size \[3, 4\]"),
        ({"size": [HEIGHT, WIDTH], "counts": [5, 5]}, "10 pixels"),
        ({"size": [HEIGHT, WIDTH]}, "'counts' is missing"),
    ],
)
def test_broken_masks_are_named(tmp_path: Path, segmentation: Any, message: str) -> None:
    pytest.importorskip("pycocotools")
    annotation = {"image_id": 7, "category_id": 1, "segmentation": segmentation}
    dataset = CocoDataset(coco_file(tmp_path, annotations=[annotation]), tmp_path / "images")
    with pytest.raises(DatasetError, match=rf"instances\.json, annotations\[0\] of 'dog'.*{message}"):
        dataset[0]


def test_an_image_of_another_size_than_annotated_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("pycocotools")
    dataset = CocoDataset(coco_file(tmp_path), tmp_path / "images")
    save_image(tmp_path / "images" / "a.png", np.zeros((HEIGHT, 9), np.uint8))
    with pytest.raises(DatasetError, match=r"image id 7.*9 x 30.*40 x 30"):
        dataset[0]


def test_without_pycocotools_the_error_names_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(ImportError, match=r"pip install .captum-intramodal\[evaluate\]"):
        CocoDataset(coco_file(tmp_path), tmp_path / "images")
