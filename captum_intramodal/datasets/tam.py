r"""Read the data released with Token Activation Map (TAM): COCO, GranDf and OpenPSG with label images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from captum_intramodal.datasets.annotation_files import (
    Record,
    as_list,
    checked_category_name,
    existing_file,
    image_size,
    read_gray_levels,
    read_json,
)
from captum_intramodal.datasets.base import Sample
from captum_intramodal.datasets.coco import read_captions, read_category_names, records_under
from captum_intramodal.datasets.registry import register_dataset

__all__ = ["TAMDataset"]

# The release's names that differ from COCO's.
_RENAMED_CATEGORIES = {"sports ball": "ball", "wine glass": "glass"}


@dataclass(frozen=True)
class _LabeledImage:
    """A record of the release: an image, its label image if there is one, and each category's gray level in it."""

    record: Record
    id: str
    image: Path
    label_image: Path | None
    gray_levels: dict[str, int]
    captions: tuple[str, ...]


@register_dataset("tam")
class TAMDataset:
    r"""
    A folder of the data released with `Token Activation Map to Visually Explain Multimodal LLMs`_: COCO, GranDf or
    OpenPSG. Each image has one label image, so that a pixel belongs to one category.

    COCO: ``annotations/instances_minival2014.json`` (``images``, ``categories``),
    ``annotations/captions_val2014.json``, ``image/<id>.jpg`` and ``seg_label/<id>.png``, with ids of twelve digits and
    category ids as gray levels. An image without a label image shows no object.

    GranDf and OpenPSG: ``anno.json``, a list of ``[image, description, label image, {category: gray level}]`` with
    paths relative to the folder. If the label image's path is empty, the image shows no object.

    Args:

        folder (str or Path): The folder.
        prompt (str, optional): The question about each image. The default is the prompt of the release's evaluation
            code; published figures depend on it.
            Default: ``'describe the picture.'``

    Raises:
        DatasetError: the annotations are damaged or inconsistent, or a file is missing. Label images are checked when
            their sample is read.

    Examples::

        >>> import json
        >>> from pathlib import Path
        >>> from captum_intramodal.datasets import TAMDataset
        >>> image.save("1.png")
        >>> Image.new("L", image.size, 4).save("1-labels.png")
        >>> _ = Path("anno.json").write_text(json.dumps([["1.png", "A dog.", "1-labels.png", {"dog": 4, "cat": 9}]]))
        >>> sample = TAMDataset(".")[0]
        >>> {name: bool(mask.any()) for name, mask in sample.categories.items()}
        {'dog': True, 'cat': False}

    .. _Token Activation Map to Visually Explain Multimodal LLMs: https://arxiv.org/abs/2506.23270
    """

    def __init__(self, folder: str | Path, prompt: str = "describe the picture.") -> None:
        self._folder, self._prompt = Path(folder), prompt
        self.settings: dict[str, Any] = {"name": "tam", "folder": str(folder), "prompt": self._prompt, "sha256": []}
        self._images = list(self._read_anno() if (self._folder / "anno.json").is_file() else self._read_coco())

    def _read_anno(self) -> Iterator[_LabeledImage]:
        file = self._folder / "anno.json"
        content, digest = read_json(file)
        self.settings["sha256"].append(digest)
        for index, entry in enumerate(as_list(file, content, "the content")):
            record = Record(file, f"[{index}]")
            if not isinstance(entry, list) or len(entry) != 4:
                raise record.error("expected [image, description, label image, {category: gray level}]")
            with record.reading():
                image, description, label_image, gray_levels = entry
                if not all(0 < level < 256 for level in gray_levels.values()):
                    raise record.error(f"gray levels must be from 1 to 255, got {gray_levels}")
                yield _LabeledImage(
                    Record(file, f"[{index}] ({image})"),
                    str(index),
                    existing_file(self._folder / image, record),
                    existing_file(self._folder / label_image, record) if label_image else None,
                    {checked_category_name(name, record): level for name, level in gray_levels.items()},
                    (description,),
                )

    def _read_coco(self) -> Iterator[_LabeledImage]:
        file = self._folder / "annotations" / "instances_minival2014.json"
        instances, digest = read_json(file)
        captions, captions_digest = read_captions(self._folder / "annotations" / "captions_val2014.json")
        self.settings["sha256"] += [digest, captions_digest]
        names = read_category_names(file, instances)
        gray_levels = {_RENAMED_CATEGORIES.get(name, name): level for level, name in names.items()}
        for index, image in enumerate(records_under(file, instances, "images")):
            record = Record(file, f"images[{index}]")
            with record.reading():
                name = f"{image['id']:012d}"
                label_image = self._folder / "seg_label" / f"{name}.png"
                yield _LabeledImage(
                    Record(file, f"images[{index}] (id {image['id']})"),
                    name,
                    existing_file(self._folder / "image" / f"{name}.jpg", record),
                    label_image if label_image.is_file() else None,
                    gray_levels,
                    captions.get(image["id"], ()),
                )

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Sample:
        labeled = self._images[index]
        width, height = image_size(labeled.image, labeled.record)
        empty = np.zeros((height, width), bool)
        masks: dict[int, np.ndarray] = {}
        if labeled.label_image is not None:
            labels = read_gray_levels(labeled.label_image, labeled.record)
            if labels.shape != empty.shape:
                raise labeled.record.error(
                    f"the label image {labeled.label_image} has {labels.shape[1]} x {labels.shape[0]} pixels, "
                    f"but the image has {width} x {height}"
                )
            # Categories of one gray level share a mask; absent ones share the empty mask.
            present = set(np.unique(labels).tolist()) & set(labeled.gray_levels.values())
            masks = {level: labels == level for level in present}
        categories = {name: masks.get(level, empty) for name, level in labeled.gray_levels.items()}
        return Sample(labeled.id, labeled.image, self._prompt, None, categories, labeled.captions)
