r"""Open the data set that a text specification names."""

from __future__ import annotations

import os
from pathlib import Path

from captum_intramodal._utils.spec import build, parse_spec
from captum_intramodal.datasets.base import EvaluationDataset
from captum_intramodal.datasets.folder import FolderDataset
from captum_intramodal.datasets.registry import DATASETS
from captum_intramodal.datasets.tam import TAMDataset
from captum_intramodal.errors import DatasetError, SpecError

__all__ = ["open_dataset"]


def open_dataset(spec: str) -> EvaluationDataset:
    r"""
    Open the data set that a text specification names.

    Args:

        spec (str): A folder of :class:`FolderDataset` or :class:`TAMDataset`; or ``name:option=value,...``, in which
            the name is registered (see ``DATASETS``) or the dotted name of a class (``package.module.Class``). Values
            are JSON; other values are text up to the next comma.

    Returns:
        **dataset** (*EvaluationDataset*): the data set.

    Raises:
        SpecError: there is no such folder, name or data set class, or the class has no such option.
        DatasetError: a folder is of neither kind, or the annotations are damaged.

    Examples::

        >>> from captum_intramodal.datasets import open_dataset
        >>> len(open_dataset("scenes:count=3,objects=[3,5],overlap=0.4"))
        3
        >>> open_dataset("coco:annotation_file=instances_val2017.json,image_folder=val2017")  # doctest: +SKIP
        >>> open_dataset("data/GranDf")  # doctest: +SKIP
    """
    # Unlike Path.is_dir, os.path.isdir does not raise if the spec is too long for a path.
    if spec not in DATASETS and os.path.isdir(spec):
        return _open_folder(Path(spec))
    name, options = parse_spec(spec)
    if name not in DATASETS and ("." not in name or os.sep in name):
        raise SpecError(
            f"{name!r} is neither a folder nor a registered data set ({', '.join(DATASETS)}); a class of your own is "
            "named package.module.Class."
        )
    dataset = build(spec, DATASETS.resolve(name), options)
    if not isinstance(dataset, EvaluationDataset):
        raise SpecError(f"{name!r} is not a data set: {type(dataset).__name__} objects have no settings.")
    return dataset


def _open_folder(folder: Path) -> EvaluationDataset:
    if (folder / FolderDataset.FILE).is_file():
        return FolderDataset(folder)
    if (folder / "anno.json").is_file() or (folder / "annotations").is_dir():
        return TAMDataset(folder)
    raise DatasetError(
        f"The folder {folder} has neither {FolderDataset.FILE} nor the annotations of TAM's release (anno.json)."
    )
