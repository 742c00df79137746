r"""How an input goes to a scale, what follows it there, and how attributions come back: the pyramids of MSEA."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor

from captum_intramodal.attr.pyramids.arguments import ends_with, follow_forward_args, follow_inputs, input_sizes
from captum_intramodal.attr.pyramids.base import Arguments, Size
from captum_intramodal.attr.pyramids.interpolation import resize_linear, resize_nearest

__all__ = ["Resize"]


class Resize:
    r"""
    The input itself has another size: for models that take any.

    What follows, where it has the spatial size of its input: ``baselines`` (tensors of any number of rows, also a
    distribution's; what a callable returns), by interpolation; ``feature_mask``, by nearest neighbor;
    ``additional_forward_args``, floating-point ones by interpolation, others by nearest neighbor.
    ``sliding_window_shapes`` and ``strides`` are multiplied, rounded and kept within 1 and the input's size; the
    channel dimension is left alone. Inputs without spatial dimensions, and numbers, stay as they are.

    Args:

        interpolate_mode (str, optional): ``'linear'`` (bilinear or trilinear as the input has 2 or 3 spatial
                    dimensions) or ``'nearest'``, for the way down and back; shrinking is antialiased where torch can.
                    Default: ``'linear'``
        inputs (Sequence[int], optional): Which inputs go to a scale, counted from 0; (0,) for an image and embeddings
                    (N, tokens, width), whose width is no size.
                    Default: None, those with one to three spatial dimensions.
        forward_args (Sequence[int], optional): Which of ``additional_forward_args`` follow, counted from 0.
                    Default: None, tensors of at least a batch dimension that end with the spatial size of an input.

    Examples::

        >>> msea = MSEA(IntegratedGradients(net), scales=(0.5, 1.0), pyramid=Resize("nearest"))
    """

    def __init__(
        self,
        interpolate_mode: Literal["linear", "nearest"] = "linear",
        inputs: Sequence[int] | None = None,
        forward_args: Sequence[int] | None = None,
    ) -> None:
        if interpolate_mode not in ("linear", "nearest"):
            raise ValueError(f"interpolate_mode must be 'linear' or 'nearest', got {interpolate_mode!r}.")
        self.interpolate_mode = interpolate_mode
        self.inputs = inputs
        self.forward_args = forward_args

    def down(
        self, inputs: tuple[Tensor, ...], kwargs: Mapping[str, Any], scale: float
    ) -> tuple[tuple[Tensor, ...], Arguments]:
        """The inputs resized, but at scale 1, and what follows them; see :meth:`Pyramid.down`.

        Raises:
            ValueError: no input with spatial dimensions.
        """
        if scale == 1:
            return inputs, dict(kwargs)
        sizes = input_sizes(inputs, self.inputs)
        scaled = {size: tuple(max(1, round(side * scale)) for side in size) for size in sizes if size}

        def image(value: Any, size: Size) -> Any:
            return self._resize(value, scaled[size]) if ends_with(value, size) else value

        def mask(value: Any, size: Size) -> Any:
            return resize_nearest(value, scaled[size]) if ends_with(value, size) else value

        def window(value: int | Size, size: Size) -> Size:
            channel, *sides = (value,) * (len(size) + 1) if isinstance(value, int) else value
            moved = zip(sides, size, scaled[size], strict=True)
            return (channel, *(min(max(1, round(side * new / old)), new) for side, old, new in moved))

        changes = {"baselines": image, "feature_mask": mask, "sliding_window_shapes": window, "strides": window}
        arguments = follow_forward_args(follow_inputs(kwargs, sizes, changes), sizes, image, self.forward_args)
        return tuple(image(t, size) if size else t for t, size in zip(inputs, sizes, strict=True)), arguments

    def back(
        self, attributions: tuple[Tensor, ...], like: tuple[Tensor, ...], scale: float, preserve_sum: bool
    ) -> tuple[Tensor, ...]:
        """Attributions resized; see :meth:`Pyramid.back`.

        Raises:
            ValueError: they differ from ``like`` in other than spatial dimensions.
        """
        return tuple(self._back(part, other, preserve_sum) for part, other in zip(attributions, like, strict=True))

    def _back(self, part: Tensor, like: Tensor, preserve_sum: bool) -> Tensor:
        if part.shape[1:] == like.shape[1:]:
            return part
        if part.ndim != like.ndim or part.ndim < 3 or part.shape[1] != like.shape[1]:
            raise ValueError(
                f"Attributions of shape {tuple(part.shape)} at one scale and {tuple(like.shape)} at another cannot be "
                "aligned, as other than spatial dimensions differ; pyramid=LowPass() keeps all sizes."
            )
        back = self._resize(part, like.shape[2:])
        return back * (math.prod(part.shape[2:]) / math.prod(like.shape[2:])) if preserve_sum else back

    def _resize(self, value: Tensor, size: Sequence[int]) -> Tensor:
        """The last dimensions brought to a size."""
        if tuple(value.shape[-len(size) :]) == tuple(size):
            return value
        if self.interpolate_mode == "nearest" or not value.is_floating_point():
            return resize_nearest(value, size)
        return resize_linear(value, size)
