r"""Compose images from sprites, with exact object masks, and questions about them with exact answers.

One integer seed determines a scene. The scenes of some seeds are the demo model's training set; those of others are
its held-out test set and the ground truth of the localization benchmark.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageEnhance

from captum_intramodal.errors import IntramodalError, InvalidOptionError

__all__ = [
    "CLASSES",
    "COLORS",
    "DESCRIBE_PROMPTS",
    "SPRITES",
    "AmbiguousNeighborError",
    "Question",
    "Scene",
    "SceneObject",
    "compose",
]

SPRITES = Path(__file__).parent / "sprites"

CLASSES: tuple[str, ...] = (
    "dog", "cat", "lion", "frog", "pig", "panda", "apple", "banana", "lemon", "grapes", "pizza", "burger",
    "donut", "cake", "car", "bus", "truck", "rocket", "bicycle", "boat", "house", "tree", "flower", "star",
    "moon", "umbrella", "clock", "book", "guitar", "balloon", "gift", "key",
)  # fmt: skip

# Hue of each color word: 0..255, as in Pillow's HSV.
COLORS: dict[str, int] = {"red": 0, "yellow": 42, "green": 85, "blue": 150, "purple": 195}

# Classes whose sprites are painted in one of COLORS; answers always name the color of these.
_PAINTED: frozenset[str] = frozenset({"car", "book", "balloon", "gift", "star", "key"})

_DIRECTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "above": (0, -1), "below": (0, 1)}

DESCRIBE_PROMPTS: tuple[str, ...] = (
    "describe the picture.",
    "describe this image.",
    "what is in the picture?",
    "what do you see?",
)


class AmbiguousNeighborError(IntramodalError, LookupError):
    """The scene does not clearly show which object lies in a direction."""


class Question(NamedTuple):
    r"""A prompt about a scene, with its answer and task.

    Args:

        prompt (str): The prompt.
        answer (str): The right answer; for ``'hallucination'``, one that names an object that is not in the scene.
        task (str): ``'describe'``, ``'relation'``, ``'exists'``, ``'absent'`` or ``'hallucination'``.
    """

    prompt: str
    answer: str
    task: str


@dataclass(frozen=True)
class SceneObject:
    r"""An object of a scene.

    Attributes:

        name (str): Its class.
        color (str or None): Its color word, if its class is painted.
        box (tuple[int, int, int, int]): Its box (left, top, right, bottom) in pixels.
    """

    name: str
    color: str | None
    box: tuple[int, int, int, int]

    @property
    def center(self) -> tuple[float, float]:
        """Return the center (x, y) of the box in pixels."""
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2

    @property
    def phrase(self) -> str:
        """Return the object's name as used in answers: ``a dog``, ``an apple``, ``a red car``."""
        words = f"{self.color} {self.name}" if self.color else self.name
        return f"{_article(words)} {words}"


