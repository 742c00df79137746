r"""Images with prompts, answers and object masks to evaluate explanations on, from scenes, COCO, TAM or a folder.

A data set is anything with ``len``, ``dataset[i]`` that gives a :class:`Sample`, and ``settings``;
:func:`open_dataset` also takes the dotted name of a class, so that a set of one's own needs no registration::

    class Pets:
        settings = {"name": "pets"}

        def __len__(self):
            return 2

        def __getitem__(self, index):
            return Sample(f"pet-{range(2)[index]}", Path(f"pets/{index}.png"), "what is this?", categories={...})
"""

from __future__ import annotations

import hashlib
import json
import os
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol, get_args, runtime_checkable

import numpy as np
from PIL import Image

from captum_intramodal._utils.spec import build, parse_spec
from captum_intramodal.demo.scenes import CLASSES, COLORS, SPRITES, Question, Scene, compose
from captum_intramodal.text.parts_of_speech import WordType

__all__ = [
    "DATASETS",
    "CocoDataset",
    "EvaluationDataset",
    "FolderDataset",
    "Sample",
    "SceneDataset",
    "TAMDataset",
    "open_dataset",
]


@dataclass(frozen=True, eq=False)
class Sample:
    r"""
    One image to explain a model's words on.

    Args:

        id (str): Name of the sample, unique in its data set and the same in every run.
        source (Path or PIL.Image.Image): The image or its file, which is opened only when ``image`` is asked for.
        prompt (str): What the model is asked.
        answer (str, optional): The answer to explain.
            Default: None, the model's own
        categories (Mapping[str, numpy.ndarray], optional): A bool mask (height, width) of the image's size for each
            word or phrase that names a kind of object. All False: the image shows no such object.
            Default: no categories
        captions (tuple[str, ...], optional): Reference texts that a generated answer can be compared with.
            Default: ()
        word_types (Mapping[str, str], optional): ``'noun'``, ``'function'`` or ``'other'`` for words, in lower case,
            whose type is annotated; a tagger is asked about others.
            Default: none are

    Raises:
        ValueError: a mask that is not bool or not of the image's size, an unknown type of word, or, from ``image``,
            no readable image.
        OSError: no image.

    Examples::

        >>> mask = np.zeros((192, 256), bool)
        >>> mask[20:90, 30:100] = True
        >>> Sample("1", Path("1.png"), "what do you see?", "a dog.", {"dog": mask}).image.size
        (256, 192)
    """

    id: str
    source: Path | Image.Image
    prompt: str
    answer: str | None = None
    categories: Mapping[str, np.ndarray] = field(default_factory=dict)
    captions: tuple[str, ...] = ()
    word_types: Mapping[str, WordType] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if unknown := set(self.word_types.values()) - set(get_args(WordType)):
            raise ValueError(f"word_types must be {', '.join(get_args(WordType))}, got {', '.join(map(repr, unknown))}")
        width, height = self.size
        for name, mask in self.categories.items():
            if mask.dtype != bool or mask.shape != (height, width):
                raise ValueError(
                    f"the mask of {name!r} is {mask.dtype} {mask.shape}; it has to be bool {(height, width)}, "
                    "the image's height and width"
                )

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the image; of a file only the header is read."""
        if isinstance(self.source, Image.Image):
            return self.source.size
        with Image.open(self.source) as file:
            return file.size

    @cached_property
    def image(self) -> Image.Image:
        """The image, RGB."""
        if isinstance(self.source, Image.Image):
            return self.source.convert("RGB")
        with _record(self.source, f"sample {self.id}"), Image.open(self.source) as file:
            return file.convert("RGB")


@runtime_checkable
class EvaluationDataset(Protocol):
    """What an evaluation needs of a data set.

    Attributes:
        settings (dict[str, Any]): what the samples follow from, in JSON's types; it goes into the run's manifest, and
            a run goes on only with the same.
    """

    settings: dict[str, Any]

    def __len__(self) -> int:
        """Number of samples."""

    def __getitem__(self, index: int) -> Sample:
        """A sample, the same each time; IndexError past the last one."""


def _relation(scene: Scene, rng: np.random.Generator, classes: tuple[str, ...]) -> Question:
    return scene.relation_question(rng) or scene.describe_question(rng)


_TASKS: dict[str, Callable[[Scene, np.random.Generator, tuple[str, ...]], Question]] = {
    "describe": lambda scene, rng, classes: scene.describe_question(rng),
    "relation": _relation,
    "exists": Scene.exists_question,
    "absent": Scene.absent_question,
    "hallucination": Scene.hallucination,
}


# What the scenes' answers are made of, beside the classes.
_WORD_TYPES: dict[str, WordType] = {
    **dict.fromkeys(("picture", "nothing"), "noun"),
    **dict.fromkeys("a an the some and there no yes".split(), "function"),
    **dict.fromkeys(("shows", "is", ".", ",", *COLORS), "other"),
}


class SceneDataset:
    r"""
    Composed scenes with exact masks: any number of them, from a seed (see
    :func:`~captum_intramodal.demo.compose`). The demo model was trained on other seeds, from 2**32.

    Args:

        count (int, optional): Number of scenes.
            Default: 100
        seed (int, optional): Seed of the first scene; the others have the seeds that follow.
            Default: 2_000_000
        size (Sequence[int], optional): Width and height in pixels.
            Default: (256, 192)
        objects (int or Sequence[int], optional): Number of objects, or its inclusive range.
            Default: (2, 4)
        task (str, optional): ``"describe"``: the answer names every object; ``"relation"``: *what is left of the X?*
            (a description where a scene leaves none without doubt); ``"exists"``: *is there a X?*, half of them with
            yes; ``"absent"``: *is there a X?* where there is none; ``"hallucination"``: a description that names one
            object too many.
            Default: ``"describe"``
        same_class (int, optional): How many objects of a scene are of one class.
            Default: 1
        overlap (float, optional): 0: objects keep apart; up to 0.6: they cover parts of each other.
            Default: 0
        scale (float, optional): Factor on the objects' diameters.
            Default: 1
        classes (Sequence[str], optional): Names to choose from.
            Default: the demo's
        sprites (Path, optional): Folder with ``<name>.webp`` of each.
            Default: the demo's

    Every sample has all ``classes`` as categories, with empty masks for those that its scene does not show, and the
    types of all words that the answers are made of.

    Raises:
        ValueError: unknown task, no such sprite, or no such number of scenes.

    Examples::

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
            raise ValueError(f"unknown task {task!r}; there are {', '.join(_TASKS)}")
        fewest, most = (objects, objects) if isinstance(objects, int) else objects
        if count < 1 or seed < 0 or not 1 <= fewest <= most:
            raise ValueError(
                f"count={count}, seed={seed}, objects={objects}: there has to be at least one scene and in each at "
                "least one object; seeds count from 0"
            )
        missing = [name for name in classes if not (Path(sprites) / f"{name}.webp").is_file()]
        if missing:
            raise ValueError(f"{sprites} has no sprite for {', '.join(missing)}")
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
        self._scene = partial(
            compose,
            size=(width, height),
            n_objects=(fewest, most),
            classes=self._classes,
            sprites=Path(sprites),
            same_class=same_class,
            overlap=overlap,
            scale=scale,
        )
        self._scene(seed)  # options out of range are told now

    def __len__(self) -> int:
        return len(self._seeds)

    def __getitem__(self, index: int) -> Sample:
        seed = self._seeds[index]
        scene = self._scene(seed)
        # Its own stream: the scene's would tie the question to the number of objects.
        question = self._question(scene, np.random.default_rng((seed, 1)), self._classes)
        # The union of no masks is empty.
        categories = {name: scene.mask_of(name) for name in self._classes}
        types: dict[str, WordType] = {**_WORD_TYPES, **dict.fromkeys(self._classes, "noun")}
        return Sample(str(seed), scene.image, question.prompt, question.answer, categories, (scene.description,), types)


