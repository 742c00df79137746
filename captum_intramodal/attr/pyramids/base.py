r"""TODO."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

__all__ = ["Arguments", "Pyramid", "Size"]

Arguments = dict[str, Any]


Size = tuple[int, ...]


class Pyramid(Protocol):
    r"""
    What :class:`~captum_intramodal.MSEA` asks of the way to a scale and back. Any object with these two methods is one.

    Arguments that belong to a layer's output (``layer_mask``, ``layer_baselines``, ``neuron_selector``) are no concern
    of a pyramid: MSEA measures the layer at both scales.
    """

    def down(
        self, inputs: tuple[Tensor, ...], kwargs: Mapping[str, Any], scale: float
    ) -> tuple[tuple[Tensor, ...], Arguments]:
        r"""
        Args:

            inputs (tuple[Tensor, ...]): The originals, dimension 0 the examples.
            kwargs (Mapping): The other arguments of the inner method's ``attribute``, by name.
            scale (float): Factor of the size.

        Returns:
            *tuple*: inputs and arguments at this scale.
        """

    def back(
        self, attributions: tuple[Tensor, ...], like: tuple[Tensor, ...], scale: float, preserve_sum: bool
    ) -> tuple[Tensor, ...]:
        r"""
        Args:

            attributions (tuple[Tensor, ...]): What the inner method returned at this scale.
            like (tuple[Tensor, ...]): For each of them a tensor of the size to come back to: the original input where
                        the attribution has the size of the scaled one, else (a layer's) the attribution at the scale
                        closest to 1.
            scale (float): Factor of the size.
            preserve_sum (bool): Whether the attributions' total stays the same, else their values do.

        Returns:
            *tuple[Tensor, ...]*: attributions of the size of ``like``.
        """
