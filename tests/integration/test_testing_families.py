"""The tiny random models of all types, which other tests use, let the image affect the answer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.testing.families import FAMILIES, LEFT_OUT, answer_logits, build, prepare
from tests.testing.tiny import WORDS, random_image

BUILT = [model_type for model_type in FAMILIES if model_type not in LEFT_OUT]


def word_ids(tokenizer: Any, *words: str) -> list[int]:
    """Return the ids of words, which some tokenizers start with a mark for the space before."""
    vocabulary = tokenizer.get_vocab()
    return [vocabulary.get(word, vocabulary.get(f"▁{word}")) for word in words]


def test_every_type_is_built_or_left_out_for_a_reason() -> None:
    assert len(FAMILIES) == 97
    assert set(LEFT_OUT) < set(FAMILIES) and all(LEFT_OUT.values())
    with pytest.raises(ValueError, match="left out: it reads proteins"):
        build("evolla")
    with pytest.raises(ValueError, match="No model of type 'gpt2'"):
        build("gpt2")


@pytest.mark.parametrize("model_type", BUILT)
def test_the_image_affects_the_words_of_the_answer(model_type: str) -> None:
    model, processor = build(model_type)
    assert model.dtype == torch.float32 and not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    answer = word_ids(processor.tokenizer, "a", "red", "cat")
    first, second = (
        answer_logits(
            model, prepare(model, processor, [random_image(640, 400, seed)], "describe the picture ."), answer
        )
        for seed in (0, 1)
    )
    assert first.shape[0] == 3
    words = word_ids(processor.tokenizer, *WORDS)
    first, second = first[:, words], second[:, words]
    assert bool(first.isfinite().all())
    assert float((first - second).abs().max()) > 0.02 * float(first.std())