class CocoDataset:
    r"""
    A COCO file of instance annotations (polygons or run lengths), and optionally one of captions. Needs pycocotools:
    ``pip install "captum-intramodal[evaluate]"``.

    Args:

        annotation_file (str or Path): JSON with ``images`` (``id``, ``file_name``), ``annotations`` (``image_id``,
            ``category_id``, ``segmentation``) and ``categories`` (``id``, ``name``).
        image_folder (str or Path): Where the ``file_name`` of the images are.
        captions (str or Path, optional): JSON with ``annotations`` (``image_id``, ``caption``).
            Default: None
        prompt (str, optional): What the model is asked about each image.
            Default: ``"Describe the image in one sentence."``

    Every sample has all categories of the file; the mask is the union of the image's instances, crowds included.

    Raises:
        ImportError: no pycocotools.
        ValueError: broken annotations, with file and record. Polygons and sizes of masks are looked at when a sample
            is read.

    Examples::

        >>> dataset = CocoDataset("annotations/instances_val2017.json", "val2017", "annotations/captions_val2017.json")
        >>> dataset[0].categories["person"].sum()
    """

    def __init__(
        self,
        annotation_file: str | Path,
        image_folder: str | Path,
        captions: str | Path | None = None,
        prompt: str = "Describe the image in one sentence.",
    ) -> None:
        try:
            from pycocotools import mask
        except ImportError as error:
            raise ImportError(
                'COCO annotations are decoded by pycocotools: pip install "captum-intramodal[evaluate]"'
            ) from error
        self._coco = mask
        self._file, self._prompt = Path(annotation_file), prompt
        instances, digest = _read_json(self._file)
        self.settings: dict[str, Any] = {
            "name": "coco",
            "annotation_file": str(annotation_file),
            "image_folder": str(image_folder),
            "captions": None if captions is None else str(captions),
            "prompt": prompt,
            "sha256": [digest],
        }
        self._names = _category_names(self._file, instances)
        self._images: dict[int, dict[str, Any]] = {}
        for index, image in enumerate(_records(self._file, instances, "images")):
            with _record(self._file, f"images[{index}]"):
                if image["id"] in self._images:
                    raise ValueError(f"id {image['id']} appears twice")
                self._images[image["id"]] = {**image, "file": _existing(Path(image_folder) / image["file_name"])}
        self._annotations: dict[int, list[dict[str, Any]]] = {image: [] for image in self._images}
        for index, annotation in enumerate(_records(self._file, instances, "annotations")):
            with _record(self._file, f"annotations[{index}]"):
                if annotation["category_id"] not in self._names:
                    raise ValueError(f"category_id {annotation['category_id']} is not among the categories")
                if annotation["image_id"] not in self._images:
                    raise ValueError(f"image_id {annotation['image_id']} is not among the images")
                self._annotations[annotation["image_id"]].append({**annotation, "index": index})
        self._captions: dict[int, tuple[str, ...]] = {}
        if captions is not None:
            self._captions, digest = _read_captions(Path(captions))
            self.settings["sha256"].append(digest)
        self._ids = list(self._images)

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> Sample:
        key = self._ids[index]
        image = self._images[key]["file"]
        with _record(self._file, f"image id {key} ({image})"), Image.open(image) as file:
            size = width, height = file.size
            annotated = self._images[key].get("width", width), self._images[key].get("height", height)
            if size != annotated:
                raise ValueError(f"the image is {size}, annotated were {annotated} (width, height)")
        categories = dict.fromkeys(self._names.values(), np.zeros((height, width), bool))
        for annotation in self._annotations[key]:
            name = self._names[annotation["category_id"]]
            with _record(self._file, f"annotations[{annotation['index']}] of {name!r} on {image}"):
                categories[name] = categories[name] | self._mask(annotation["segmentation"], height, width)
        return Sample(str(key), image, self._prompt, None, categories, self._captions.get(key, ()))

    def _mask(self, segmentation: Any, height: int, width: int) -> np.ndarray:
        if isinstance(segmentation, dict):
            if list(segmentation["size"]) != [height, width]:
                raise ValueError(f"run lengths of size {segmentation['size']}, the image has {[height, width]}")
            runs = segmentation
            if isinstance(runs["counts"], list):
                if sum(runs["counts"]) != height * width:
                    raise ValueError(f"run lengths of {sum(runs['counts'])} pixels, the image has {height * width}")
                runs = self._coco.frPyObjects(runs, height, width)
        else:
            if not segmentation or any(len(polygon) < 6 or len(polygon) % 2 for polygon in segmentation):
                raise ValueError("a polygon has to have three or more x, y pairs, a segmentation one or more polygons")
            runs = self._coco.merge(self._coco.frPyObjects(segmentation, height, width))
        return np.asarray(self._coco.decode(runs), dtype=bool)


