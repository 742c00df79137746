"""A video is explained frame by frame, for every family that takes videos."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from captum_intramodal import ModelAdapter, explain
from captum_intramodal.geometry.oracle import geometry_oracle
from tests.testing.families import build
from tests.testing.tiny import random_image, tiny

SIZE = (160, 120)
# Number of successive frames that the model merges into one.
MERGED = {
    "qwen2_vl": 2,
    "qwen2_5_vl": 2,
    "qwen3_vl": 2,
    "llava_onevision": 1,
    "llava_next_video": 1,
    "video_llava": 1,
    "smolvlm": 1,
    "internvl": 1,
    "video_llama_3": 1,
    # The processors of these write each frame's time before its tokens.
    "glm4v": 2,
    "glm46v": 2,
    "glm5_next": 2,
    "cosmos3_edge": 1,
}


def frames(count: int = 4) -> list[Image.Image]:
    return [random_image(*SIZE, seed) for seed in range(count)]


@pytest.mark.parametrize("model_type", MERGED)
def test_maps_change_from_frame_to_frame_unless_frames_are_merged(model_type: str) -> None:
    model, processor = build(model_type)
    adapter = ModelAdapter(model, processor, video=True)
    geometry = adapter.geometry([SIZE] * 4)
    step = MERGED[model_type]
    first, last = geometry.frames[geometry.is_local].unbind(1)
    assert set(first.tolist()) == set(range(0, 4, step))
    assert torch.equal(last, first + step - 1)
    assert (geometry.last_image_index is None) == (step == 1)
    assert geometry_oracle(model, lambda images: adapter.prepare(images, "describe"), frames(), geometry, 16) >= 0.97
    result = explain(model, processor, frames(), "describe the picture", "a red cat", scales=(1.0,), video=True)
    assert result.settings["method"] == "logit_lens" and len(result.maps) == 4
    assert all(bool(m.any()) for m in result.maps)
    assert torch.equal(result.maps[0], result.maps[1]) == (step == 2)
    assert not torch.equal(result.maps[1], result.maps[2])


def test_frames_of_a_video_are_encoded_differently_from_separate_images() -> None:
    model, processor = tiny("qwen2_vl")
    arguments = (model, processor, frames(2), "describe the picture", "a red dog")
    as_video, as_images = explain(*arguments, scales=(1.0,), video=True), explain(*arguments, scales=(1.0,))
    assert not torch.equal(as_images.maps[0], as_images.maps[1])
    assert torch.equal(as_video.maps[0], as_video.maps[1])


def test_frames_of_different_sizes_are_rejected() -> None:
    model, processor = tiny("qwen2_vl")
    with pytest.raises(ValueError, match=r"one size, got \[\(60, 60\), \(160, 120\)\]"):
        explain(model, processor, [frames(1)[0], Image.new("RGB", (60, 60))], "describe", "a dog", video=True)


def test_a_model_without_video_input_rejects_frames() -> None:
    model, processor = tiny("llava")
    with pytest.raises(ValueError, match="takes no videos"):
        explain(model, processor, frames(), "describe the picture", "a dog", video=True)
