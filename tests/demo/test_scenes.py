"""Scenes are reproducible to the pixel, and their options do what they promise."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest

from captum_intramodal.demo import IMAGES, PICTURES, Scene, SceneObject, compose
from captum_intramodal.demo.scenes import AmbiguousNeighborError
from captum_intramodal.errors import InvalidOptionError


def digest(*arguments: Any, **options: Any) -> str:
    """Hash a scene's image, masks and objects."""
    scene = compose(*arguments, **options)
    # The digests are older than the American spelling of this attribute.
    objects = repr(scene.objects).replace("color=", "colour=")
    content = scene.image.tobytes() + scene.masks.tobytes() + objects.encode()
    return hashlib.sha256(content).hexdigest()[:16]


def test_scenes_of_the_demo_models_training_are_unchanged_to_the_pixel() -> None:
    assert digest(7) == digest(7, same_class=1, overlap=0.0, scale=1.0) == "0385d42fe9954116"
    assert digest(34, (320, 224), 3) == "71f8894649097d3e"
    assert digest(2**40 + 1, (192, 256), (1, 5)) == "c90d83a2b0033144"
    questions = []
    for seed in range(40):
        scene, rng = compose(seed), np.random.default_rng(seed)
        asked = scene.describe_question(rng), scene.relation_question(rng), scene.exists_question(rng)
        questions.append(tuple(question and tuple(question) for question in asked))
    assert hashlib.sha256(repr(questions).encode()).hexdigest()[:16] == "63bde43baad020d3"


def count_touching(masks: np.ndarray) -> int:
    """Count the objects that are visible within one pixel of another one."""
    grown = masks.copy()
    for axis in (1, 2):
        grown |= np.roll(masks, 1, axis) | np.roll(masks, -1, axis)
    meets = (grown[:, None] & masks[None]).any((2, 3))
    return int((meets.sum(1) > 1).sum())


def test_overlapping_objects_cover_each_other_and_stay_visible() -> None:
    assert sum(count_touching(compose(seed, n_objects=3).masks) for seed in range(25)) < 10
    for seed in range(25):
        scene = compose(seed, n_objects=3, overlap=0.5)
        assert count_touching(scene.masks) >= 2
        assert len(scene.objects) == 3 and scene.masks.sum((1, 2)).min() >= 50
        assert not (scene.masks.sum(0) > 1).any()


def test_scenes_have_small_objects_and_several_of_one_class() -> None:
    for seed in range(10):
        scene = compose(seed, n_objects=4, same_class=3, scale=0.3)
        names = [item.name for item in scene.objects]
        assert len(names) == 4 and sorted(names.count(name) for name in set(names)) == [1, 3]
        repeated = max(names, key=names.count)
        assert np.array_equal(scene.mask_of(repeated), scene.masks[[name == repeated for name in names]].any(0))
        # Each of four objects fills at most 0.3 * 0.85 / sqrt(4) of the shorter side, plus one pixel of rounding.
        assert all(item.box[2] - item.box[0] <= 0.3 * 0.425 * 192 + 1 for item in scene.objects)
        question = scene.relation_question(np.random.default_rng(seed))
        assert question is None or f"the {repeated}?" not in question.prompt


def test_the_former_name_of_the_images_is_an_alias() -> None:
    assert PICTURES is IMAGES and all(file.exists() for file in IMAGES)


def scene_of(*centers: tuple[int, int]) -> Scene:
    """Build a scene of dogs, without an image, with the given centers."""
    objects = tuple(SceneObject("dog", None, (x - 1, y - 1, x + 1, y + 1)) for x, y in centers)
    return Scene(None, objects, np.zeros((len(objects), 1, 1), bool), 0)  # type: ignore[arg-type]


def test_neighbors_are_the_nearest_in_a_direction() -> None:
    scene = scene_of((100, 100), (160, 110), (250, 100), (100, 40))
    assert scene.neighbor(0, "right") == 1 and scene.neighbor(0, "above") == 3
    assert scene.neighbor(0, "left") is None and scene.neighbor(0, "below") is None


@pytest.mark.parametrize(
    ("centers", "message"),
    [(((100, 100), (160, 160)), "near the diagonal"), (((100, 100), (160, 100), (165, 110)), "equally near")],
)
def test_ambiguous_neighbors_are_reported(centers: tuple[tuple[int, int], ...], message: str) -> None:
    with pytest.raises(AmbiguousNeighborError, match=message) as error:
        scene_of(*centers).neighbor(0, "right")
    assert isinstance(error.value, LookupError)


@pytest.mark.parametrize("options", [{"same_class": 0}, {"overlap": 0.7}, {"scale": 0}])
def test_options_out_of_range_are_rejected(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidOptionError, match=f"{next(iter(options))}={next(iter(options.values()))}"):
        compose(1, **options)
