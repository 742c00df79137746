r"""TODO."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext

import torch
from PIL import Image, ImageOps
from torch import Tensor

from captum_intramodal.adapter.model_adapter import ModelAdapter
from captum_intramodal.adapter.prompts import Prompt
from captum_intramodal.attr.answer_forward import AnswerForward, Output, avoid_blank_images, is_float_tensor
from captum_intramodal.geometry.pixel_map import PixelMap

__all__ = ["ProcessedPixelForward"]


class ProcessedPixelForward(AnswerForward):
    r"""
    Logits or log-probabilities of an answer's tokens as a function of the processor's own pixel tensors, for Captum
    methods where no gradient passes through the image processor.

    Each tensor gets a dimension of examples in front, (N, *its shape), whatever its own first dimension is: an image's
    patches or tiles stay together in Captum's batches. Elements that show nothing of the image, such as padding, keep
    their values. :meth:`fold` brings attributions back into the image's frame, and :meth:`feature_mask` segments of
    the image to its pixel tensors, through the measured coordinates.

    Args:

        adapter (ModelAdapter): The model and its processor.
        prompt (str or Sequence[Mapping]): The question about the image.
        answer (str or Sequence[int]): The answer whose tokens are predicted, teacher-forced.
        image (PIL.Image.Image): The image.
        output (str, optional): See :class:`PixelForward`.
                    Default: ``'logits'``
        contrast (str or Sequence[int], optional): See :class:`PixelForward`.
                    Default: None

    Raises:
        ValueError: none of the processor's tensors depends on the image.

    Examples::

        >>> forward = ProcessedPixelForward(adapter, "describe the picture.", "a dog.", image, "token_log_probs")
        >>> black = forward.process(Image.new("RGB", image.size))
        >>> attributions = IntegratedGradients(forward).attribute(forward.pixels, baselines=black, target=1)
        >>> forward.fold(attributions, grid=(24, 32)).shape            # (1, 24, 32)

        >>> superpixels = torch.arange(12).reshape(3, 4).repeat_interleave(64, 0).repeat_interleave(64, 1)
        >>> mask = forward.feature_mask(superpixels)                   # an image of 256 x 192
        >>> KernelShap(forward).attribute(forward.pixels, baselines=black, target=1, feature_mask=mask)
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
        inputs = adapter.prepare([self.image], prompt)
        self._inputs = inputs
        self._unmeasured = ""
        self._maps: dict[str, PixelMap] = {}
        try:
            self._maps = adapter.pixel_maps([image.size]).maps
            self._keys = list(self._maps)
        except ValueError as error:
            self._unmeasured = str(error)
            negative = adapter.prepare([ImageOps.invert(self.image)], prompt)
            tensors = {key: value for key, value in inputs.items() if is_float_tensor(value)}
            self._keys = [key for key, value in tensors.items() if not torch.equal(value, negative[key])]
        if not self._keys:
            raise ValueError(f"None of the inputs of {type(adapter.model).__name__} depends on the image.")

    @property
    def pixels(self) -> tuple[Tensor, ...]:
        """The image's pixel tensors, float32, each (1, *its shape): Captum's ``inputs``."""
        return tuple(self._inputs[key].float()[None] for key in self._keys)

    def process(self, image: Image.Image) -> tuple[Tensor, ...]:
        """Another image of the same size as pixel tensors, float32, each (1, *its shape): Captum's ``baselines``."""
        if image.size != self.image.size:
            raise ValueError(f"An image of {image.size} pixels where {self.image.size} are explained.")
        inputs = self.adapter.prepare([image.convert("RGB")], self.prompt)
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
        """By name, with the elements that show nothing of the image as they are."""
        result = {}
        for key, value in zip(self._keys, pixels, strict=True):
            value = avoid_blank_images(value)
            if key in self._maps:
                shows = (self._maps[key].gain != 0).reshape(value.shape).to(value.device)
                value = torch.where(shows, value, self._inputs[key].to(value))
            result[key] = value
        return result

    def _measured(self) -> list[PixelMap]:
        if self._unmeasured:
            raise ValueError(f"The pixel tensors have no coordinates in the image. {self._unmeasured}")
        return list(self._maps.values())

    def fold(self, attributions: Tensor | Sequence[Tensor], grid: tuple[int, int]) -> Tensor:
        r"""
        Attributions of the pixel tensors, summed up in the frame of the image.

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
        Segments of the image as Captum's ``feature_mask``: one feature each, in all tensors, tiles and the thumbnail.

        Args:

            segmentation (Tensor): int64 (height, width) of the image, segments counted from 0.

        Returns:
            **masks** (*tuple[Tensor, ...]*):
                int64, each (1, *shape). Padding is one feature more, the last.

        Raises:
            ValueError: a segmentation of another size; the processor's coordinates cannot be measured.
        """
        return tuple(pixels.feature_mask([segmentation])[None] for pixels in self._measured())
