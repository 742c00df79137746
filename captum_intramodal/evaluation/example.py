r"""What is evaluated? A sample with its answer: its words, the objects they name, and their probabilities."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from captum_intramodal.adapter.answer_scorer import AnswerScorer
from captum_intramodal.adapter.model_adapter import ModelAdapter
from captum_intramodal.datasets import Sample
from captum_intramodal.metrics.curves import FRACTIONS
from captum_intramodal.text.parts_of_speech import Tagger, WordType, match_categories, word_types
from captum_intramodal.text.spans import decode_pieces, group_words

__all__ = ["AnswerWord", "AnsweredSample"]


@dataclass(frozen=True)
class AnswerWord:
    r"""
    A word of an answer, or several words that together name one category.

    Args:

        text (str): The word.
        tokens (tuple[int, ...]): Indices of its tokens in the answer.
        type (str): ``'noun'``, ``'function'`` or ``'other'``.
        category (str or None): The category of the data set that it names.
        probability (float): Product of its tokens' probabilities.

    Examples::

        >>> from captum_intramodal.evaluation import AnswerWord
        >>> AnswerWord("red book", (1, 2), "noun", "red book", 0.9).tokens
        (1, 2)
    """

    text: str
    tokens: tuple[int, ...]
    type: WordType
    category: str | None
    probability: float


@dataclass(frozen=True, eq=False)
class AnsweredSample:
    r"""
    A sample with the answer to explain.

    Args:

        adapter (ModelAdapter): The model and its processor.
        sample (Sample): Image, prompt and masks.
        answer_ids (Sequence[int]): The answer's tokens, without those that end it.
        tagger (Callable, optional): See :func:`~captum_intramodal.metrics.word_types`; called only for words that the
                    sample's own ``word_types`` do not include.
                    Default: None
        batch_size (int, optional): Number of prompts per batch; memory grows with it.
                    Default: 16
        fractions (Sequence[float], optional): Fractions at which insertion, deletion and ROAD curves are evaluated.
                    Default: 0, 0.1, ..., 1

    Attributes:
        answer (str): Text of the answer.
        words (list[AnswerWord]): Words of the answer; adjacent words that name one category are merged.

    Examples::

        >>> from captum_intramodal.datasets import open_dataset
        >>> from captum_intramodal.evaluation import AnsweredSample
        >>> sample = open_dataset("scenes:count=1")[0]
        >>> case = AnsweredSample(adapter, sample, adapter.tokenize_answer(sample.answer))
        >>> [word.text for word in case.objects.values()]
        ['lemon', 'donut']
    """

    adapter: ModelAdapter
    sample: Sample
    answer_ids: Sequence[int]
    tagger: Tagger | None = None
    batch_size: int = 16
    fractions: Sequence[float] = FRACTIONS
    _log_probabilities: dict[bytes, Tensor] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def answer(self) -> str:
        return self._pieces[0]

    @cached_property
    def _pieces(self) -> tuple[str, list[tuple[int, int]]]:
        return decode_pieces(self.adapter.tokenizer, self.answer_ids)

    @cached_property
    def scorer(self) -> AnswerScorer:
        return AnswerScorer(self.adapter, self.sample.prompt, self.answer_ids, self.batch_size)

    @cached_property
    def words(self) -> list[AnswerWord]:
        probabilities = self.log_probability([self.sample.image])[0].exp().tolist()
        spans = group_words(*self._pieces, probabilities)
        types = self._types([span.text for span in spans])
        categories = match_categories([span.text for span in spans], list(self.sample.categories))
        words: list[AnswerWord] = []
        for span, type_, category in zip(spans, types, categories, strict=True):
            word = AnswerWord(span.text, span.tokens, type_, category, float(span.probability or 0.0))
            if words and category is not None and words[-1].category == category:
                last = words.pop()
                word = AnswerWord(
                    f"{last.text} {word.text}", last.tokens + word.tokens, "noun", category,
                    last.probability * word.probability,
                )  # fmt: skip
            words.append(word)
        return words

    def _types(self, words: list[str]) -> list[WordType]:
        """Return the words' types, from the sample's annotation or else from the tagger."""
        annotated = [self.sample.word_types.get(word.casefold()) for word in words]
        if None not in annotated:
            return [type_ for type_ in annotated if type_ is not None]
        return [known or tagged for known, tagged in zip(annotated, word_types(words, self.tagger), strict=True)]

    @property
    def nouns(self) -> dict[int, AnswerWord]:
        """The nouns, by their index among the words."""
        return {i: word for i, word in enumerate(self.words) if word.type == "noun"}

    @property
    def objects(self) -> dict[int, AnswerWord]:
        """The words that name a category of the data set, by index; all nouns if the data set has no categories."""
        if not self.sample.categories:
            return self.nouns
        return {i: word for i, word in enumerate(self.words) if word.category is not None}

    @property
    def shown(self) -> dict[int, tuple[AnswerWord, np.ndarray]]:
        """The objects with a nonempty mask, by index, with their masks, bool (height, width)."""
        masks = {i: self.sample.categories[w.category] for i, w in self.objects.items() if w.category is not None}
        return {i: (self.words[i], mask) for i, mask in masks.items() if mask.any()}

    def log_probability(self, images: Sequence[Image.Image]) -> Tensor:
        """Return the log-probabilities of the answer's tokens for other images, float32 (images, tokens).

        Results are cached by the images' pixels.
        """
        keys = [blake2b(image.tobytes()).digest() for image in images]
        new = {key: image for key, image in zip(keys, images, strict=True) if key not in self._log_probabilities}
        if new:
            self._log_probabilities.update(zip(new, self.scorer.log_probability(list(new.values())), strict=True))
        return torch.stack([self._log_probabilities[key] for key in keys])

    def score(self, tokens: Sequence[int]) -> Callable[[list[Image.Image]], Tensor]:
        """Return a function from images to the joint probability of these tokens of the answer."""
        return lambda images: self.log_probability(images)[:, list(tokens)].sum(1).exp()
