"""Masks drawn by hand, and the files of data sets that contain them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from captum_intramodal.datasets import Sample

SIZE = WIDTH, HEIGHT = 40, 30


def rectangle(left: int, top: int, right: int, bottom: int) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[top:bottom, left:right] = True
    return mask


DOG, CAT, BALL = rectangle(2, 3, 12, 20), rectangle(20, 5, 33, 28), rectangle(30, 20, 38, 29)
EMPTY = rectangle(0, 0, 0, 0)


def save_image(file: Path, array: np.ndarray | None = None) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array if array is not None else np.full((HEIGHT, WIDTH, 3), 90, np.uint8)).save(file)


def write_file(file: Path, content: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return file


def same_masks(sample: Sample, expected: dict[str, np.ndarray]) -> bool:
    assert list(sample.categories) == list(expected)
    return all(np.array_equal(sample.categories[name], mask) for name, mask in expected.items())


def label_image(**levels: int) -> np.ndarray:
    image = np.zeros((HEIGHT, WIDTH), np.uint8)
    for mask, level in zip((DOG, CAT), levels.values(), strict=True):
        image[mask] = level
    return image


def grandf_folder(folder: Path, *records: Any) -> Path:
    """Write a folder in the layout that TAM's release has for GranDf and OpenPSG."""
    save_image(folder / "image" / "x.png")
    save_image(folder / "label" / "x.png", label_image(dog=4, cat=9))
    save_image(folder / "label" / "small.png", np.zeros((3, 4), np.uint8))
    write_file(folder / "anno.json", list(records))
    return folder


def folder_with_lines(folder: Path, *lines: Any) -> Path:
    """Write a folder with images, masks and the given lines of ``annotations.jsonl``."""
    save_image(folder / "1.png")
    save_image(folder / "dog.png", DOG.astype(np.uint8) * 255)
    save_image(folder / "cat.png", CAT)
    save_image(folder / "red.png", np.where(BALL[..., None], np.array([200, 0, 0], np.uint8), np.uint8(0)))
    save_image(folder / "small.png", np.zeros((3, 4), np.uint8))
    write_file(folder / "annotations.jsonl", "\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))
    return folder
