r"""Characters, tokens and words: which span of a text each token is, and which tokens a word is made of."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

__all__ = ["Word", "decode_pieces", "find_spans", "group_words"]

# A word, one sign of a script that is written without spaces (kana, CJK ideographs, ...), or one other sign.
_WORD = re.compile(
    r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+(?:['’\-][^\W]+)*|[^\w\s]"
)


@dataclass(frozen=True)
class Word:
    """A word of the prompt or the answer.

    Attributes:
        text (str): the word, without surrounding space.
        start, end (int): its characters in the prompt or answer.
        tokens (tuple[int, ...]): indices of its tokens.
        probability (float or None): of an answer's word, the product of its tokens' probabilities, each given all
            tokens before it.
    """

    text: str
    start: int
    end: int
    tokens: tuple[int, ...]
    probability: float | None = None


def decode_pieces(tokenizer: Any, ids: Sequence[int]) -> tuple[str, list[tuple[int, int]]]:
    r"""
    Text of a token sequence and the span of characters that each token adds to it.

    Offsets are found by decoding prefixes, because generated ids need not be what the tokenizer would make of their
    text. Bytes of one character that are spread over several tokens give the character to the last of them.

    Returns:
        tuple: the text, and per token ``(start, end)``.
    """
    spans: list[tuple[int, int]] = []
    text, end = "", 0
    for count in range(1, len(ids) + 1):
        text = tokenizer.decode(list(ids[:count]), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        start, end = end, max(end, len(text.rstrip("\ufffd")))
        spans.append((start, end))
    return text, spans


def find_spans(pieces_text: str, spans: Sequence[tuple[int, int]], text: str) -> list[tuple[int, int] | None] | None:
    """Maps token spans in ``pieces_text`` to spans in ``text``, which it contains up to space and letter case.

    None for a token outside of ``text``; None altogether where ``text`` is not found. The last occurrence counts.
    """
    have = [(char.lower(), index) for index, char in enumerate(pieces_text) if not char.isspace()]
    want = [(char.lower(), index) for index, char in enumerate(text) if not char.isspace()]
    # One sign per character keeps the two strings aligned where lower() makes several.
    first = "".join(char[0] for char, _ in have).rfind("".join(char[0] for char, _ in want))
    if first < 0 or not want:
        return None
    position = {have[first + offset][1]: index for offset, (_, index) in enumerate(want)}
    result: list[tuple[int, int] | None] = []
    for start, end in spans:
        inside = [position[i] for i in range(start, end) if i in position]
        result.append((inside[0], inside[-1] + 1) if inside else None)
    return result


def group_words(
    text: str, spans: Sequence[tuple[int, int]], probabilities: Sequence[float] | None = None
) -> list[Word]:
    """Words of a text with the tokens that touch them; words that share a token are one."""
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
    if probabilities is not None:
        for index, word in enumerate(words):
            product = 1.0
            for token in word.tokens:
                product *= float(probabilities[token])
            words[index] = replace(word, probability=product)
    return words
