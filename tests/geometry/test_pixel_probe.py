from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from captum_intramodal.errors import InvalidInputError, NoPixelMapError
from captum_intramodal.geometry import pixel_probe
from captum_intramodal.geometry.pixel_probe import measure_pixels
from tests.geometry.helpers import image_only
from tests.testing.tiny import tiny

SIZE = (200, 136)


def test_coordinates_of_a_center_crop_by_hand() -> None:
    _, processor = tiny("llava")  # Resizes the shorter side to 112, and crops the middle of the longer one.
    pixels = measure_pixels(image_only(processor), [SIZE])["pixel_values"]
    assert pixels.shape == (1, 3, 112, 112)
    resized = (112 * 200 // 136, 112)
    x = ((resized[0] - 112) // 2 + np.arange(112) + 0.5) * 200 / resized[0]
    y = (np.arange(112) + 0.5) * 136 / 112
    center = ((pixels.lower + pixels.upper) / 2).reshape(2, 1, 3, 112, 112)[:, 0, :, 4:-4, 4:-4]
    assert np.abs(center[0].numpy() - x[None, None, 4:-4]).max() < 0.5
    assert np.abs(center[1].numpy() - y[None, 4:-4, None]).max() < 0.5
    assert (pixels.gain > 0).all() and (pixels.image_index == 0).all()


def test_patches_with_their_row_and_column() -> None:
    # An image of 2 rows x 3 columns of patches with 4 elements each, and one patch of padding.
    places = [[r, c] for r in (1, 2) for c in (1, 2, 3)] + [[0, 0]]
    patches = torch.cat([torch.tensor(places).float(), torch.zeros(7, 4)], dim=1)[None]
    pixels = measure_pixels(lambda images: {"flattened_patches": patches}, [(60, 30)])["flattened_patches"]
    boxes = torch.cat([pixels.lower, pixels.upper]).T.reshape(7, 6, 4)
    assert boxes[4, 2].tolist() == [20, 15, 40, 30]
    assert boxes[2, 5].tolist() == [40, 0, 60, 15]
    assert (pixels.gain.reshape(7, 6) != 0).sum(1).tolist() == [4] * 6 + [0]
    assert pixels.fold(torch.ones(1, 7, 6), (2, 3)).tolist() == [[4, 4, 4], [4, 4, 4]]


def test_sizes_are_not_reduced_if_every_pixel_reaches_the_model() -> None:
    sizes = ((1600, 1000),)
    whole = lambda images: {"pixel_values": torch.zeros(1, 3, images[0].height, images[0].width)}  # noqa: E731
    assert pixel_probe.reduced_sizes(whole, sizes) == sizes


@pytest.mark.parametrize("pattern", ["white", "varying"])
def test_processor_that_crops_by_content(pattern: str) -> None:
    def prepare(images: list[Image.Image]) -> dict[str, Tensor]:
        values = torch.from_numpy(np.array(images[0])).float()
        cropped = values.min() > 0 if pattern == "white" else values.min() < values.max()
        return {"pixel_values": values[1:] if cropped else values}

    with pytest.raises(NoPixelMapError, match=r"'pixel_values' of shape \(8, 16, 3\) for black.*\(7, 16, 3\)"):
        measure_pixels(prepare, [(16, 8)])


def test_errors() -> None:
    with pytest.raises(InvalidInputError, match="at least one image"):
        measure_pixels(lambda images: {}, [])
    with pytest.raises(NoPixelMapError, match="None of the processor's 1 float tensors"):
        measure_pixels(lambda images: {"pixel_values": torch.zeros(1, 4)}, [(16, 8)])
