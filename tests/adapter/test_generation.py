"""Generated answers, and answers as tokens."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from captum_intramodal import ModelAdapter
from captum_intramodal.demo import CHECKPOINT, IMAGES
from captum_intramodal.errors import EmptyAnswerError, InvalidInputError
from tests.testing.tiny import random_image, tiny

PROMPT = "describe the picture"


def test_the_demo_model_answers_the_same_in_a_batch() -> None:
    model, processor = (auto.from_pretrained(CHECKPOINT) for auto in (AutoModelForImageTextToText, AutoProcessor))
    adapter = ModelAdapter(model, processor)
    images = [[Image.open(path)] for path in IMAGES[:3]]
    prompts = ["describe the picture.", "is there a dog?", "describe the picture."]
    assert adapter.batches
    answers = adapter.generate_batch(adapter.prepare_batch(images, prompts))
    assert answers == [adapter.generate(adapter.prepare(*each)) for each in zip(images, prompts, strict=True)]
    assert len({len(answer) for answer in answers}) > 1  # So that one of them was padded at its end.


def test_logits_are_those_of_the_generated_tokens() -> None:
    adapter = ModelAdapter(*tiny("qwen2_vl"))
    inputs = adapter.prepare([random_image()], PROMPT)
    ids, logits = adapter.generate_with_logits(inputs, max_new_tokens=4)
    assert logits.shape == (len(ids), len(adapter.tokenizer))
    answer = adapter.generate(inputs, max_new_tokens=4)
    assert ids[: len(answer)] == answer


def test_states_of_a_generation_are_those_of_a_teacher_forced_pass() -> None:
    adapter = ModelAdapter(*tiny("llava"))
    inputs = adapter.prepare([random_image()], PROMPT)
    layer = adapter.lens.layers[1]
    kept = [torch.arange(adapter.sequence_length(inputs))]
    (answer,), states, rankings = adapter.generate_with_states(inputs, 4, [layer], kept)
    assert answer == adapter.generate(inputs, 4) and states is not None and rankings is None
    (answer,), _, rankings = adapter.generate_with_states(inputs, 4, [layer], kept, k=5)
    assert rankings is not None and rankings.k == 5


def test_answers_as_tokens() -> None:
    adapter = ModelAdapter(*tiny("llava"))
    ids = adapter.tokenize_answer("a red dog")
    assert adapter.tokenizer.decode(ids) == "a red dog"
    end, padding = adapter.tokenizer.eos_token_id, adapter.tokenizer.pad_token_id
    assert adapter.tokenize_answer([*ids, end, padding]) == ids
    with pytest.raises(InvalidInputError, match=r"cannot encode 'zebra', 'zebra' \(2 of 4 words\)"):
        adapter.tokenize_answer("a zebra and zebra")
    with pytest.raises(InvalidInputError, match=r"Answer ids \[-1, 9999\] lie outside the vocabulary of \d+"):
        adapter.tokenize_answer([*ids, -1, 9999])
    for empty in (" ", [], [end]):
        with pytest.raises(EmptyAnswerError, match="answer is empty"):
            adapter.tokenize_answer(empty)
