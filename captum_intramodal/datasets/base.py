r"""Define what a data set and its samples are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, get_args, runtime_checkable

import numpy as np
from PIL import Image

from captum_intramodal.datasets.annotation_files import Record, image_size, open_image
from captum_intramodal.errors import InvalidInputError
from captum_intramodal.text.parts_of_speech import WordType

__all__ = ["EvaluationDataset", "Sample"]


@dataclass(frozen=True, eq=False)
class Sample:
    r"""
    An image with a prompt, and optionally an answer, object masks and reference captions.

    Args:

        id (str): Name of the sample, unique in its data set and the same in every run.
        source (Path or PIL.Image.Image): The image or its file, whose pixels are read when ``image`` is first used.
        prompt (str): The question about the image.
        answer (str, optional): The answer to explain.
            Default: None, the model's own answer.
        categories (Mapping[str, numpy.ndarray], optional): For each word or phrase that names a kind of object, a bool
            mask of shape (height, width) of the image. If all values are False, the image shows no such object.
            Default: no categories.
        captions (tuple[str, ...], optional): Reference texts to compare a generated answer with.
            Default: ()
        word_types (Mapping[str, str], optional): ``'noun'``, ``'function'`` or ``'other'`` for lower-case words whose
            type is annotated; a tagger determines the types of other words.
            Default: no annotated types.

    Raises:
        InvalidInputError: a mask is not bool or not of the image's size, or the type of a word is unknown.
        DatasetError: the image's file is missing or cannot be read.

    Examples::

        >>> from captum_intramodal.datasets import Sample
        >>> mask = np.zeros((image.height, image.width), bool)
        >>> mask[20:90, 30:100] = True
        >>> sample = Sample("1", image, "what do you see?", "a dog.", {"dog": mask})
        >>> sample.size == image.size
        True
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
            raise InvalidInputError(
                f"word_types must be {', '.join(get_args(WordType))}, got {', '.join(map(repr, unknown))}."
            )
        width, height = self.size
        for name, mask in self.categories.items():
            if mask.dtype != bool or mask.shape != (height, width):
                raise InvalidInputError(
                    f"The mask of {name!r} must be bool of shape {(height, width)}, the image's height and width; "
                    f"got {mask.dtype} of shape {mask.shape}."
                )

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the image, read from the file's header."""
        if isinstance(self.source, Image.Image):
            return self.source.size
        return image_size(self.source, Record(self.source, f"sample {self.id}"))

    @cached_property
    def image(self) -> Image.Image:
        """The image in RGB."""
        if isinstance(self.source, Image.Image):
            return self.source.convert("RGB")
        with open_image(self.source, Record(self.source, f"sample {self.id}")) as image:
            return image.convert("RGB")


@runtime_checkable
class EvaluationDataset(Protocol):
    """The interface of a data set: ``settings``, ``len(dataset)`` and ``dataset[index]``.

    Attributes:
        settings (dict[str, Any]): everything that determines the samples, in JSON's types. The manifest of a run
            records it, and a run can only be resumed with the same settings.
    """

    settings: dict[str, Any]

    def __len__(self) -> int:
        """Return the number of samples."""

    def __getitem__(self, index: int) -> Sample:
        """Return a sample, the same one each time; raise IndexError past the last one."""
