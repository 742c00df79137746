"""A sample checks its masks and word types, and names its file if the image cannot be read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from captum_intramodal.datasets import Sample
from captum_intramodal.errors import DatasetError, InvalidInputError
from tests.datasets.helpers import DOG, SIZE, save_image, write_file


def test_truncated_image_is_named(tmp_path: Path) -> None:
    save_image(tmp_path / "1.png", np.random.default_rng(0).integers(0, 255, (90, 90, 3), np.uint8))
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:5000])
    sample = Sample("one", tmp_path / "1.png", "what?")
    assert sample.size == (90, 90)
    with pytest.raises(DatasetError, match=r"1\.png, sample one.*truncated"):
        _ = sample.image


def test_missing_file_and_file_of_another_kind_are_named(tmp_path: Path) -> None:
    for file, message in ((tmp_path / "gone.png", "no file"), (write_file(tmp_path / "1.txt", "x"), "known format")):
        with pytest.raises(DatasetError, match=rf"{file.name}, sample one: .*{message}"):
            Sample("one", file, "what?")


def test_images_are_rgb_and_masks_bool() -> None:
    assert Sample("1", Image.new("L", SIZE), "").image.mode == "RGB"
    with pytest.raises(InvalidInputError, match="word_types must be noun, function, other, got 'verb'"):
        Sample("one", Image.new("RGB", (4, 4)), "what?", word_types={"runs": "verb"})  # type: ignore[dict-item]
    with pytest.raises(InvalidInputError, match=r"'dog' must be bool.*got uint8"):
        Sample("1", Image.new("L", SIZE), "", categories={"dog": DOG.astype(np.uint8)})
