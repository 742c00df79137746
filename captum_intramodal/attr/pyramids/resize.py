r"""Resize an input, the arguments that depend on its size, and attributions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor

from captum_intramodal.attr.pyramids.arguments import ends_with, follow_forward_args, follow_inputs, input_sizes
from captum_intramodal.attr.pyramids.base import Arguments, Size
from captum_intramodal.attr.pyramids.interpolation import resize_linear, resize_nearest
from captum_intramodal.errors import InvalidInputError, InvalidOptionError

__all__ = ["Resize"]


class Resize:
    r"""
    Pyramid that resizes the input, for models of any input size.

    Arguments of the input's spatial size follow it: ``baselines`` (tensors of any number of rows, including
    distributions and what a callable returns) by interpolation; ``feature_mask`` by nearest neighbor;
    ``additional_forward_args`` by interpolation if floating-point, else by nearest neighbor. ``sliding_window_shapes``
    and ``strides`` are scaled, rounded and clamped between 1 and the input's size, except for the channel dimension.
    Inputs without spatial dimensions, and numbers, stay as they are.

    Args:

        interpolate_mode (str, optional): Interpolation on the way down and back: ``'linear'`` (bilinear or trilinear
                    for 2 or 3 spatial dimensions) or ``'nearest'``. Linear shrinking is antialiased if torch supports
                    it.
                    Default: ``'linear'``
        inputs (Sequence[int], optional): Indices of the inputs to scale; (0,) for an image and embeddings (N, tokens,
                    width), whose width is not a spatial size.
                    Default: None, those with one to three spatial dimensions.
        forward_args (Sequence[int], optional): Indices of the ``additional_forward_args`` to scale.
                    Default: None, tensors with at least a batch dimension and the spatial size of an input.

    Raises:
        InvalidOptionError: if ``interpolate_mode`` is unknown.

    Examples::

        >>> from captum.attr import InputXGradient
        >>> from captum_intramodal import MSEA, Resize
        >>> net = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten(), torch.nn.Linear(12, 3))
        >>> msea = MSEA(InputXGradient(net), scales=(0.5, 1.0), pyramid=Resize("nearest"))
        >>> msea.attribute(torch.rand(1, 3, 8, 8), target=1).shape
        torch.Size([1, 3, 8, 8])
    """

    def __init__(
        self,
        interpolate_mode: Literal["linear", "nearest"] = "linear",
        inputs: Sequence[int] | None = None,
        forward_args: Sequence[int] | None = None,
    ) -> None:
        if interpolate_mode not in ("linear", "nearest"):
            raise InvalidOptionError(f"interpolate_mode must be 'linear' or 'nearest', got {interpolate_mode!r}.")
        self.interpolate_mode = interpolate_mode
        self.inputs = inputs
        self.forward_args = forward_args

    def down(
        self, inputs: tuple[Tensor, ...], kwargs: Mapping[str, Any], scale: float
    ) -> tuple[tuple[Tensor, ...], Arguments]:
        """Resize the inputs and the arguments that follow them; see :meth:`Pyramid.down`.

        Raises:
            InvalidInputError: if no input has spatial dimensions.
        """
        if scale == 1:
            return inputs, dict(kwargs)
        sizes = input_sizes(inputs, self.inputs)
        scaled = {size: tuple(max(1, round(side * scale)) for side in size) for size in sizes if size}

        def resize(value: Any, size: Size) -> Any:
            return self._resize(value, scaled[size]) if ends_with(value, size) else value

        def resize_mask(value: Any, size: Size) -> Any:
            return resize_nearest(value, scaled[size]) if ends_with(value, size) else value

        def resize_window(value: int | Size, size: Size) -> Size:
            channel, *sides = (value,) * (len(size) + 1) if isinstance(value, int) else value
            moved = zip(sides, size, scaled[size], strict=True)
            return (channel, *(min(max(1, round(side * new / old)), new) for side, old, new in moved))

        changes = {
            "baselines": resize,
            "feature_mask": resize_mask,
            "sliding_window_shapes": resize_window,
            "strides": resize_window,
        }
        arguments = follow_forward_args(follow_inputs(kwargs, sizes, changes), sizes, resize, self.forward_args)
        return tuple(resize(t, size) if size else t for t, size in zip(inputs, sizes, strict=True)), arguments

    def back(
        self, attributions: tuple[Tensor, ...], like: tuple[Tensor, ...], scale: float, preserve_sum: bool
    ) -> tuple[Tensor, ...]:
        """Resize attributions to the original size; see :meth:`Pyramid.back`.

        Raises:
            InvalidInputError: if they differ from ``like`` in dimensions other than spatial ones.
        """
        return tuple(self._back(part, other, preserve_sum) for part, other in zip(attributions, like, strict=True))

    def _back(self, part: Tensor, like: Tensor, preserve_sum: bool) -> Tensor:
        """Resize one tensor of attributions."""
        if part.shape[1:] == like.shape[1:]:
            return part
        if part.ndim != like.ndim or part.ndim < 3 or part.shape[1] != like.shape[1]:
            raise InvalidInputError(
                f"Attributions of shape {tuple(part.shape)} at one scale cannot be resized to {tuple(like.shape)}, "
                "which differs in more than spatial dimensions; pyramid=LowPass() keeps all sizes."
            )
        back = self._resize(part, like.shape[2:])
        return back * (math.prod(part.shape[2:]) / math.prod(like.shape[2:])) if preserve_sum else back

    def _resize(self, value: Tensor, size: Sequence[int]) -> Tensor:
        """Resize the last dimensions."""
        if tuple(value.shape[-len(size) :]) == tuple(size):
            return value
        if self.interpolate_mode == "nearest" or not value.is_floating_point():
            return resize_nearest(value, size)
        return resize_linear(value, size)