# The release's names where they differ from COCO's.
_TAM_NAMES = {"sports ball": "ball", "wine glass": "glass"}


class TAMDataset:
    r"""
    A folder of the data released with TAM, `Token Activation Map to Visually Explain Multimodal LLMs`_: COCO, GranDf
    or OpenPSG. Its masks are one label image per image, so that a pixel belongs to one category.

    COCO: ``annotations/instances_minival2014.json`` (``images``, ``categories``),
    ``annotations/captions_val2014.json``, ``image/<id>.jpg`` and ``seg_label/<id>.png`` with ids of twelve digits and
    category ids as gray levels. An image without label image shows no object.

    GranDf and OpenPSG: ``anno.json``, a list of ``[image, description, label image, {category: gray level}]`` with
    paths in the folder; an empty path of the label image: no object.

    Args:

        folder (str or Path): The folder.
        prompt (str, optional): What the model is asked about each image. Published figures depend on it; it is written
                    in the release's evaluation code.
                    Default: ``'describe the picture.'``

    Raises:
        ValueError: broken annotations, with file and record. Masks are looked at when a sample is read.

    Examples::

        >>> TAMDataset("data/GranDf")[0].captions

    .. _Token Activation Map to Visually Explain Multimodal LLMs: https://arxiv.org/abs/2506.23270
    """

    def __init__(self, folder: str | Path, prompt: str = "describe the picture.") -> None:
        self._folder, self._prompt = Path(folder), prompt
        self.settings: dict[str, Any] = {"name": "tam", "folder": str(folder), "prompt": self._prompt, "sha256": []}
        # File and record that an error names, id, image, label image, categories by name, captions.
        self._samples = list(self._anno() if (self._folder / "anno.json").is_file() else self._coco())

    def _anno(self) -> Iterator[_Labeled]:
        file = self._folder / "anno.json"
        records, digest = _read_json(file)
        self.settings["sha256"].append(digest)
        for index, record in enumerate(_list(file, records, "the content")):
            with _record(file, f"[{index}]"):
                image, description, labels, levels = record
                if not all(0 < level < 256 for level in levels.values()):
                    raise ValueError(f"gray levels have to be 1 to 255: {levels}")
                yield _Labeled(
                    (file, f"[{index}] ({image})"),
                    str(index),
                    _existing(self._folder / image),
                    _existing(self._folder / labels) if labels else None,
                    {_named(name): level for name, level in levels.items()},
                    (description,),
                )

    def _coco(self) -> Iterator[_Labeled]:
        file = self._folder / "annotations" / "instances_minival2014.json"
        instances, digest = _read_json(file)
        captions, captions_digest = _read_captions(self._folder / "annotations" / "captions_val2014.json")
        self.settings["sha256"] += [digest, captions_digest]
        names = _category_names(file, instances)
        levels = {_TAM_NAMES.get(name, name): level for level, name in names.items()}
        for index, image in enumerate(_records(file, instances, "images")):
            with _record(file, f"images[{index}]"):
                name = f"{image['id']:012d}"
                labels = self._folder / "seg_label" / f"{name}.png"
                yield _Labeled(
                    (file, f"images[{index}] (id {image['id']})"),
                    name,
                    _existing(self._folder / "image" / f"{name}.jpg"),
                    labels if labels.is_file() else None,
                    levels,
                    captions.get(image["id"], ()),
                )

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Sample:
        sample = self._samples[index]
        with _record(*sample.record):
            with Image.open(sample.image) as file:
                empty = np.zeros((file.height, file.width), bool)
            labels = None if sample.labels is None else _read_gray(sample.labels)
            if labels is not None and labels.shape != empty.shape:
                raise ValueError(f"{sample.labels} is {labels.shape}, the image {empty.shape} (height, width)")
            shown = set() if labels is None else set(np.unique(labels).tolist())
            # Names of one level share one mask, absent ones the empty one.
            masks = {level: labels == level for level in shown & set(sample.levels.values())}
            categories = {name: masks.get(level, empty) for name, level in sample.levels.items()}
            return Sample(sample.id, sample.image, self._prompt, None, categories, sample.captions)


