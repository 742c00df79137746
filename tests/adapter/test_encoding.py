"""Answers appended to prompts."""

from __future__ import annotations

import pytest
import torch

from captum_intramodal import ModelAdapter
from tests.testing.families import build
from tests.testing.tiny import random_image, tiny

PROMPTS = ["describe the picture", "what is in the picture and where is the red cat ?"]


def test_each_example_of_a_batch_is_encoded_as_alone() -> None:
    adapter = ModelAdapter(*tiny("qwen2_vl"))
    images = [[random_image(120, 88)], [random_image(200, 136)]]
    answers = [adapter.tokenize_answer("a red dog and a cat"), adapter.tokenize_answer("a dog")]
    encodings = adapter.encode_batch(adapter.prepare_batch(images, PROMPTS), answers)
    length = encodings[0].inputs["input_ids"].shape[1]
    for row, encoding in enumerate(encodings):
        alone = adapter.encode(adapter.prepare(images[row], PROMPTS[row]), answers[row])
        assert torch.equal(encoding.input_ids, alone.input_ids) and encoding.answer_ids == answers[row]
        assert torch.equal(encoding.visual_positions, alone.visual_positions)
        assert (encoding.row, encoding.batch_size, encoding.prompt_length) == (row, 2, alone.prompt_length)
        padding = length - len(encoding.input_ids)
        assert encoding.inputs["attention_mask"][row].tolist() == [0] * padding + [1] * len(encoding.input_ids)
        assert encoding.rows(torch.arange(length)).tolist() == list(range(padding, length))


def test_a_family_has_a_token_type_of_its_own_for_answers() -> None:
    adapter = ModelAdapter(*build("paligemma"))
    inputs = adapter.prepare([random_image()], "describe the picture")
    encoding = adapter.encode(inputs, adapter.tokenize_answer("a red dog"))
    assert encoding.inputs["token_type_ids"][0, -4:].tolist() == [0, 1, 1, 1]


@pytest.mark.parametrize("model_type", ["llava", "pix2struct"])
def test_logits_at_some_positions(model_type: str) -> None:
    adapter = ModelAdapter(*build(model_type))
    inputs = adapter.prepare([random_image()], "describe the picture")
    encoding = adapter.encode(inputs, adapter.tokenize_answer("a red dog"))
    whole = adapter.run(encoding.inputs).logits
    positions = torch.tensor([-4, -2])
    torch.testing.assert_close(adapter.logits(encoding.inputs, positions), whole[:, positions], atol=1e-5, rtol=1e-5)
