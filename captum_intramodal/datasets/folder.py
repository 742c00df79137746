r"""Read a folder of images, masks and one file of JSON lines."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from captum_intramodal.datasets.annotation_files import (
    Record,
    checked_category_name,
    existing_file,
    image_size,
    read_bytes,
    read_gray_levels,
    sha256,
)
from captum_intramodal.datasets.base import Sample
from captum_intramodal.datasets.registry import register_dataset

__all__ = ["FolderDataset"]


@register_dataset("folder")
class FolderDataset:
    r"""
    A folder of images, masks and one file ``annotations.jsonl`` with a JSON object per line::

        {"image": "1.jpg", "prompt": "what do you see?", "answer": "a dog.",
         "categories": {"dog": "1-dog.png", "cat": null}, "captions": ["a dog on a lawn"], "id": "first"}

    Paths are relative to the folder. Only ``image`` is required. ``categories`` gives each name a mask of the image's
    size, in which all pixels that are not black belong to the category, or null if the image shows no such object.
    Without ``answer``, the model's own is explained. Without ``id``, the image's path is the id.

    Args:

        folder (str or Path): The folder.
        prompt (str, optional): The question for lines without ``prompt``.
            Default: ``"Describe the image."``

    Raises:
        DatasetError: a line is damaged or inconsistent, or a file is missing. Images and masks are checked when their
            sample is read.

    Examples::

        >>> from pathlib import Path
        >>> from captum_intramodal.datasets import FolderDataset
        >>> image.save("1.png")
        >>> Image.new("L", image.size, 255).save("1-dog.png")
        >>> _ = Path("annotations.jsonl").write_text('{"image": "1.png", "categories": {"dog": "1-dog.png"}}')
        >>> dataset = FolderDataset(".")
        >>> dataset[0].id, bool(dataset[0].categories["dog"].all())
        ('1.png', True)
    """

    FILE = "annotations.jsonl"
    _TYPES: Mapping[str, type] = {"id": str, "image": str, "prompt": str, "answer": str, "captions": list,
                                  "categories": dict}  # fmt: skip

    def __init__(self, folder: str | Path, prompt: str = "Describe the image.") -> None:
        self._folder, self._file = Path(folder), Path(folder) / self.FILE
        content = read_bytes(self._file)
        self.settings: dict[str, Any] = {
            "name": "folder",
            "folder": str(folder),
            "prompt": prompt,
            "sha256": [sha256(content)],
        }
        self._lines: dict[str, tuple[int, dict[str, Any]]] = {}
        for number, line in enumerate(content.splitlines(), 1):
            if line.strip():
                record = Record(self._file, f"line {number}")
                with record.reading():
                    values = {"prompt": prompt, **self._parse(line, record)}
                    name = values.setdefault("id", values["image"])
                    if name in self._lines:
                        raise record.error(f"line {self._lines[name][0]} has the id {name!r} too; ids must be unique")
                    self._lines[name] = number, values
        self._ids = list(self._lines)

    def _parse(self, line: bytes, record: Record) -> dict[str, Any]:
        """Return the object in a line, with keys, types and files checked."""
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            raise record.error(f"invalid JSON at column {error.colno}") from error
        except UnicodeDecodeError as error:
            raise record.error(f"invalid {error.encoding} at byte {error.start}") from error
        if not isinstance(values, dict):
            raise record.error(f"expected a JSON object, got {type(values).__name__}")
        for key, value in values.items():
            if key not in self._TYPES:
                raise record.error(f"the key {key!r} is unknown; known are {', '.join(self._TYPES)}")
            if not isinstance(value, self._TYPES[key]) and not (key == "answer" and value is None):
                raise record.error(f"{key!r} must be {self._TYPES[key].__name__}, got {type(value).__name__}")
        existing_file(self._folder / values["image"], record)
        for name, mask in values.get("categories", {}).items():
            checked_category_name(name, record)
            if mask is not None:
                existing_file(self._folder / mask, record)
        return values

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> Sample:
        name = self._ids[index]
        number, values = self._lines[name]
        image = self._folder / values["image"]
        record = Record(self._file, f"line {number} ({image})")
        width, height = image_size(image, record)
        empty = np.zeros((height, width), bool)
        categories: dict[str, np.ndarray] = {}
        for category, file in values.get("categories", {}).items():
            mask = empty if file is None else read_gray_levels(self._folder / file, record) > 0
            if mask.shape != empty.shape:
                raise record.error(
                    f"the mask of {category!r} has {mask.shape[1]} x {mask.shape[0]} pixels, "
                    f"but the image has {width} x {height}"
                )
            categories[category] = mask
        captions = tuple(values.get("captions", ()))
        return Sample(name, image, values["prompt"], values.get("answer"), categories, captions)