@dataclass(frozen=True)
class _Labeled:
    record: tuple[Path, str]
    id: str
    image: Path
    labels: Path | None
    levels: dict[str, int]
    captions: tuple[str, ...]


class FolderDataset:
    r"""
    A folder of images, masks and one file ``annotations.jsonl`` with a JSON object per line::

        {"image": "1.jpg", "prompt": "what do you see?", "answer": "a dog.",
         "categories": {"dog": "1-dog.png", "cat": null}, "captions": ["a dog on a lawn"], "id": "first"}

    Paths are relative to the folder. ``image`` is required. ``categories``: a mask of the image's size for each name,
    where every pixel but the black ones belongs to the category; null: the image shows none. ``answer``: without it
    the model's own. ``id``: without it, the image's path.

    Args:

        folder (str or Path): The folder.
        prompt (str, optional): What the model is asked where a line has no ``prompt``.
            Default: ``"Describe the image."``

    Raises:
        ValueError: broken annotations, with file and line. Masks are looked at when a sample is read.

    Examples::

        >>> dataset = FolderDataset("pets")
        >>> dataset[0].categories["dog"].shape == dataset[0].image.size[::-1]
        True
    """

    FILE = "annotations.jsonl"
    _TYPES: Mapping[str, type] = {"id": str, "image": str, "prompt": str, "answer": str, "captions": list,
                                  "categories": dict}  # fmt: skip

    def __init__(self, folder: str | Path, prompt: str = "Describe the image.") -> None:
        self._folder, self._file = Path(folder), Path(folder) / self.FILE
        content = _read(self._file)
        self.settings: dict[str, Any] = {
            "name": "folder",
            "folder": str(folder),
            "prompt": prompt,
            "sha256": [_sha256(content)],
        }
        self._lines: dict[str, tuple[int, dict[str, Any]]] = {}
        for number, line in enumerate(content.splitlines(), 1):
            if line.strip():
                with _record(self._file, f"line {number}"):
                    record = {"prompt": prompt, **self._checked(json.loads(line))}
                    name = record.setdefault("id", record["image"])
                    if name in self._lines:
                        raise ValueError(f"the id {name!r} is that of line {self._lines[name][0]}; give another one")
                    self._lines[name] = number, record
        self._ids = list(self._lines)

    def _checked(self, record: Any) -> dict[str, Any]:
        if not isinstance(record, dict):
            raise ValueError(f"a JSON object is expected, not {type(record).__name__}")
        for key, value in record.items():
            if key not in self._TYPES:
                raise ValueError(f"unknown key {key!r}; there are {', '.join(self._TYPES)}")
            if not isinstance(value, self._TYPES[key]) and not (key == "answer" and value is None):
                raise ValueError(f"{key!r} has to be {self._TYPES[key].__name__}, not {type(value).__name__}")
        _existing(self._folder / record["image"])
        for name, mask in record.get("categories", {}).items():
            _named(name)
            if mask is not None:
                _existing(self._folder / mask)
        return record

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> Sample:
        name = self._ids[index]
        number, record = self._lines[name]
        image = self._folder / record["image"]
        with _record(self._file, f"line {number} ({image})"):
            with Image.open(image) as file:
                empty = np.zeros((file.height, file.width), bool)
            categories = {
                category: empty if mask is None else _read_gray(self._folder / mask) > 0
                for category, mask in record.get("categories", {}).items()
            }
            captions = tuple(record.get("captions", ()))
            return Sample(name, image, record["prompt"], record.get("answer"), categories, captions)


