"""An answered sample: its words, their types and categories, and cached probabilities."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from captum_intramodal.adapter.answer_scorer import AnswerScorer
from captum_intramodal.datasets import Sample
from captum_intramodal.evaluation import AnsweredSample
from tests.evaluation.helpers import (
    demo_case,
)


def test_words_of_an_answer() -> None:
    words = [(word.text, word.type, word.category) for word in demo_case().words]
    sample = demo_case().sample
    assert sample.answer == "the picture shows a lemon and a donut."
    assert words == [
        ("the", "function", None), ("picture", "noun", None), ("shows", "other", None), ("a", "function", None),
        ("lemon", "noun", "lemon"), ("and", "function", None), ("a", "function", None), ("donut", "noun", "donut"),
        (".", "other", None),
    ]  # fmt: skip
    assert set(demo_case().shown) == {4, 7}
    alone = AnswerScorer(demo_case().adapter, sample.prompt, sample.answer or "").log_probability([sample.image])[0]
    assert demo_case().words[4].probability == pytest.approx(float(alone[4].exp()))


def test_adjacent_words_of_one_category_are_merged_and_the_tagger_types_unannotated_words() -> None:
    adapter, image = demo_case().adapter, demo_case().sample.image
    mask = np.ones(image.size[::-1], bool)
    sample = Sample(
        "1", image, "what do you see?", categories={"red book": mask, "dog": ~mask}, word_types={"a": "other"}
    )
    tagged: list[list[str]] = []

    def tag(words: list[str]) -> list[tuple[str, str]]:
        tagged.append(words)
        return [(word, "NN" if word == "dog" else "DT") for word in words]

    answer = AnsweredSample(adapter, sample, adapter.tokenize_answer("a red book and a dog"), tag)
    found = [(word.text, word.tokens, word.type, word.category) for word in answer.words]
    assert found == [
        ("a", (0,), "other", None), ("red book", (1, 2), "noun", "red book"), ("and", (3,), "function", None),
        ("a", (4,), "other", None), ("dog", (5,), "noun", "dog"),
    ]  # fmt: skip
    assert tagged == [["a", "red", "book", "and", "a", "dog"]]
    assert set(answer.shown) == {1}  # There is no dog in the image.


def test_no_image_is_scored_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    scored: list[int] = []
    score = AnswerScorer.log_probability
    monkeypatch.setattr(
        AnswerScorer, "log_probability", lambda self, images: scored.append(len(images)) or score(self, images)
    )
    answer = AnsweredSample(demo_case().adapter, demo_case().sample, demo_case().answer_ids)
    black, white = (Image.new("RGB", (256, 192), color) for color in ("black", "white"))
    first = answer.log_probability([black, white])
    assert torch.equal(answer.log_probability([white, black, white]), first[[1, 0, 1]])
    assert scored == [2]
