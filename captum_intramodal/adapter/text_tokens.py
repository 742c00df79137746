r"""TODO."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from captum_intramodal.adapter.encoding import Encoding
from captum_intramodal.adapter.model_adapter import ModelAdapter
from captum_intramodal.adapter.prompts import Prompt
from captum_intramodal.text.spans import decode_pieces, find_spans

__all__ = ["TextTokens", "shown_prompt", "text_positions"]


@dataclass(frozen=True)
class TextTokens:
    """The sequence's text tokens in order: all may be context; those of the user's prompt and the answer are shown."""

    positions: Tensor
    ids: Tensor
    spans: Tensor
    shown: Tensor
    prompt: str
    answer: str

    @classmethod
    def of(cls, adapter: ModelAdapter, encoding: Encoding, prompt: str) -> TextTokens:
        ids, positions = encoding.input_ids, text_positions(adapter, encoding)
        context = ids[positions[positions < encoding.prompt_length]].tolist()
        rendered, rendered_spans = decode_pieces(adapter.tokenizer, context)
        answer, answer_spans = decode_pieces(adapter.tokenizer, encoding.answer_ids)
        prompt_spans = find_spans(rendered, rendered_spans, prompt)
        if prompt_spans is None:  # The template or tokenizer changed its letters: show all that was read.
            prompt, prompt_spans = rendered, list(rendered_spans)
        return cls(
            positions=positions,
            ids=ids[positions],
            spans=torch.tensor([*(span or (0, 0) for span in prompt_spans), *answer_spans]).reshape(-1, 2),
            shown=torch.tensor([*(span is not None for span in prompt_spans), *(True for _ in answer_spans)]),
            prompt=prompt,
            answer=answer,
        )


def text_positions(adapter: ModelAdapter, encoding: Encoding) -> Tensor:
    """Positions of all that is neither visual nor special, and of the answer; int64 (T,)."""
    is_text = ~torch.isin(encoding.input_ids, torch.tensor(adapter.tokenizer.all_special_ids))
    is_text[encoding.visual_positions] = False
    is_text[encoding.prompt_length :] = True
    return is_text.nonzero().flatten()


def shown_prompt(prompt: Prompt) -> str:
    """What the user wrote: the prompt, or the text of the last message."""
    if isinstance(prompt, str):
        return prompt
    content = prompt[-1]["content"]
    return content if isinstance(content, str) else " ".join(part["text"] for part in content if part["type"] == "text")
