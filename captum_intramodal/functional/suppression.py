r"""Suppression of interference: subtract from each token's map what the maps of its context explain."""

from __future__ import annotations

import torch
from torch import Tensor

from captum_intramodal._utils.memory import WORKING_MEMORY, items_within, run_in_chunks
from captum_intramodal.errors import InvalidInputError

__all__ = ["suppress_interference"]


def suppress_interference(
    maps: Tensor,
    weights: Tensor,
    least_squares: bool = True,
    strength: float = 1.0,
    relu_attributions: bool = True,
    working_memory: int = WORKING_MEMORY,
) -> Tensor:
    r"""
    Subtract from each token's map the weighted mean of its context's maps.

    With :math:`A_t` the map of token t and :math:`\omega_{tj}` the weight of the context token j,

    .. math::
        E_t = \frac{\sum_j \omega_{tj} A_j}{\sum_j \omega_{tj}}, \qquad
        s_t = \lambda \frac{\langle A_t, E_t \rangle}{\langle E_t, E_t \rangle}, \qquad
        A'_t = \max(0, A_t - s_t E_t)

    Without least squares :math:`s_t = \lambda`. A token keeps its map if it has no context, or if the weights or the
    maps of its context are all zero. The maps of the context are those given, not those already corrected. ARC
    (arXiv 2509.22415) and TAM (Li et al., ICCV 2025) differ in the weights alone.

    Args:

        maps (Tensor): One map per token, (T, ...), of any shape; all tokens of the sequence that may be context.
        weights (Tensor): :math:`\omega`, non-negative (T, T), 0 for tokens that are not context.
        least_squares (bool, optional): Fit the scale of the interference to each token.
                    Default: True
        strength (float, optional): :math:`\lambda`, factor of the interference that is subtracted; 0 leaves the maps
                    unchanged.
                    Default: 1.0
        relu_attributions (bool, optional): Clip the result at 0; turn it off for signed attributions.
                    Default: True
        working_memory (int, optional): Bytes that the tokens processed at a time may take.
                    Default: 16 MiB

    Returns:
        **maps** (*Tensor*): of the shape of ``maps``; float32, or float64 for float64 maps.

    Raises:
        InvalidInputError: if the shapes do not fit together.

    Examples::

        >>> from captum_intramodal.functional.suppression import suppress_interference
        >>> maps = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 1.0]])
        >>> suppress_interference(maps, torch.tensor([[0.0, 0.0], [1.0, 0.0]]))
        tensor([[1., 0., 0.],
                [0., 0., 1.]])
    """
    count = maps.shape[0] if maps.ndim else 0
    if maps.ndim < 2 or weights.shape != (count, count):
        raise InvalidInputError(
            f"maps must be (T, ...) and weights (T, T), got {tuple(maps.shape)} and {tuple(weights.shape)}."
        )
    flat = maps.flatten(1).to(torch.promote_types(maps.dtype, torch.float32))
    weights = weights.to(flat)
    result = torch.empty_like(flat)

    def suppress(rows: slice) -> None:
        total = weights[rows].sum(1, keepdim=True)
        interference = weights[rows] @ flat / total.where(total > 0, 1)
        energy = interference.square().sum(1, keepdim=True)
        has_interference = (total > 0) & (energy > 0)
        scale = torch.full_like(energy, strength)
        if least_squares:
            scale = scale * (flat[rows] * interference).sum(1, keepdim=True) / energy.where(has_interference, 1)
        scale = scale.where(has_interference, 0)
        result[rows] = flat[rows] - scale * interference

    for _ in run_in_chunks(suppress, count, items_within(working_memory, 3 * flat.element_size() * flat.shape[1])):
        pass
    if relu_attributions:
        result.clamp_min_(0)
    return result.reshape(maps.shape)
