from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image

from captum_intramodal.geometry import cache
from captum_intramodal.geometry.cache import cached_geometry, cached_pixels, geometry_key
from captum_intramodal.geometry.measure import measure_geometry
from captum_intramodal.geometry.pixel_probe import measure_pixels
from tests.geometry.helpers import preparer
from tests.testing.families import build
from tests.testing.tiny import tiny


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_cache", type(cache._cache)())


def test_same_object_for_same_key() -> None:
    model, processor = tiny("llava")
    prepare = preparer(processor)
    first = cached_geometry(model, processor, prepare, [(60, 50)])
    assert cached_geometry(tiny("llava", seed=1)[0], tiny("llava")[1], prepare, ((60, 50),)) is first
    assert cached_geometry(model, processor, prepare, [(50, 60)]) is not first


def test_least_recently_used_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "CACHE_SIZE", 2)
    monkeypatch.setattr(cache, "measure_geometry", lambda model, prepare, sizes: object())
    model, processor = tiny("llava")
    a, b = ([cached_geometry(model, processor, preparer(processor), [(n, n)])][0] for n in (10, 20))
    assert cached_geometry(model, processor, preparer(processor), [(10, 10)]) is a
    cached_geometry(model, processor, preparer(processor), [(30, 30)])
    assert cached_geometry(model, processor, preparer(processor), [(10, 10)]) is a
    assert cached_geometry(model, processor, preparer(processor), [(20, 20)]) is not b


def test_key_follows_settings() -> None:
    model, processor = tiny("internvl")
    key = geometry_key(model, processor, [(60, 50)])
    assert key == geometry_key(*tiny("internvl", seed=3), [(60, 50)])
    processor.image_processor.max_patches = 2
    assert geometry_key(model, processor, [(60, 50)]) != key


def test_pixels_of_large_images_are_measured_at_a_smaller_size() -> None:
    model, processor = tiny("llava")
    sizes = [(1600, 1000), (900, 1400)]
    prepare = preparer(processor, n_images=2)
    prepared: list[tuple[int, int]] = []

    def recording(images: list[Image.Image]) -> Any:
        prepared.append(images[0].size)
        return prepare(images)

    found = cached_pixels(model, processor, recording, sizes).maps["pixel_values"]
    assert prepared.count((1600, 1000)) == 1 and len(prepared) > 5
    exact = measure_pixels(prepare, sizes)["pixel_values"]
    assert found.image_sizes == exact.image_sizes == tuple(sizes)
    assert torch.equal(found.image_index, exact.image_index)
    for a, b in ((found.lower, exact.lower), (found.upper, exact.upper)):
        torch.testing.assert_close(a, b, atol=4.0, rtol=0)  # Elements are 9 pixels wide.


@pytest.mark.parametrize("reason", ["several images", "smallest size"])
def test_images_are_measured_if_the_processor_rejects_the_sample(reason: str) -> None:
    model, processor = tiny("qwen2_vl")
    sizes = [(300, 200)] * (2 if reason == "several images" else 1)
    plain = preparer(processor, n_images=len(sizes))

    def prepare(images: list[Image.Image]) -> Any:
        if images[0].width < 224:
            raise ValueError("height and width must be at least 224")
        return plain(images)

    if reason == "several images":
        prepare = plain
        with pytest.raises(ValueError, match="number of images"):
            prepare([Image.new("RGB", (192, 128))])
    geometry = cached_geometry(model, processor, prepare, sizes)
    expected = measure_geometry(model, prepare, sizes)
    assert geometry.kinds == expected.kinds and torch.equal(geometry.boxes, expected.boxes)


def test_errors_of_the_processor_about_the_images_are_raised() -> None:
    model, processor = tiny("qwen2_vl")
    plain = preparer(processor)

    def prepare(images: list[Image.Image]) -> Any:
        if images[0].width > 200:
            raise ValueError("too large for this processor")
        return plain(images)

    with pytest.raises(ValueError, match="too large for this processor"):
        cached_geometry(model, processor, prepare, [(300, 200)])


def test_other_errors_during_the_sample_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = build("qwen2_vl")

    def fail(*args: Any) -> None:
        raise ValueError("a fault of the measurement")

    monkeypatch.setattr(cache, "measure_geometry", fail)
    with pytest.raises(ValueError, match="a fault of the measurement"):
        cached_geometry(model, processor, preparer(processor), [(300, 200)])
