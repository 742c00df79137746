r"""TODO."""

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
    The input loses what a smaller one could not show, and keeps its size: for models of a fixed input size.

    Inputs are shrunk (antialiased where torch can) and enlarged again; ``baselines`` of their spatial size and
    floating-point ``additional_forward_args`` alike. Everything else stays as it is, attributions too. An image has
    nothing that an enlarged one would show and it does not: at scales above 1 it is left as it is.

    Args:

        inputs (Sequence[int], optional): Which inputs go to a scale, counted from 0; (0,) for an image and embeddings
                    (N, tokens, width), whose width is no size.
                    Default: None, those with one to three spatial dimensions.
        forward_args (Sequence[int], optional): Which of ``additional_forward_args`` follow, counted from 0.
                    Default: None, tensors of at least a batch dimension that end with the spatial size of an input.

    Examples::

        >>> msea = MSEA(IntegratedGradients(vit), scales=(0.25, 0.5, 1.0), pyramid=LowPass())
    """

    def __init__(self, inputs: Sequence[int] | None = None, forward_args: Sequence[int] | None = None) -> None:
        self.inputs = inputs
        self.forward_args = forward_args

    def down(
        self, inputs: tuple[Tensor, ...], kwargs: Mapping[str, Any], scale: float
    ) -> tuple[tuple[Tensor, ...], Arguments]:
        """The inputs without their high frequencies; see :meth:`Pyramid.down`.

        Raises:
            ValueError: no input with spatial dimensions.
        """
        if scale >= 1:
            return inputs, dict(kwargs)
        sizes = input_sizes(inputs, self.inputs)

        def image(value: Any, size: Size) -> Any:
            if not ends_with(value, size) or not value.is_floating_point():
                return value
            return resize_linear(resize_linear(value, [max(1, round(side * scale)) for side in size]), size)

        arguments = follow_forward_args(
            follow_inputs(kwargs, sizes, {"baselines": image}), sizes, image, self.forward_args
        )
        return tuple(image(t, size) if size else t for t, size in zip(inputs, sizes, strict=True)), arguments

    def back(
        self, attributions: tuple[Tensor, ...], like: tuple[Tensor, ...], scale: float, preserve_sum: bool
    ) -> tuple[Tensor, ...]:
        """The attributions, which have the size of the original; see :meth:`Pyramid.back`."""
        return attributions