DATASETS: dict[str, Callable[..., EvaluationDataset]] = {
    "scenes": SceneDataset,
    "coco": CocoDataset,
    "tam": TAMDataset,
    "folder": FolderDataset,
}


def open_dataset(spec: str) -> EvaluationDataset:
    r"""
    Opens a data set that a line of text describes.

    Args:

        spec (str): A folder of :class:`FolderDataset` or :class:`TAMDataset`, or ``name:option=value,...`` with a name
            of ``DATASETS`` or the dotted name of a class (``package.module.Class``) and its arguments, in JSON; other
            values are taken as text up to the next comma.

    Returns:
        **dataset** (*EvaluationDataset*)

    Raises:
        ValueError: no such folder or name, options that the set does not take, or broken annotations.

    Examples::

        >>> open_dataset("scenes:count=100,seed=1,objects=[3,5],overlap=0.4,task=describe")
        >>> open_dataset("coco:annotation_file=instances_val2017.json,image_folder=val2017")
        >>> open_dataset("data/GranDf")
    """
    folder = Path(spec)
    if spec not in DATASETS and os.path.isdir(spec):  # Of a path too long for one, Path.is_dir raises OSError.
        if (folder / FolderDataset.FILE).is_file():
            return FolderDataset(folder)
        if (folder / "anno.json").is_file() or (folder / "annotations").is_dir():
            return TAMDataset(folder)
        raise ValueError(f"the folder {spec} has neither {FolderDataset.FILE} nor the TAM release's anno.json")
    name, options = parse_spec(spec)
    if name in DATASETS:
        return build(spec, DATASETS[name], options)
    try:
        dataset = pkgutil.resolve_name(name)
    except (ValueError, ImportError, AttributeError) as error:
        raise ValueError(
            f"{spec!r} is no folder, and {name!r} none of {', '.join(DATASETS)} and no class ({error})"
        ) from error
    own: EvaluationDataset = build(spec, dataset, options)
    return own


