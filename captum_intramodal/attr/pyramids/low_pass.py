r"""Remove an input's fine detail without changing its size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from captum_intramodal.attr.pyramids.arguments import ends_with, follow_forward_args, follow_inputs, input_sizes
from captum_intramodal.attr.pyramids.base import Arguments, Size
from captum_intramodal.attr.pyramids.interpolation import resize_linear

__all__ = ["LowPass"]


class LowPass:
    r"""
    Pyramid that removes the detail that a smaller input would not contain and keeps the input's size, for models of a
    fixed input size.

    Inputs are shrunk (antialiased if torch supports it) and enlarged again, and so are ``baselines`` of their spatial
    size and floating-point ``additional_forward_args``. Everything else stays as it is, including attributions.
    Enlarging adds no detail, so scales above 1 leave the input as it is.

    Args:

        inputs (Sequence[int], optional): Indices of the inputs to scale; (0,) for an image and embeddings (N, tokens,
                    width), whose width is not a spatial size.
                    Default: None, those with one to three spatial dimensions.
        forward_args (Sequence[int], optional): Indices of the ``additional_forward_args`` to scale.
                    Default: None, tensors with at least a batch dimension and the spatial size of an input.

    Examples::

        >>> from captum.attr import InputXGradient
        >>> from captum_intramodal import MSEA, LowPass
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 2))  # accepts one size only
        >>> msea = MSEA(InputXGradient(net), scales=(0.25, 0.5, 1.0), pyramid=LowPass())
        >>> msea.attribute(torch.rand(1, 3, 8, 8), target=1).shape
        torch.Size([1, 3, 8, 8])
    """

    def __init__(self, inputs: Sequence[int] | None = None, forward_args: Sequence[int] | None = None) -> None:
        self.inputs = inputs
        self.forward_args = forward_args

    def down(
        self, inputs: tuple[Tensor, ...], kwargs: Mapping[str, Any], scale: float
    ) -> tuple[tuple[Tensor, ...], Arguments]:
        """Remove the inputs' high frequencies; see :meth:`Pyramid.down`.

        Raises:
            InvalidInputError: if no input has spatial dimensions.
        """
        if scale >= 1:
            return inputs, dict(kwargs)
        sizes = input_sizes(inputs, self.inputs)

        def smooth(value: Any, size: Size) -> Any:
            if not ends_with(value, size) or not value.is_floating_point():
                return value
            return resize_linear(resize_linear(value, [max(1, round(side * scale)) for side in size]), size)

        arguments = follow_inputs(kwargs, sizes, {"baselines": smooth})
        arguments = follow_forward_args(arguments, sizes, smooth, self.forward_args)
        return tuple(smooth(t, size) if size else t for t, size in zip(inputs, sizes, strict=True)), arguments

    def back(
        self, attributions: tuple[Tensor, ...], like: tuple[Tensor, ...], scale: float, preserve_sum: bool
    ) -> tuple[Tensor, ...]:
        """Return the attributions, which already have the original size; see :meth:`Pyramid.back`."""
        return attributions
