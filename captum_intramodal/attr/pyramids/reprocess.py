r"""Resize images and run the model's processor on them again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from captum_intramodal._utils.captum import format_additional_forward_args
from captum_intramodal._utils.image import resize_images
from captum_intramodal.attr.pyramids.arguments import as_tuple
from captum_intramodal.attr.pyramids.base import Arguments
from captum_intramodal.attr.pyramids.interpolation import resample_pixel_values, resize_nearest
from captum_intramodal.errors import InvalidInputError, InvalidOptionError
from captum_intramodal.geometry.pixel_map import PixelMap, Prepare
from captum_intramodal.geometry.pixel_probe import measure_pixels

__all__ = ["Reprocess"]


class Reprocess:
    r"""
    Pyramid that resizes the original images and runs them through the model's own processor, whose pixel tensors are
    the inputs.

    It serves models whose processor is not differentiable, or whose pixel tensors (packed patches, tiles and thumbnail)
    have no spatial dimensions to resize. The region that each element of the tensors samples is measured at every scale
    (:func:`~captum_intramodal.geometry.measure_pixels`). Attributions return in the shape of the original tensor: each
    of its elements takes the attribution interpolated at its position in the image, shared equally by the color
    channels; padding gets 0.

    The inputs must be the processor's tensors for the images, as they are or with a batch dimension of 1 (which packed
    patches need, so that Captum does not take patches for examples). Noise belongs inside:
    ``MSEA(NoiseTunnel(method), pyramid=Reprocess(...))``.

    These arguments are given in the frame of the images: ``baselines``, a PIL image, one for each image, or a number;
    ``feature_mask``, int64 (height, width) segments, or one such tensor for each image. The first of the
    ``additional_forward_args`` are replaced by the processor's other tensors.

    Args:

        prepare (Callable): Function from a list of PIL images to the model's inputs by name, such as
                    ``lambda images: processor(images=images, text=[text], return_tensors="pt")``.
        images (Sequence[PIL.Image.Image]): The images.
        inputs (Sequence[str], optional): Names of the pixel tensors that are the inputs, in their order.
                    Default: ``("pixel_values",)``
        forward_args (Sequence[str], optional): Names of the first ``additional_forward_args``, in their order: those
                    that depend on the images' size, such as ``("input_ids", "image_grid_thw")``.
                    Default: ``()``

    Raises:
        TypeError: if ``inputs`` or ``forward_args`` is a string.

    Examples::

        >>> from captum.attr import InputXGradient
        >>> from captum_intramodal import MSEA, Reprocess
        >>> names = ("input_ids", "image_grid_thw", "mm_token_type_ids")
        >>> def forward(pixel_values, *others):  # one example at a time
        ...     return torch.cat([
        ...         model(pixel_values=pixels, **{name: row[None] for name, row in zip(names, rows)}).logits[:, -1]
        ...         for pixels, *rows in zip(pixel_values, *others)
        ...     ])
        >>> prepare = lambda images: adapter.prepare(images, "describe the picture.")
        >>> inputs = prepare([image])
        >>> pyramid = Reprocess(prepare, [image], forward_args=names)
        >>> msea = MSEA(InputXGradient(forward), scales=(0.5, 1.0), pyramid=pyramid)
        >>> forward_args = tuple(inputs[name] for name in names)
        >>> pixels = inputs["pixel_values"][None]
        >>> msea.attribute(pixels, target=7, additional_forward_args=forward_args).shape == pixels.shape
        True
    """

    def __init__(
        self,
        prepare: Prepare,
        images: Sequence[Image.Image],
        inputs: Sequence[str] = ("pixel_values",),
        forward_args: Sequence[str] = (),
    ) -> None:
        if isinstance(inputs, str) or isinstance(forward_args, str):
            raise TypeError(
                'inputs and forward_args must be sequences of names, such as ("pixel_values",), got a string.'
            )
        self.prepare = prepare
        self.images = [image.convert("RGB") for image in images]
        self.inputs = tuple(inputs)
        self.forward_args = tuple(forward_args)
        self._maps: dict[float, list[PixelMap]] = {}

    def down(
        self, inputs: tuple[Tensor, ...], kwargs: Mapping[str, Any], scale: float
    ) -> tuple[tuple[Tensor, ...], Arguments]:
        """Run the processor on the resized images; see :meth:`Pyramid.down`.

        Raises:
            InvalidInputError: if the inputs are not the processor's tensors for the images, or an argument is not given
                in the frame of the images.
            InvalidOptionError: if windows are given, or ``inputs`` names a tensor that does not depend on the images.
        """
        self._check_inputs(inputs)
        prepared = self.prepare(self._resized(self.images, scale))
        arguments = dict(kwargs)
        if self.forward_args:
            given = format_additional_forward_args(kwargs.get("additional_forward_args")) or ()
            names = self.forward_args
            arguments["additional_forward_args"] = (*(prepared[name] for name in names), *given[len(names) :])
        if windows := [name for name in ("sliding_window_shapes", "strides") if kwargs.get(name) is not None]:
            raise InvalidOptionError(
                f"Windows cannot slide over the processor's elements, got {', '.join(windows)}; pass windows as "
                "segments of the image, feature_mask (height, width), to FeatureAblation."
            )
        single = len(inputs) == 1
        if kwargs.get("feature_mask") is not None:
            masks = self._feature_masks(kwargs["feature_mask"], inputs, scale)
            arguments["feature_mask"] = masks[0] if single else masks
        baselines = kwargs.get("baselines")
        if baselines is not None and not all(isinstance(value, (int, float)) for value in as_tuple(baselines)):
            rows = self._baselines(baselines, inputs, scale)
            arguments["baselines"] = rows[0] if single else rows
        return self._like(prepared, inputs), arguments

    def back(
        self, attributions: tuple[Tensor, ...], like: tuple[Tensor, ...], scale: float, preserve_sum: bool
    ) -> tuple[Tensor, ...]:
        """Interpolate attributions at the elements of the original tensors; see :meth:`Pyramid.back`.

        Raises:
            InvalidInputError: if the attributions are not those of the pixel tensors.
        """
        if scale == 1:
            return attributions
        sources, targets = self._pixel_maps(scale), self._pixel_maps(1.0)
        shapes = [tuple(part.shape) for part in attributions]
        expected = [tuple(source.shape) for source in sources]
        if len(shapes) != len(expected) or any(s[-len(e) :] != e for s, e in zip(shapes, expected, strict=True)):
            raise InvalidInputError(
                f"Reprocess resizes attributions of the pixel tensors {self.inputs} only, at this scale of shapes "
                f"{expected}, got {shapes}; use Resize or LowPass for attributions of a layer."
            )
        return tuple(
            resample_pixel_values(part, source, target, preserve_sum)
            for part, source, target in zip(attributions, sources, targets, strict=True)
        )

    def _resized(self, images: Sequence[Image.Image], scale: float) -> list[Image.Image]:
        """Resize each image to the size that the original image in its place has at a scale."""
        sizes = [(max(1, round(i.width * scale)), max(1, round(i.height * scale))) for i in self.images]
        return resize_images([image.convert("RGB") for image in images], sizes)

    def _pixel_maps(self, scale: float) -> list[PixelMap]:
        """Measure the regions that the elements of each pixel tensor sample at a scale."""
        if scale not in self._maps:
            measured = measure_pixels(self.prepare, [image.size for image in self._resized(self.images, scale)])
            if missing := [name for name in self.inputs if name not in measured]:
                raise InvalidOptionError(
                    f"inputs must name tensors that depend on the images, of which there are {list(measured)}; got "
                    f"{missing}."
                )
            self._maps[scale] = [measured[name] for name in self.inputs]
        return self._maps[scale]

    def _like(self, prepared: Mapping[str, Any], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the processor's tensors with the leading dimensions, dtype and device of the inputs."""
        return tuple(
            prepared[name].reshape(*[1] * (tensor.ndim - prepared[name].ndim), *prepared[name].shape).to(tensor)
            for name, tensor in zip(self.inputs, inputs, strict=True)
        )

    def _check_inputs(self, inputs: tuple[Tensor, ...]) -> None:
        """Raise if the inputs are not the processor's tensors for the images."""
        if len(inputs) != len(self.inputs):
            raise InvalidInputError(f"Got {len(inputs)} inputs for the pixel tensors {self.inputs}; pass one for each.")
        expected = self._like(self.prepare(self.images), inputs)
        for name, given, prepared in zip(self.inputs, inputs, expected, strict=True):
            if given.shape != prepared.shape or not torch.allclose(given, prepared, atol=1e-3, equal_nan=True):
                raise InvalidInputError(
                    f"Expected the processor's {name!r} for the images, of shape {tuple(prepared.shape)}, got another "
                    f"tensor of shape {tuple(given.shape)}. A method that changes its inputs, such as NoiseTunnel, "
                    "belongs inside MSEA."
                )

    def _baselines(
        self, baselines: Image.Image | Sequence[Image.Image], inputs: tuple[Tensor, ...], scale: float
    ) -> tuple[Tensor, ...]:
        """Run the processor on one baseline image for each image, resized to a scale."""
        images = [baselines] * len(self.images) if isinstance(baselines, Image.Image) else baselines
        if (
            not isinstance(images, Sequence)
            or len(images) != len(self.images)
            or not all(isinstance(image, Image.Image) for image in images)
        ):
            raise InvalidInputError(
                f"baselines must be numbers, or a PIL image for each of {len(self.images)} images, got "
                f"{type(baselines).__name__}."
            )
        return self._like(self.prepare(self._resized(images, scale)), inputs)

    def _feature_masks(
        self, segmentations: Tensor | Sequence[Tensor], inputs: tuple[Tensor, ...], scale: float
    ) -> tuple[Tensor, ...]:
        """Convert one segmentation per image to a feature mask for each pixel tensor at a scale."""
        segments = [segmentations] if isinstance(segmentations, Tensor) else list(segmentations)
        sizes = [(image.height, image.width) for image in self.images]
        if [tuple(s.shape) for s in segments] != sizes:
            raise InvalidInputError(
                f"feature_mask must be one (height, width) segmentation per image, {sizes}; got "
                f"{[tuple(s.shape) for s in segments]}."
            )
        resized = [
            resize_nearest(s, (image.height, image.width))
            for s, image in zip(segments, self._resized(self.images, scale), strict=True)
        ]
        return tuple(
            mask.reshape(*[1] * (tensor.ndim - mask.ndim), *mask.shape).to(tensor.device)
            for mask, tensor in zip(
                (pixels.feature_mask(resized) for pixels in self._pixel_maps(scale)), inputs, strict=True
            )
        )
