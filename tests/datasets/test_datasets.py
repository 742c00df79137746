"""Data sets give the masks that were drawn, and say which file and record is broken."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from captum_intramodal.datasets import (
    CocoDataset,
    EvaluationDataset,
    FolderDataset,
    Sample,
    SceneDataset,
    TAMDataset,
    open_dataset,
)
from captum_intramodal.demo import compose
from captum_intramodal.demo.scenes import CLASSES

SIZE = WIDTH, HEIGHT = 40, 30


def rectangle(left: int, top: int, right: int, bottom: int) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[top:bottom, left:right] = True
    return mask


DOG, CAT, BALL = rectangle(2, 3, 12, 20), rectangle(20, 5, 33, 28), rectangle(30, 20, 38, 29)
NONE = rectangle(0, 0, 0, 0)


def save(file: Path, array: np.ndarray | None = None) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array if array is not None else np.full((HEIGHT, WIDTH, 3), 90, np.uint8)).save(file)


def write(file: Path, content: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return file


def same_masks(sample: Sample, expected: dict[str, np.ndarray]) -> bool:
    assert list(sample.categories) == list(expected)
    return all(np.array_equal(sample.categories[name], mask) for name, mask in expected.items())


def digest(*arguments: Any, **options: Any) -> str:
    scene = compose(*arguments, **options)
    content = scene.image.tobytes() + scene.masks.tobytes() + repr(scene.objects).encode()
    return hashlib.sha256(content).hexdigest()[:16]


# Scenes


def test_present_scenes_are_unchanged_to_the_pixel() -> None:
    # Taken before the options of hard scenes were added; the demo model was trained on these.
    assert digest(7) == digest(7, same_class=1, overlap=0.0, scale=1.0) == "0385d42fe9954116"
    assert digest(34, (320, 224), 3) == "71f8894649097d3e"
    assert digest(2**40 + 1, (192, 256), (1, 5)) == "c90d83a2b0033144"
    questions = []
    for seed in range(40):
        scene, rng = compose(seed), np.random.default_rng(seed)
        asked = scene.describe_question(rng), scene.relation_question(rng), scene.exists_question(rng)
        questions.append(tuple(question and tuple(question) for question in asked))
    assert hashlib.sha256(repr(questions).encode()).hexdigest()[:16] == "63bde43baad020d3"


def touching(masks: np.ndarray) -> int:
    """Number of objects one pixel away from which another one is visible."""
    grown = masks.copy()
    for axis in (1, 2):
        grown |= np.roll(masks, 1, axis) | np.roll(masks, -1, axis)
    meets = (grown[:, None] & masks[None]).any((2, 3))
    return int((meets.sum(1) > 1).sum())


def test_overlapping_objects_cover_each_other_and_stay_visible() -> None:
    assert sum(touching(compose(seed, n_objects=3).masks) for seed in range(25)) < 10
    for seed in range(25):
        near = compose(seed, n_objects=3, overlap=0.5)
        assert touching(near.masks) >= 2
        assert len(near.objects) == 3 and near.masks.sum((1, 2)).min() >= 50
        assert not (near.masks.sum(0) > 1).any()


def test_objects_of_one_class_and_small_ones() -> None:
    for seed in range(10):
        scene = compose(seed, n_objects=4, same_class=3, scale=0.3)
        names = [item.name for item in scene.objects]
        assert len(names) == 4 and sorted(names.count(name) for name in set(names)) == [1, 3]
        repeated = max(names, key=names.count)
        assert np.array_equal(scene.mask_of(repeated), scene.masks[[name == repeated for name in names]].any(0))
        # One object of four fills at most 0.85 / sqrt(4) of the short side, 0.3 of that, and one pixel of rounding.
        assert all(item.box[2] - item.box[0] <= 0.3 * 0.425 * 192 + 1 for item in scene.objects)
        question = scene.relation_question(np.random.default_rng(seed))
        assert question is None or f"the {repeated}?" not in question.prompt


def test_scenes_have_a_mask_for_every_class_and_none_for_absent_ones() -> None:
    dataset = SceneDataset(count=12, seed=5, objects=3)
    assert [sample.id for sample in dataset] == [str(seed) for seed in range(5, 17)]
    for sample, seed in zip(dataset, range(5, 17), strict=True):
        scene = compose(seed, n_objects=3)
        assert sample.image.tobytes() == scene.image.tobytes() and sample.answer == scene.description
        present = {name for name, mask in sample.categories.items() if mask.any()}
        assert present == {item.name for item in scene.objects} and len(sample.categories) == 32
        assert all(np.array_equal(sample.categories[name], scene.mask_of(name)) for name in present)


@pytest.mark.parametrize("task", ["absent", "hallucination"])
def test_absent_objects_are_named_and_have_empty_masks(task: str) -> None:
    for sample in SceneDataset(count=12, seed=0, task=task):
        text = f"{sample.prompt} {sample.answer}" if task == "absent" else str(sample.answer)
        words = set(text.replace(",", "").replace(".", "").replace("?", "").split())
        named = {name for name in sample.categories if name in words}
        shown = {name for name, mask in sample.categories.items() if mask.any()}
        assert len(named - shown) == 1
        assert named & shown == (set() if task == "absent" else shown)


def test_scene_options_out_of_range() -> None:
    for options, said in (
        ({"task": "guess"}, "describe, relation"),
        ({"overlap": 0.9}, "0.6"),
        ({"scale": 0}, "scale=0"),
        ({"objects": 0}, "objects=0"),
        ({"count": 0}, "count=0"),
        ({"classes": ["dog", "yeti"]}, "yeti"),
    ):
        with pytest.raises(ValueError, match=said):
            SceneDataset(**options)


# COCO


def box(left: int, top: int, right: int, bottom: int) -> list[int]:
    return [left, top, right, top, right, bottom, left, bottom]


def runs(mask: np.ndarray) -> list[int]:
    """Uncompressed run lengths by hand: column by column, beginning with the zeros."""
    flat = mask.flatten(order="F").astype(int)
    ends = [0, *(np.flatnonzero(np.diff(flat)) + 1), flat.size]
    return [0] * int(flat[0]) + np.diff(ends).tolist()


def coco(folder: Path, **changes: Any) -> Path:
    save(folder / "images" / "a.png")
    save(folder / "images" / "b.png")
    content = {
        "images": [{"id": 7, "file_name": "a.png", "width": WIDTH, "height": HEIGHT}, {"id": 9, "file_name": "b.png"}],
        "categories": [{"id": 1, "name": "dog"}, {"id": 3, "name": "cat"}, {"id": 4, "name": "sports ball"}],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 1, "segmentation": [box(2, 3, 12, 20), box(0, 0, 5, 2)]},
            {"id": 2, "image_id": 7, "category_id": 3, "segmentation": {"size": [HEIGHT, WIDTH], "counts": runs(CAT)}},
            {"id": 3, "image_id": 7, "category_id": 3, "segmentation": [box(30, 20, 38, 29)]},
        ],
    }
    return write(folder / "instances.json", {**content, **changes})


def test_coco_masks_are_those_drawn(tmp_path: Path) -> None:
    coder = pytest.importorskip("pycocotools.mask")
    captions = write(
        tmp_path / "captions.json",
        {"annotations": [{"image_id": 7, "caption": "a dog"}, {"image_id": 7, "caption": "and a cat"}]},
    )
    dataset = CocoDataset(coco(tmp_path), tmp_path / "images", captions)
    assert len(dataset) == 2
    first, second = dataset
    assert same_masks(first, {"dog": DOG | rectangle(0, 0, 5, 2), "cat": CAT | BALL, "sports ball": NONE})
    assert same_masks(second, {"dog": NONE, "cat": NONE, "sports ball": NONE})
    assert (first.id, first.captions, second.captions) == ("7", ("a dog", "and a cat"), ())
    assert first.image.size == SIZE and first.image.mode == "RGB"
    compressed = coder.encode(np.asfortranarray(BALL.astype(np.uint8)))
    compressed["counts"] = compressed["counts"].decode()
    annotation = {"image_id": 9, "category_id": 4, "segmentation": compressed, "iscrowd": 1}
    assert np.array_equal(
        CocoDataset(coco(tmp_path, annotations=[annotation]), tmp_path / "images")[1].categories["sports ball"], BALL
    )


def test_coco_polygons_agree_with_pycocotools_own_reader(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reader = pytest.importorskip("pycocotools.coco")
    corners = np.random.default_rng(0).uniform(0, 30, (6, 10)).round(2).tolist()
    annotations = [
        {"id": i, "image_id": 7, "category_id": 1, "segmentation": [polygon]} for i, polygon in enumerate(corners)
    ]
    file = coco(tmp_path, annotations=annotations)
    theirs = reader.COCO(str(file))
    expected = np.any([theirs.annToMask(annotation) for annotation in theirs.anns.values()], 0)
    assert expected.any() and np.array_equal(CocoDataset(file, tmp_path / "images")[0].categories["dog"], expected)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"images": [{"id": 1, "file_name": "gone.png"}]}, r"images\[0\].*gone.png"),
        ({"images": [{"id": 7, "file_name": "a.png"}] * 2}, r"images\[1\].*7 appears twice"),
        ({"images": [{"id": 7}]}, r"images\[0\].*'file_name' is missing"),
        ({"images": None}, r"'images' has to be a list"),
        ({"categories": [{"id": 1, "name": ""}]}, r"categories\[0\].*no name"),
        ({"categories": [{"id": 1}]}, r"categories\[0\].*'name' is missing"),
        ({"annotations": [{"image_id": 7, "category_id": 8}]}, r"annotations\[0\].*8 is not among the categories"),
        ({"annotations": [{"image_id": 8, "category_id": 1}]}, r"annotations\[0\].*8 is not among the images"),
    ],
)
def test_coco_annotations_broken_on_opening(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    pytest.importorskip("pycocotools")
    with pytest.raises(ValueError, match=rf"instances\.json.*{said}"):
        CocoDataset(coco(tmp_path, **changes), tmp_path / "images")


@pytest.mark.parametrize(
    ("segmentation", "said"),
    [
        ([[1, 2, 3, 4]], "three or more"),
        ([], "three or more"),
        ({"size": [3, 4], "counts": [12]}, r"size \[3, 4\]"),
        ({"size": [HEIGHT, WIDTH], "counts": [5, 5]}, "10 pixels"),
        ({"size": [HEIGHT, WIDTH]}, "'counts' is missing"),
    ],
)
def test_coco_masks_broken(tmp_path: Path, segmentation: Any, said: str) -> None:
    pytest.importorskip("pycocotools")
    annotation = {"image_id": 7, "category_id": 1, "segmentation": segmentation}
    dataset = CocoDataset(coco(tmp_path, annotations=[annotation]), tmp_path / "images")
    with pytest.raises(ValueError, match=rf"instances\.json, annotations\[0\] of 'dog'.*{said}"):
        dataset[0]


def test_coco_image_of_another_size_than_annotated(tmp_path: Path) -> None:
    pytest.importorskip("pycocotools")
    dataset = CocoDataset(coco(tmp_path), tmp_path / "images")
    save(tmp_path / "images" / "a.png", np.zeros((HEIGHT, 9), np.uint8))
    with pytest.raises(ValueError, match=r"image id 7.*\(9, 30\).*\(40, 30\)"):
        dataset[0]


def test_without_pycocotools_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(ImportError, match=r"pip install .captum-intramodal\[evaluate\]"):
        CocoDataset(coco(tmp_path), tmp_path / "images")


# TAM


def labels(**levels: int) -> np.ndarray:
    image = np.zeros((HEIGHT, WIDTH), np.uint8)
    for mask, level in zip((DOG, CAT), levels.values(), strict=True):
        image[mask] = level
    return image


def grandf(folder: Path, *records: Any) -> Path:
    save(folder / "image" / "x.png")
    save(folder / "label" / "x.png", labels(dog=4, cat=9))
    save(folder / "label" / "small.png", np.zeros((3, 4), np.uint8))
    write(folder / "anno.json", list(records))
    return folder


def test_tam_release_as_grandf(tmp_path: Path) -> None:
    folder = grandf(
        tmp_path / "GranDf",
        ["image/x.png", "A dog and a cat.", "label/x.png", {"dog": 4, "puppy": 4, "cat": 9, "boat": 2}],
        ["image/x.png", "Nothing.", "", {"dog": 4}],
    )
    first, second = dataset = TAMDataset(folder)
    assert same_masks(first, {"dog": DOG, "puppy": DOG, "cat": CAT, "boat": NONE})
    assert first.categories["dog"] is first.categories["puppy"]
    assert same_masks(second, {"dog": NONE})
    assert first.captions == ("A dog and a cat.",) and first.prompt == "describe the picture."
    assert [sample.id for sample in dataset] == ["0", "1"]
    assert TAMDataset(folder, prompt="what?")[0].prompt == "what?"


def test_tam_release_as_coco(tmp_path: Path) -> None:
    folder = tmp_path / "coco2014"
    for name in ("000000000042", "000000000043"):
        save(folder / "image" / f"{name}.jpg")
    save(folder / "seg_label" / "000000000042.png", labels(dog=18, ball=37))
    write(
        folder / "annotations" / "instances_minival2014.json",
        {
            "images": [{"id": 42}, {"id": 43}],
            "categories": [{"id": 18, "name": "dog"}, {"id": 37, "name": "sports ball"}, {"id": 17, "name": "cat"}],
        },
    )
    write(folder / "annotations" / "captions_val2014.json", {"annotations": [{"image_id": 42, "caption": "a dog"}]})
    first, second = TAMDataset(folder)
    assert same_masks(first, {"dog": DOG, "ball": CAT, "cat": NONE})
    assert same_masks(second, {"dog": NONE, "ball": NONE, "cat": NONE})
    assert (first.id, first.captions, second.captions) == ("000000000042", ("a dog",), ())
    (folder / "image" / "000000000043.jpg").unlink()
    with pytest.raises(ValueError, match=r"instances_minival2014\.json, images\[1\].*000000000043\.jpg"):
        TAMDataset(folder)


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (["image/gone.png", "", "", {}], "gone.png"),
        (["image/x.png", "", "label/gone.png", {}], "gone.png"),
        (["image/x.png", "", ""], "unpack"),
        (["image/x.png", "", "", {" ": 3}], "no name"),
        (["image/x.png", "", "", {"dog": 0}], "1 to 255"),
        (["image/x.png", "", "label/small.png", {"dog": 1}], r"\(3, 4\)"),
    ],
)
def test_tam_records_broken(tmp_path: Path, record: list[Any], said: str) -> None:
    folder = grandf(tmp_path / "OpenPSG", ["image/x.png", "", "", {}], record)
    with pytest.raises(ValueError, match=rf"anno\.json, \[1\].*{said}"):
        TAMDataset(folder)[1]


# Folder


def folder_of(folder: Path, *lines: Any) -> Path:
    save(folder / "1.png")
    save(folder / "dog.png", DOG.astype(np.uint8) * 255)
    save(folder / "cat.png", CAT)
    save(folder / "red.png", np.where(BALL[..., None], np.array([200, 0, 0], np.uint8), np.uint8(0)))
    save(folder / "small.png", np.zeros((3, 4), np.uint8))
    write(folder / "annotations.jsonl", "\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))
    return folder


def test_folder_masks_of_any_kind_of_png(tmp_path: Path) -> None:
    categories = {"dog": "dog.png", "cat": "cat.png", "ball": "red.png", "boat": None}
    folder = folder_of(
        tmp_path,
        {"image": "1.png", "prompt": "what?", "answer": "a dog.", "categories": categories, "captions": ["dog", "cat"]},
        "",
        {"image": "1.png", "id": "again"},
    )
    first, second = dataset = FolderDataset(folder, prompt="describe it")
    assert same_masks(first, {"dog": DOG, "cat": CAT, "ball": BALL, "boat": NONE})
    assert (first.id, first.prompt, first.answer, first.captions) == ("1.png", "what?", "a dog.", ("dog", "cat"))
    assert (second.id, second.prompt, second.answer, second.categories) == ("again", "describe it", None, {})
    with pytest.raises(IndexError):
        dataset[2]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{'image'}", "invalid JSON"),
        ("[1]", "a JSON object is expected, not list"),
        ({"id": "3"}, "'image' is missing"),
        ({"id": "3", "image": "gone.png"}, "gone.png"),
        ({"id": "3", "image": "1.png", "categories": {"dog": "gone.png"}}, "gone.png"),
        ({"id": "3", "image": "1.png", "categories": {"": "dog.png"}}, "no name"),
        ({"id": "3", "image": "1.png", "categories": ["dog"]}, "'categories' has to be dict, not list"),
        ({"id": "3", "image": "1.png", "anwser": "x"}, "'anwser'.*answer"),
        ({"image": "1.png"}, "'1.png' is that of line 1"),
        ({"id": "3", "image": "1.png", "categories": {"dog": "small.png"}}, r"'dog'.*\(3, 4\).*\(30, 40\)"),
        ({"id": "3", "image": "annotations.jsonl"}, "cannot identify"),
    ],
)
def test_folder_lines_broken(tmp_path: Path, line: Any, said: str) -> None:
    folder = folder_of(tmp_path, {"image": "1.png"}, line)
    with pytest.raises(ValueError, match=rf"annotations\.jsonl, line 2.*{said}"):
        FolderDataset(folder)[1]


def test_truncated_image_is_named(tmp_path: Path) -> None:
    save(tmp_path / "1.png", np.random.default_rng(0).integers(0, 255, (90, 90, 3), np.uint8))
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:5000])
    sample = Sample("one", tmp_path / "1.png", "what?")
    assert sample.size == (90, 90)
    with pytest.raises(ValueError, match=r"1\.png, sample one.*truncated"):
        _ = sample.image


def test_images_are_rgb_and_masks_bool() -> None:
    assert Sample("1", Image.new("L", SIZE), "").image.mode == "RGB"
    with pytest.raises(ValueError, match="word_types must be noun, function, other, got 'verb'"):
        Sample("one", Image.new("RGB", (4, 4)), "what?", word_types={"runs": "verb"})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match=r"'dog' is uint8"):
        Sample("1", Image.new("L", SIZE), "", categories={"dog": DOG.astype(np.uint8)})


# Opening


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
    folder = folder_of(tmp_path / "plain", line)
    assert isinstance(open_dataset(str(folder)), FolderDataset)
    assert open_dataset(f'folder:folder={folder},prompt="a, b=c"')[0].prompt == "a, b=c"
    assert isinstance(open_dataset(str(grandf(tmp_path / "GranDf"))), TAMDataset)
    pets = open_dataset(f"{__name__}.Pets:count=4")
    assert isinstance(pets, EvaluationDataset) and [sample.id for sample in pets][-1] == "pet-3"


def test_settings_are_json_and_follow_the_annotations(tmp_path: Path) -> None:
    before = FolderDataset(folder_of(tmp_path, {"image": "1.png"})).settings
    after = FolderDataset(folder_of(tmp_path, {"image": "1.png", "answer": "x"})).settings
    assert before != after
    for settings in (before, SceneDataset().settings):
        assert json.loads(json.dumps(settings)) == settings


def test_what_cannot_be_opened(tmp_path: Path) -> None:
    for spec, said in (
        (str(tmp_path), "annotations.jsonl"),
        (str(tmp_path / "gone"), "is no folder"),
        ("sceens:count=1", "scenes, coco, tam, folder"),
        ("scenes:cuont=1", "cuont.*count"),
        ("scenes:count", "name=value"),
        (f"folder:folder={tmp_path}/gone", "cannot be read"),
    ):
        with pytest.raises(ValueError, match=said):
            open_dataset(spec)