@dataclass(frozen=True)
class Scene:
    r"""A composed image with its objects and their masks.

    Attributes:

        image (PIL.Image.Image): The image, RGB.
        objects (tuple[SceneObject, ...]): The objects from left to right, by their centers.
        masks (ndarray): Pixels where each object is visible (opacity above one half, no other object in front), bool
                    (number of objects, height, width).
        seed (int): Seed of the scene.
    """

    image: Image.Image
    objects: tuple[SceneObject, ...]
    masks: np.ndarray
    seed: int

    def mask_of(self, name: str) -> np.ndarray:
        """Return the union of the masks of all objects of a class, bool (height, width)."""
        indices = [i for i, item in enumerate(self.objects) if item.name == name]
        return np.asarray(self.masks[indices].any(0))

    @property
    def description(self) -> str:
        """Return the right answer to a request for a description."""
        return _description([item.phrase for item in self.objects])

    def neighbor(self, index: int, direction: str) -> int | None:
        r"""Find the nearest object in a direction.

        An object lies to the left of another if the line between their centers is closer to the horizontal than to the
        vertical; the other directions follow the same rule.

        Args:

            index (int): Index of the object to start from.
            direction (str): ``'left'``, ``'right'``, ``'above'`` or ``'below'``.

        Returns:
            **neighbor** (*int or None*):
                Index of the nearest object in that direction; ``None`` if there is none.

        Raises:
            AmbiguousNeighborError: A person could not answer with certainty: an object lies near the diagonal, or two
                objects are about equally near.
        """
        sign_x, sign_y = _DIRECTIONS[direction]
        cx, cy = self.objects[index].center
        certain: list[tuple[float, int]] = []
        for other, item in enumerate(self.objects):
            dx, dy = item.center[0] - cx, item.center[1] - cy
            along, across = (sign_x * dx, abs(dy)) if sign_x else (sign_y * dy, abs(dx))
            if other == index or along <= 0 or along < 0.8 * across:
                continue
            if along < 1.25 * across:
                raise AmbiguousNeighborError(f"Object {other} lies near the diagonal of object {index}.")
            certain.append((float(np.hypot(dx, dy)), other))
        certain.sort()
        if len(certain) > 1 and certain[0][0] > 0.75 * certain[1][0]:
            raise AmbiguousNeighborError(
                f"Objects {certain[0][1]} and {certain[1][1]} are about equally near in the direction {direction!r} of "
                f"object {index}."
            )
        return certain[0][1] if certain else None

    def describe_question(self, rng: np.random.Generator) -> Question:
        """Draw a request for a description, with the right answer."""
        return Question(str(rng.choice(DESCRIBE_PROMPTS)), self.description, "describe")

    def relation_question(self, rng: np.random.Generator) -> Question | None:
        """Draw a question *what is left of (right of, above, below) the X?* with an unambiguous answer, or ``None``."""
        found: list[Question] = []
        nothing: list[Question] = []
        names = [item.name for item in self.objects]
        for index, item in enumerate(self.objects):
            if names.count(item.name) > 1:
                continue
            for direction in _DIRECTIONS:
                try:
                    neighbor = self.neighbor(index, direction)
                except AmbiguousNeighborError:
                    continue
                where = f"{direction} of" if direction in ("left", "right") else direction
                prompt = f"what is {where} the {item.name}?"
                if neighbor is None:
                    nothing.append(Question(prompt, "nothing.", "relation"))
                else:
                    found.append(Question(prompt, f"{self.objects[neighbor].phrase}.", "relation"))
        if found and (not nothing or rng.random() < 0.7):
            return found[rng.integers(len(found))]
        return nothing[rng.integers(len(nothing))] if nothing else None

    def exists_question(self, rng: np.random.Generator, classes: tuple[str, ...] = CLASSES) -> Question:
        """Draw a question *is there a X?*, with the answer yes or no with equal probability."""
        if rng.random() < 0.5:
            item = self.objects[rng.integers(len(self.objects))]
            return Question(f"is there {_article(item.name)} {item.name}?", f"yes, there is {item.phrase}.", "exists")
        return self.absent_question(rng, classes)._replace(task="exists")

    def absent_question(self, rng: np.random.Generator, classes: tuple[str, ...] = CLASSES) -> Question:
        """Draw a question *is there a X?* for a class that is not in the scene."""
        name = self._absent_class(rng, classes)
        return Question(f"is there {_article(name)} {name}?", f"no, there is no {name}.", "absent")

    def hallucination(self, rng: np.random.Generator, classes: tuple[str, ...] = CLASSES) -> Question:
        """Draw a request for a description, with a wrong answer that names one additional object."""
        prompt = str(rng.choice(DESCRIBE_PROMPTS))
        phrases = [item.phrase for item in self.objects]
        name = self._absent_class(rng, classes)
        color = str(rng.choice(list(COLORS))) if name in _PAINTED else None
        phrases.insert(int(rng.integers(len(phrases) + 1)), SceneObject(name, color, (0, 0, 0, 0)).phrase)
        return Question(prompt, _description(phrases), "hallucination")

    def _absent_class(self, rng: np.random.Generator, classes: tuple[str, ...]) -> str:
        """Draw a class that is not in the scene."""
        absent = sorted(set(classes) - {item.name for item in self.objects})
        return absent[rng.integers(len(absent))]


def compose(
    seed: int,
    size: tuple[int, int] = (256, 192),
    n_objects: int | tuple[int, int] = (2, 4),
    classes: tuple[str, ...] = CLASSES,
    sprites: Path = SPRITES,
    *,
    same_class: int = 1,
    overlap: float = 0.0,
    scale: float = 1.0,
) -> Scene:
    r"""Compose an image of objects on a smooth random background.

    Args:

        seed (int): Seed of everything random.
        size (tuple[int, int]): Width and height of the image in pixels.
                    Default: ``(256, 192)``
        n_objects (int or tuple[int, int]): Number of objects, or its inclusive range. The image gets fewer if it has no
                    room for all.
                    Default: ``(2, 4)``
        classes (tuple[str, ...]): Classes to choose from; each occurs at most once, except for ``same_class``.
                    Default: all
        sprites (Path): Folder with ``<name>.webp``, RGBA.
                    Default: the package's own
        same_class (int): Number of objects that share a class.
                    Default: ``1``
        overlap (float): From 0, objects are kept apart, to 0.6: the larger, the more every object covers part of
                    another, or is partly covered; none is hidden.
                    Default: ``0.0``
        scale (float): Factor on the objects' diameters, above 0 and at most 1.
                    Default: ``1.0``

    Returns:
        **scene** (*Scene*):
            The same for the same arguments.

    Raises:
        InvalidOptionError: ``same_class``, ``overlap`` or ``scale`` is out of range.

    Examples::

        >>> from captum_intramodal.demo import compose
        >>> scene = compose(7, size=(256, 192), n_objects=3)
        >>> scene.masks.shape
        (3, 192, 256)
    """
    if same_class < 1 or not 0 <= overlap <= 0.6 or not 0 < scale <= 1:
        raise InvalidOptionError(
            f"same_class={same_class}, overlap={overlap}, scale={scale}: same_class has to be 1 or more, overlap "
            "between 0 and 0.6, scale above 0 and at most 1."
        )
    rng = np.random.default_rng(seed)
    low, high = (n_objects, n_objects) if isinstance(n_objects, int) else n_objects
    count = int(rng.integers(low, high + 1))
    names = [classes[i] for i in rng.choice(len(classes), size=count, replace=False)]
    names[:same_class] = names[:1] * len(names[:same_class])
    image, objects, masks = _paint(rng, size, _place(rng, names, size, overlap, scale), sprites)
    order = sorted(range(len(objects)), key=lambda i: objects[i].center[0])
    return Scene(image, tuple(objects[i] for i in order), np.stack([masks[i] for i in order]), seed)


