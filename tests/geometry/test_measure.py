from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from captum_intramodal import ModelAdapter
from captum_intramodal._utils.image import noise_image
from captum_intramodal.errors import InvalidInputError, NoPixelMapError, NoTokenGeometryError
from captum_intramodal.geometry import ownership, pixel_probe
from captum_intramodal.geometry.measure import measure_geometry
from captum_intramodal.geometry.oracle import geometry_oracle
from tests.geometry.helpers import BOXES, SIZES, grid_boxes, iou, preparer
from tests.testing.families import build
from tests.testing.tiny import MODEL_TYPES, tiny


def hooks_and_forwards(model: PreTrainedModel) -> list[Any]:
    # transformers installs recorders on the first pass that stay; they are not counted.
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
        assert geometry_oracle(model, prepare, [noise_image(size)], geometry) >= 0.97

    def test_bfloat16(self, model_type: str) -> None:
        model, processor = tiny(model_type)
        prepare, size = preparer(processor), (200, 136)
        exact = measure_geometry(model, prepare, [size])
        model.to(torch.bfloat16)
        rounded = measure_geometry(model, prepare, [size])
        torch.testing.assert_close(rounded.boxes, exact.boxes)
        assert geometry_oracle(model, prepare, [noise_image(size)], rounded) >= 0.97

    def test_two_images(self, model_type: str) -> None:
        model, processor = tiny(model_type)
        sizes = [(200, 136), (130, 310)]
        prepare = preparer(processor, n_images=2)
        geometry = measure_geometry(model, prepare, sizes)
        expected = [torch.tensor(BOXES[model_type](*size)) for size in sizes]
        assert geometry.image_sizes == tuple(sizes)
        assert geometry.image_index.tolist() == [0] * len(expected[0]) + [1] * len(expected[1])
        assert iou(geometry.boxes, torch.cat(expected)).mean() >= 0.97
        assert geometry_oracle(model, prepare, [noise_image(size) for size in sizes], geometry) >= 0.97

    def test_model_is_restored(self, model_type: str) -> None:
        model, processor = tiny(model_type)
        model.train()
        model.get_decoder().eval()
        wrapped = ownership._attention_blocks(model)[0]
        wrapped.forward = wrapped.forward  # On the instance, as accelerate leaves it.
        prepare, size = preparer(processor), (100, 100)
        before, seed = hooks_and_forwards(model), torch.random.get_rng_state()
        geometry = measure_geometry(model, prepare, [size])
        geometry_oracle(model, prepare, [noise_image(size)], geometry, blocks=2)
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

    def test_tiny_model_generates_words(self, model_type: str) -> None:
        model, processor = tiny(model_type)
        inputs = preparer(processor)([noise_image((100, 80))])
        answer = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert len(answer) >= 3
        assert processor.tokenizer.decode(answer, skip_special_tokens=True).strip()


def test_large_images_are_measured_at_a_smaller_size(monkeypatch: pytest.MonkeyPatch) -> None:
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
        expected = torch.tensor(grid_boxes(4, 8, 0, 0, 160, 80))
        assert iou(geometry.boxes[16:48], expected).mean() >= 0.97

    def test_thumbnail_of_one_token_is_local(self) -> None:
        model, processor = tiny("internvl")
        processor.image_processor.size = transformers.image_utils.SizeDict(height=28, width=28)
        processor.image_seq_length = 1
        geometry = measure_geometry(model, preparer(processor), [(90, 60)])
        assert geometry.kinds == ("local",) * 7
        expected = torch.tensor([*grid_boxes(2, 3, 0, 0, 90, 60), [0.0, 0, 90, 60]])
        assert iou(geometry.boxes, expected).mean() >= 0.97


class TestErrors:
    def test_inputs_that_ignore_the_images(self) -> None:
        model, processor = tiny("llava")
        fixed = preparer(processor)([noise_image((64, 64))])
        with pytest.raises(NoPixelMapError, match="differs between black and white"):
            measure_geometry(model, lambda images: fixed, [(64, 64)])

    def test_inputs_without_ids(self) -> None:
        model, processor = tiny("llava")
        fixed = preparer(processor)([noise_image((64, 64))])
        with pytest.raises(InvalidInputError, match="one example"):
            measure_geometry(model, lambda images: {"pixel_values": fixed["pixel_values"]}, [(64, 64)])

    def test_no_image(self) -> None:
        model, processor = tiny("llava")
        with pytest.raises(InvalidInputError, match="at least one image"):
            measure_geometry(model, preparer(processor), [])

    def test_pixels_normalized_by_their_own_contrast(self) -> None:
        model, processor = tiny("llava")
        prepare = preparer(processor)

        def own_contrast(images: list[Image.Image]) -> dict[str, Tensor]:
            inputs = dict(prepare(images))
            pixels = inputs["pixel_values"]
            inputs["pixel_values"] = pixels.mean() + (pixels - pixels.mean()) / (pixels.std() + 0.01)
            return inputs

        with pytest.raises(NoPixelMapError, match="contrast"):
            measure_geometry(model, own_contrast, [(64, 64)])

    def test_processor_that_crops_by_content(self) -> None:
        model, processor = tiny("llava")
        prepare = preparer(processor)

        def cropped(images: list[Image.Image]) -> dict[str, Tensor]:
            inputs = dict(prepare(images))
            if len(images[0].getcolors(1 << 24)) > 256:  # Noise, but not the gray images of the pixel probe.
                inputs["pixel_values"] = inputs["pixel_values"][..., :-1]
            return inputs

        with pytest.raises(NoTokenGeometryError, match="crops by content"):
            measure_geometry(model, cropped, [(64, 64)])

    def test_model_without_placeholders(self) -> None:
        adapter = ModelAdapter(*build("kosmos-2"))
        with pytest.raises(NoTokenGeometryError, match=r"include no image placeholder.* model\.config\.image_token_id"):
            adapter.geometry([(320, 200)])
        assert adapter.pixel_maps([(320, 200)]).maps

    def test_model_that_rejects_its_inputs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, processor = tiny("llava")

        def reject(*args: Any, **kwargs: Any) -> None:
            raise ValueError("Image features and image tokens do not match")

        monkeypatch.setattr(model.model, "forward", reject)
        with pytest.raises(NoTokenGeometryError, match="LlavaForConditionalGeneration rejects") as caught:
            measure_geometry(model, preparer(processor), [(64, 64)])
        assert str(caught.value.__cause__) == "Image features and image tokens do not match"
