r"""Score an answer as a differentiable function of the image's pixels and the prompt's embeddings, as Captum needs it.

Captum multiplies examples: IntegratedGradients by its steps, NoiseTunnel and GradientShap by their samples,
perturbation methods by ``perturbations_per_eval``. Each example is preprocessed separately, so that patches of several
images, which many families pack into one tensor, never mix. Examples then run in one pass if a trial shows that
batching does not change the model's logits, and one at a time otherwise. Captum holds the graphs of all examples until
it asks for the gradient; ``internal_batch_size=1`` (for NoiseTunnel ``nt_samples_batch_size=1``) holds one at a time
and leaves the result unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from captum_intramodal._utils.image import tensor_to_image
from captum_intramodal.adapter.model_adapter import ModelAdapter
from captum_intramodal.adapter.prompts import Prompt
from captum_intramodal.attr.answer_forward import (
    TOKEN_OUTPUTS,
    AnswerForward,
    Output,
    at_least_float32,
    avoid_blank_images,
    expand_rows,
    is_float_tensor,
)
from captum_intramodal.errors import IntramodalError, InvalidInputError, InvalidOptionError, UnsupportedModelError
from captum_intramodal.models.hooks import replace_embeddings

__all__ = ["PixelForward"]

# Deviation from a whole 8-bit value that float32 rounding causes after division by 255.
_ROUNDING = 1e-3


class PixelForward(AnswerForward):
    r"""
    Logits or log-probabilities of an answer's tokens as a function of the image and of the prompt's embeddings, for
    Captum methods.

    The image goes through the model's own image processor, whose torchvision version is differentiable, including
    resizing, tiling, patching and normalization. Images of any size are accepted, so MSEA can resize its input; the
    number of placeholders in the prompt follows. The model runs in evaluation mode with frozen parameters; its flags
    and the random state are restored afterwards.

    The usual preprocessing rounds pixels to 8 bits before and after resizing. With ``exact=True``, values include this
    rounding, while gradients are those of the preprocessing without it: for an 8-bit image (multiples of 1/255), the
    logits are exactly the model's own; between two such images, they follow the gradient. Completeness then holds up
    to the effect of rounding on the logits of the image and of the baseline, which more steps do not reduce (0.02 to
    0.6 % of the logits' standard deviation). With ``exact=False`` this gap vanishes, but the logits equal the model's
    own only up to rounding (0.5 to 4.4 %; both measured on six random models).

    Args:

        adapter (ModelAdapter): The model and its processor.
        prompt (str or Sequence[Mapping]): The question about one image.
        answer (str or Sequence[int]): The answer to score, teacher-forced.
        output (str, optional): What the function returns for N examples and an answer of T tokens, and the ``target``
                    to pass to Captum. ``'logits'`` and ``'log_probs'`` cover the whole vocabulary, (N, T, vocabulary);
                    target ``(token index, token id)``. ``'token_logits'`` and ``'token_log_probs'`` are those of the
                    answer's own tokens, (N, T); target ``token index``. ``'answer_log_prob'`` is the log-probability of
                    the whole answer, (N,); target None.
                    Default: ``'logits'``
        contrast (str or Sequence[int], optional): An alternative to the answer with as many tokens. Its tokens' values,
                    each given the answer's tokens before it, are subtracted. Not for outputs over the vocabulary.
                    Default: None
        exact (bool, optional): Whether values include the rounding to 8 bits of the usual preprocessing.
                    Default: True

    Raises:
        TypeError: in the first pass with gradients, if the image processor is not the torchvision-backed one;
            :class:`ProcessedPixelForward` does not need it.
        InvalidOptionError: if ``output`` is unknown.
        EmptyAnswerError: if the answer is empty.

    Examples::

        >>> from captum.attr import IntegratedGradients
        >>> from captum_intramodal import PixelForward
        >>> forward = PixelForward(adapter, "describe the picture.", "a dog.")
        >>> pixels = torch.rand(1, 3, 96, 128)  # in [0, 1]
        >>> forward(pixels).shape  # (1, answer tokens, vocabulary)
        torch.Size([1, 3, 76])
        >>> target = (1, forward.answer_ids[1])  # the second token
        >>> IntegratedGradients(forward).attribute(pixels, target=target, n_steps=2).shape
        torch.Size([1, 3, 96, 128])

        >>> # Evidence for a dog and against a cat, in image and prompt together; the prompt's baseline is zero.
        >>> forward = PixelForward(adapter, "describe the picture.", "a dog.", "answer_log_prob", contrast="a cat.")
        >>> embeddings = forward.prompt_embeddings(pixels[0])
        >>> image_attr, text_attr = IntegratedGradients(forward).attribute((pixels, embeddings), n_steps=2)
        >>> tokens = adapter.tokenizer.convert_ids_to_tokens(forward.prompt_ids(pixels[0]))
        >>> text_attr.shape == (1, len(tokens), embeddings.shape[2])
        True

        >>> # The prompt alone.
        >>> method = IntegratedGradients(lambda embeddings, pixels: forward(pixels, embeddings))
        >>> text_attr = method.attribute(embeddings, additional_forward_args=pixels, n_steps=2)
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
        """Return the model's inputs for an image, (3, height, width) in [0, 1]: differentiable pixels, and the text."""
        return self.adapter.encode(self._prompt_inputs(image), self.answer_ids).inputs

    def positions(self, image: Tensor) -> Tensor:
        """Return the positions of the answer's tokens in the sequence, int64 (answer tokens,)."""
        length = self.adapter.sequence_length(self.inputs(image.detach()))
        return torch.arange(length - len(self.answer_ids), length)

    @property
    def targets(self) -> list[int] | list[tuple[int, int]]:
        """Captum's ``target`` for each of the answer's tokens.

        Raises:
            InvalidOptionError: if the output is one number for the whole answer.
        """
        if self.output == "answer_log_prob":
            raise InvalidOptionError("output='answer_log_prob' has no target per token; use 'token_log_probs'.")
        if self.output in TOKEN_OUTPUTS:
            return list(range(len(self.answer_ids)))
        return list(enumerate(self.answer_ids))

    def prompt_positions(self, image: Tensor) -> Tensor:
        """Return the positions of the prompt's tokens, chat template included and image excluded, int64 (tokens,)."""
        return self._prompt_tokens(self._prompt_inputs(image.detach()))[0]

    def prompt_ids(self, image: Tensor) -> Tensor:
        """Return the token of each row of :meth:`prompt_embeddings`, int64 (tokens,); the same for any image size."""
        return self._prompt_tokens(self._prompt_inputs(image.detach()))[1]

    def prompt_embeddings(self, image: Tensor) -> Tensor:
        """Return the input embeddings of the prompt's tokens, (1, tokens, width), in the model's dtype."""
        ids = self.prompt_ids(image)[None].to(self.adapter.device)
        with torch.no_grad():
            rows: Tensor = self._input_embeddings(ids)
        return rows

    def forward(
        self,
        images: Tensor,
        prompt_embeddings: Tensor | None = None,
        answer_ids: Tensor | None = None,
        contrast_ids: Tensor | None = None,
    ) -> Tensor:
        r"""
        Score the answer for each image.

        Args:

            images (Tensor): float (N, 3, height, width) in [0, 1]; or (1, 3, height, width) for N embeddings.
            prompt_embeddings (Tensor, optional): float (N, prompt tokens, width), or one row for all, instead of
                        :meth:`prompt_embeddings`. Other uses of the token ids in the model, such as the per-layer
                        embeddings of Gemma 3n, are unaffected.
                        Default: None
            answer_ids (Tensor, optional): int (N, T), or one row for all, instead of the answer. In Captum, pass
                        ``additional_forward_args=(None, answer_ids)``, which it expands with its batches.
                        Default: None
            contrast_ids (Tensor, optional): int (N, T), or one row for all, instead of the contrast.
                        Default: None

        Returns:
            **scores** (*Tensor*): float, of the shape of the output, see :class:`PixelForward`.

        Raises:
            InvalidInputError: if a tensor has another shape or dtype, or the contrast another length than the answer.
            InvalidOptionError: if the output takes no contrast.
            UnsupportedModelError: if the model has no input embeddings to replace, or Captum's layer method needs all
                examples in one pass and the model cannot batch them.
        """
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise InvalidInputError(
                f"images must be float (N, 3, height, width) in [0, 1], got {images.dtype} {tuple(images.shape)}."
            )
        if prompt_embeddings is None:
            examples = ((self._prompt_inputs(image), nullcontext()) for image in images)
            return self._scores(examples, len(images), answer_ids, contrast_ids)
        if prompt_embeddings.ndim != 3 or not prompt_embeddings.is_floating_point():
            raise InvalidInputError(
                f"prompt_embeddings must be float (N, tokens, width), got {prompt_embeddings.dtype} "
                f"{tuple(prompt_embeddings.shape)}; answer_ids come after them: additional_forward_args=(None, ids)."
            )
        count = max(len(images), len(prompt_embeddings))
        images = expand_rows("images", images, count)
        prompt_embeddings = expand_rows("prompt_embeddings", prompt_embeddings, count)
        return self._scores(self._joint_examples(images, prompt_embeddings), count, answer_ids, contrast_ids)

    def _joint_examples(
        self, images: Tensor, prompt_embeddings: Tensor
    ) -> Iterator[tuple[dict[str, Any], AbstractContextManager[None]]]:
        """Yield each example's inputs and the context that replaces its prompt's embeddings."""
        for image, rows in zip(images, prompt_embeddings, strict=True):
            inputs = self._prompt_inputs(image)
            positions, ids = self._prompt_tokens(inputs)
            if len(rows) != len(ids):
                raise InvalidInputError(
                    f"Got {len(rows)} embeddings for a prompt of {len(ids)} tokens; pass one for each of prompt_ids."
                )
            yield inputs, replace_embeddings(self._input_embeddings, ids, positions, rows)

    @property
    def _input_embeddings(self) -> nn.Module:
        try:
            embeddings: nn.Module = self.model.get_input_embeddings()
        except NotImplementedError as error:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} does not implement get_input_embeddings; attribute to the image alone."
            ) from error
        return embeddings

    def _prompt_tokens(self, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the positions and ids of the prompt's tokens, int64 (tokens,) each."""
        positions, ids = self.adapter.prompt_positions(inputs, self.prompt)
        if len(ids) == 0:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} takes no token of the prompt; attribute to the image alone."
            )
        return positions, ids

    def _prompt_inputs(self, image: Tensor) -> dict[str, Any]:
        """Return the prompt's inputs with differentiable pixels, rounded like the usual preprocessing if ``exact``."""
        # In [0, 255], the range in which processors give the color of their padding.
        pixels = at_least_float32(image) * 255
        if not self.exact:
            smooth = self._preprocess(pixels)
            return smooth | {key: avoid_blank_images(value) for key, value in smooth.items() if is_float_tensor(value)}
        whole = pixels.detach().round().clamp(0, 255)
        inputs = self.adapter.prepare([tensor_to_image(whole / 255)], self.prompt)
        is_whole = bool((pixels.detach() - whole).abs().max() < _ROUNDING)
        if is_whole and not (pixels.requires_grad and torch.is_grad_enabled()):
            return inputs
        smooth = self._preprocess(pixels)
        with torch.no_grad():
            rounded = smooth if is_whole else self._preprocess(whole)
        for key, value in smooth.items():
            if is_float_tensor(value) and key in inputs:
                inputs[key] = avoid_blank_images(inputs[key] + (value - rounded[key].detach()))
        return inputs

    def _preprocess(self, pixels: Tensor) -> dict[str, Any]:
        """Return the prompt's inputs for an image in [0, 255], preprocessed without rounding."""
        processor = self.adapter.processor.image_processor
        try:
            inputs = self.adapter.prepare([pixels], self.prompt)
        except IntramodalError:
            raise
        except (TypeError, ValueError):
            # Idefics2's processor takes PIL images only, but its image processor takes tensors too.
            processed = processor(images=[pixels], return_tensors="pt")
            inputs = self.adapter.prepare([Image.new("RGB", (pixels.shape[2], pixels.shape[1]), "gray")], self.prompt)
            inputs |= {key: value.to(self.adapter.device) for key, value in processed.items() if key in inputs}
        differentiable = any(isinstance(value, Tensor) and value.requires_grad for value in inputs.values())
        if pixels.requires_grad and torch.is_grad_enabled() and not differentiable:
            raise TypeError(
                f"No gradient passes through {type(processor).__name__}; install torchvision and load the processor "
                "with AutoProcessor.from_pretrained(path), which then uses its torchvision version (use_fast=True in "
                "early transformers 5), or attribute to its pixel tensors with ProcessedPixelForward."
            )
        return inputs
