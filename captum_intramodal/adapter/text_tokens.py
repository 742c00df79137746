r"""Which tokens of a sequence are text, and where are they in what the user wrote and the model answered?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from captum_intramodal.adapter.encoding import Encoding
from captum_intramodal.adapter.model_adapter import ModelAdapter
from captum_intramodal.adapter.prompts import Prompt
from captum_intramodal.text.spans import decode_pieces, find_spans

__all__ = ["TextTokens", "text_positions", "user_text"]


@dataclass(frozen=True)
class TextTokens:
    """The T text tokens of a sequence, in order: all of them can be context, those of the user's prompt and of the
    answer are displayed.

    Attributes:
        positions (Tensor): positions in the sequence, int64 (T,).
        ids (Tensor): token ids, int64 (T,).
        spans (Tensor): first and last character (exclusive) of each token in the prompt or the answer, int64 (T, 2).
        displayed (Tensor): whether a token is part of the prompt or the answer, bool (T,); the chat template's are not.
        prompt (str): the user's prompt, or the rendered one if the former does not occur in it.
        answer (str): the answer.
    """

    positions: Tensor
    ids: Tensor
    spans: Tensor
    displayed: Tensor
    prompt: str
    answer: str

    @classmethod
    def from_encoding(cls, adapter: ModelAdapter, encoding: Encoding, prompt: str) -> TextTokens:
        """Find the text tokens of an encoded prompt and answer; ``prompt`` is the text that the user wrote."""
        ids, positions = encoding.input_ids, text_positions(adapter, encoding)
        context = ids[positions[positions < encoding.prompt_length]].tolist()
        rendered, rendered_spans = decode_pieces(adapter.tokenizer, context)
        answer, answer_spans = decode_pieces(adapter.tokenizer, encoding.answer_ids)
        prompt_spans = find_spans(rendered, rendered_spans, prompt)
        if prompt_spans is None:  # The template or the tokenizer changed its characters: display all of them.
            prompt, prompt_spans = rendered, list(rendered_spans)
        return cls(
            positions=positions,
            ids=ids[positions],
            spans=torch.tensor([*(span or (0, 0) for span in prompt_spans), *answer_spans]).reshape(-1, 2),
            displayed=torch.tensor([*(span is not None for span in prompt_spans), *(True for _ in answer_spans)]),
            prompt=prompt,
            answer=answer,
        )


def text_positions(adapter: ModelAdapter, encoding: Encoding) -> Tensor:
    """Return the positions of the answer's tokens and of all others that are neither visual nor special, int64 (T,)."""
    is_text = ~torch.isin(encoding.input_ids, torch.tensor(adapter.tokenizer.all_special_ids))
    is_text[encoding.visual_positions] = False
    is_text[encoding.prompt_length :] = True
    return is_text.nonzero().flatten()


def user_text(prompt: Prompt) -> str:
    """Return what the user wrote: the prompt itself, or the text of the last message."""
    if isinstance(prompt, str):
        return prompt
    content = prompt[-1]["content"]
    return content if isinstance(content, str) else " ".join(part["text"] for part in content if part["type"] == "text")
