r"""One answer to evaluate explanations of: its words, what they name, and how likely they are on changed images."""

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
    """A word of an answer, or the words that name one category together.

    Attributes:
        text (str): the word.
        tokens (tuple[int, ...]): indices of its tokens in the answer.
        type (str): ``'noun'``, ``'function'`` or ``'other'``.
        category (str or None): the category of the data set that it names.
        probability (float): product of its tokens' probabilities.
    """

    text: str
    tokens: tuple[int, ...]
    type: WordType
    category: str | None
    probability: float


@dataclass(frozen=True, eq=False)
class AnsweredSample:
    r"""
    A sample with the answer that is explained.

    Args:

        adapter (ModelAdapter): The model and its processor.
        sample (Sample): Image, prompt and masks.
        answer_ids (Sequence[int]): The answer's tokens, without those that end it.
        tagger (Callable, optional): See :func:`~captum_intramodal.metrics.word_types`; asked only for words that the
                    sample's own ``word_types`` leave open.
                    Default: None
        batch_size (int, optional): Prompts that run together; memory grows with it.
                    Default: 16
        fractions (Sequence[float], optional): Where the curves of insertion, deletion and ROAD are measured.
                    Default: 0, 0.1, ..., 1

    Attributes:
        answer (str): its text.
        words (list[AnswerWord]): its words; adjacent words that name one category are one.
    """

    adapter: ModelAdapter
    sample: Sample
    answer_ids: Sequence[int]
    tagger: Tagger | None = None
    batch_size: int = 16
    fractions: Sequence[float] = FRACTIONS
    _known: dict[bytes, Tensor] = field(default_factory=dict, init=False, repr=False)

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
        found = group_words(*self._pieces, probabilities)
        types = self._types([word.text for word in found])
        named = match_categories([word.text for word in found], list(self.sample.categories))
        words: list[AnswerWord] = []
        for word, type_, category in zip(found, types, named, strict=True):
            new = AnswerWord(word.text, word.tokens, type_, category, float(word.probability or 0.0))
            if words and category is not None and words[-1].category == category:
                last = words.pop()
                new = AnswerWord(
                    f"{last.text} {new.text}", last.tokens + new.tokens, "noun", category,
                    last.probability * new.probability,
                )  # fmt: skip
            words.append(new)
        return words

    def _types(self, words: list[str]) -> list[WordType]:
        own = [self.sample.word_types.get(word.casefold()) for word in words]
        if None not in own:
            return [type_ for type_ in own if type_ is not None]
        return [mine or theirs for mine, theirs in zip(own, word_types(words, self.tagger), strict=True)]

    @property
    def nouns(self) -> dict[int, AnswerWord]:
        """By index among the words."""
        return {i: word for i, word in enumerate(self.words) if word.type == "noun"}

    @property
    def objects(self) -> dict[int, AnswerWord]:
        """What can be looked for in the image: words that name a category; nouns where the data set has none."""
        if not self.sample.categories:
            return self.nouns
        return {i: word for i, word in enumerate(self.words) if word.category is not None}

    @property
    def shown(self) -> dict[int, tuple[AnswerWord, np.ndarray]]:
        """The objects that the image shows, with their masks, bool (height, width)."""
        masks = {i: self.sample.categories[w.category] for i, w in self.objects.items() if w.category is not None}
        return {i: (self.words[i], mask) for i, mask in masks.items() if mask.any()}

    def log_probability(self, images: Sequence[Image.Image]) -> Tensor:
        """Of the answer's tokens on other images, float32 (images, tokens); none is asked for twice."""
        keys = [blake2b(image.tobytes()).digest() for image in images]
        new = {key: image for key, image in zip(keys, images, strict=True) if key not in self._known}
        if new:
            self._known.update(zip(new, self.scorer.log_probability(list(new.values())), strict=True))
        return torch.stack([self._known[key] for key in keys])

    def score(self, tokens: Sequence[int]) -> Callable[[list[Image.Image]], Tensor]:
        """From images to the probability of these tokens of the answer."""
        return lambda images: self.log_probability(images)[:, list(tokens)].sum(1).exp()
