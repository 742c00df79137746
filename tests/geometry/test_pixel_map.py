from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from captum_intramodal.errors import InvalidInputError
from captum_intramodal.geometry.pixel_map import PixelMap
from captum_intramodal.geometry.pixel_probe import measure_pixels
from tests.geometry.helpers import image_only
from tests.testing.tiny import MODEL_TYPES, tiny

SIZE = (200, 136)


def segments(width: int, height: int, rows: int = 3, columns: int = 4) -> torch.Tensor:
    row, column = torch.arange(height) * rows // height, torch.arange(width) * columns // width
    return row[:, None] * columns + column


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_segment_is_masked_in_all_tiles_at_once(model_type: str) -> None:
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


def test_segments_of_several_images_are_numbered_on() -> None:
    _, processor = tiny("llava")
    pixels = measure_pixels(image_only(processor), [SIZE, (90, 90)])["pixel_values"]
    mask = pixels.feature_mask([segments(*SIZE), segments(90, 90, 2, 2)])
    assert set(mask[0].unique().tolist()) <= set(range(12))
    assert mask[1].unique().tolist() == [12, 13, 14, 15]


@pytest.mark.parametrize("model_type", ["qwen2_vl", "smolvlm"])
def test_fold_preserves_sum_and_place(model_type: str) -> None:
    _, processor = tiny(model_type)
    pixels = measure_pixels(image_only(processor), [SIZE])["pixel_values"]
    values = torch.randn(2, *pixels.shape)
    folded = pixels.fold(values, (17, 25))
    assert folded.shape == (2, 17, 25)
    samples = (pixels.gain != 0).reshape(pixels.shape)
    torch.testing.assert_close(folded.sum((1, 2)), (values * samples).flatten(1).sum(1), rtol=1e-4, atol=1e-2)
    marked = pixels.feature_mask([segments(*SIZE, 17, 25)]) == 17 * 25 // 2
    assert (pixels.fold(marked.float(), (17, 25)) > 0).nonzero().tolist() == [[8, 12]]


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
    with pytest.raises(InvalidInputError, match=r"images of .* \[\(2, 2\)\], got .* \[\(2, 3\)\]"):
        pixels.feature_mask([torch.zeros(3, 2, dtype=torch.int64)])
    with pytest.raises(InvalidInputError, match=r"counted from 0, got torch\.int64 with minimum -1"):
        pixels.feature_mask([torch.full((2, 2), -1)])
    with pytest.raises(InvalidInputError, match="Attributions of shape"):
        pixels.fold(torch.zeros(3), (1, 2))
