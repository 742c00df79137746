r"""TODO."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from captum_intramodal._utils.captum import format_additional_forward_args
from captum_intramodal.attr.pyramids.arguments import as_tuple
from captum_intramodal.attr.pyramids.base import Arguments
from captum_intramodal.attr.pyramids.interpolation import resample_pixel_values, resize_nearest
from captum_intramodal.geometry.pixel_map import PixelMap, Prepare
from captum_intramodal.geometry.pixel_probe import measure_pixels

__all__ = ["Reprocess"]


class Reprocess:
    r"""
    The images have another size, and go through the model's own processor: its pixel tensors are the inputs.

    For models whose processor is not differentiable, or whose pixel tensors (packed patches, tiles and thumbnail) have
    no spatial dimensions that could be resized. What each element of the tensors samples is measured at every scale
    (:func:`~captum_intramodal.coordinates.measure_pixels`). Attributions come back in the shape of the original tensor:
    each of its elements takes what was attributed around its place in the image, in whichever tile. Colors share it
    equally; padding gets 0.

    The inputs must be what the processor makes of the images, by themselves or behind a batch dimension of 1 (which
    packed patches need, so that Captum does not take patches for examples). Noise belongs inside:
    ``MSEA(NoiseTunnel(method), pyramid=Reprocess(...))``.

    What follows, given in the frame of the images: ``baselines``, a PIL image, or one for each image (or a
    number); ``feature_mask``, int64 (height, width) segments, or one such tensor for each image. The first of
    ``additional_forward_args`` are replaced by the processor's other tensors.

    Args:

        prepare (Callable): From a list of PIL images to the model's inputs by name, such as
                    ``lambda images: processor(images=images, text=[text], return_tensors="pt")``.
        images (Sequence[PIL.Image.Image]): The images.
        inputs (Sequence[str], optional): Names of the pixel tensors that are the inputs, in their order.
                    Default: ``("pixel_values",)``
        forward_args (Sequence[str], optional): Names of the first ``additional_forward_args``, in their order; those
                    that depend on the images' size, such as ``("input_ids", "image_grid_thw")``.
                    Default: ``()``

    Examples::

        >>> def forward(pixel_values, input_ids, grid):  # one example after the other
        ...     return torch.cat([model(pixel_values=p, input_ids=i[None], image_grid_thw=g[None]).logits[:, -1]
        ...                       for p, i, g in zip(pixel_values, input_ids, grid)])
        >>> inputs = prepare([image])
        >>> pyramid = Reprocess(prepare, [image], forward_args=("input_ids", "image_grid_thw"))
        >>> msea = MSEA(InputXGradient(forward), scales=(0.5, 1.0), pyramid=pyramid)
        >>> attribution = msea.attribute(inputs["pixel_values"][None], target=7,
        ...                              additional_forward_args=(inputs["input_ids"], inputs["image_grid_thw"]))
    """

    def __init__(
        self,
        prepare: Prepare,
        images: Sequence[Image.Image],
        inputs: Sequence[str] = ("pixel_values",),
        forward_args: Sequence[str] = (),
    ) -> None:
        if isinstance(inputs, str) or isinstance(forward_args, str):
            raise TypeError('inputs and forward_args are sequences of names, such as ("pixel_values",).')
        self.prepare = prepare
        self.images = [image.convert("RGB") for image in images]
        self.inputs = tuple(inputs)
        self.forward_args = tuple(forward_args)
        self._maps: dict[float, list[PixelMap]] = {}

    def down(
        self, inputs: tuple[Tensor, ...], kwargs: Mapping[str, Any], scale: float
    ) -> tuple[tuple[Tensor, ...], Arguments]:
        """The processor's tensors of the resized images; see :meth:`Pyramid.down`.

        Raises:
            ValueError: the inputs are not what the processor makes of the images, or an argument is not given in the
                frame of the images.
        """
        self._check_inputs(inputs)
        prepared = self.prepare(self._resized(self.images, scale))
        arguments = dict(kwargs)
        if self.forward_args:
            given = format_additional_forward_args(kwargs.get("additional_forward_args")) or ()
            names = self.forward_args
            arguments["additional_forward_args"] = (*(prepared[name] for name in names), *given[len(names) :])
        if bad := [name for name in ("sliding_window_shapes", "strides") if kwargs.get(name) is not None]:
            raise ValueError(
                f"{', '.join(bad)}: no window slides over the processor's elements; pass windows as segments of the "
                "image, feature_mask (height, width), to FeatureAblation."
            )
        single = len(inputs) == 1
        if kwargs.get("feature_mask") is not None:
            masks = self._feature_masks(kwargs["feature_mask"], inputs, scale)
            arguments["feature_mask"] = masks[0] if single else masks
        if (baselines := kwargs.get("baselines")) is not None:
            if isinstance(baselines, Image.Image):
                baselines = [baselines] * len(self.images)
            if isinstance(baselines, Sequence) and all(isinstance(image, Image.Image) for image in baselines):
                rows = self._like(self.prepare(self._resized(baselines, scale)), inputs)
                arguments["baselines"] = rows[0] if single else rows
            elif not all(isinstance(value, (int, float)) for value in as_tuple(baselines)):
                raise ValueError(
                    "baselines must be numbers, or a PIL image for each image, which goes through the processor at "
                    f"every scale; got {type(baselines).__name__}."
                )
        return self._like(prepared, inputs), arguments

    def back(
        self, attributions: tuple[Tensor, ...], like: tuple[Tensor, ...], scale: float, preserve_sum: bool
    ) -> tuple[Tensor, ...]:
        """Attributions at the elements of the original tensors; see :meth:`Pyramid.back`.

        Raises:
            ValueError: attributions that are not of the pixel tensors.
        """
        if scale == 1:
            return attributions
        sources, targets = self._pixels(scale), self._pixels(1.0)
        shapes = [tuple(part.shape) for part in attributions]
        expected = [tuple(source.shape) for source in sources]
        if len(shapes) != len(expected) or any(s[-len(e) :] != e for s, e in zip(shapes, expected, strict=True)):
            raise ValueError(
                f"Reprocess brings back attributions of pixel tensors {self.inputs}, here of shapes {expected}; got "
                f"{shapes}. A layer's attributions need a model and pyramid with the same layer at all scales."
            )
        return tuple(
            resample_pixel_values(part, source, target, preserve_sum)
            for part, source, target in zip(attributions, sources, targets, strict=True)
        )

    def _resized(self, images: Sequence[Image.Image], scale: float) -> list[Image.Image]:
        sizes = [(max(1, round(i.width * scale)), max(1, round(i.height * scale))) for i in self.images]
        return [
            image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)
            for image, size in zip((p.convert("RGB") for p in images), sizes, strict=True)
        ]

    def _pixels(self, scale: float) -> list[PixelMap]:
        """What the elements of each pixel tensor sample."""
        if scale not in self._maps:
            measured = measure_pixels(self.prepare, [image.size for image in self._resized(self.images, scale)])
            if missing := [name for name in self.inputs if name not in measured]:
                raise ValueError(f"The processor's tensors that follow the images are {list(measured)}, not {missing}.")
            self._maps[scale] = [measured[name] for name in self.inputs]
        return self._maps[scale]

    def _like(self, prepared: Mapping[str, Any], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The processor's tensors with the leading dimensions, dtype and device of the inputs."""
        return tuple(
            prepared[name].reshape(*[1] * (tensor.ndim - prepared[name].ndim), *prepared[name].shape).to(tensor)
            for name, tensor in zip(self.inputs, inputs, strict=True)
        )

    def _check_inputs(self, inputs: tuple[Tensor, ...]) -> None:
        if len(inputs) != len(self.inputs):
            raise ValueError(f"{len(inputs)} inputs for the pixel tensors {self.inputs}.")
        expected = self._like(self.prepare(self.images), inputs)
        for name, given, made in zip(self.inputs, inputs, expected, strict=True):
            if given.shape != made.shape or not torch.allclose(given, made, atol=1e-3, equal_nan=True):
                raise ValueError(
                    f"The input of shape {tuple(given.shape)} is not {name!r}, of shape {tuple(made.shape)}, that the "
                    "processor makes of the images. What changes inputs, such as NoiseTunnel, belongs inside MSEA."
                )

    def _feature_masks(
        self, segmentations: Tensor | Sequence[Tensor], inputs: tuple[Tensor, ...], scale: float
    ) -> tuple[Tensor, ...]:
        segments = [segmentations] if isinstance(segmentations, Tensor) else list(segmentations)
        sizes = [(image.height, image.width) for image in self.images]
        if [tuple(s.shape) for s in segments] != sizes:
            raise ValueError(
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
                (pixels.feature_mask(resized) for pixels in self._pixels(scale)), inputs, strict=True
            )
        )
