r"""Read COCO annotations: instances with masks, and captions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from captum_intramodal.datasets.annotation_files import (
    Record,
    as_list,
    checked_category_name,
    existing_file,
    image_size,
    read_json,
)
from captum_intramodal.datasets.base import Sample
from captum_intramodal.datasets.registry import register_dataset

__all__ = ["CocoDataset", "read_captions", "read_category_names", "records_under"]


@register_dataset("coco")
class CocoDataset:
    r"""
    A COCO file of instance annotations (polygons or run lengths), and optionally one of captions. Needs pycocotools:
    ``pip install "captum-intramodal[evaluate]"``.

    Every sample has all categories of the file; a mask is the union of the category's instances, crowds included.

    Args:

        annotation_file (str or Path): JSON with ``images`` (``id``, ``file_name``), ``annotations`` (``image_id``,
            ``category_id``, ``segmentation``) and ``categories`` (``id``, ``name``).
        image_folder (str or Path): Folder that contains the images' ``file_name``.
        captions (str or Path, optional): JSON with ``annotations`` (``image_id``, ``caption``).
            Default: None
        prompt (str, optional): The question about each image.
            Default: ``"Describe the image in one sentence."``

    Raises:
        ImportError: pycocotools is not installed.
        DatasetError: the annotations are damaged or inconsistent, or a file is missing. Images and masks are checked
            when their sample is read.

    Examples::

        >>> import json
        >>> from pathlib import Path
        >>> from captum_intramodal.datasets import CocoDataset
        >>> image.save("1.png")
        >>> content = {
        ...     "images": [{"id": 1, "file_name": "1.png"}],
        ...     "annotations": [{"image_id": 1, "category_id": 3, "segmentation": [[20, 20, 60, 20, 60, 50]]}],
        ...     "categories": [{"id": 3, "name": "dog"}],
        ... }
        >>> _ = Path("instances.json").write_text(json.dumps(content))
        >>> dataset = CocoDataset("instances.json", image_folder=".")
        >>> int(dataset[0].categories["dog"].sum())
        600
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
        self._mask_functions = mask
        self._file, self._prompt = Path(annotation_file), prompt
        instances, digest = read_json(self._file)
        self.settings: dict[str, Any] = {
            "name": "coco",
            "annotation_file": str(annotation_file),
            "image_folder": str(image_folder),
            "captions": None if captions is None else str(captions),
            "prompt": prompt,
            "sha256": [digest],
        }
        self._names = read_category_names(self._file, instances)
        self._images = self._read_images(instances, Path(image_folder))
        self._annotations = self._read_annotations(instances)
        self._captions: dict[int, tuple[str, ...]] = {}
        if captions is not None:
            self._captions, digest = read_captions(Path(captions))
            self.settings["sha256"].append(digest)
        self._ids = list(self._images)

    def _read_images(self, instances: Any, folder: Path) -> dict[int, dict[str, Any]]:
        """Return the file's images by id, each with the path of its file."""
        images: dict[int, dict[str, Any]] = {}
        for index, image in enumerate(records_under(self._file, instances, "images")):
            record = Record(self._file, f"images[{index}]")
            with record.reading():
                if image["id"] in images:
                    raise record.error(f"the id {image['id']} appears twice")
                images[image["id"]] = {**image, "file": existing_file(folder / image["file_name"], record)}
        return images

    def _read_annotations(self, instances: Any) -> dict[int, list[dict[str, Any]]]:
        """Return the annotations by the id of their image, each with its index in the file."""
        annotations: dict[int, list[dict[str, Any]]] = {image: [] for image in self._images}
        for index, annotation in enumerate(records_under(self._file, instances, "annotations")):
            record = Record(self._file, f"annotations[{index}]")
            with record.reading():
                if annotation["category_id"] not in self._names:
                    raise record.error(f"the category_id {annotation['category_id']} is not among the categories")
                if annotation["image_id"] not in annotations:
                    raise record.error(f"the image_id {annotation['image_id']} is not among the images")
                annotations[annotation["image_id"]].append({**annotation, "index": index})
        return annotations

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> Sample:
        key = self._ids[index]
        file = self._images[key]["file"]
        record = Record(self._file, f"image id {key} ({file})")
        width, height = image_size(file, record)
        annotated = self._images[key].get("width", width), self._images[key].get("height", height)
        if (width, height) != annotated:
            raise record.error(
                f"the image has {width} x {height} pixels, but the annotations are for {annotated[0]} x {annotated[1]}"
            )
        categories = dict.fromkeys(self._names.values(), np.zeros((height, width), bool))
        for annotation in self._annotations[key]:
            name = self._names[annotation["category_id"]]
            record = Record(self._file, f"annotations[{annotation['index']}] of {name!r} on {file}")
            with record.reading():
                categories[name] = categories[name] | self._mask(annotation["segmentation"], height, width, record)
        return Sample(str(key), file, self._prompt, None, categories, self._captions.get(key, ()))

    def _mask(self, segmentation: Any, height: int, width: int, record: Record) -> np.ndarray:
        """Decode polygons or run lengths into a bool mask of shape (height, width)."""
        if isinstance(segmentation, dict):
            runs = segmentation
            if list(runs["size"]) != [height, width]:
                raise record.error(
                    f"the run lengths have the size {runs['size']}, but the image's height and width are "
                    f"{[height, width]}"
                )
            if isinstance(runs["counts"], list):
                if sum(runs["counts"]) != height * width:
                    raise record.error(
                        f"the run lengths cover {sum(runs['counts'])} pixels, but the image has {height * width}"
                    )
                runs = self._mask_functions.frPyObjects(runs, height, width)
        else:
            if not segmentation or any(len(polygon) < 6 or len(polygon) % 2 for polygon in segmentation):
                raise record.error("a segmentation must have one or more polygons, each of three or more x, y pairs")
            runs = self._mask_functions.merge(self._mask_functions.frPyObjects(segmentation, height, width))
        return np.asarray(self._mask_functions.decode(runs), dtype=bool)


def records_under(file: Path, content: Any, key: str) -> list[Any]:
    """Return the list under a key of a COCO file."""
    return as_list(file, content.get(key) if isinstance(content, dict) else None, repr(key))


def read_category_names(file: Path, instances: Any) -> dict[int, str]:
    """Return the names of a COCO file's categories by their ids."""
    names: dict[int, str] = {}
    for index, category in enumerate(records_under(file, instances, "categories")):
        record = Record(file, f"categories[{index}]")
        with record.reading():
            names[category["id"]] = checked_category_name(category["name"], record)
    return names


def read_captions(file: Path) -> tuple[dict[int, tuple[str, ...]], str]:
    """Return the captions of a COCO file by the ids of their images, and the file's SHA-256."""
    content, digest = read_json(file)
    captions: dict[int, tuple[str, ...]] = {}
    for index, annotation in enumerate(records_under(file, content, "annotations")):
        with Record(file, f"annotations[{index}]").reading():
            image = annotation["image_id"]
            captions[image] = (*captions.get(image, ()), annotation["caption"])
    return captions, digest
