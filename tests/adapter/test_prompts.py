"""Prompts and images as model inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from captum_intramodal import ModelAdapter
from captum_intramodal.adapter.prompts import append_left_padded, stack_inputs
from captum_intramodal.errors import InvalidInputError, UnsupportedModelError
from tests.testing.families import build
from tests.testing.tiny import random_image, tiny

PROMPT = "describe the picture"
PROMPTS = [PROMPT, "what is in the picture and where is the red cat ?"]
IMAGES = [random_image(120, 88, 0), random_image(200, 136, 1)]


def test_images_that_cannot_be_stacked_run_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = ModelAdapter(*tiny("qwen2_vl"))
    images = [[image] for image in IMAGES]
    assert [rows for rows, _ in adapter.prepare_together(images, PROMPTS)] == [[0, 1]]
    process = type(adapter.processor).__call__

    def refuse(self: Any, *args: Any, **kwargs: Any) -> Any:
        if len(kwargs["text"]) > 1:
            raise RuntimeError("stack expects each tensor to be equal size")
        return process(self, *args, **kwargs)

    monkeypatch.setattr(type(adapter.processor), "__call__", refuse)
    together = list(adapter.prepare_together(images, PROMPTS))
    assert [rows for rows, _ in together] == [[0], [1]]
    assert torch.equal(together[1][1]["input_ids"], adapter.prepare(images[1], PROMPTS[1])["input_ids"])


def test_images_are_interleaved_as_in_the_prompt() -> None:
    model, processor = build("idefics")
    adapter = ModelAdapter(model, processor)
    images = [random_image(96, 96)] * 2
    decoded = processor.tokenizer.decode(adapter.prepare(images, PROMPT)["input_ids"][0]).split()
    tokens = [token for token in decoded if token != "<fake_token_around_image>"]
    assert tokens == ["<s>", "user", ":", "<image>", ",", "<image>", ",", *PROMPT.split(), "assistant", ":"]
    with pytest.raises(InvalidInputError, match="1 places for images, but there are 2"):
        adapter.prepare(images, [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what"}]}])


def test_the_prompt_begins_once() -> None:
    adapter = ModelAdapter(*tiny("llava"))
    ids = adapter.prepare([IMAGES[0]], PROMPT)["input_ids"][0]
    assert (ids == adapter.tokenizer.bos_token_id).sum() == 1


def test_prompt_positions_do_not_depend_on_the_image_size() -> None:
    adapter = ModelAdapter(*tiny("qwen2_vl"))
    each = []
    for image in IMAGES:
        inputs = adapter.prepare([image], PROMPT)
        positions, ids = adapter.prompt_positions(inputs, PROMPT)
        assert torch.equal(inputs["input_ids"][0, positions], ids)
        each.append(ids)
    assert torch.equal(*each)
    assert adapter.model.config.image_token_id not in each[0]


def test_a_processor_without_chat_template() -> None:
    model, processor = tiny("llava")
    processor.chat_template = processor.tokenizer.chat_template = None
    adapter = ModelAdapter(model, processor)
    assert adapter.prompt_text(PROMPT, 2) == f"<image><image>{PROMPT}"
    with pytest.raises(InvalidInputError, match="LlavaProcessor has no chat template"):
        adapter.prompt_text([{"role": "user", "content": PROMPT}], 0)


def test_prompts_that_cannot_be_prepared() -> None:
    model, processor = tiny("qwen2_vl")
    adapter = ModelAdapter(model, processor)
    with pytest.raises(InvalidInputError, match="prompt is empty"):
        adapter.prepare([IMAGES[0]], " ")
    processor.chat_template = "{{ messages[0]['content'][-1]['text'] }}"
    with pytest.raises(InvalidInputError, match="Some prompts begin with <s>"):
        adapter.prepare_batch([[]] * 2, ["<s> describe", "describe"])


def test_an_encoder_decoder_takes_one_prompt_at_a_time() -> None:
    adapter = ModelAdapter(*build("pix2struct"))
    with pytest.raises(UnsupportedModelError, match="takes one prompt at a time; got 2"):
        adapter.prepare_batch([[image] for image in IMAGES], PROMPTS)


def test_rows_are_padded_on_the_left() -> None:
    rows, more = torch.tensor([[1, 2], [3, 4]]), [torch.tensor([5]), torch.tensor([6, 7, 8])]
    assert append_left_padded(rows, more, 0).tolist() == [[0, 0, 1, 2, 5], [3, 4, 6, 7, 8]]


def test_stacked_inputs_follow_each_other() -> None:
    one, two = ({"input_ids": torch.full((1, 3), i), "patches": torch.full((4, 2), i), "n": 5} for i in (1, 2))
    stacked = stack_inputs([one, two])
    assert stacked["input_ids"].tolist() == [[1] * 3, [2] * 3] and stacked["n"] == 5
    assert torch.equal(stacked["patches"], torch.cat([one["patches"], two["patches"]]))
