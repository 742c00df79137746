r"""TODO."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from captum_intramodal.adapter.encoding import stack_inputs
from captum_intramodal.adapter.model_adapter import ModelAdapter
from captum_intramodal.adapter.prompts import Prompt
from captum_intramodal.models.hooks import evaluation_mode

__all__ = ["OF_TOKENS", "Output"]

Output = Literal["logits", "log_probs", "token_logits", "token_log_probs", "answer_log_prob"]


OUTPUTS: tuple[str, ...] = get_args(Output)


OF_TOKENS = ("token_logits", "token_log_probs", "answer_log_prob")


# Where Captum's hooks on layers come from.
LAYER_HOOKS = ("captum._utils.gradient", "captum.attr._core.layer.", "captum.attr._core.deep_lift")


class AnswerForward(nn.Module):
    """What a model makes of an answer's tokens after a prompt, teacher-forced.

    Args:
        adapter (ModelAdapter): The model and its processor.
        prompt (str or Sequence[Mapping]): The question about one image.
        answer (str or Sequence[int]): The answer whose tokens are predicted.
        output (str): One of :data:`OUTPUTS`, see :class:`PixelForward`.
        contrast (str, Sequence[int] or None): As many tokens as the answer has, see :class:`PixelForward`.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        prompt: Prompt,
        answer: str | Sequence[int],
        output: Output,
        contrast: str | Sequence[int] | None,
    ) -> None:
        super().__init__()
        if output not in OUTPUTS:
            raise ValueError(f"output must be one of {OUTPUTS}, got {output!r}.")
        self.model = adapter.model
        self.adapter = adapter
        self.prompt = prompt
        self.output = output
        self.answer_ids = adapter.tokenize_answer(answer)
        self.contrast_ids = None if contrast is None else adapter.tokenize_answer(contrast)
        # Tried here, not in a pass in which Captum has hooks on the model.
        self.stacks = adapter.stacks

    def _scores(
        self,
        examples: Iterable[tuple[Mapping[str, Any], AbstractContextManager[None]]],
        count: int,
        answer_ids: Tensor | None,
        contrast_ids: Tensor | None,
    ) -> Tensor:
        """The output of each example: of its prompt's inputs, run inside its context."""
        answers = _rows("answer_ids", answer_ids, self.answer_ids, count)
        contrasts = None
        if contrast_ids is not None or self.contrast_ids is not None:
            contrasts = _rows("contrast_ids", contrast_ids, self.contrast_ids, count)
            if self.output not in OF_TOKENS:
                raise ValueError(
                    f"A contrast is for an output of {OF_TOKENS}; {self.output!r} has every token already."
                )
            if contrasts.shape != answers.shape:
                raise ValueError(f"A contrast of {contrasts.shape[1]} tokens for an answer of {answers.shape[1]}.")
        encodings, contexts = [], []
        for (inputs, context), answer in zip(examples, answers.tolist(), strict=True):
            encodings.append(self.adapter.encode(inputs, answer).inputs)
            contexts.append(context)
        logits = self._logits(encodings, contexts, answers.shape[1])
        others = [None] * count if contrasts is None else contrasts
        return torch.stack([self._score(*each) for each in zip(logits, answers, others, strict=True)])

    def _logits(
        self, encodings: Sequence[Mapping[str, Any]], contexts: Sequence[AbstractContextManager[None]], length: int
    ) -> Sequence[Tensor]:
        """Per example the logits of its answer."""
        predicting = torch.arange(-length - 1, -1)
        plain = all(isinstance(context, nullcontext) for context in contexts)
        if len(encodings) > 1 and plain and self.stacks and len({_shapes(inputs) for inputs in encodings}) == 1:
            with evaluation_mode(self.model, gradients=True):
                return self.adapter.logits(stack_inputs(encodings), predicting).unbind()
        if len(encodings) > 1:
            _refuse_layer_hooks(self.model)
        each = []
        for inputs, context in zip(encodings, contexts, strict=True):
            # Given back after each example: a model that draws random numbers draws the same for all of them.
            with evaluation_mode(self.model, gradients=True), context:
                each.append(self.adapter.logits(inputs, predicting)[0])
        return each

    def _score(self, logits: Tensor, answer: Tensor, contrast: Tensor | None) -> Tensor:
        values = logits if self.output in ("logits", "token_logits") else at_least_float32(logits).log_softmax(-1)
        if self.output not in OF_TOKENS:
            return values
        tokens = values.gather(1, answer.to(values.device)[:, None])[:, 0]
        if contrast is not None:
            tokens = tokens - values.gather(1, contrast.to(values.device)[:, None])[:, 0]
        return tokens.sum() if self.output == "answer_log_prob" else tokens


def is_float_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def at_least_float32(tensor: Tensor) -> Tensor:
    """In float32 at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def avoid_blank_images(pixels: Tensor) -> Tensor:
    """Images or tiles (..., channels, height, width) that are zero throughout, as of a mean-colored baseline, moved
    off zero: Idefics and SmolVLM take them for padding and drop them."""
    if pixels.ndim < 4:
        return pixels
    blank = (pixels == 0).flatten(-3).all(-1)
    return pixels + 1e-6 * blank[..., None, None, None].to(pixels) if bool(blank.any()) else pixels


def _shapes(inputs: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple((key, value.shape) for key, value in inputs.items() if isinstance(value, Tensor))


def _refuse_layer_hooks(model: nn.Module) -> None:
    """Captum's hooks on layers expect all examples in one call; of several calls they would silently keep the last."""
    for module in model.modules():
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            if getattr(getattr(hook, "func", hook), "__module__", "").startswith(LAYER_HOOKS):
                raise ValueError(
                    f"{type(model).__name__} runs these examples one by one, but Captum's layer method needs them in "
                    "one pass. Pass one example and internal_batch_size=1, if the method has it; or go through "
                    "VisualTokenAttribution, ARC or HiddenStates, which show it all of them."
                )


def expand_rows(name: str, tensor: Tensor, count: int) -> Tensor:
    """One row for all, or a row per example."""
    if len(tensor) not in (1, count):
        raise ValueError(f"{len(tensor)} {name} for {count} examples.")
    return tensor.expand(count, *tensor.shape[1:])


def _rows(name: str, ids: Tensor | None, default: Sequence[int] | None, count: int) -> Tensor:
    """Token ids per example, int64 (N, tokens)."""
    rows = torch.tensor([list(default or ())]) if ids is None else ids
    if rows.ndim != 2 or rows.shape[1] == 0 or rows.is_floating_point():
        raise ValueError(f"{name} must be integers (N, tokens), got {rows.dtype} {tuple(rows.shape)}.")
    return expand_rows(name, rows, count).long()
