from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from captum_intramodal import ModelAdapter
from captum_intramodal.geometry import bisection, cache, ownership, pixel_probe
from captum_intramodal.geometry import raster as raster_module
from captum_intramodal.geometry.cache import cached_geometry, cached_pixels, geometry_key
from captum_intramodal.geometry.measure import measure_geometry
from captum_intramodal.geometry.oracle import geometry_oracle
from captum_intramodal.geometry.pixel_probe import measure_pixels
from captum_intramodal.geometry.raster import expected_raster
from captum_intramodal.geometry.token_geometry import TokenGeometry
from captum_intramodal.models.placeholders import visual_positions
from tests.testing.families import build
from tests.testing.tiny import MODEL_TYPES, tiny

SIZES = [(200, 136), (640, 400), (130, 310)]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def preparer(processor: Any, n_images: int = 1, **options: Any) -> Callable[[list[Image.Image]], Any]:
    content = [*({"type": "image"} for _ in range(n_images)), {"type": "text", "text": "what is in the picture ?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return lambda images: processor(images=images, text=[text], return_tensors="pt", **options)


def random_image(size: tuple[int, int], seed: int = 0) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def raster(rows: int, columns: int, x0: float, y0: float, x1: float, y1: float) -> list[list[float]]:
    x = [x0 + (x1 - x0) * i / columns for i in range(columns + 1)]
    y = [y0 + (y1 - y0) * i / rows for i in range(rows + 1)]
    return [[x[c], y[r], x[c + 1], y[r + 1]] for r in range(rows) for c in range(columns)]


def tiles(rows: int, columns: int, width: int, height: int) -> list[list[float]]:
    """4 x 4 tokens in every tile, then 4 x 4 of the thumbnail."""
    boxes = [
        box for tile in raster(rows, columns, 0, 0, width, height) for box in raster(4, 4, *tile)
    ]  # fmt: skip
    return boxes + raster(4, 4, 0, 0, width, height) if rows * columns > 1 else boxes


def qwen_boxes(width: int, height: int) -> list[list[float]]:
    unit, most = 28, 160
    rows, columns = round(height / unit), round(width / unit)
    if rows * columns > most:
        shrink = math.sqrt(width * height / (most * unit**2))
        rows, columns = math.floor(height / shrink / unit), math.floor(width / shrink / unit)
    return raster(rows, columns, 0, 0, width, height)


def llava_boxes(width: int, height: int) -> list[list[float]]:
    # The shorter side is resized to 112, the longer rounded down; the crop's margin is rounded down as well.
    crop = 112
    resized = [crop * side // min(width, height) for side in (width, height)]
    left, top = ((side - crop) // 2 for side in resized)
    x, y = width / resized[0], height / resized[1]
    return raster(8, 8, left * x, top * y, (left + crop) * x, (top + crop) * y)


def idefics_boxes(width: int, height: int) -> list[list[float]]:
    # The longer side is resized to three tiles, the shorter one up to the next whole tile.
    other = math.ceil(3 * min(width, height) / max(width, height))
    return tiles(other, 3, width, height) if width >= height else tiles(3, other, width, height)


def internvl_boxes(width: int, height: int) -> list[list[float]]:
    # The tiling of at most six tiles with the image's aspect ratio, looked up by hand.
    rows, columns = {(200, 136): (2, 3), (640, 400): (2, 3), (130, 310): (2, 1), (100, 100): (1, 1)}[width, height]
    return tiles(rows, columns, width, height)


BOXES = {
    "qwen2_vl": qwen_boxes,
    "qwen2_5_vl": qwen_boxes,
    "llava": llava_boxes,
    "smolvlm": idefics_boxes,
    "idefics3": idefics_boxes,
    "internvl": internvl_boxes,
}


def iou(a: Tensor, b: Tensor) -> Tensor:
    overlap = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp_min(0).prod(1)
    area = (a[:, 2:] - a[:, :2]).prod(1) + (b[:, 2:] - b[:, :2]).prod(1)
    return overlap / (area - overlap)


def hooks_and_forwards(model: PreTrainedModel) -> list[Any]:
    # transformers installs recorders of its own on the first pass, for good; they are not ours to count.
    ours = [
        [h for h in module._forward_hooks.values() if "captum_intramodal" in getattr(h, "__module__", "")]
        + list(module._forward_pre_hooks)
        for module in model.modules()
    ]
    return [ours, [vars(m).get("forward") for m in model.modules()], [m.training for m in model.modules()]]


@pytest.mark.parametrize("model_type", MODEL_TYPES)
class TestFamilies:
    @pytest.mark.parametrize("size", SIZES, ids=str)
    def test_boxes_are_those_derived_by_hand(self, model_type: str, size: tuple[int, int]) -> None:
        model, processor = tiny(model_type)
        prepare = preparer(processor)
        geometry = measure_geometry(model, prepare, [size])
        expected = torch.tensor(BOXES[model_type](*size))
        assert geometry.boxes.dtype == torch.float32
        assert geometry.boxes.shape == expected.shape
        assert set(geometry.kinds) == {"local"}
        agreement = iou(geometry.boxes, expected)
        assert agreement.mean() >= 0.97
        assert agreement.min() >= 0.9
        rectangle = [*expected[:, :2].amin(0).tolist(), *expected[:, 2:].amax(0).tolist()]
        assert geometry.coverage() == pytest.approx(rectangle, abs=1.0)
        assert geometry_oracle(model, prepare, [random_image(size)], geometry) >= 0.97

    def test_oracle_rejects_wrong_boxes(self, model_type: str) -> None:
        model, processor = tiny(model_type)
        prepare, size = preparer(processor), (180, 180)
        geometry = measure_geometry(model, prepare, [size])
        transposed = replace(geometry, boxes=geometry.boxes[:, [1, 0, 3, 2]])
        shifted = replace(geometry, boxes=geometry.boxes.roll(1, dims=0))
        assert geometry_oracle(model, prepare, [random_image(size)], geometry) >= 0.97
        assert geometry_oracle(model, prepare, [random_image(size)], transposed, blocks=20) <= 0.5
        assert geometry_oracle(model, prepare, [random_image(size)], shifted, blocks=20) <= 0.5

    def test_ownership_and_bisection_agree(self, model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
        model, processor = tiny(model_type)
        prepare, size = preparer(processor), (200, 136)
        found: list[Any] = []
        owners = ownership.PerturbationSweep.owners
        monkeypatch.setattr(ownership.PerturbationSweep, "owners", lambda self: found.append(owners(self)) or found[-1])
        owned = measure_geometry(model, prepare, [size])
        assert found[0] is not None
        monkeypatch.setattr(ownership.PerturbationSweep, "owners", lambda self: None)
        swept = measure_geometry(model, prepare, [size])
        assert owned.kinds == swept.kinds
        torch.testing.assert_close(owned.boxes, swept.boxes, atol=bisection.PRECISION, rtol=0)

    def test_bfloat16(self, model_type: str) -> None:
        model, processor = tiny(model_type)
        prepare, size = preparer(processor), (200, 136)
        exact = measure_geometry(model, prepare, [size])
        model.to(torch.bfloat16)
        rounded = measure_geometry(model, prepare, [size])
        torch.testing.assert_close(rounded.boxes, exact.boxes)
        assert geometry_oracle(model, prepare, [random_image(size)], rounded) >= 0.97

    def test_two_images(self, model_type: str) -> None:
        model, processor = tiny(model_type)
        sizes = [(200, 136), (130, 310)]
        prepare = preparer(processor, n_images=2)
        geometry = measure_geometry(model, prepare, sizes)
        expected = [torch.tensor(BOXES[model_type](*size)) for size in sizes]
        assert geometry.image_sizes == tuple(sizes)
        assert geometry.image_index.tolist() == [0] * len(expected[0]) + [1] * len(expected[1])
        assert iou(geometry.boxes, torch.cat(expected)).mean() >= 0.97
        assert geometry_oracle(model, prepare, [random_image(size) for size in sizes], geometry) >= 0.97

    def test_model_is_left_as_it_was(self, model_type: str) -> None:
        model, processor = tiny(model_type)
        model.train()
        model.get_decoder().eval()
        wrapped = ownership._attention_blocks(model)[0]
        wrapped.forward = wrapped.forward  # as accelerate leaves it: on the instance
        prepare, size = preparer(processor), (100, 100)
        before, seed = hooks_and_forwards(model), torch.random.get_rng_state()
        geometry = measure_geometry(model, prepare, [size])
        geometry_oracle(model, prepare, [random_image(size)], geometry, blocks=2)
        assert hooks_and_forwards(model) == before
        assert torch.equal(torch.random.get_rng_state(), seed)
        assert torch.is_grad_enabled()

        calls = 0

        def fail(*args: Any, **kwargs: Any) -> None:
            nonlocal calls
            calls += 1
            if calls > 2:
                raise RuntimeError("broken on purpose")

        handle = model.register_forward_pre_hook(fail, with_kwargs=True)
        before = hooks_and_forwards(model)
        with pytest.raises(RuntimeError, match="on purpose"):
            measure_geometry(model, prepare, [size])
        assert hooks_and_forwards(model) == before
        assert torch.equal(torch.random.get_rng_state(), seed)
        assert torch.is_grad_enabled()
        handle.remove()

    def test_generates_words(self, model_type: str) -> None:
        model, processor = tiny(model_type)
        inputs = preparer(processor)([random_image((100, 80))])
        answer = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert len(answer) >= 3
        assert processor.tokenizer.decode(answer, skip_special_tokens=True).strip()


class TestLargeImages:
    def test_measured_on_smaller_ones(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, processor = tiny("llava")
        plain, largest = preparer(processor), 0

        def prepare(images: list[Image.Image]) -> Any:
            nonlocal largest
            largest = max(largest, *(sum(np.array(image).ravel() > 0) for image in images))
            return plain(images)

        size = (1600, 1000)
        geometry = measure_geometry(model, prepare, [size])
        assert 0 < largest < 1600 * 1000
        assert geometry.image_sizes == (size,)
        monkeypatch.setattr(pixel_probe, "LARGE", math.inf)
        exact = measure_geometry(model, plain, [size])
        assert geometry.kinds == exact.kinds
        assert iou(geometry.boxes, exact.boxes).min() >= 0.97

    def test_not_where_the_model_sees_every_pixel(self) -> None:
        sizes = ((1600, 1000),)
        whole = lambda images: {"pixel_values": torch.zeros(1, 3, images[0].height, images[0].width)}  # noqa: E731
        assert pixel_probe.reduced_sizes(whole, sizes) == sizes

    def test_pixels_as_well(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, processor = tiny("llava")
        sizes = [(1600, 1000), (900, 1400)]
        prepare = preparer(processor, n_images=2)
        shown: list[tuple[int, int]] = []

        def watched(images: list[Image.Image]) -> Any:
            shown.append(images[0].size)
            return prepare(images)

        monkeypatch.setattr(cache, "_cache", type(cache._cache)())
        found = cached_pixels(model, processor, watched, sizes).maps["pixel_values"]
        assert shown.count((1600, 1000)) == 1 and len(shown) > 5
        exact = measure_pixels(prepare, sizes)["pixel_values"]
        assert found.image_sizes == exact.image_sizes == tuple(sizes)
        assert torch.equal(found.image_index, exact.image_index)
        for a, b in ((found.lower, exact.lower), (found.upper, exact.upper)):
            torch.testing.assert_close(a, b, atol=4.0, rtol=0)  # elements are 9 pixels wide


def test_codes_of_images_of_different_sizes() -> None:
    model, processor = build("emu3")
    sizes = [(160, 120), (90, 200)]
    geometry = ModelAdapter(model, processor).geometry(sizes)
    # Brought to 104 x 80 and 64 x 136 pixels, codes of 8 pixels; the smaller sides are padded.
    expected = rows_of(10, 13, *sizes[0]) + rows_of(17, 8, *sizes[1])
    boxes = torch.tensor([box for row in expected for box in [*row, [math.nan] * 4]])
    torch.testing.assert_close(geometry.boxes, boxes, atol=0.5, rtol=0, equal_nan=True)
    assert geometry.kinds == (("local",) * 13 + ("separator",)) * 10 + (("local",) * 8 + ("separator",)) * 17
    assert geometry.image_index.tolist() == [0] * 140 + [1] * 153


def rows_of(rows: int, columns: int, width: int, height: int) -> list[list[list[float]]]:
    boxes = raster(rows, columns, 0, 0, width, height)
    return [boxes[columns * row : columns * (row + 1)] for row in range(rows)]


def test_frames() -> None:
    images = TokenGeometry(torch.zeros(3, 4), ("local",) * 3, torch.tensor([0, 1, 2]), ((8, 8),) * 3)
    assert images.frames.tolist() == [[0, 0], [1, 1], [2, 2]]
    video = replace(images, image_index=torch.tensor([0, 0, 2]), last_image_index=torch.tensor([1, 1, 2]))
    assert video.frames.tolist() == [[0, 1], [0, 1], [2, 2]]
    assert [video.sees(frame).tolist() for frame in range(3)] == [[True, True, False]] * 2 + [[False, False, True]]


class TestKinds:
    def test_separator_and_global(self) -> None:
        model, processor = tiny("llava")
        projector = model.model.multi_modal_projector
        project = projector.forward

        def with_summary_and_newline(features: Tensor) -> Tensor:
            tokens = project(features)
            return torch.cat([tokens[:, :-2], tokens.mean(dim=1, keepdim=True), torch.ones_like(tokens[:, -1:])], dim=1)

        projector.forward = with_summary_and_newline
        geometry = measure_geometry(model, preparer(processor), [(120, 120)])
        assert geometry.kinds == ("local",) * 62 + ("global", "separator")
        assert geometry.boxes[62:].isnan().all()
        assert not geometry.boxes[:62].isnan().any()

    def test_global_through_attention_only(self) -> None:
        model, processor = tiny("llava")
        model.config.vision_feature_select_strategy = "full"
        processor.vision_feature_select_strategy = "full"
        geometry = measure_geometry(model, preparer(processor), [(120, 120)])
        assert geometry.kinds == ("global",) + ("local",) * 64

    def test_padding(self) -> None:
        model, processor = tiny("llava")
        processor.image_processor = transformers.LlavaImageProcessor(
            do_pad=True, size={"shortest_edge": 112}, crop_size={"height": 112, "width": 112}
        )
        geometry = measure_geometry(model, preparer(processor), [(160, 80)])
        assert geometry.kinds == ("padding",) * 16 + ("local",) * 32 + ("padding",) * 16
        expected = torch.tensor(raster(4, 8, 0, 0, 160, 80))
        assert iou(geometry.boxes[16:48], expected).mean() >= 0.97

    def test_thumbnail_of_one_token_is_local(self) -> None:
        model, processor = tiny("internvl")
        processor.image_processor.size = transformers.image_utils.SizeDict(height=28, width=28)
        processor.image_seq_length = 1
        geometry = measure_geometry(model, preparer(processor), [(90, 60)])
        assert geometry.kinds == ("local",) * 7
        expected = torch.tensor([*raster(2, 3, 0, 0, 90, 60), [0.0, 0, 90, 60]])
        assert iou(geometry.boxes, expected).mean() >= 0.97


class TestCache:
    def test_same_object_for_same_key(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cache, "_cache", type(cache._cache)())
        model, processor = tiny("llava")
        prepare = preparer(processor)
        first = cached_geometry(model, processor, prepare, [(60, 50)])
        assert cached_geometry(tiny("llava", seed=1)[0], tiny("llava")[1], prepare, ((60, 50),)) is first
        assert cached_geometry(model, processor, prepare, [(50, 60)]) is not first

    def test_oldest_is_dropped(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cache, "_cache", type(cache._cache)())
        monkeypatch.setattr(cache, "CACHE_SIZE", 2)
        monkeypatch.setattr(cache, "measure_geometry", lambda model, prepare, sizes: object())
        model, processor = tiny("llava")
        a, b = ([cached_geometry(model, processor, preparer(processor), [(n, n)])][0] for n in (10, 20))
        assert cached_geometry(model, processor, preparer(processor), [(10, 10)]) is a
        cached_geometry(model, processor, preparer(processor), [(30, 30)])
        assert cached_geometry(model, processor, preparer(processor), [(10, 10)]) is a
        assert cached_geometry(model, processor, preparer(processor), [(20, 20)]) is not b

    def test_key_follows_settings(self) -> None:
        model, processor = tiny("internvl")
        key = geometry_key(model, processor, [(60, 50)])
        assert key == geometry_key(*tiny("internvl", seed=3), [(60, 50)])
        processor.image_processor.max_patches = 2
        assert geometry_key(model, processor, [(60, 50)]) != key


class TestErrors:
    def test_visual_positions(self) -> None:
        model, _ = tiny("llava")
        token = model.config.image_token_id
        assert visual_positions(model, torch.tensor([1, token, 2, token])).tolist() == [1, 3]
        assert visual_positions(model, torch.tensor([[token, 1]])).tolist() == [0]
        with pytest.raises(ValueError, match="No image placeholder"):
            visual_positions(model, torch.tensor([1, 2]))
        with pytest.raises(ValueError, match="one example"):
            visual_positions(model, torch.tensor([[token, 1], [token, 1]]))
        with pytest.raises(ValueError, match="names no image placeholder"):
            visual_positions(SimpleNamespace(config=SimpleNamespace()), torch.tensor([1, token]))

    def test_prepare(self) -> None:
        model, processor = tiny("llava")
        prepare = preparer(processor)
        fixed = prepare([random_image((64, 64))])
        with pytest.raises(ValueError, match="differs between black and white"):
            measure_geometry(model, lambda images: fixed, [(64, 64)])
        with pytest.raises(ValueError, match="one example"):
            measure_geometry(model, lambda images: {"pixel_values": fixed["pixel_values"]}, [(64, 64)])
        with pytest.raises(ValueError, match="at least one image"):
            measure_geometry(model, prepare, [])

        def own_contrast(images: list[Image.Image]) -> dict[str, Tensor]:
            inputs = dict(prepare(images))
            pixels = inputs["pixel_values"]
            inputs["pixel_values"] = pixels.mean() + (pixels - pixels.mean()) / (pixels.std() + 0.01)
            return inputs

        with pytest.raises(ValueError, match="contrast"):
            measure_geometry(model, own_contrast, [(64, 64)])

    def test_oracle(self) -> None:
        model, processor = tiny("llava")
        prepare = preparer(processor)
        geometry = TokenGeometry(torch.zeros(3, 4), ("local",) * 3, torch.zeros(3, dtype=torch.int64), ((64, 64),))
        with pytest.raises(ValueError, match="64 visual positions, the geometry 3"):
            geometry_oracle(model, prepare, [random_image((64, 64))], geometry)
        with pytest.raises(ValueError, match="sizes"):
            geometry_oracle(model, prepare, [random_image((64, 60))], geometry)
        with pytest.raises(ValueError, match="blocks"):
            geometry_oracle(model, prepare, [random_image((64, 64))], geometry, blocks=0)
        with pytest.raises(ValueError, match="no local tokens"):
            geometry_oracle(model, prepare, [random_image((64, 64))], replace(geometry, kinds=("global",) * 3))

    def test_geometry_without_local_tokens(self) -> None:
        empty = TokenGeometry(torch.full((1, 4), math.nan), ("global",), torch.zeros(1, dtype=torch.int64), ((8, 8),))
        assert all(math.isnan(side) for side in empty.token_size + empty.coverage())
        with pytest.raises(ValueError, match="no image 1"):
            empty.coverage(1)


# ---------------------------------------------------------------------------------------------------------- raster


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
def test_an_expected_raster_is_what_is_measured(model_type: str, sizes: Any) -> None:
    model, processor = build(model_type)
    adapter = ModelAdapter(model, processor)

    def prepare(images: list[Image.Image]) -> Any:
        return adapter.prepare(images, "describe")

    sample = measure_geometry(model, prepare, [raster_module.SAMPLE])
    expected = expected_raster(model, prepare, sample, sizes)
    measured = measure_geometry(model, prepare, sizes)
    assert expected is not None
    assert expected.kinds == measured.kinds and expected.image_sizes == measured.image_sizes
    assert torch.equal(expected.image_index, measured.image_index)
    torch.testing.assert_close(expected.boxes, measured.boxes, atol=0.5, rtol=0)


@pytest.mark.parametrize("model_type", ["idefics3", "internvl", "llava", "git"])
def test_tiles_crops_and_prefixes_are_no_raster(model_type: str) -> None:
    model, processor = build(model_type)
    adapter = ModelAdapter(model, processor)

    def prepare(images: list[Image.Image]) -> Any:
        return adapter.prepare(images, "describe")

    sample = measure_geometry(model, prepare, [raster_module.SAMPLE])
    assert expected_raster(model, prepare, sample, [(320, 200)]) is None


def test_a_wrong_raster_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = tiny("qwen2_vl")
    prepare = preparer(processor)
    sample = measure_geometry(model, prepare, [raster_module.SAMPLE])
    shape = raster_module._raster_shape
    assert shape((640, 400), 14 * 23, 1.0) == (14, 23)
    monkeypatch.setattr(raster_module, "_raster_shape", lambda size, count, aspect: shape(size[::-1], count, aspect))
    sample = replace(sample, image_sizes=(sample.image_sizes[0][::-1],), boxes=sample.boxes[:, [1, 0, 3, 2]])
    raster_of_sample = raster_module._raster_boxes(
        sample.image_sizes[0], shape((192, 128), len(sample.boxes), 1.0)[::-1]
    )
    sample = replace(sample, boxes=raster_of_sample)
    assert expected_raster(model, prepare, sample, [(640, 400)]) is None


@pytest.mark.parametrize("options", [{}, {"padding": 1}, {"groups": 3}, {"stride": 1}])
def test_patch_convolutions_are_products(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    for kind, kernel in ((torch.nn.Conv2d, (4, 5)), (torch.nn.Conv3d, (2, 4, 5))):
        convolution = kind(3, 6, kernel, **({"stride": kernel} | options))
        for size in (kernel, tuple(2 * side for side in kernel)):
            hidden = torch.randn(7, 3, *size)
            actual = ownership._as_product(convolution, hidden)
            torch.testing.assert_close(actual, convolution(hidden), atol=1e-5, rtol=1e-4)
