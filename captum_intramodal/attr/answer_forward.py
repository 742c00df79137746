r"""Score a teacher-forced answer: the base of :class:`PixelForward` and :class:`ProcessedPixelForward`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from captum_intramodal.adapter.model_adapter import ModelAdapter
from captum_intramodal.adapter.prompts import Prompt, stack_inputs
from captum_intramodal.errors import InvalidInputError, InvalidOptionError, UnsupportedModelError
from captum_intramodal.models.hooks import evaluation_mode

__all__ = ["TOKEN_OUTPUTS", "AnswerForward", "Output"]

Output = Literal["logits", "log_probs", "token_logits", "token_log_probs", "answer_log_prob"]

_OUTPUTS: tuple[str, ...] = get_args(Output)

# Outputs of the answer's own tokens; the others cover the whole vocabulary.
TOKEN_OUTPUTS = ("token_logits", "token_log_probs", "answer_log_prob")

# Modules that define the hooks of Captum's layer methods.
_LAYER_HOOK_MODULES = ("captum._utils.gradient", "captum.attr._core.layer.", "captum.attr._core.deep_lift")


class AnswerForward(nn.Module):
    r"""
    Base class of forward functions that score an answer after a prompt, teacher-forced.

    Args:

        adapter (ModelAdapter): The model and its processor.
        prompt (str or Sequence[Mapping]): The question about one image.
        answer (str or Sequence[int]): The answer to score.
        output (str): See :class:`PixelForward`.
        contrast (str, Sequence[int] or None): See :class:`PixelForward`.
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
        if output not in _OUTPUTS:
            raise InvalidOptionError(f"output must be one of {_OUTPUTS}, got {output!r}.")
        self.model = adapter.model
        self.adapter = adapter
        self.prompt = prompt
        self.output = output
        self.answer_ids = adapter.tokenize_answer(answer)
        self.contrast_ids = None if contrast is None else adapter.tokenize_answer(contrast)
        # The trial runs the model, so it must not wait for a pass in which Captum has hooks on the model.
        self.stacks = adapter.stacks

    def _scores(
        self,
        examples: Iterable[tuple[Mapping[str, Any], AbstractContextManager[None]]],
        count: int,
        answer_ids: Tensor | None,
        contrast_ids: Tensor | None,
    ) -> Tensor:
        """Return the output for each example, given as its prompt's inputs and the context to run it in."""
        answers = _id_rows("answer_ids", answer_ids, self.answer_ids, count)
        contrasts: Sequence[Tensor | None] = [None] * count
        if contrast_ids is not None or self.contrast_ids is not None:
            contrasts = self._contrasts(contrast_ids, answers)
        encodings, contexts = [], []
        for (inputs, context), answer in zip(examples, answers.tolist(), strict=True):
            encodings.append(self.adapter.encode(inputs, answer).inputs)
            contexts.append(context)
        logits = self._logits(encodings, contexts, answers.shape[1])
        return torch.stack([self._score(*each) for each in zip(logits, answers, contrasts, strict=True)])

    def _contrasts(self, contrast_ids: Tensor | None, answers: Tensor) -> Sequence[Tensor]:
        """Return the contrast's token ids for each example, checked against the output and the answers."""
        contrasts = _id_rows("contrast_ids", contrast_ids, self.contrast_ids, len(answers))
        if self.output not in TOKEN_OUTPUTS:
            raise InvalidOptionError(
                f"output={self.output!r} covers the whole vocabulary and takes no contrast; use one of {TOKEN_OUTPUTS}."
            )
        if contrasts.shape != answers.shape:
            raise InvalidInputError(
                f"The contrast must have as many tokens as the answer, got {contrasts.shape[1]} tokens for an answer "
                f"of {answers.shape[1]}."
            )
        return contrasts.unbind()

    def _logits(
        self, encodings: Sequence[Mapping[str, Any]], contexts: Sequence[AbstractContextManager[None]], length: int
    ) -> Sequence[Tensor]:
        """Return the logits of each example's answer, from one batch where possible."""
        predicting = torch.arange(-length - 1, -1)
        plain = all(isinstance(context, nullcontext) for context in contexts)
        if len(encodings) > 1 and plain and self.stacks and len({_shapes(inputs) for inputs in encodings}) == 1:
            with evaluation_mode(self.model, gradients=True):
                return self.adapter.logits(stack_inputs(encodings), predicting).unbind()
        if len(encodings) > 1:
            _refuse_layer_hooks(self.model)
        logits = []
        for inputs, context in zip(encodings, contexts, strict=True):
            # Entered once per example, so that a model that draws random numbers draws the same for all of them.
            with evaluation_mode(self.model, gradients=True), context:
                logits.append(self.adapter.logits(inputs, predicting)[0])
        return logits

    def _score(self, logits: Tensor, answer: Tensor, contrast: Tensor | None) -> Tensor:
        """Return the output for one example, from its answer's logits (tokens, vocabulary)."""
        values = logits if self.output in ("logits", "token_logits") else at_least_float32(logits).log_softmax(-1)
        if self.output not in TOKEN_OUTPUTS:
            return values
        tokens = values.gather(1, answer.to(values.device)[:, None])[:, 0]
        if contrast is not None:
            tokens = tokens - values.gather(1, contrast.to(values.device)[:, None])[:, 0]
        return tokens.sum() if self.output == "answer_log_prob" else tokens


