from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from captum_intramodal.geometry.pixel_map import PixelMap
from captum_intramodal.geometry.pixel_probe import measure_pixels
from tests.testing.tiny import MODEL_TYPES, tiny

SIZE = (200, 136)


def image_only(processor: Any) -> Any:
    return lambda images: processor.image_processor(images=images, return_tensors="pt")


def segments(width: int, height: int, rows: int = 3, columns: int = 4) -> torch.Tensor:
    row, column = torch.arange(height) * rows // height, torch.arange(width) * columns // width
    return row[:, None] * columns + column


def test_coordinates_of_a_center_crop_by_hand() -> None:
    _, processor = tiny("llava")  # The shorter side becomes 112, of the longer one the middle is kept.
    pixels = measure_pixels(image_only(processor), [SIZE])["pixel_values"]
    assert pixels.shape == (1, 3, 112, 112)
    resized = (112 * 200 // 136, 112)
    x = ((resized[0] - 112) // 2 + np.arange(112) + 0.5) * 200 / resized[0]
    y = (np.arange(112) + 0.5) * 136 / 112
    center = ((pixels.lower + pixels.upper) / 2).reshape(2, 1, 3, 112, 112)[:, 0, :, 4:-4, 4:-4]
    assert np.abs(center[0].numpy() - x[None, None, 4:-4]).max() < 0.5
    assert np.abs(center[1].numpy() - y[None, 4:-4, None]).max() < 0.5
    assert (pixels.gain > 0).all() and (pixels.image_index == 0).all()


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_segment_is_masked_in_all_frames_at_once(model_type: str) -> None:
    _, processor = tiny(model_type)
    prepare = image_only(processor)
    pixels = measure_pixels(prepare, [SIZE])["pixel_values"]
    segmentation = segments(*SIZE)
    mask = pixels.feature_mask([segmentation])
    assert mask.shape == pixels.shape and mask.dtype == torch.int64 and int(mask.max()) <= 12

    white = np.full((136, 200, 3), 255, np.uint8)
    holed = white.copy()
    holed[(segmentation == 5).numpy()] = 0
    before, after, black = (
        prepare([Image.fromarray(values)])["pixel_values"].flatten() for values in (white, holed, np.zeros_like(white))
    )
    assert torch.equal((black - before).abs() > 0, pixels.gain != 0)
    darkened = (before - after) > pixels.gain / 2
    agreement = (darkened == (mask.flatten() == 5)).float().mean()
    assert darkened.any() and agreement > 0.99


def test_segments_of_several_images_are_counted_on() -> None:
    _, processor = tiny("llava")
    pixels = measure_pixels(image_only(processor), [SIZE, (90, 90)])["pixel_values"]
    mask = pixels.feature_mask([segments(*SIZE), segments(90, 90, 2, 2)])
    assert set(mask[0].unique().tolist()) <= set(range(12))
    assert mask[1].unique().tolist() == [12, 13, 14, 15]


@pytest.mark.parametrize("model_type", ["qwen2_vl", "smolvlm"])
def test_fold_keeps_the_sum_and_the_place(model_type: str) -> None:
    _, processor = tiny(model_type)
    pixels = measure_pixels(image_only(processor), [SIZE])["pixel_values"]
    values = torch.randn(2, *pixels.shape)
    folded = pixels.fold(values, (17, 25))
    assert folded.shape == (2, 17, 25)
    shows = (pixels.gain != 0).reshape(pixels.shape)
    torch.testing.assert_close(folded.sum((1, 2)), (values * shows).flatten(1).sum(1), rtol=1e-4, atol=1e-2)
    marked = pixels.feature_mask([segments(*SIZE, 17, 25)]) == 17 * 25 // 2
    assert (pixels.fold(marked.float(), (17, 25)) > 0).nonzero().tolist() == [[8, 12]]


def test_patches_that_say_where_they_are() -> None:
    # An image of 2 rows x 3 columns of patches with 4 elements each, and one patch of padding.
    places = [[r, c] for r in (1, 2) for c in (1, 2, 3)] + [[0, 0]]
    patches = torch.cat([torch.tensor(places).float(), torch.zeros(7, 4)], dim=1)[None]
    pixels = measure_pixels(lambda images: {"flattened_patches": patches}, [(60, 30)])["flattened_patches"]
    boxes = torch.cat([pixels.lower, pixels.upper]).T.reshape(7, 6, 4)
    assert boxes[4, 2].tolist() == [20, 15, 40, 30]
    assert boxes[2, 5].tolist() == [40, 0, 60, 15]
    assert (pixels.gain.reshape(7, 6) != 0).sum(1).tolist() == [4] * 6 + [0]
    assert pixels.fold(torch.ones(1, 7, 6), (2, 3)).tolist() == [[4, 4, 4], [4, 4, 4]]


def test_errors() -> None:
    pixels = PixelMap(
        torch.Size([1, 4]),
        torch.tensor([[0.0, 1, 0, 1], [0, 0, 1, 1]]),
        torch.tensor([[1.0, 2, 1, 2], [1, 1, 2, 2]]),
        torch.ones(4),
        torch.zeros(4, dtype=torch.int64),
        ((2, 2),),
    )
    assert pixels.feature_mask([torch.tensor([[0, 1], [2, 3]])]).tolist() == [[0, 1, 2, 3]]
    assert pixels.fold(torch.tensor([[1.0, 2, 3, 4]]), (1, 2)).tolist() == [[4, 6]]
    with pytest.raises(ValueError, match="images of"):
        pixels.feature_mask([torch.zeros(3, 2, dtype=torch.int64)])
    with pytest.raises(ValueError, match="counted from 0"):
        pixels.feature_mask([torch.full((2, 2), -1)])
    with pytest.raises(ValueError, match="at least one image"):
        measure_pixels(lambda images: {}, [])
    with pytest.raises(ValueError, match="Attributions of shape"):
        pixels.fold(torch.zeros(3), (1, 2))
