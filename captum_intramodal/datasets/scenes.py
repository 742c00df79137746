r"""Compose scenes with exact masks as a data set of any size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from captum_intramodal.datasets.base import Sample
from captum_intramodal.datasets.registry import register_dataset
from captum_intramodal.demo.scenes import CLASSES, COLORS, SPRITES, Question, Scene, compose
from captum_intramodal.errors import InvalidOptionError
from captum_intramodal.text.parts_of_speech import WordType

__all__ = ["SceneDataset"]


def _relation_or_description(scene: Scene, rng: np.random.Generator, classes: tuple[str, ...]) -> Question:
    return scene.relation_question(rng) or scene.describe_question(rng)


_TASKS: dict[str, Callable[[Scene, np.random.Generator, tuple[str, ...]], Question]] = {
    "describe": lambda scene, rng, classes: scene.describe_question(rng),
    "relation": _relation_or_description,
    "exists": Scene.exists_question,
    "absent": Scene.absent_question,
    "hallucination": Scene.hallucination,
}

# The words of the scenes' answers besides the classes.
_WORD_TYPES: dict[str, WordType] = {
    **dict.fromkeys(("picture", "nothing"), "noun"),
    **dict.fromkeys("a an the some and there no yes".split(), "function"),
    **dict.fromkeys(("shows", "is", ".", ",", *COLORS), "other"),
}


@register_dataset("scenes")
class SceneDataset:
    r"""
    Scenes composed from seeds, any number of them, with exact masks (see :func:`~captum_intramodal.demo.compose`). The
    demo model was trained on other seeds, from 2**32.

    Every sample has all ``classes`` as categories, with empty masks for those that are absent from its scene, and the
    types of all words that occur in answers.

    Args:

        count (int, optional): Number of scenes.
            Default: 100
        seed (int, optional): Seed of the first scene; the others have the seeds that follow.
            Default: 2_000_000
        size (Sequence[int], optional): Width and height in pixels.
            Default: (256, 192)
        objects (int or Sequence[int], optional): Number of objects, or its inclusive range.
            Default: (2, 4)
        task (str, optional): ``"describe"``: the answer names every object; ``"relation"``: *what is left of the X?*,
            or a description if no such question has an unambiguous answer; ``"exists"``: *is there a X?*, with yes and
            no equally frequent; ``"absent"``: *is there a X?* about an absent object; ``"hallucination"``: a
            description that names one object too many.
            Default: ``"describe"``
        same_class (int, optional): Number of objects per scene that share one class.
            Default: 1
        overlap (float, optional): 0: objects keep apart; up to 0.6: they cover parts of each other.
            Default: 0
        scale (float, optional): Factor on the objects' diameters.
            Default: 1
        classes (Sequence[str], optional): Names of the objects to choose from.
            Default: the demo's.
        sprites (Path, optional): Folder with a file ``<name>.webp`` for each class.
            Default: the demo's.

    Raises:
        InvalidOptionError: the task is unknown, a sprite is missing, or a number is out of range.

    Examples::

        >>> from captum_intramodal.datasets import SceneDataset
        >>> SceneDataset(count=10, task="absent")[0].answer
        'no, there is no book.'
    """

    def __init__(
        self,
        count: int = 100,
        seed: int = 2_000_000,
        size: Sequence[int] = (256, 192),
        objects: int | Sequence[int] = (2, 4),
        task: str = "describe",
        same_class: int = 1,
        overlap: float = 0.0,
        scale: float = 1.0,
        classes: Sequence[str] = CLASSES,
        sprites: str | Path = SPRITES,
    ) -> None:
        if task not in _TASKS:
            raise InvalidOptionError(f"task must be one of {', '.join(_TASKS)}, got {task!r}.")
        fewest, most = (objects, objects) if isinstance(objects, int) else objects
        if count < 1 or seed < 0 or not 1 <= fewest <= most:
            raise InvalidOptionError(
                "There must be at least one scene, at least one object per scene, and a seed of 0 or more; "
                f"got count={count}, seed={seed}, objects={objects}."
            )
        if missing := [name for name in classes if not (Path(sprites) / f"{name}.webp").is_file()]:
            raise InvalidOptionError(f"{sprites} has no sprite for {', '.join(missing)}.")
        self.settings: dict[str, Any] = {
            "name": "scenes",
            "count": count,
            "seed": seed,
            "size": list(size),
            "objects": objects if isinstance(objects, int) else list(objects),
            "task": task,
            "same_class": same_class,
            "overlap": overlap,
            "scale": scale,
            "classes": list(classes),
            "sprites": "demo" if Path(sprites) == SPRITES else str(sprites),
        }
        self._seeds = range(seed, seed + count)
        self._question = _TASKS[task]
        self._classes = tuple(classes)
        width, height = size
        self._compose = partial(
            compose,
            size=(width, height),
            n_objects=(fewest, most),
            classes=self._classes,
            sprites=Path(sprites),
            same_class=same_class,
            overlap=overlap,
            scale=scale,
        )
        self._compose(seed)  # raises now if same_class, overlap or scale is out of range

    def __len__(self) -> int:
        return len(self._seeds)

    def __getitem__(self, index: int) -> Sample:
        seed = self._seeds[index]
        scene = self._compose(seed)
        # A generator of its own: with the scene's, the question would depend on the number of objects.
        question = self._question(scene, np.random.default_rng((seed, 1)), self._classes)
        # mask_of returns an empty mask for absent classes.
        categories = {name: scene.mask_of(name) for name in self._classes}
        types: dict[str, WordType] = {**_WORD_TYPES, **dict.fromkeys(self._classes, "noun")}
        return Sample(str(seed), scene.image, question.prompt, question.answer, categories, (scene.description,), types)
