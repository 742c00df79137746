r"""Score an answer as a function of the processor's pixel tensors, for processors that are not differentiable."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext

import torch
from PIL import Image, ImageOps
from torch import Tensor

from captum_intramodal.adapter.model_adapter import ModelAdapter
from captum_intramodal.adapter.prompts import Prompt
from captum_intramodal.attr.answer_forward import AnswerForward, Output, avoid_blank_images, is_float_tensor
from captum_intramodal.errors import InvalidInputError, NoPixelMapError, UnsupportedModelError
from captum_intramodal.geometry.pixel_map import PixelMap

__all__ = ["ProcessedPixelForward"]


class ProcessedPixelForward(AnswerForward):
    r"""
    Logits or log-probabilities of an answer's tokens as a function of the processor's own pixel tensors, for Captum
    methods when no gradient passes through the image processor.

    Each tensor gets a leading dimension of examples, (N, \*shape), whatever its own first dimension is, so Captum's
    batches keep an image's patches or tiles together. Elements that do not depend on the image, such as padding, keep
    their values. Through the measured coordinates of the elements, :meth:`fold` maps attributions to the image, and
    :meth:`feature_mask` maps segments of the image to its pixel tensors.

    Args:

        adapter (ModelAdapter): The model and its processor.
        prompt (str or Sequence[Mapping]): The question about the image.
        answer (str or Sequence[int]): The answer to score, teacher-forced.
        image (PIL.Image.Image): The image.
        output (str, optional): See :class:`PixelForward`.
                    Default: ``'logits'``
        contrast (str or Sequence[int], optional): See :class:`PixelForward`.
                    Default: None

    Raises:
        InvalidOptionError: if ``output`` is unknown.
        EmptyAnswerError: if the answer is empty.
        UnsupportedModelError: if none of the processor's tensors depends on the image.

    Examples::

        >>> from captum.attr import FeatureAblation, InputXGradient
        >>> from captum_intramodal import ProcessedPixelForward
        >>> forward = ProcessedPixelForward(adapter, "describe the picture.", "a dog.", image, "token_log_probs")
        >>> attributions = InputXGradient(forward).attribute(forward.pixels, target=1)
        >>> forward.fold(attributions, grid=(7, 10)).shape
        torch.Size([1, 7, 10])

        >>> halves = (torch.arange(image.width) * 2 // image.width).expand(image.height, -1)
        >>> mask = forward.feature_mask(halves)
        >>> black = forward.process(Image.new("RGB", image.size))
        >>> ablated = FeatureAblation(forward).attribute(forward.pixels, baselines=black, target=1, feature_mask=mask)
        >>> [part.shape == pixels.shape for part, pixels in zip(ablated, forward.pixels)]
        [True]
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        prompt: Prompt,
        answer: str | Sequence[int],
        image: Image.Image,
        output: Output = "logits",
        contrast: str | Sequence[int] | None = None,
    ) -> None:
        super().__init__(adapter, prompt, answer, output, contrast)
        self.image = image.convert("RGB")
        self._inputs = adapter.prepare([self.image], prompt)
        self._maps: dict[str, PixelMap] = {}
        self._no_map_error: NoPixelMapError | None = None
        try:
            self._maps = adapter.pixel_maps([image.size]).maps
            self._keys = list(self._maps)
        except NoPixelMapError as error:
            self._no_map_error = error.with_traceback(None)
            negative = adapter.prepare([ImageOps.invert(self.image)], prompt)
            tensors = {key: value for key, value in self._inputs.items() if is_float_tensor(value)}
            self._keys = [key for key, value in tensors.items() if not torch.equal(value, negative[key])]
        if not self._keys:
            raise UnsupportedModelError(
                f"None of the inputs {list(self._inputs)} of {type(adapter.model).__name__} depends on the image."
            )

    @property
    def pixels(self) -> tuple[Tensor, ...]:
        r"""The image's pixel tensors, float32, each (1, \*its shape): Captum's ``inputs``."""
        return tuple(self._inputs[key].float()[None] for key in self._keys)

    def process(self, image: Image.Image) -> tuple[Tensor, ...]:
        r"""Return the pixel tensors of another image of the same size, as for :attr:`pixels`: Captum's ``baselines``.

        Raises:
            InvalidInputError: if the image has another size.
        """
        if image.size != self.image.size:
            raise InvalidInputError(
                f"The image must have the size of the explained one, {self.image.size}, got {image.size}."
            )
        inputs = self.adapter.prepare([image.convert("RGB")], self.prompt)
        return tuple(inputs[key].float()[None] for key in self._keys)

    def forward(self, *pixels_and_ids: Tensor) -> Tensor:
        r"""
        Score the answer for each example.

        Args:

            *pixels_and_ids (Tensor): One tensor for each of :attr:`pixels`, float (N, \*shape); then, optionally,
                        ``answer_ids`` and ``contrast_ids`` as in :meth:`PixelForward.forward`, which Captum calls
                        ``additional_forward_args``.

        Returns:
            **scores** (*Tensor*): float, of the shape of the output, see :class:`PixelForward`.

        Raises:
            InvalidInputError: if the number of tensors or a shape is wrong.
            InvalidOptionError: if the output takes no contrast.
            UnsupportedModelError: if Captum's layer method needs all examples in one pass and the model cannot batch
                them.
        """
        count = len(self._keys)
        if not count <= len(pixels_and_ids) <= count + 2:
            raise InvalidInputError(
                f"Expected {count} pixel tensors and up to 2 of ids, got {len(pixels_and_ids)} tensors."
            )
        pixels, ids = pixels_and_ids[:count], pixels_and_ids[count:]
        for key, tensor in zip(self._keys, pixels, strict=True):
            if tensor.shape[1:] != self._inputs[key].shape:
                raise InvalidInputError(
                    f"{key!r} must have shape (N, {', '.join(map(str, self._inputs[key].shape))}), got "
                    f"{tuple(tensor.shape)}."
                )
        answer_ids, contrast_ids = (*ids, None, None)[:2]
        examples = ((self._inputs | self._named(example), nullcontext()) for example in zip(*pixels, strict=True))
        return self._scores(examples, len(pixels[0]), answer_ids, contrast_ids)

    def _named(self, pixels: Iterable[Tensor]) -> dict[str, Tensor]:
        """Return one example's pixel tensors by name; elements that do not depend on the image keep their values."""
        result = {}
        for key, value in zip(self._keys, pixels, strict=True):
            value = avoid_blank_images(value)
            if key in self._maps:
                depends = (self._maps[key].gain != 0).reshape(value.shape).to(value.device)
                value = torch.where(depends, value, self._inputs[key].to(value))
            result[key] = value
        return result

    def _require_maps(self) -> list[PixelMap]:
        """Return the map of each pixel tensor, or raise if they could not be measured."""
        if self._no_map_error is not None:
            raise NoPixelMapError(
                f"{type(self.adapter.processor).__name__}'s pixel tensors have no coordinates in the image; attribute "
                "to them without fold and feature_mask."
            ) from self._no_map_error
        return list(self._maps.values())

    def fold(self, attributions: Tensor | Sequence[Tensor], grid: tuple[int, int]) -> Tensor:
        r"""
        Sum the attributions of the pixel tensors in a grid over the image.

        Args:

            attributions (Tensor or Sequence[Tensor]): float (N, \*shape) for each of :attr:`pixels`.
            grid (tuple[int, int]): Rows and columns of the map.

        Returns:
            **map** (*Tensor*): float32 (N, rows, columns).

        Raises:
            InvalidInputError: if the number of tensors or a shape is wrong.
            NoPixelMapError: if the coordinates of the processor's tensors cannot be measured.
        """
        maps = self._require_maps()
        parts = [attributions] if isinstance(attributions, Tensor) else list(attributions)
        if len(parts) != len(maps):
            raise InvalidInputError(f"Got {len(parts)} attributions for {len(maps)} pixel tensors; pass one for each.")
        return torch.stack([pixels.fold(part, grid) for pixels, part in zip(maps, parts, strict=True)]).sum(0)

    def feature_mask(self, segmentation: Tensor) -> tuple[Tensor, ...]:
        r"""
        Convert segments of the image to Captum's ``feature_mask``: each is one feature across all tensors, tiles and
        thumbnail.

        Args:

            segmentation (Tensor): int64 (height, width), segments of the image, numbered from 0.

        Returns:
            **masks** (*tuple[Tensor, ...]*): int64, each (1, \*shape). Padding is an additional feature, the last one.

        Raises:
            InvalidInputError: if the segmentation has another size than the image.
            NoPixelMapError: if the coordinates of the processor's tensors cannot be measured.
        """
        return tuple(pixels.feature_mask([segmentation])[None] for pixels in self._require_maps())
