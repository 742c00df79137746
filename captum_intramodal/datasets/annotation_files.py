r"""Read annotation files and images, with errors that name the file and the record."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from captum_intramodal.errors import DatasetError, IntramodalError

__all__ = [
    "Record",
    "as_list",
    "checked_category_name",
    "existing_file",
    "image_size",
    "open_image",
    "read_bytes",
    "read_gray_levels",
    "read_json",
    "sha256",
]


@dataclass(frozen=True)
class Record:
    """A record of an annotation file, as errors name it.

    Attributes:
        file (Path): the annotation file.
        name (str): which of its records: ``'line 3'``, ``'images[0]'``.
    """

    file: Path
    name: str

    def error(self, problem: str) -> DatasetError:
        """Return the error to raise for this record."""
        return DatasetError(f"{self.file}, {self.name}: {problem}.")

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Raise a :class:`DatasetError` if the code inside meets a missing key or a value of the wrong type or form."""
        try:
            yield
        except IntramodalError:
            raise
        except KeyError as error:
            raise self.error(f"the key {error.args[0]!r} is missing") from error
        except (AttributeError, TypeError, ValueError) as error:
            raise self.error("a value has the wrong type or form") from error


def read_bytes(file: Path) -> bytes:
    """Return the content of an annotation file."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise DatasetError(f"{file} cannot be read ({error.strerror}).") from error


def read_json(file: Path) -> tuple[Any, str]:
    """Return the content of a JSON file and its SHA-256."""
    content = read_bytes(file)
    try:
        return json.loads(content), sha256(content)
    except json.JSONDecodeError as error:
        raise DatasetError(f"{file}: invalid JSON at line {error.lineno}, column {error.colno}.") from error
    except UnicodeDecodeError as error:
        raise DatasetError(f"{file}: invalid {error.encoding} at byte {error.start}.") from error


def sha256(content: bytes) -> str:
    """Return the SHA-256 of an annotation file's content, which identifies a data set's version."""
    return hashlib.sha256(content).hexdigest()


def as_list(file: Path, value: Any, what: str) -> list[Any]:
    """Return a value of an annotation file if it is a list."""
    if not isinstance(value, list):
        raise DatasetError(f"{file}: {what} must be a list, got {type(value).__name__}.")
    return value


def existing_file(file: Path, record: Record) -> Path:
    """Return the path that a record names if there is a file."""
    # Unlike Path.is_file, os.path.isfile does not raise if the name is too long for a file.
    if not os.path.isfile(file):
        raise record.error(f"there is no file {file}")
    return file


def checked_category_name(name: Any, record: Record) -> str:
    """Return a category's name if it is a non-empty string."""
    if not isinstance(name, str) or not name.strip():
        raise record.error("category names must be non-empty strings")
    return name


@contextmanager
def open_image(file: Path, record: Record) -> Iterator[Image.Image]:
    """Open an image file; while it is open, everything that Pillow cannot read raises a :class:`DatasetError`."""
    try:
        with Image.open(file) as image:
            yield image
    except FileNotFoundError as error:
        raise record.error(f"there is no file {file}") from error
    except UnidentifiedImageError as error:
        raise record.error(f"{file} is not an image of a known format") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise record.error(f"the image {file} cannot be read; it may be truncated or damaged") from error


def image_size(file: Path, record: Record) -> tuple[int, int]:
    """Return the width and height of an image file, from its header."""
    with open_image(file, record) as image:
        return image.size


def read_gray_levels(file: Path, record: Record) -> np.ndarray:
    """Return the gray levels of an image, or the indices of a palette image: uint8 (height, width)."""
    with open_image(file, record) as image:
        return np.asarray(image if image.mode == "P" else image.convert("L"))
