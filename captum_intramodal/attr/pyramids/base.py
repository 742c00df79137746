r"""Define the interface of a pyramid."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

__all__ = ["Arguments", "Pyramid", "Size"]

# Arguments of an attribution method's ``attribute``, by name.
Arguments = dict[str, Any]

# The spatial dimensions of a tensor, of which there are 1 to 3; empty if it has none.
Size = tuple[int, ...]


class Pyramid(Protocol):
    r"""
    Protocol of the pyramids of :class:`~captum_intramodal.MSEA`. Any object with these two methods is a pyramid.

    Pyramids leave arguments that belong to a layer's output (``layer_mask``, ``layer_baselines``, ``neuron_selector``)
    as they are: MSEA measures the layer's size at both scales and adapts them itself.
    """

    def down(
        self, inputs: tuple[Tensor, ...], kwargs: Mapping[str, Any], scale: float
    ) -> tuple[tuple[Tensor, ...], Arguments]:
        r"""
        Bring the inputs and the arguments that depend on them to a scale.

        Args:

            inputs (tuple[Tensor, ...]): The original inputs, (N, ...).
            kwargs (Mapping): The other arguments of the inner method's ``attribute``, by name.
            scale (float): Factor of the size.

        Returns:
            **inputs, arguments** (*tuple[tuple[Tensor, ...], dict]*): inputs and arguments at this scale.
        """

    def back(
        self, attributions: tuple[Tensor, ...], like: tuple[Tensor, ...], scale: float, preserve_sum: bool
    ) -> tuple[Tensor, ...]:
        r"""
        Bring attributions at a scale back to the original size.

        Args:

            attributions (tuple[Tensor, ...]): Attributions of the inner method at this scale.
            like (tuple[Tensor, ...]): For each of them, a tensor of the size to return to: the original input if the
                        attribution has the size of the scaled input, else (for a layer) the attribution at the scale
                        closest to 1.
            scale (float): Factor of the size.
            preserve_sum (bool): Whether to preserve the attributions' total rather than their values.

        Returns:
            **attributions** (*tuple[Tensor, ...]*): of the sizes of ``like``.
        """
