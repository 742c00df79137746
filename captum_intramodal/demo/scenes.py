r"""Images with exact object masks, composed from sprites, and questions about them with exact answers.

Every scene follows from one integer seed: it is the demo model's training set, its held-out test set (other
seeds) and the ground truth of the first benchmark.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageEnhance

__all__ = ["CLASSES", "COLORS", "PAINTED", "SPRITES", "Question", "Scene", "SceneObject", "compose"]

SPRITES = Path(__file__).parent / "sprites"

CLASSES: tuple[str, ...] = (
    "dog", "cat", "lion", "frog", "pig", "panda", "apple", "banana", "lemon", "grapes", "pizza", "burger",
    "donut", "cake", "car", "bus", "truck", "rocket", "bicycle", "boat", "house", "tree", "flower", "star",
    "moon", "umbrella", "clock", "book", "guitar", "balloon", "gift", "key",
)  # fmt: skip

# Hue (0..255, Pillow's HSV) that each color word stands for.
COLORS: dict[str, int] = {"red": 0, "yellow": 42, "green": 85, "blue": 150, "purple": 195}

# Classes whose sprite is painted in one of COLORS; their noun is always said with the color.
PAINTED: frozenset[str] = frozenset({"car", "book", "balloon", "gift", "star", "key"})

DIRECTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "above": (0, -1), "below": (0, 1)}

DESCRIBE_PROMPTS: tuple[str, ...] = (
    "describe the picture.",
    "describe this image.",
    "what is in the picture?",
    "what do you see?",
)


class Question(NamedTuple):
    """A prompt about a scene, its answer, and the kind of task.

    ``describe``, ``relation``, ``exists`` and ``absent`` come with their right answer; the answer of a
    ``hallucination`` names one object that is not there.
    """

    prompt: str
    answer: str
    task: str


@dataclass(frozen=True)
class SceneObject:
    """One object of a scene: class name, color word or None, and box ``(x0, y0, x1, y1)`` in pixels."""

    name: str
    color: str | None
    box: tuple[int, int, int, int]

    @property
    def center(self) -> tuple[float, float]:
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2

    @property
    def phrase(self) -> str:
        """The object as the answers name it: ``a dog``, ``an apple``, ``a red car``."""
        words = f"{self.color} {self.name}" if self.color else self.name
        return f"{_article(words)} {words}"


@dataclass(frozen=True)
class Scene:
    """A composed image: RGB image, objects from left to right, and their visible masks.

    Attributes:
        image (PIL.Image.Image): the image, RGB.
        objects (tuple[SceneObject, ...]): sorted by the horizontal position of their center.
        masks (numpy.ndarray): bool, shape (number of objects, height, width); the pixels where the object is
            visible (alpha above one half and no other object in front).
        seed (int): the seed that made the scene.
    """

    image: Image.Image
    objects: tuple[SceneObject, ...]
    masks: np.ndarray
    seed: int

    def mask_of(self, name: str) -> np.ndarray:
        """Union of the visible masks of all objects of a class, bool (height, width)."""
        indices = [i for i, item in enumerate(self.objects) if item.name == name]
        return np.asarray(self.masks[indices].any(0))

    @property
    def description(self) -> str:
        return _description([item.phrase for item in self.objects])

    def neighbor(self, index: int, direction: str) -> int | None:
        """Index of the object that lies in a direction from another one, None where nothing does.

        An object lies to the *left* of another if the line between their centers is closer to the horizontal than to
        the vertical; of several, the nearest counts.

        Raises:
            LookupError: where a person could not say for sure: an object near the diagonal, or two candidates at
                nearly the same distance.
        """
        sign_x, sign_y = DIRECTIONS[direction]
        cx, cy = self.objects[index].center
        certain: list[tuple[float, int]] = []
        for other, item in enumerate(self.objects):
            dx, dy = item.center[0] - cx, item.center[1] - cy
            along, across = (sign_x * dx, abs(dy)) if sign_x else (sign_y * dy, abs(dx))
            if other == index or along <= 0 or along < 0.8 * across:
                continue
            if along < 1.25 * across:
                raise LookupError(f"object {other} lies near the diagonal of object {index}")
            certain.append((float(np.hypot(dx, dy)), other))
        certain.sort()
        if len(certain) > 1 and certain[0][0] > 0.75 * certain[1][0]:
            raise LookupError(f"objects {certain[0][1]} and {certain[1][1]} are both {direction} of object {index}")
        return certain[0][1] if certain else None

    def describe_question(self, rng: np.random.Generator) -> Question:
        return Question(str(rng.choice(DESCRIBE_PROMPTS)), self.description, "describe")

    def relation_question(self, rng: np.random.Generator) -> Question | None:
        """A question *what is left / right / above / below of the X?* with an unambiguous answer, or None."""
        found: list[Question] = []
        nothing: list[Question] = []
        names = [item.name for item in self.objects]
        for index, item in enumerate(self.objects):
            if names.count(item.name) > 1:
                continue
            for direction in DIRECTIONS:
                try:
                    neighbor = self.neighbor(index, direction)
                except LookupError:
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
        """A question *is there a X?*; yes and no are equally frequent."""
        if rng.random() < 0.5:
            item = self.objects[rng.integers(len(self.objects))]
            return Question(f"is there {_article(item.name)} {item.name}?", f"yes, there is {item.phrase}.", "exists")
        return self.absent_question(rng, classes)._replace(task="exists")

    def absent_question(self, rng: np.random.Generator, classes: tuple[str, ...] = CLASSES) -> Question:
        """A question *is there a X?* for a class that the scene does not show."""
        name = self._absent_class(rng, classes)
        return Question(f"is there {_article(name)} {name}?", f"no, there is no {name}.", "absent")

    def hallucination(self, rng: np.random.Generator, classes: tuple[str, ...] = CLASSES) -> Question:
        """A request for a description with a wrong answer: it names one object more than the scene shows."""
        prompt = str(rng.choice(DESCRIBE_PROMPTS))
        phrases = [item.phrase for item in self.objects]
        name = self._absent_class(rng, classes)
        color = str(rng.choice(list(COLORS))) if name in PAINTED else None
        phrases.insert(int(rng.integers(len(phrases) + 1)), SceneObject(name, color, (0, 0, 0, 0)).phrase)
        return Question(prompt, _description(phrases), "hallucination")

    def _absent_class(self, rng: np.random.Generator, classes: tuple[str, ...]) -> str:
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
    r"""Composes an image of objects on a smooth random background.

    Args:
        seed (int): everything random follows from it.
        size (tuple[int, int]): width and height of the image in pixels.
        n_objects (int or tuple[int, int]): number of objects, or its inclusive range. Where the image has no room
            for so many, it gets fewer.
        classes (tuple[str, ...]): names to choose from; each appears at most once, but for ``same_class``.
        sprites (Path): folder with ``<name>.webp``, RGBA.
        same_class (int): how many of the objects are of one and the same class.
            Default: 1
        overlap (float): 0: objects keep apart; up to 0.6: every object covers part of another one or is partly
            covered, the more the larger the value, and none is hidden.
            Default: 0
        scale (float): factor on the objects' diameters, above 0 and at most 1.
            Default: 1

    Returns:
        Scene: the same for the same arguments.

    Raises:
        ValueError: ``same_class``, ``overlap`` or ``scale`` out of range.

    Examples::

        >>> scene = compose(7, size=(256, 192), n_objects=3)
        >>> scene.masks.shape
        (3, 192, 256)
    """
    if same_class < 1 or not 0 <= overlap <= 0.6 or not 0 < scale <= 1:
        raise ValueError(
            f"same_class={same_class}, overlap={overlap}, scale={scale}: same_class has to be 1 or more, overlap "
            "between 0 and 0.6, scale above 0 and at most 1"
        )
    rng = np.random.default_rng(seed)
    low, high = (n_objects, n_objects) if isinstance(n_objects, int) else n_objects
    count = int(rng.integers(low, high + 1))
    names = [classes[i] for i in rng.choice(len(classes), size=count, replace=False)]
    names[:same_class] = names[:1] * len(names[:same_class])
    width, height = size
    placed: list[tuple[str, float, float, float]] = []
    # A share of the image that leaves room for all: one object fills up to 85 % of the short side, five up to 38 %.
    largest = min(width, height) * min(0.85, 0.85 / count**0.5) * scale
    for name in names:
        for _ in range(1000 if overlap else 30):
            diameter = rng.uniform(0.6, 1.0) * largest
            x = rng.uniform(diameter / 2, width - diameter / 2)
            y = rng.uniform(diameter / 2, height - diameter / 2)
            # 1 where the two just touch, as round objects would.
            distances = [np.hypot(x - px, y - py) / (0.45 * (diameter + other)) for _, px, py, other in placed]
            apart = all(distance > 1 - overlap for distance in distances) and all(
                abs(x - px) > 0.06 * width * (1 - overlap) * scale for _, px, _, _ in placed
            )
            if apart and (not overlap or not placed or min(distances) < 1 - overlap / 2):
                placed.append((name, x, y, diameter))
                break
    canvas = _background(rng, size)
    objects: list[SceneObject] = []
    masks: list[np.ndarray] = []
    for name, x, y, diameter in placed:
        color = str(rng.choice(list(COLORS))) if name in PAINTED else None
        sprite = _sprite(name, color, str(sprites))
        if rng.random() < 0.5:
            sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        side = max(8, round(diameter))
        sprite = sprite.resize((side, side), Image.Resampling.BILINEAR, reducing_gap=2.0)
        sprite = sprite.rotate(rng.uniform(-12, 12), Image.Resampling.BILINEAR)
        alpha = sprite.getchannel("A")
        painted = ImageEnhance.Brightness(sprite.convert("RGB")).enhance(rng.uniform(0.85, 1.12))
        left, top = round(x - side / 2), round(y - side / 2)
        canvas.paste(painted, (left, top), alpha)
        layer = Image.new("L", size)
        layer.paste(alpha, (left, top))
        mask = np.asarray(layer) > 127
        masks = [earlier & ~mask for earlier in masks]
        masks.append(mask)
        objects.append(SceneObject(name, color, (left, top, left + side, top + side)))
    order = sorted(range(len(objects)), key=lambda i: objects[i].center[0])
    return Scene(canvas, tuple(objects[i] for i in order), np.stack([masks[i] for i in order]), seed)


def _description(phrases: list[str]) -> str:
    listing = phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"
    return f"the picture shows {listing}."


def _article(words: str) -> str:
    if words == "grapes":
        return "some"
    return "an" if words[0] in "aeiou" else "a"


def _background(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """Smooth blotches of muted color: a random grid of at most 5 x 4 cells, enlarged."""
    cells = rng.integers(2, 6), rng.integers(2, 5)
    base = rng.uniform(60, 220) + rng.normal(0, 25, size=3)
    grid = np.clip(base + rng.normal(0, 22, size=(cells[1], cells[0], 3)), 0, 255).astype(np.uint8)
    return Image.fromarray(grid).resize(size, Image.Resampling.BICUBIC)


@lru_cache(maxsize=512)
def _sprite(name: str, color: str | None, folder: str) -> Image.Image:
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
