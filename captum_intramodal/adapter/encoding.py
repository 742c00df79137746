r"""How is an answer appended to a prompt's inputs, so that one pass predicts all of its tokens?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from captum_intramodal.adapter.prompts import (
    append_left_padded,
    decoder_ids,
    has_entry_per_token,
    pad_token_id,
    sequence_starts,
    visual_token_positions,
)
from captum_intramodal.models.families import family_of

__all__ = ["Encoding", "encode_batch"]


@dataclass(frozen=True)
class Encoding:
    """Prompt, images and answer of one example, which may be part of a left-padded batch, for a teacher-forced pass.

    Attributes:
        inputs (dict): keyword arguments of the model's forward, for the whole batch.
        input_ids (Tensor): the decoder's tokens of this example without padding, int64 (sequence,), on the CPU.
        prompt_length (int): number of these tokens before the answer.
        visual_positions (Tensor): positions of the visual tokens among them, int64 (V,), on the CPU.
        row (int): the example's index in the batch.
        batch_size (int): number of examples in the batch.
    """

    inputs: dict[str, Any]
    input_ids: Tensor
    prompt_length: int
    visual_positions: Tensor
    row: int = 0
    batch_size: int = 1

    @property
    def answer_ids(self) -> list[int]:
        """The tokens of the answer."""
        return self.input_ids[self.prompt_length :].tolist()

    def rows(self, states: Tensor) -> Tensor:
        """Return the rows of this example's states or logits that belong to ``input_ids``, without what precedes
        them: padding, or visual tokens of models whose images enter before the prompt."""
        return states[len(states) - len(self.input_ids) :]


def encode_batch(
    model: PreTrainedModel, processor: ProcessorMixin, inputs: Mapping[str, Any], answers: Sequence[Sequence[int]]
) -> list[Encoding]:
    """Append an answer to each prompt of a left-padded batch; all padding stays on the left."""
    name = "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"
    ids = decoder_ids(model, inputs)
    extended: dict[str, Any] = dict(inputs)
    more = [torch.tensor(list(answer), dtype=ids.dtype, device=ids.device) for answer in answers]
    extended[name] = append_left_padded(ids, more, pad_token_id(processor.tokenizer) or 0)
    for key, value in inputs.items():
        if key == name or model.config.is_encoder_decoder or not has_entry_per_token(processor, key, value, ids):
            continue
        # Masks and token types continue as at the prompt's last position, which holds text.
        last = value[:, -1:]
        answer_type = family_of(model.config).answer_token_type
        if key == "token_type_ids" and answer_type is not None:
            last = torch.full_like(last, answer_type)
        more = [end.expand(len(answer), *end.shape[1:]) for end, answer in zip(last, answers, strict=True)]
        extended[key] = append_left_padded(value, more, 0)
    encodings = []
    for row, (start, answer) in enumerate(zip(sequence_starts(model, inputs), answers, strict=True)):
        length = ids.shape[1] - start
        own = extended[name][row, -length - len(answer) :].cpu()
        encodings.append(Encoding(extended, own, length, visual_token_positions(model, own[:length]), row, len(ids)))
    return encodings
