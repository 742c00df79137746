r"""A multimodal model as a differentiable function of its pictures' pixels and its prompt: what Captum methods need.

Captum multiplies examples: IntegratedGradients by its steps, NoiseTunnel and GradientShap by their samples,
perturbation methods by ``perturbations_per_eval``. The functions here make each example's inputs on their own, so that
patches of several pictures, which many families pack into one tensor, never mix; they run in one pass where a trial
shows that the model reads them as each alone, else one by one. The graph of every example is kept until Captum asks for
the gradient; ``internal_batch_size=1`` (of NoiseTunnel: ``nt_samples_batch_size=1``) keeps one at a time and changes no
result.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from captum_intramodal.adapter import ModelAdapter, Prompt, stack_inputs
from captum_intramodal.coordinates import PixelMap
from captum_intramodal.hooks import evaluation_mode, replaced_embeddings

__all__ = ["PixelForward", "ProcessedPixelForward", "picture_tensor"]

Output = Literal["logits", "log_probs", "token_logits", "token_log_probs", "answer_log_prob"]
OUTPUTS: tuple[str, ...] = get_args(Output)
OF_TOKENS = ("token_logits", "token_log_probs", "answer_log_prob")

# Where Captum's hooks on layers come from.
LAYER_HOOKS = ("captum._utils.gradient", "captum.attr._core.layer.", "captum.attr._core.deep_lift")

# Levels, of 255, by which float32 misses a whole one after division by 255.
_ROUNDING = 1e-3


def picture_tensor(picture: Image.Image) -> Tensor:
    """An RGB picture as :class:`PixelForward` takes it, float32 (1, 3, height, width) in [0, 1]."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255


