"""What all explainers have in common: maps, several images, refused input."""

from __future__ import annotations

import json

import pytest
import torch

from captum_intramodal import ModelAdapter
from captum_intramodal.errors import InvalidInputError, NotApplicableError, UnsupportedModelError
from captum_intramodal.explainers import EXPLAINERS, TextMaps, make_explainer
from tests.explainers.helpers import PROMPT, answer_to, model_of
from tests.testing.families import build
from tests.testing.tiny import random_image

SMALL = {
    "integrated_gradients": "n_steps=2",
    "llava_cam": "samples=2",
    "occlusion": "window=1,stride=1",
    "greedy": "cells=2,steps=1",
}


@pytest.mark.parametrize("name", EXPLAINERS)
def test_every_explainer_returns_finite_reproducible_maps(name: str) -> None:
    adapter, image = model_of("qwen2_vl"), random_image(112, 84)
    explainer = make_explainer(f"{name}:{SMALL.get(name, '')}")
    ids = answer_to(adapter)
    (maps,) = explainer(adapter, [image], PROMPT, ids)
    (again,) = explainer(adapter, [image], PROMPT, ids)
    assert maps.shape[0] == len(ids) and maps.dtype == torch.float32 and not maps.requires_grad
    assert bool(maps.isfinite().all()) and float(maps.min()) >= 0 and float(maps.max()) > 0
    assert torch.equal(maps, again)
    assert explainer.name == name
    assert json.loads(json.dumps(explainer.settings)) == explainer.settings
    options = {key: value for key, value in explainer.settings.items() if key != "name"}
    assert EXPLAINERS[name](**options).settings == explainer.settings


def test_several_images_have_one_map_each() -> None:
    adapter, images = model_of("qwen2_vl"), [random_image(112, 84), random_image(84, 112, 1)]
    for spec in ("msea+arc", "attention", "greedy:cells=4,steps=1", "random", "msea+attention:scales=[1,2]"):
        maps = make_explainer(spec)(adapter, images, PROMPT, answer_to(adapter))
        assert [m.shape[0] for m in maps] == [3, 3]
        assert maps[0].shape[1] < maps[0].shape[2] and maps[1].shape[1] > maps[1].shape[2]
    with pytest.raises(NotApplicableError, match="one image, got 2"):
        make_explainer("grad_cam")(adapter, images, PROMPT, answer_to(adapter))


def test_answer_ids_that_end_the_answer_are_refused() -> None:
    adapter = model_of("qwen2_vl")
    ids = [*answer_to(adapter), adapter.tokenizer.eos_token_id]
    with pytest.raises(InvalidInputError, match="The last 1 of 4 answer_ids"):
        make_explainer("random")(adapter, [random_image(112, 84)], PROMPT, ids)


@pytest.mark.parametrize("name", ["attention", "grad_cam"])
def test_encoder_decoders_without_visual_tokens_in_the_sequence_are_not_supported(name: str) -> None:
    adapter = ModelAdapter(*build("pix2struct")[:2])
    with pytest.raises(UnsupportedModelError, match="its decoder's sequence"):
        make_explainer(name)(adapter, [random_image(112, 84)], PROMPT, answer_to(adapter))


def test_explainers_of_images_do_not_apply_to_text() -> None:
    adapter = model_of("qwen2_vl")
    with pytest.raises(NotApplicableError, match="center_gaussian explains images only"):
        make_explainer("center_gaussian").explain_text(  # type: ignore[attr-defined]
            adapter, [random_image(112, 84)], PROMPT, answer_to(adapter)
        )


@pytest.mark.parametrize("spec", ["logit_lens", "arc", "tam", "attention", "random"])
def test_text_maps_relate_the_answer_to_earlier_tokens(spec: str) -> None:
    adapter = model_of("qwen2_vl")
    ids = answer_to(adapter)
    text: TextMaps = make_explainer(spec).explain_text(  # type: ignore[attr-defined]
        adapter, [random_image(112, 84)], PROMPT, ids
    )
    assert text.values.shape == (len(ids), len(text.positions)) and text.values.dtype == torch.float32
    assert float(text.values.min()) >= 0 and float(text.values.max()) > 0
    later = text.positions >= text.positions[-len(ids) :, None]
    assert float(text.values[later].abs().max()) == 0
