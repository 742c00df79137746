"""Scores of answers, against single passes."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from captum_intramodal import ModelAdapter
from captum_intramodal.adapter.answer_scorer import AnswerScorer
from captum_intramodal.demo import CHECKPOINT, IMAGES
from captum_intramodal.errors import InvalidInputError, InvalidOptionError
from captum_intramodal.metrics import TokenRemoval, deletion_curve, insertion_curve

PROMPT, ANSWER = "describe the picture.", "a dog and a cat."


@pytest.fixture(scope="module")
def adapter() -> ModelAdapter:
    model = AutoModelForImageTextToText.from_pretrained(CHECKPOINT, dtype=torch.float32)
    return ModelAdapter(model, AutoProcessor.from_pretrained(CHECKPOINT))


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    originals = [Image.open(path).convert("RGB") for path in IMAGES[:2]]
    return [*originals, Image.new("RGB", (96, 160), "gray")]


def score_alone(adapter: ModelAdapter, image: Image.Image, replaced: list[int] | None = None) -> torch.Tensor:
    """Score the answer in one pass over the processor's own inputs."""
    text = adapter.prompt_text(PROMPT, 1) + ANSWER
    inputs = adapter.processor(text=[text], images=[image], return_tensors="pt")
    count = len(adapter.tokenize_answer(ANSWER))
    targets = inputs["input_ids"][0, -count:].clone()
    if replaced is not None:
        inputs["input_ids"][0, replaced] = adapter.tokenizer.unk_token_id
    with torch.no_grad():
        logits = adapter.model(**inputs).logits[0, -count - 1 : -1]
    return logits.log_softmax(-1)[torch.arange(count), targets]


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_scores_are_those_of_single_passes(adapter: ModelAdapter, images: list[Image.Image], batch_size: int) -> None:
    scores = AnswerScorer(adapter, PROMPT, ANSWER, batch_size).log_probability(images)
    for score, image in zip(scores, images, strict=True):
        torch.testing.assert_close(score, score_alone(adapter, image), atol=2e-4, rtol=1e-3)


def test_replaced_tokens_of_prompt_and_answer(adapter: ModelAdapter, images: list[Image.Image]) -> None:
    scorer = AnswerScorer(adapter, PROMPT, ANSWER)
    length = adapter.sequence_length(adapter.prepare([images[0]], PROMPT))
    positions = torch.tensor([length - 6, length + 1])
    removed = torch.tensor([[False, False], [True, False], [True, True]])
    scores = scorer.without_tokens(images[0], positions, removed)
    for score, row in zip(scores, removed, strict=True):
        expected = score_alone(adapter, images[0], positions[row].tolist())
        torch.testing.assert_close(score, expected, atol=2e-4, rtol=1e-3)
    assert (scores[1] - scores[0]).abs().max() > 0.01
    removal = TokenRemoval(scorer, images[0], positions, token=2)
    values = torch.tensor([1.0, 0.0])
    chances = scores[:, 2].exp().double().numpy()
    assert deletion_curve(removal, values, (0, 0.5, 1)) == pytest.approx(chances, abs=1e-5)
    assert insertion_curve(removal, values, (0, 1)) == pytest.approx(chances[[2, 0]], abs=1e-5)
    # A token cannot change what came before it, nor its own probability.
    torch.testing.assert_close(scores[2, :2], scores[1, :2], atol=1e-4, rtol=1e-4)


def test_the_model_is_restored(adapter: ModelAdapter, images: list[Image.Image]) -> None:
    adapter.model.train()
    try:
        AnswerScorer(adapter, PROMPT, ANSWER).log_probability(images[:1])
        assert adapter.model.training and all(p.grad is None for p in adapter.model.parameters())
    finally:
        adapter.model.eval()


def test_invalid_arguments(adapter: ModelAdapter, images: list[Image.Image]) -> None:
    scorer = AnswerScorer(adapter, PROMPT, ANSWER)
    with pytest.raises(InvalidOptionError, match="batch_size must be at least 1, got 0"):
        AnswerScorer(adapter, PROMPT, ANSWER, 0)
    with pytest.raises(InvalidInputError, match="1 lists of positions for 3"):
        scorer.log_probability(images, [torch.tensor([5])])
    with pytest.raises(InvalidInputError, match=r"bool \(N, 1\), got torch.float32 \(2, 1\)"):
        scorer.without_tokens(images[0], torch.tensor([5]), torch.zeros(2, 1))
    with pytest.raises(InvalidInputError, match=r"Positions \[9999\] lie outside"):
        scorer.log_probability(images[:1], [torch.tensor([9999])])
    with pytest.raises(InvalidInputError, match="positions in one are not those in another"):
        scorer.log_probability(images, [torch.tensor([0])] * 3)
