"""Scenes as a data set: every class has a mask, and every task its question and answer."""

from __future__ import annotations

import numpy as np
import pytest

from captum_intramodal.datasets import SceneDataset
from captum_intramodal.demo import compose


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
        present = {name for name, mask in sample.categories.items() if mask.any()}
        assert len(named - present) == 1
        assert named & present == (set() if task == "absent" else present)


def test_scene_options_out_of_range_are_refused() -> None:
    for options, message in (
        ({"task": "guess"}, "describe, relation"),
        ({"overlap": 0.9}, "0.6"),
        ({"scale": 0}, "scale=0"),
        ({"objects": 0}, "objects=0"),
        ({"count": 0}, "count=0"),
        ({"classes": ["dog", "yeti"]}, "yeti"),
    ):
        with pytest.raises(ValueError, match=message):
            SceneDataset(**options)
