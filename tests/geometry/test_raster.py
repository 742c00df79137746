from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image

from captum_intramodal import ModelAdapter
from captum_intramodal.errors import NoTokenGeometryError
from captum_intramodal.geometry import raster
from captum_intramodal.geometry.measure import measure_geometry
from captum_intramodal.geometry.raster import code_raster_geometry, expected_raster
from tests.geometry.helpers import grid_boxes, preparer
from tests.testing.families import build
from tests.testing.tiny import tiny


@pytest.mark.parametrize(
    ("model_type", "sizes"),
    [
        ("qwen2_vl", [(640, 400)]),
        ("qwen2_vl", [(333, 221)]),
        ("qwen2_5_vl", [(320, 200), (210, 333)]),
        ("gemma3", [(333, 221)]),
        ("mistral3", [(320, 200)]),
    ],
)
def test_expected_raster_is_the_measured_one(model_type: str, sizes: Any) -> None:
    model, processor = build(model_type)
    adapter = ModelAdapter(model, processor)

    def prepare(images: list[Image.Image]) -> Any:
        return adapter.prepare(images, "describe")

    sample = measure_geometry(model, prepare, [raster.SAMPLE])
    expected = expected_raster(model, prepare, sample, sizes)
    measured = measure_geometry(model, prepare, sizes)
    assert expected is not None
    assert expected.kinds == measured.kinds and expected.image_sizes == measured.image_sizes
    assert torch.equal(expected.image_index, measured.image_index)
    torch.testing.assert_close(expected.boxes, measured.boxes, atol=0.5, rtol=0)


@pytest.mark.parametrize("model_type", ["idefics3", "internvl", "llava", "git"])
def test_no_raster_is_expected_of_tiles_crops_and_prefixes(model_type: str) -> None:
    model, processor = build(model_type)
    adapter = ModelAdapter(model, processor)

    def prepare(images: list[Image.Image]) -> Any:
        return adapter.prepare(images, "describe")

    sample = measure_geometry(model, prepare, [raster.SAMPLE])
    assert expected_raster(model, prepare, sample, [(320, 200)]) is None


def test_wrong_raster_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = tiny("qwen2_vl")
    prepare = preparer(processor)
    sample = measure_geometry(model, prepare, [raster.SAMPLE])
    shape = raster._raster_shape
    assert shape((640, 400), 14 * 23, 1.0) == (14, 23)
    monkeypatch.setattr(raster, "_raster_shape", lambda size, count, aspect: shape(size[::-1], count, aspect))
    sample = replace(sample, image_sizes=(sample.image_sizes[0][::-1],), boxes=sample.boxes[:, [1, 0, 3, 2]])
    raster_of_sample = raster._raster_boxes(sample.image_sizes[0], shape((192, 128), len(sample.boxes), 1.0)[::-1])
    sample = replace(sample, boxes=raster_of_sample)
    assert expected_raster(model, prepare, sample, [(640, 400)]) is None


def test_codes_of_images_of_different_sizes() -> None:
    sizes = [(160, 120), (90, 200)]
    geometry = ModelAdapter(*build("emu3")).geometry(sizes)
    # Resized to 104 x 80 and 64 x 136 pixels, codes of 8 pixels; the smaller sides are padded.
    expected = grid_rows(10, 13, *sizes[0]) + grid_rows(17, 8, *sizes[1])
    boxes = torch.tensor([box for row in expected for box in [*row, [math.nan] * 4]])
    torch.testing.assert_close(geometry.boxes, boxes, atol=0.5, rtol=0, equal_nan=True)
    assert geometry.kinds == (("local",) * 13 + ("separator",)) * 10 + (("local",) * 8 + ("separator",)) * 17
    assert geometry.image_index.tolist() == [0] * 140 + [1] * 153


def grid_rows(rows: int, columns: int, width: int, height: int) -> list[list[list[float]]]:
    boxes = grid_boxes(rows, columns, 0, 0, width, height)
    return [boxes[columns * row : columns * (row + 1)] for row in range(rows)]


def test_codes_that_form_no_raster() -> None:
    maps = ModelAdapter(*build("emu3")).pixel_maps([(160, 120)])
    with pytest.raises(NoTokenGeometryError, match="141 visual tokens do not form a raster"):
        code_raster_geometry(maps.maps, maps.image_sizes, 141, 1)
