r"""Tail replay: the logit lens of models whose logits are not ``head(norm(h))``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from captum_intramodal.models.hooks import first_tensor, put_rows, replace_first_tensor

__all__ = []

# Hidden states that one pass of a tail replay takes, at (positions x vocabulary) floats of memory.
_REPLAYED = 32


class TailReplay:
    """The model's own way from the output of its last decoder layer to its logits.

    The model runs once more on the inputs it was calibrated with (repeated along the sequence where they are text
    alone), and a hook puts the given hidden states in the place of the last layer's output.

    Attributes:
        length (int): Number of hidden states that one pass takes.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        inputs: Mapping[str, Any],
        layer: nn.Module,
        hidden: Tensor,
        logits: Tensor,
        reason: str,
    ) -> None:
        self.model, self.layer = model, layer
        self.hidden_size, self.vocab_size = int(hidden.shape[-1]), int(logits.shape[-1])
        self.inputs = dict(inputs)
        if set(inputs) == {"input_ids"}:
            ids = inputs["input_ids"]
            self.inputs["input_ids"] = ids.repeat(1, -(-_REPLAYED // ids.shape[1]))[:, :_REPLAYED]
            self.length = _REPLAYED
        else:
            self.length = len(hidden)
        # Each position's logits must follow from its own hidden state alone.
        backwards = self(hidden.flip(0)).flip(0)[-len(logits) :]
        expected = logits.float()
        seen = expected.isfinite() & (expected > torch.finfo(torch.float32).min / 4)
        gap = float((backwards - expected)[seen].abs().mean())
        tolerance = 1e-3 if hidden.dtype in (torch.float32, torch.float64) else 3e-2
        if not gap <= tolerance * float(expected[seen].std()):
            raise ValueError(
                f"The logits of {type(model).__name__} do not follow from its last decoder layer's output: neither as "
                f"a scaled or soft-capped head(norm(h)) ({reason}), nor through the model's own tail (mean gap "
                f"{gap:.3g}). Its logit lens would be wrong."
            )

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits (n, vocabulary) in float32 of n hidden states, n at most ``length``."""

        def put(module: nn.Module, args: Any, output: Any) -> Any:
            return replace_first_tensor(output, put_rows(first_tensor(output), hidden))

        with self.layer.register_forward_hook(put):
            logits: Tensor = self.model(**self.inputs).logits[0]
        return logits[len(logits) - len(hidden) :].float()
