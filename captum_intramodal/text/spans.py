r"""Map between characters, tokens and words: which characters does a token cover, and which tokens form a word?"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

__all__ = ["Word", "decode_pieces", "find_spans", "group_words"]

# A single character of a script written without spaces (kana, CJK ideographs), a word, or a punctuation mark.
_WORD = re.compile(
    r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+(?:['’\-][^\W]+)*|[^\w\s]"
)


@dataclass(frozen=True)
class Word:
    r"""A word of the prompt or the answer.

    Attributes:

        text (str): The word, without surrounding spaces.
        start (int): Index of its first character in the prompt or answer.
        end (int): Index after its last character.
        tokens (tuple[int, ...]): Indices of its tokens.
        probability (float or None): For a word of the answer, the product of its tokens' probabilities, each
                    conditioned on all previous tokens.
    """

    text: str
    start: int
    end: int
    tokens: tuple[int, ...]
    probability: float | None = None


def decode_pieces(tokenizer: Any, ids: Sequence[int]) -> tuple[str, list[tuple[int, int]]]:
    r"""Decode a token sequence and find the span of characters that each token adds.

    Spans are found by decoding prefixes, because re-tokenizing the text of generated ids can give other ids. If the
    bytes of a character are spread over several tokens, the character belongs to the last of them.

    Args:

        tokenizer (PreTrainedTokenizerBase): The tokenizer.
        ids (Sequence[int]): Token ids.

    Returns:
        **text, spans** (*tuple*):
            The decoded text, and ``(start, end)`` per token.
    """
    spans: list[tuple[int, int]] = []
    text, end = "", 0
    for count in range(1, len(ids) + 1):
        text = tokenizer.decode(list(ids[:count]), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        start, end = end, max(end, len(text.rstrip("\ufffd")))
        spans.append((start, end))
    return text, spans


def find_spans(pieces_text: str, spans: Sequence[tuple[int, int]], text: str) -> list[tuple[int, int] | None] | None:
    r"""Map token spans in a decoded text to spans in a text that it contains, such as the prompt in its chat template.

    Spaces and letter case are ignored. If the text occurs several times, the last occurrence is used.

    Args:

        pieces_text (str): The decoded text.
        spans (Sequence[tuple[int, int]]): Span of each token in ``pieces_text``.
        text (str): The text to find.

    Returns:
        **spans** (*list or None*):
            For each token its span in ``text``, or ``None`` if it is outside; ``None`` if ``text`` is not found.

    Examples::

        >>> from captum_intramodal.text.spans import find_spans
        >>> find_spans("user: Hi you", [(0, 5), (5, 8), (8, 12)], "hi you")
        [None, (0, 2), (3, 6)]
    """
    rendered = [(char.lower(), index) for index, char in enumerate(pieces_text) if not char.isspace()]
    wanted = [(char.lower(), index) for index, char in enumerate(text) if not char.isspace()]
    # lower() can turn one character into several; its first keeps both strings aligned.
    first = "".join(char[0] for char, _ in rendered).rfind("".join(char[0] for char, _ in wanted))
    if first < 0 or not wanted:
        return None
    index_in_text = {rendered[first + offset][1]: index for offset, (_, index) in enumerate(wanted)}
    result: list[tuple[int, int] | None] = []
    for start, end in spans:
        inside = [index_in_text[i] for i in range(start, end) if i in index_in_text]
        result.append((inside[0], inside[-1] + 1) if inside else None)
    return result


def group_words(
    text: str, spans: Sequence[tuple[int, int]], probabilities: Sequence[float] | None = None
) -> list[Word]:
    r"""Split a text into words with the tokens that overlap them; words that share a token are merged.

    Args:

        text (str): The text.
        spans (Sequence[tuple[int, int]]): Span of each token in ``text``.
        probabilities (Sequence[float], optional): Probability of each token, conditioned on all previous ones.
                    Default: ``None``

    Returns:
        **words** (*list[Word]*):
            The words in order, punctuation marks included.

    Examples::

        >>> from captum_intramodal.text.spans import group_words
        >>> [(word.text, word.tokens) for word in group_words("a dog.", [(0, 1), (1, 3), (3, 5), (5, 6)])]
        [('a', (0,)), ('dog', (1, 2)), ('.', (3,))]
    """
    words: list[Word] = []
    for match in _WORD.finditer(text):
        start, end = match.span()
        tokens = tuple(i for i, (a, b) in enumerate(spans) if a < end and b > start)
        if words and tokens and words[-1].tokens and tokens[0] <= words[-1].tokens[-1]:
            last = words[-1]
            merged = tuple(sorted({*last.tokens, *tokens}))
            words[-1] = replace(last, text=text[last.start : end], end=end, tokens=merged)
        elif tokens:
            words.append(Word(text[start:end], start, end, tokens))
    if probabilities is None:
        return words
    return [
        replace(word, probability=math.prod((float(probabilities[token]) for token in word.tokens), start=1.0))
        for word in words
    ]
