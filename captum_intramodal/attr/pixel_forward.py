r"""A multimodal model as a differentiable function of its images' pixels and its prompt: what Captum methods need.

Captum multiplies examples: IntegratedGradients by its steps, NoiseTunnel and GradientShap by their samples,
perturbation methods by ``perturbations_per_eval``. The functions here make each example's inputs on their own, so that
patches of several images, which many families pack into one tensor, never mix; they run in one pass where a trial
shows that the model reads them as each alone, else one by one. The graph of every example is kept until Captum asks for
the gradient; ``internal_batch_size=1`` (of NoiseTunnel: ``nt_samples_batch_size=1``) keeps one at a time and changes no
result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from captum_intramodal._utils.image import tensor_to_image
from captum_intramodal.adapter.model_adapter import ModelAdapter
from captum_intramodal.adapter.prompts import Prompt
from captum_intramodal.attr.answer_forward import (
    OF_TOKENS,
    AnswerForward,
    Output,
    at_least_float32,
    avoid_blank_images,
    expand_rows,
    is_float_tensor,
)
from captum_intramodal.models.hooks import replaced_embeddings

__all__ = ["PixelForward"]

# Levels, of 255, by which float32 misses a whole one after division by 255.
_ROUNDING = 1e-3


class PixelForward(AnswerForward):
    r"""
    Logits or log-probabilities of an answer's tokens as a function of the image, and of the prompt's embeddings, for
    Captum methods.

    The image goes through the model's own image processor, whose torchvision version is differentiable: resizing,
    tiling, patching and normalization included. Any image size works, so that MSEA can resize its input; the prompt's
    placeholders follow. The model runs in evaluation mode, with the parameters frozen; its flags and the random state
    are given back.

    The ordinary way of an image to the model rounds to 8 bits, before and after resizing. With ``exact=True`` that
    rounding is part of the values, and the gradient is that of the way without rounding: for an image of 8 bits (whole
    multiples of 1/255) the logits are the model's own, and between two such images they follow the gradient.
    Completeness then holds up to what rounding does to the image's and the baseline's logits, which more steps do not
    remove (0.02 to 0.6 % of the logits' standard deviation); with ``exact=False`` the gap vanishes,
    but the logits are the model's own only up to the rounding (0.5 to 4.4 %; measured on six random models).

    Args:

        adapter (ModelAdapter): The model and its processor.
        prompt (str or Sequence[Mapping]): The question about one image.
        answer (str or Sequence[int]): The answer whose tokens are predicted, teacher-forced.
        output (str, optional): What the function returns of N examples and an answer of T tokens, and Captum's
                    ``target`` for it. ``'logits'`` or ``'log_probs'`` of the whole vocabulary, (N, T, vocabulary):
                    ``(token index, token id)``. ``'token_logits'`` or ``'token_log_probs'`` of the answer's own tokens,
                    (N, T): ``token index``. ``'answer_log_prob'``, the log-probability of the whole answer, (N,): None.
                    Default: ``'logits'``
        contrast (str or Sequence[int], optional): What else might stand there, as many tokens as the answer has: their
                    values, each given the answer's tokens before it, are subtracted. Not for the outputs over the
                    vocabulary.
                    Default: None
        exact (bool, optional): Whether the values include the ordinary way's rounding to 8 bits.
                    Default: True

    Raises:
        TypeError: at the first pass with gradients, if the image processor is not the torchvision-backed one;
            :class:`ProcessedPixelForward` does without.
        ValueError: an unknown output, an empty answer, or a contrast of another number of tokens.

    Examples::

        >>> forward = PixelForward(ModelAdapter(model, processor), "describe the picture.", "a dog.")
        >>> image = torch.rand(1, 3, 192, 256)                  # in [0, 1]
        >>> forward(image).shape                                # (1, answer tokens, vocabulary)
        >>> target = (1, forward.answer_ids[1])                   # the second token
        >>> attribution = IntegratedGradients(forward).attribute(image, target=target)

        >>> # What speaks for a dog and against a cat, in image and prompt together; the prompt's baseline is zero.
        >>> forward = PixelForward(adapter, "describe the picture.", "a dog.", "answer_log_prob", contrast="a cat.")
        >>> embeddings = forward.prompt_embeddings(image[0])    # (1, tokens, width)
        >>> shown, said = IntegratedGradients(forward).attribute((image, embeddings), internal_batch_size=1)
        >>> words = tokenizer.convert_ids_to_tokens(forward.prompt_ids(image[0]))

        >>> # The prompt alone.
        >>> method = IntegratedGradients(lambda embeddings, image: forward(image, embeddings))
        >>> said = method.attribute(embeddings, additional_forward_args=image)
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        prompt: Prompt,
        answer: str | Sequence[int],
        output: Output = "logits",
        contrast: str | Sequence[int] | None = None,
        exact: bool = True,
    ) -> None:
        super().__init__(adapter, prompt, answer, output, contrast)
        self.exact = exact

    def inputs(self, image: Tensor) -> dict[str, Any]:
        """The model's inputs for an image, (3, height, width) in [0, 1]: differentiable pixels, and the text."""
        return self.adapter.encode(self._prompt_inputs(image), self.answer_ids).inputs

    def positions(self, image: Tensor) -> Tensor:
        """Positions of the answer's tokens in the sequence, int64 (answer tokens,)."""
        length = self.adapter.sequence_length(self.inputs(image.detach()))
        return torch.arange(length - len(self.answer_ids), length)

    @property
    def targets(self) -> list[int] | list[tuple[int, int]]:
        """Captum's target for each of the answer's tokens.

        Raises:
            ValueError: the output is one number for the whole answer.
        """
        if self.output == "answer_log_prob":
            raise ValueError("output='answer_log_prob' has no target per token; take 'token_log_probs'.")
        if self.output in OF_TOKENS:
            return list(range(len(self.answer_ids)))
        return list(enumerate(self.answer_ids))

    def prompt_positions(self, image: Tensor) -> Tensor:
        """Positions of the prompt's tokens, the chat template's included and the image's not, int64 (tokens,)."""
        return self._prompt_tokens(self._prompt_inputs(image.detach()))[0]

    def prompt_ids(self, image: Tensor) -> Tensor:
        """The tokens that the rows of :meth:`prompt_embeddings` are, int64 (tokens,); the same at any image size."""
        return self._prompt_tokens(self._prompt_inputs(image.detach()))[1]

    def prompt_embeddings(self, image: Tensor) -> Tensor:
        """The prompt's tokens as the model's input embeddings give them, (1, tokens, width), in the model's dtype."""
        ids = self.prompt_ids(image)[None].to(self.adapter.device)
        with torch.no_grad():
            rows: Tensor = self._embeddings(ids)
        return rows

    def forward(
        self,
        images: Tensor,
        prompt_embeddings: Tensor | None = None,
        answer_ids: Tensor | None = None,
        contrast_ids: Tensor | None = None,
    ) -> Tensor:
        r"""
        Args:

            images (Tensor): float (N, 3, height, width) in [0, 1]; (1, 3, height, width) for several embeddings.
            prompt_embeddings (Tensor, optional): float (N, prompt tokens, width) or one row for all, read in the place
                        of :meth:`prompt_embeddings`. What a model makes of the tokens' ids elsewhere, such as the
                        embeddings per layer of Gemma 3n, stays.
                        Default: None
            answer_ids (Tensor, optional): int (N, T) or one row for all, instead of the answer. To reach them, Captum's
                        ``additional_forward_args`` is ``(None, answer_ids)``; its batches expand them.
                        Default: None
            contrast_ids (Tensor, optional): int (N, T) or one row for all, instead of the contrast.
                        Default: None

        Returns:
            *Tensor*: float, of the shape that the output has, see :class:`PixelForward`.

        Raises:
            ValueError: inputs of other shapes or dtypes, or a model whose prompt has no embeddings to replace.
        """
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(f"Images must be float (N, 3, height, width) in [0, 1], got {tuple(images.shape)}.")
        if prompt_embeddings is None:
            examples = ((self._prompt_inputs(image), nullcontext()) for image in images)
            return self._scores(examples, len(images), answer_ids, contrast_ids)
        if prompt_embeddings.ndim != 3 or not prompt_embeddings.is_floating_point():
            raise ValueError(
                f"Embeddings must be float (N, tokens, width), got {prompt_embeddings.dtype} "
                f"{tuple(prompt_embeddings.shape)}; answer_ids come after them: additional_forward_args=(None, ids)."
            )
        count = max(len(images), len(prompt_embeddings))
        pairs = zip(
            expand_rows("pictures", images, count), expand_rows("embeddings", prompt_embeddings, count), strict=True
        )
        joint = ((inputs := self._prompt_inputs(image), self._reading(inputs, rows)) for image, rows in pairs)
        return self._scores(joint, count, answer_ids, contrast_ids)

    @property
    def _embeddings(self) -> nn.Module:
        try:
            embeddings: nn.Module = self.model.get_input_embeddings()
        except NotImplementedError:
            raise ValueError(f"{type(self.model).__name__} names no input embeddings.") from None
        return embeddings

    def _prompt_tokens(self, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        positions, ids = self.adapter.prompt_positions(inputs, self.prompt)
        if len(ids) == 0:
            raise ValueError(f"{type(self.model).__name__} reads no token of the prompt.")
        return positions, ids

    def _reading(self, inputs: Mapping[str, Any], rows: Tensor) -> AbstractContextManager[None]:
        positions, ids = self._prompt_tokens(inputs)
        if len(rows) != len(ids):
            raise ValueError(f"{len(rows)} embeddings for a prompt of {len(ids)} tokens, see prompt_ids.")
        return replaced_embeddings(self._embeddings, ids, positions, rows)

    def _prompt_inputs(self, image: Tensor) -> dict[str, Any]:
        """The prompt's inputs with differentiable pixels, rounded as on the ordinary way where that is asked for."""
        # In the range of ordinary images, in which processors also give the color of their padding.
        levels = at_least_float32(image) * 255
        if not self.exact:
            smooth = self._process(levels)
            return smooth | {key: avoid_blank_images(value) for key, value in smooth.items() if is_float_tensor(value)}
        whole = levels.detach().round().clamp(0, 255)
        inputs = self.adapter.prepare([tensor_to_image(whole)], self.prompt)
        is_whole = bool((levels.detach() - whole).abs().max() < _ROUNDING)
        if is_whole and not (levels.requires_grad and torch.is_grad_enabled()):
            return inputs
        smooth = self._process(levels)
        with torch.no_grad():
            rounded = smooth if is_whole else self._process(whole)
        for key, value in smooth.items():
            if is_float_tensor(value) and key in inputs:
                inputs[key] = avoid_blank_images(inputs[key] + (value - rounded[key].detach()))
        return inputs

    def _process(self, levels: Tensor) -> dict[str, Any]:
        """The prompt's inputs for an image in [0, 255], as the processor makes them without rounding."""
        processor = self.adapter.processor.image_processor
        try:
            inputs = self.adapter.prepare([levels], self.prompt)
        except (TypeError, ValueError):
            # Idefics2's processor takes only PIL images, its image processor tensors as well.
            pixels = processor(images=[levels], return_tensors="pt")
            inputs = self.adapter.prepare([Image.new("RGB", (levels.shape[2], levels.shape[1]), "gray")], self.prompt)
            inputs |= {key: value.to(self.adapter.device) for key, value in pixels.items() if key in inputs}
        followed = any(isinstance(value, Tensor) and value.requires_grad for value in inputs.values())
        if levels.requires_grad and torch.is_grad_enabled() and not followed:
            raise TypeError(
                f"No gradient passes through {type(processor).__name__}; install torchvision and load the processor "
                "with AutoProcessor.from_pretrained(path), which then takes its torchvision version (use_fast=True in "
                "early transformers 5), or attribute to its pixel tensors with ProcessedPixelForward."
            )
        return inputs