class _Placement(NamedTuple):
    """The class of an object, its center and its diameter in pixels."""

    name: str
    x: float
    y: float
    diameter: float


def _place(
    rng: np.random.Generator, names: list[str], size: tuple[int, int], overlap: float, scale: float
) -> list[_Placement]:
    """Draw places for objects; leave out those for which no place is found."""
    width, height = size
    placed: list[_Placement] = []
    # The largest diameter leaves room for all: up to 85 % of the shorter side for one object, 38 % for five.
    largest = min(width, height) * min(0.85, 0.85 / len(names) ** 0.5) * scale
    for name in names:
        for _ in range(1000 if overlap else 30):
            diameter = rng.uniform(0.6, 1.0) * largest
            x = rng.uniform(diameter / 2, width - diameter / 2)
            y = rng.uniform(diameter / 2, height - diameter / 2)
            # A distance of 1 means that two objects just touch, as if they were round.
            distances = [np.hypot(x - p.x, y - p.y) / (0.45 * (diameter + p.diameter)) for p in placed]
            apart = all(distance > 1 - overlap for distance in distances) and all(
                abs(x - p.x) > 0.06 * width * (1 - overlap) * scale for p in placed
            )
            if apart and (not overlap or not placed or min(distances) < 1 - overlap / 2):
                placed.append(_Placement(name, x, y, diameter))
                break
    return placed


def _paint(
    rng: np.random.Generator, size: tuple[int, int], placed: list[_Placement], sprites: Path
) -> tuple[Image.Image, list[SceneObject], list[np.ndarray]]:
    """Paint objects on a background, later ones in front; return their visible masks, too."""
    image = _background(rng, size)
    objects: list[SceneObject] = []
    masks: list[np.ndarray] = []
    for name, x, y, diameter in placed:
        color = str(rng.choice(list(COLORS))) if name in _PAINTED else None
        sprite = _load_sprite(name, color, str(sprites))
        if rng.random() < 0.5:
            sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        side = max(8, round(diameter))
        sprite = sprite.resize((side, side), Image.Resampling.BILINEAR, reducing_gap=2.0)
        sprite = sprite.rotate(rng.uniform(-12, 12), Image.Resampling.BILINEAR)
        alpha = sprite.getchannel("A")
        painted = ImageEnhance.Brightness(sprite.convert("RGB")).enhance(rng.uniform(0.85, 1.12))
        left, top = round(x - side / 2), round(y - side / 2)
        image.paste(painted, (left, top), alpha)
        layer = Image.new("L", size)
        layer.paste(alpha, (left, top))
        mask = np.asarray(layer) > 127
        masks = [earlier & ~mask for earlier in masks]
        masks.append(mask)
        objects.append(SceneObject(name, color, (left, top, left + side, top + side)))
    return image, objects, masks


def _description(phrases: list[str]) -> str:
    """List phrases in a sentence."""
    listing = phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"
    return f"the picture shows {listing}."


def _article(words: str) -> str:
    """Return the article of a noun phrase."""
    if words == "grapes":
        return "some"
    return "an" if words[0] in "aeiou" else "a"


def _background(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """Draw smooth blotches of muted color, by enlarging a random grid of at most 5 x 4 cells."""
    cells = rng.integers(2, 6), rng.integers(2, 5)
    base = rng.uniform(60, 220) + rng.normal(0, 25, size=3)
    grid = np.clip(base + rng.normal(0, 22, size=(cells[1], cells[0], 3)), 0, 255).astype(np.uint8)
    return Image.fromarray(grid).resize(size, Image.Resampling.BICUBIC)


@lru_cache(maxsize=512)
def _load_sprite(name: str, color: str | None, folder: str) -> Image.Image:
    """Load a sprite, and paint its saturated pixels in a color."""
    with Image.open(Path(folder) / f"{name}.webp") as file:
        sprite = file.convert("RGBA")
    if color is None:
        return sprite
    hsv = np.array(sprite.convert("RGB").convert("HSV"))
    colored = hsv[..., 1] > 60
    hsv[..., 0] = np.where(colored, COLORS[color], hsv[..., 0])
    hsv[..., 1] = np.where(colored, np.maximum(hsv[..., 1], 190), hsv[..., 1])
    painted = Image.frombuffer("HSV", sprite.size, hsv.tobytes()).convert("RGBA")
    painted.putalpha(sprite.getchannel("A"))
    return painted
