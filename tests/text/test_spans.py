"""Tokens map to characters and words, even if characters or words are spread over several tokens."""

from __future__ import annotations

from typing import Any

from captum_intramodal.text.spans import decode_pieces, find_spans, group_words


class ByteTokenizer:
    """A tokenizer like byte-pair encoding: each id stands for some bytes."""

    def __init__(self, *pieces: bytes) -> None:
        self.pieces = pieces

    def decode(self, ids: list[int], **kwargs: Any) -> str:
        return b"".join(self.pieces[i] for i in ids).decode("utf-8", errors="replace")


def test_a_character_spread_over_several_tokens_belongs_to_the_last() -> None:
    text = "a caf\u00e9 \U0001f436!"
    e, dog = "\u00e9".encode(), "\U0001f436".encode()
    tokenizer = ByteTokenizer(b"a", b" caf", e[:1], e[1:], b" " + dog[:2], dog[2:], b"!")
    decoded, spans = decode_pieces(tokenizer, range(7))
    assert decoded == text
    assert spans == [(0, 1), (1, 5), (5, 5), (5, 6), (6, 7), (7, 8), (8, 9)]
    assert [word.text for word in group_words(text, spans)] == ["a", "caf\u00e9", "\U0001f436", "!"]


def test_words_are_grouped_without_spaces_between_them() -> None:
    text = "\u72d7\u548c\u732b\u3002 it's well-known"
    spans = [(0, 1), (1, 3), (3, 4), (4, 7), (7, 9), (9, 14), (14, 20)]
    words = group_words(text, spans)
    assert [(w.text, w.tokens) for w in words] == [
        ("\u72d7", (0,)),
        ("\u548c\u732b", (1,)),
        ("\u3002", (2,)),
        ("it's", (3, 4)),
        ("well-known", (5, 6)),
    ]


def test_the_prompt_is_found_in_its_chat_template() -> None:
    rendered = "user\ndescribe the picture.\nassistant"
    spans = [(0, 4), (4, 13), (13, 17), (17, 25), (25, 26), (26, 36)]
    assert find_spans(rendered, spans, "Describe  the picture.") == [None, (0, 8), (10, 13), (14, 21), (21, 22), None]
    assert find_spans(rendered, spans, "something else") is None


def test_probabilities_of_words_are_products() -> None:
    words = group_words("a dog", [(0, 1), (1, 3), (3, 5)], [0.5, 0.25, 0.5])
    assert [word.probability for word in words] == [0.5, 0.125]
    assert [word.probability for word in group_words("a dog", [(0, 1), (1, 5)])] == [None, None]
