"""A folder of images, masks and JSON lines: any kind of PNG is a mask, and errors name file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from captum_intramodal.datasets import FolderDataset, SceneDataset
from captum_intramodal.errors import DatasetError
from tests.datasets.helpers import BALL, CAT, DOG, EMPTY, folder_with_lines, same_masks


def test_folder_masks_of_any_kind_of_png(tmp_path: Path) -> None:
    categories = {"dog": "dog.png", "cat": "cat.png", "ball": "red.png", "boat": None}
    folder = folder_with_lines(
        tmp_path,
        {"image": "1.png", "prompt": "what?", "answer": "a dog.", "categories": categories, "captions": ["dog", "cat"]},
        "",
        {"image": "1.png", "id": "again"},
    )
    first, second = dataset = FolderDataset(folder, prompt="describe it")
    assert same_masks(first, {"dog": DOG, "cat": CAT, "ball": BALL, "boat": EMPTY})
    assert (first.id, first.prompt, first.answer, first.captions) == ("1.png", "what?", "a dog.", ("dog", "cat"))
    assert (second.id, second.prompt, second.answer, second.categories) == ("again", "describe it", None, {})
    with pytest.raises(IndexError):
        dataset[2]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'image'}", "invalid JSON at column 2"),
        ("[1]", "expected a JSON object, got list"),
        ({"id": "3"}, "'image' is missing"),
        ({"id": "3", "image": "gone.png"}, "gone.png"),
        ({"id": "3", "image": "1.png", "categories": {"dog": "gone.png"}}, "gone.png"),
        ({"id": "3", "image": "1.png", "categories": {"": "dog.png"}}, "non-empty"),
        ({"id": "3", "image": "1.png", "categories": {"dog": 5}}, "wrong type"),
        ({"id": "3", "image": "1.png", "categories": ["dog"]}, "'categories' must be dict, got list"),
        ({"id": "3", "image": "1.png", "anwser": "x"}, "'anwser'.*answer"),
        ({"image": "1.png"}, "line 1 has the id '1.png' too"),
        ({"id": "3", "image": "1.png", "categories": {"dog": "small.png"}}, "'dog' has 4 x 3 pixels.*40 x 30"),
        ({"id": "3", "image": "annotations.jsonl"}, "not an image of a known format"),
    ],
)
def test_broken_folder_lines_are_named(tmp_path: Path, line: Any, message: str) -> None:
    folder = folder_with_lines(tmp_path, {"image": "1.png"}, line)
    with pytest.raises(DatasetError, match=rf"annotations\.jsonl, line 2.*{message}"):
        FolderDataset(folder)[1]


def test_settings_are_json_and_follow_the_annotations(tmp_path: Path) -> None:
    before = FolderDataset(folder_with_lines(tmp_path, {"image": "1.png"})).settings
    after = FolderDataset(folder_with_lines(tmp_path, {"image": "1.png", "answer": "x"})).settings
    assert before != after
    for settings in (before, SceneDataset().settings):
        assert json.loads(json.dumps(settings)) == settings
