r"""TODO."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

__all__ = ["Encoding", "stack_inputs"]


@dataclass(frozen=True)
class Encoding:
    """Prompt, images and answer, teacher-forced: one example of a left-padded batch, which may be of 1.

    Attributes:
        inputs (dict): keyword arguments of the model's forward, for the batch.
        input_ids (Tensor): the decoder's tokens of this example without its padding, int64 (sequence,), on the CPU.
        prompt_length (int): number of these before the answer.
        visual_positions (Tensor): int64 (V,), among these, on the CPU.
        row, batch_size (int): the example's place in the batch, and how many examples that has.
    """

    inputs: dict[str, Any]
    input_ids: Tensor
    prompt_length: int
    visual_positions: Tensor
    row: int = 0
    batch_size: int = 1

    @property
    def answer_ids(self) -> list[int]:
        return self.input_ids[self.prompt_length :].tolist()

    def rows(self, states: Tensor) -> Tensor:
        """The rows of the example's states or logits that belong to ``input_ids``; padding or visual tokens may stand
        before."""
        return states[len(states) - len(self.input_ids) :]


def append_left_padded(rows: Tensor, more: Sequence[Tensor], padding: int) -> Tensor:
    """Each row of a batch with something of its own length after it, left-padded."""
    longer = [torch.cat([row, end]) for row, end in zip(rows, more, strict=True)]
    return pad_sequence(longer, batch_first=True, padding_value=padding, padding_side="left")


def stack_inputs(examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Inputs of prompts of one length as those of a batch. Whatever their first dimension counts, examples, images,
    tiles or patches, a batch has them one after the other."""
    return {
        key: torch.cat([example[key] for example in examples]) if isinstance(value, Tensor) else value
        for key, value in examples[0].items()
    }