@contextmanager
def _record(file: Path, record: str) -> Iterator[None]:
    """Errors say which record of which file they are about."""
    try:
        yield
    except KeyError as error:
        raise ValueError(f"{file}, {record}: {error} is missing") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}, {record}: invalid JSON ({error})") from error
    except (ValueError, TypeError, AttributeError, OSError) as error:
        raise ValueError(f"{file}, {record}: {error}") from error


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from error


def _read_json(file: Path) -> tuple[Any, str]:
    content = _read(file)
    try:
        return json.loads(content), _sha256(content)
    except ValueError as error:
        raise ValueError(f"{file}: invalid JSON ({error})") from error


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _read_captions(file: Path) -> tuple[dict[int, tuple[str, ...]], str]:
    content, digest = _read_json(file)
    captions: dict[int, tuple[str, ...]] = {}
    for index, annotation in enumerate(_records(file, content, "annotations")):
        with _record(file, f"annotations[{index}]"):
            image = annotation["image_id"]
            captions[image] = (*captions.get(image, ()), annotation["caption"])
    return captions, digest


def _records(file: Path, content: Any, key: str) -> list[Any]:
    return _list(file, content.get(key) if isinstance(content, dict) else None, repr(key))


def _list(file: Path, value: Any, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{file}: {what} has to be a list")
    return value


def _category_names(file: Path, instances: Any) -> dict[int, str]:
    names: dict[int, str] = {}
    for index, category in enumerate(_records(file, instances, "categories")):
        with _record(file, f"categories[{index}]"):
            names[category["id"]] = _named(category["name"])
    return names


def _named(name: Any) -> str:
    if not isinstance(name, str) or not name.strip():
        raise ValueError("a category has no name")
    return name


def _existing(file: Path) -> Path:
    if not file.is_file():
        raise ValueError(f"there is no file {file}")
    return file


def _read_gray(file: Path) -> np.ndarray:
    """Gray levels, of a palette image its indices, (height, width)."""
    with Image.open(file) as image:
        return np.asarray(image if image.mode == "P" else image.convert("L"))
