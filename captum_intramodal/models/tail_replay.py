r"""Tail replay: the logit lens of models whose logits are not ``head(norm(h))``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from captum_intramodal.errors import UnsupportedModelError
from captum_intramodal.models.hooks import register_hooks
from captum_intramodal.models.layer_io import first_tensor, replace_first_tensor, replace_last_rows

__all__ = ["TailReplay", "lens_tolerance", "unmasked"]

# Hidden states that one pass of a tail replay takes, at (positions x vocabulary) floats of memory.
_REPLAYED_TOKENS = 32


def lens_tolerance(dtype: torch.dtype) -> float:
    """Return the mean error of a lens that rounding explains, in standard deviations of the model's logits."""
    return 1e-3 if dtype in (torch.float32, torch.float64) else 3e-2


def unmasked(logits: Tensor) -> Tensor:
    """Return which logits are not those of tokens that the model masks, by -inf or the dtype's minimum; bool."""
    return logits.isfinite() & (logits > torch.finfo(torch.float32).min / 4)


class TailReplay:
    r"""
    The model's own computation from the output of its last decoder layer to its logits.

    The model runs again on the inputs it was calibrated with (repeated along the sequence if they are text only), and
    a hook replaces the last layer's output by the given hidden states.

    Args:

        model (transformers.PreTrainedModel): The model.
        inputs (Mapping): Keyword arguments of its forward pass, one example.
        layer (torch.nn.Module): The last layer.
        hidden (Tensor): Output of the layer for these inputs, (T, D).
        logits (Tensor): The model's logits for these inputs, (T, vocabulary) or those of the last positions.
        reason (str): Why ``head(norm(h))`` does not give these logits; part of the error message.

    Attributes:
        length (int): Number of hidden states that one pass takes.

    Raises:
        UnsupportedModelError: the logits of a position depend on more than its own hidden state.
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
            self.inputs["input_ids"] = ids.repeat(1, -(-_REPLAYED_TOKENS // ids.shape[1]))[:, :_REPLAYED_TOKENS]
            self.length = _REPLAYED_TOKENS
        else:
            self.length = len(hidden)
        # In reverse order, a position's logits are the same only if they depend on its own hidden state alone.
        replayed = self(hidden.flip(0)).flip(0)[-len(logits) :]
        expected = logits.float()
        compared = unmasked(expected)
        gap = float((replayed - expected)[compared].abs().mean())
        if not gap <= lens_tolerance(hidden.dtype) * float(expected[compared].std()):
            raise UnsupportedModelError(
                f"The logits of {type(model).__name__} do not follow from its last decoder layer's output: neither as "
                f"a scaled or soft-capped head(norm(h)) ({reason}), nor through the model's own tail (mean gap "
                f"{gap:.3g}). Its logit lens would be wrong."
            )

    def __call__(self, hidden: Tensor) -> Tensor:
        """Compute the logits (n, vocabulary), float32, of n hidden states; n is at most ``length``."""

        def replace(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            return replace_first_tensor(output, replace_last_rows(first_tensor(output), hidden))

        with register_hooks([self.layer], replace):
            logits: Tensor = self.model(**self.inputs).logits[0]
        return logits[len(logits) - len(hidden) :].float()