def is_float_tensor(value: object) -> bool:
    """Return whether a value is a tensor of a floating-point dtype."""
    return isinstance(value, Tensor) and value.is_floating_point()


def at_least_float32(tensor: Tensor) -> Tensor:
    """Convert a tensor to float32 unless it is more precise."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def avoid_blank_images(pixels: Tensor) -> Tensor:
    """Add 1e-6 to images or tiles (..., channels, height, width) that are all zero, such as a mean-colored baseline:
    Idefics and SmolVLM drop those as padding."""
    if pixels.ndim < 4:
        return pixels
    blank = (pixels == 0).flatten(-3).all(-1)
    return pixels + 1e-6 * blank[..., None, None, None].to(pixels) if bool(blank.any()) else pixels


def expand_rows(name: str, tensor: Tensor, count: int) -> Tensor:
    """Expand a tensor of one row to ``count`` rows; a tensor of ``count`` rows stays as it is."""
    if len(tensor) not in (1, count):
        raise InvalidInputError(f"Got {len(tensor)} {name} for {count} examples; pass one per example, or one for all.")
    return tensor.expand(count, *tensor.shape[1:])


def _id_rows(name: str, ids: Tensor | None, default: Sequence[int] | None, count: int) -> Tensor:
    """Return one row of token ids per example, int64 (N, tokens)."""
    rows = torch.tensor([list(default or ())]) if ids is None else ids
    if rows.ndim != 2 or rows.shape[1] == 0 or rows.is_floating_point():
        raise InvalidInputError(f"{name} must be integers (N, tokens), got {rows.dtype} {tuple(rows.shape)}.")
    return expand_rows(name, rows, count).long()


def _shapes(inputs: Mapping[str, Any]) -> tuple[tuple[str, torch.Size], ...]:
    """Return the name and shape of every tensor among a model's inputs."""
    return tuple((key, value.shape) for key, value in inputs.items() if isinstance(value, Tensor))


def _refuse_layer_hooks(model: nn.Module) -> None:
    """Raise if Captum has hooks on layers: they expect all examples in one call and would silently keep the last."""
    for module in model.modules():
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            if getattr(getattr(hook, "func", hook), "__module__", "").startswith(_LAYER_HOOK_MODULES):
                raise UnsupportedModelError(
                    f"{type(model).__name__} runs these examples one at a time, but Captum's layer method needs all of "
                    "them in one pass. Pass one example at a time, with internal_batch_size=1 if the method has it, "
                    "or wrap the method in VisualTokenAttribution, ARC or HiddenStates, which collect all examples."
                )