class _AnswerForward(nn.Module):
    """What a model makes of an answer's tokens after a prompt, teacher-forced.

    Args:
        adapter (ModelAdapter): The model and its processor.
        prompt (str or Sequence[Mapping]): The question about one picture.
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
        values = logits if self.output in ("logits", "token_logits") else _wide(logits).log_softmax(-1)
        if self.output not in OF_TOKENS:
            return values
        tokens = values.gather(1, answer.to(values.device)[:, None])[:, 0]
        if contrast is not None:
            tokens = tokens - values.gather(1, contrast.to(values.device)[:, None])[:, 0]
        return tokens.sum() if self.output == "answer_log_prob" else tokens


class PixelForward(_AnswerForward):
    r"""
    Logits or log-probabilities of an answer's tokens as a function of the picture, and of the prompt's embeddings, for
    Captum methods.

    The picture goes through the model's own image processor, whose torchvision version is differentiable: resizing,
    tiling, patching and normalisation included. Any picture size works, so that MSEA can resize its input; the prompt's
    placeholders follow. The model runs in evaluation mode, with the parameters frozen; its flags and the random state
    are given back.

    The ordinary way of a picture to the model rounds to 8 bits, before and after resizing. With ``exact=True`` that
    rounding is part of the values, and the gradient is that of the way without rounding: for a picture of 8 bits (whole
    multiples of 1/255) the logits are the model's own, and between two such pictures they follow the gradient.
    Completeness then holds up to what rounding does to the picture's and the baseline's logits, which more steps do not
    remove (0.02 to 0.6 % of the logits' standard deviation); with ``exact=False`` the gap vanishes,
    but the logits are the model's own only up to the rounding (0.5 to 4.4 %; measured on six random models).

    Args:

        adapter (ModelAdapter): The model and its processor.
        prompt (str or Sequence[Mapping]): The question about one picture.
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
        >>> picture = torch.rand(1, 3, 192, 256)                  # in [0, 1]
        >>> forward(picture).shape                                # (1, answer tokens, vocabulary)
        >>> target = (1, forward.answer_ids[1])                   # the second token
        >>> attribution = IntegratedGradients(forward).attribute(picture, target=target)

        >>> # What speaks for a dog and against a cat, in picture and prompt together; the prompt's baseline is zero.
        >>> forward = PixelForward(adapter, "describe the picture.", "a dog.", "answer_log_prob", contrast="a cat.")
        >>> embeddings = forward.prompt_embeddings(picture[0])    # (1, tokens, width)
        >>> shown, said = IntegratedGradients(forward).attribute((picture, embeddings), internal_batch_size=1)
        >>> words = tokenizer.convert_ids_to_tokens(forward.prompt_ids(picture[0]))

        >>> # The prompt alone.
        >>> method = IntegratedGradients(lambda embeddings, picture: forward(picture, embeddings))
        >>> said = method.attribute(embeddings, additional_forward_args=picture)
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

    def inputs(self, picture: Tensor) -> dict[str, Any]:
        """The model's inputs for a picture, (3, height, width) in [0, 1]: differentiable pixels, and the text."""
        return self.adapter.encode(self._prompt_inputs(picture), self.answer_ids).inputs

    def positions(self, picture: Tensor) -> Tensor:
        """Positions of the answer's tokens in the sequence, int64 (answer tokens,)."""
        length = self.adapter.sequence_length(self.inputs(picture.detach()))
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

    def prompt_positions(self, picture: Tensor) -> Tensor:
        """Positions of the prompt's tokens, the chat template's included and the picture's not, int64 (tokens,)."""
        return self._prompt_tokens(self._prompt_inputs(picture.detach()))[0]

    def prompt_ids(self, picture: Tensor) -> Tensor:
        """The tokens that the rows of :meth:`prompt_embeddings` are, int64 (tokens,); the same at any picture size."""
        return self._prompt_tokens(self._prompt_inputs(picture.detach()))[1]

    def prompt_embeddings(self, picture: Tensor) -> Tensor:
        """The prompt's tokens as the model's input embeddings give them, (1, tokens, width), in the model's dtype."""
        ids = self.prompt_ids(picture)[None].to(self.adapter.device)
        with torch.no_grad():
            rows: Tensor = self._embeddings(ids)
        return rows

    def forward(
        self,
        pictures: Tensor,
        prompt_embeddings: Tensor | None = None,
        answer_ids: Tensor | None = None,
        contrast_ids: Tensor | None = None,
    ) -> Tensor:
        r"""
        Args:

            pictures (Tensor): float (N, 3, height, width) in [0, 1]; (1, 3, height, width) for several embeddings.
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
        if pictures.ndim != 4 or pictures.shape[1] != 3 or not pictures.is_floating_point():
            raise ValueError(f"Pictures must be float (N, 3, height, width) in [0, 1], got {tuple(pictures.shape)}.")
        if prompt_embeddings is None:
            examples = ((self._prompt_inputs(picture), nullcontext()) for picture in pictures)
            return self._scores(examples, len(pictures), answer_ids, contrast_ids)
        if prompt_embeddings.ndim != 3 or not prompt_embeddings.is_floating_point():
            raise ValueError(
                f"Embeddings must be float (N, tokens, width), got {prompt_embeddings.dtype} "
                f"{tuple(prompt_embeddings.shape)}; answer_ids come after them: additional_forward_args=(None, ids)."
            )
        count = max(len(pictures), len(prompt_embeddings))
        pairs = zip(_expand("pictures", pictures, count), _expand("embeddings", prompt_embeddings, count), strict=True)
        joint = ((inputs := self._prompt_inputs(picture), self._reading(inputs, rows)) for picture, rows in pairs)
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

    def _prompt_inputs(self, picture: Tensor) -> dict[str, Any]:
        """The prompt's inputs with differentiable pixels, rounded as on the ordinary way where that is asked for."""
        # In the range of ordinary pictures, in which processors also give the colour of their padding.
        levels = _wide(picture) * 255
        if not self.exact:
            smooth = self._process(levels)
            return smooth | {key: _not_blank(value) for key, value in smooth.items() if _is_float(value)}
        whole = levels.detach().round().clamp(0, 255)
        inputs = self.adapter.prepare([_to_image(whole)], self.prompt)
        is_whole = bool((levels.detach() - whole).abs().max() < _ROUNDING)
        if is_whole and not (levels.requires_grad and torch.is_grad_enabled()):
            return inputs
        smooth = self._process(levels)
        with torch.no_grad():
            rounded = smooth if is_whole else self._process(whole)
        for key, value in smooth.items():
            if _is_float(value) and key in inputs:
                inputs[key] = _not_blank(inputs[key] + (value - rounded[key].detach()))
        return inputs

    def _process(self, levels: Tensor) -> dict[str, Any]:
        """The prompt's inputs for a picture in [0, 255], as the processor makes them without rounding."""
        processor = self.adapter.processor.image_processor
        try:
            inputs = self.adapter.prepare([levels], self.prompt)
        except (TypeError, ValueError):
            # Idefics2's processor takes only PIL pictures, its image processor tensors as well.
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


class ProcessedPixelForward(_AnswerForward):
    r"""
    Logits or log-probabilities of an answer's tokens as a function of the processor's own pixel tensors, for Captum
    methods where no gradient passes through the image processor.

    Each tensor gets a dimension of examples in front, (N, *its shape), whatever its own first dimension is: a picture's
    patches or tiles stay together in Captum's batches. Elements that show nothing of the picture, such as padding, keep
    their values. :meth:`fold` brings attributions back into the picture's frame, and :meth:`feature_mask` segments of
    the picture to its pixel tensors, through the measured coordinates.

    Args:

        adapter (ModelAdapter): The model and its processor.
        prompt (str or Sequence[Mapping]): The question about the picture.
        answer (str or Sequence[int]): The answer whose tokens are predicted, teacher-forced.
        picture (PIL.Image.Image): The picture.
        output (str, optional): See :class:`PixelForward`.
                    Default: ``'logits'``
        contrast (str or Sequence[int], optional): See :class:`PixelForward`.
                    Default: None

    Raises:
        ValueError: none of the processor's tensors depends on the picture.

    Examples::

        >>> forward = ProcessedPixelForward(adapter, "describe the picture.", "a dog.", picture, "token_log_probs")
        >>> black = forward.process(Image.new("RGB", picture.size))
        >>> attributions = IntegratedGradients(forward).attribute(forward.pixels, baselines=black, target=1)
        >>> forward.fold(attributions, grid=(24, 32)).shape            # (1, 24, 32)

        >>> superpixels = torch.arange(12).reshape(3, 4).repeat_interleave(64, 0).repeat_interleave(64, 1)
        >>> mask = forward.feature_mask(superpixels)                   # a picture of 256 x 192
        >>> KernelShap(forward).attribute(forward.pixels, baselines=black, target=1, feature_mask=mask)
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        prompt: Prompt,
        answer: str | Sequence[int],
        picture: Image.Image,
        output: Output = "logits",
        contrast: str | Sequence[int] | None = None,
    ) -> None:
        super().__init__(adapter, prompt, answer, output, contrast)
        self.picture = picture.convert("RGB")
        inputs = adapter.prepare([self.picture], prompt)
        self._inputs = inputs
        self._unmeasured = ""
        self._maps: dict[str, PixelMap] = {}
        try:
            self._maps = adapter.pixel_maps([picture.size]).maps
            self._keys = list(self._maps)
        except ValueError as error:
            self._unmeasured = str(error)
            negative = adapter.prepare([ImageOps.invert(self.picture)], prompt)
            tensors = {key: value for key, value in inputs.items() if _is_float(value)}
            self._keys = [key for key, value in tensors.items() if not torch.equal(value, negative[key])]
        if not self._keys:
            raise ValueError(f"None of the inputs of {type(adapter.model).__name__} depends on the picture.")

    @property
    def pixels(self) -> tuple[Tensor, ...]:
        """The picture's pixel tensors, float32, each (1, *its shape): Captum's ``inputs``."""
        return tuple(self._inputs[key].float()[None] for key in self._keys)

    def process(self, picture: Image.Image) -> tuple[Tensor, ...]:
        """Another picture of the same size as pixel tensors, float32, each (1, *its shape): Captum's ``baselines``."""
        if picture.size != self.picture.size:
            raise ValueError(f"A picture of {picture.size} pixels where {self.picture.size} are explained.")
        inputs = self.adapter.prepare([picture.convert("RGB")], self.prompt)
        return tuple(inputs[key].float()[None] for key in self._keys)

    def forward(self, *pixels_and_ids: Tensor) -> Tensor:
        r"""
        Args:

            *pixels_and_ids (Tensor): As many tensors as :attr:`pixels` has, float (N, *shape), and then, optionally,
                        ``answer_ids`` and ``contrast_ids`` as :meth:`PixelForward.forward` takes them: Captum's
                        ``additional_forward_args``.

        Returns:
            *Tensor*: float, of the shape that the output has, see :class:`PixelForward`.
        """
        count = len(self._keys)
        if not count <= len(pixels_and_ids) <= count + 2:
            raise ValueError(f"Expected {count} pixel tensors and up to 2 of ids, got {len(pixels_and_ids)} tensors.")
        pixels, ids = pixels_and_ids[:count], pixels_and_ids[count:]
        for key, tensor in zip(self._keys, pixels, strict=True):
            if tensor.shape[1:] != self._inputs[key].shape:
                raise ValueError(f"{key!r} must be (N, {tuple(self._inputs[key].shape)}), got {tuple(tensor.shape)}.")
        answer_ids, contrast_ids = (*ids, None, None)[:2]
        examples = ((self._inputs | self._shown(example), nullcontext()) for example in zip(*pixels, strict=True))
        return self._scores(examples, len(pixels[0]), answer_ids, contrast_ids)

    def _shown(self, pixels: Iterable[Tensor]) -> dict[str, Tensor]:
        """By name, with the elements that show nothing of the picture as they are."""
        result = {}
        for key, value in zip(self._keys, pixels, strict=True):
            value = _not_blank(value)
            if key in self._maps:
                shows = (self._maps[key].gain != 0).reshape(value.shape).to(value.device)
                value = torch.where(shows, value, self._inputs[key].to(value))
            result[key] = value
        return result

    def _measured(self) -> list[PixelMap]:
        if self._unmeasured:
            raise ValueError(f"The pixel tensors have no coordinates in the picture. {self._unmeasured}")
        return list(self._maps.values())

    def fold(self, attributions: Tensor | Sequence[Tensor], grid: tuple[int, int]) -> Tensor:
        r"""
        Attributions of the pixel tensors, summed up in the frame of the picture.

        Args:

            attributions (Tensor or Sequence[Tensor]): float (N, *shape) for each of :attr:`pixels`.
            grid (tuple[int, int]): Rows and columns of the map.

        Returns:
            **map** (*Tensor*):
                float32 (N, rows, columns).

        Raises:
            ValueError: attributions of other shapes; the processor's coordinates cannot be measured.
        """
        maps = self._measured()
        parts = [attributions] if isinstance(attributions, Tensor) else list(attributions)
        if len(parts) != len(maps):
            raise ValueError(f"{len(parts)} attributions for {len(maps)} pixel tensors.")
        return torch.stack([pixels.fold(part, grid) for pixels, part in zip(maps, parts, strict=True)]).sum(0)

    def feature_mask(self, segmentation: Tensor) -> tuple[Tensor, ...]:
        r"""
        Segments of the picture as Captum's ``feature_mask``: one feature each, in all tensors, tiles and the thumbnail.

        Args:

            segmentation (Tensor): int64 (height, width) of the picture, segments counted from 0.

        Returns:
            **masks** (*tuple[Tensor, ...]*):
                int64, each (1, *shape). Padding is one feature more, the last.

        Raises:
            ValueError: a segmentation of another size; the processor's coordinates cannot be measured.
        """
        return tuple(pixels.feature_mask([segmentation])[None] for pixels in self._measured())


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _wide(tensor: Tensor) -> Tensor:
    """In float32 at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _to_image(levels: Tensor) -> Image.Image:
    return Image.fromarray(levels.byte().permute(1, 2, 0).cpu().numpy())


def _not_blank(pixels: Tensor) -> Tensor:
    """Pictures or tiles (..., channels, height, width) that are zero throughout, as of a mean-coloured baseline, moved
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


def _expand(name: str, tensor: Tensor, count: int) -> Tensor:
    """One row for all, or a row per example."""
    if len(tensor) not in (1, count):
        raise ValueError(f"{len(tensor)} {name} for {count} examples.")
    return tensor.expand(count, *tensor.shape[1:])


def _rows(name: str, ids: Tensor | None, default: Sequence[int] | None, count: int) -> Tensor:
    """Token ids per example, int64 (N, tokens)."""
    rows = torch.tensor([list(default or ())]) if ids is None else ids
    if rows.ndim != 2 or rows.shape[1] == 0 or rows.is_floating_point():
        raise ValueError(f"{name} must be integers (N, tokens), got {rows.dtype} {tuple(rows.shape)}.")
    return _expand(name, rows, count).long()
