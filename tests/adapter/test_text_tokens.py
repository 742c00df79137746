"""Text tokens of a sequence and their spans."""

from __future__ import annotations

from captum_intramodal import ModelAdapter
from captum_intramodal.adapter.text_tokens import TextTokens, text_positions, user_text
from tests.testing.tiny import random_image, tiny

PROMPT = "describe the picture"


def test_the_text_of_a_prompt() -> None:
    assert user_text(PROMPT) == PROMPT
    assert user_text([{"role": "system", "content": "no"}, {"role": "user", "content": PROMPT}]) == PROMPT
    content = [{"type": "image"}, {"type": "text", "text": "describe"}, {"type": "text", "text": "the picture"}]
    assert user_text([{"role": "user", "content": content}]) == PROMPT


def test_tokens_of_prompt_and_answer_are_displayed() -> None:
    adapter = ModelAdapter(*tiny("llava"))
    encoding = adapter.encode(adapter.prepare([random_image()], PROMPT), adapter.tokenize_answer("a red dog"))
    text = TextTokens.from_encoding(adapter, encoding, PROMPT)
    assert (text.prompt, text.answer) == (PROMPT, "a red dog")
    spans = text.spans[text.displayed].tolist()
    whole = [PROMPT] * 3 + ["a red dog"] * 3
    assert [w[a:b].strip() for w, (a, b) in zip(whole, spans, strict=True)] == [*PROMPT.split(), "a", "red", "dog"]
    # The chat template's words are context only.
    assert adapter.tokenizer.decode(text.ids[~text.displayed]).split() == ["user", ":", "assistant", ":"]
    assert not set(text_positions(adapter, encoding).tolist()) & set(encoding.visual_positions.tolist())


def test_a_prompt_that_the_template_changed_is_displayed_as_rendered() -> None:
    adapter = ModelAdapter(*tiny("llava"))
    encoding = adapter.encode(adapter.prepare([random_image()], PROMPT), adapter.tokenize_answer("a dog"))
    text = TextTokens.from_encoding(adapter, encoding, "something else")
    assert text.displayed.all() and PROMPT in text.prompt
