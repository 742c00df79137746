r"""TODO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from captum_intramodal._utils.memory import WORKING_MEMORY, items_within, run_in_chunks
from captum_intramodal.functional.rank_overlap import NORMALIZATIONS

__all__ = [
    "WEIGHTINGS",
    "ContextRelevance",
    "RankingPosition",
    "Weighting",
    "check_arc_options",
    "check_positions",
    "suppress_interference",
]

Weighting = Literal[
    "uniform",
    "irrelevance",
    "relevance",
    "text_activation",
    "irrelevance*text_activation",
    "relevance*text_activation",
]


WEIGHTINGS: tuple[str, ...] = get_args(Weighting)


RankingPosition = Literal["token", "prediction"]


@dataclass(frozen=True)
class ContextRelevance:
    r"""
    How a sequence's text tokens relate to each other; row t, column j: the context token j of the token t.

    Attributes:

        relevance (Tensor): Rank-biased overlap of the two tokens' rankings, float32 (T, T) in [0, 1], symmetric.
        text_activation (Tensor): :math:`r_t(j) = \max(0, \mathrm{norm}(h_j) \cdot w_t)`, float32 (T, T).
        context (Tensor): bool (T, T): whether j is context of t: earlier in the sequence and another token.
    """

    relevance: Tensor
    text_activation: Tensor
    context: Tensor

    def weights(self, weighting: Weighting) -> Tensor:
        """Weights of the context in the interference, float32 (T, T), zero outside the context; rows not normalized."""
        if weighting not in WEIGHTINGS:
            raise ValueError(f"weighting must be one of {WEIGHTINGS}, got {weighting!r}.")
        factors = {
            "uniform": torch.ones_like(self.relevance),
            "irrelevance": 1 - self.relevance,
            "relevance": self.relevance,
            "text_activation": self.text_activation,
        }
        result = self.context.float()
        for name in weighting.split("*"):
            result = result * factors[name]
        return result

    def first(self, count: int) -> ContextRelevance:
        """Of the first ``count`` tokens."""
        part = (slice(count), slice(count))
        return ContextRelevance(self.relevance[part], self.text_activation[part], self.context[part])


def suppress_interference(
    maps: Tensor,
    weights: Tensor,
    least_squares: bool = True,
    strength: float = 1.0,
    relu_attributions: bool = True,
    working_memory: int = WORKING_MEMORY,
) -> Tensor:
    r"""
    Takes from each token's map what its context explains of it.

    With :math:`A_t` the map of token t and :math:`\omega_{tj}` the weight of the context token j,

    .. math::
        E_t = \frac{\sum_j \omega_{tj} A_j}{\sum_j \omega_{tj}}, \qquad
        s_t = \lambda \frac{\langle A_t, E_t \rangle}{\langle E_t, E_t \rangle}, \qquad
        A'_t = \max(0, A_t - s_t E_t)

    Without least squares :math:`s_t = \lambda`. A token without context, or whose context has no weight or no map,
    keeps its map.

    Args:

        maps (Tensor): One map per token, (T, ...), any shape; all tokens of the sequence that may be context.
        weights (Tensor): :math:`\omega`, non-negative, float32 (T, T).
        least_squares (bool, optional): Fit the scale to each token.
                    Default: True
        strength (float, optional): :math:`\lambda`, how much of the interference is taken away; 0 leaves the maps.
                    Default: 1.0
        relu_attributions (bool, optional): Clip the result at 0. Turn it off for signed attributions.
                    Default: True
        working_memory (int, optional): Bytes that the tokens which are worked on at a time may take.
                    Default: 16 MiB

    Returns:
        *Tensor* of the shape of ``maps``, float32.

    Raises:
        ValueError: shapes that do not belong together.

    Examples::

        >>> maps = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 1.0]])
        >>> suppress_interference(maps, torch.tensor([[0.0, 0.0], [1.0, 0.0]]))
        tensor([[1., 0., 0.],
                [0., 0., 1.]])
    """
    count = maps.shape[0] if maps.ndim else 0
    if maps.ndim < 2 or weights.shape != (count, count):
        raise ValueError(
            f"maps must be (T, ...) and weights (T, T), got {tuple(maps.shape)} and {tuple(weights.shape)}."
        )
    flat = maps.reshape(count, -1).float()
    weights = weights.to(flat)
    result = torch.empty_like(flat)

    def suppress(rows: slice) -> None:
        total = weights[rows].sum(1, keepdim=True)
        interference = weights[rows] @ flat / total.clamp_min(torch.finfo(torch.float32).tiny)
        energy = interference.square().sum(1, keepdim=True)
        scale = torch.full_like(energy, strength)
        if least_squares:
            scale = scale * (flat[rows] * interference).sum(1, keepdim=True) / energy
        scale = torch.where((total > 0) & (energy > 0), scale, 0.0)
        torch.sub(flat[rows], scale * interference, out=result[rows])

    for _ in run_in_chunks(suppress, count, items_within(working_memory, 12 * flat.shape[1])):
        pass
    if relu_attributions:
        result.clamp_min_(0)
    return result.reshape(maps.shape)


def check_positions(positions: Tensor, length: int | None) -> Tensor:
    positions = torch.as_tensor(positions).cpu()
    if positions.ndim != 1 or positions.is_floating_point() or positions.numel() == 0:
        raise ValueError(
            f"positions must be a non-empty 1-D integer tensor, got {positions.dtype} {tuple(positions.shape)}."
        )
    if (
        bool((positions.diff() <= 0).any())
        or int(positions[0]) < 0
        or (length is not None and int(positions[-1]) >= length)
    ):
        raise ValueError(
            f"positions must increase within the sequence{'' if length is None else f' of {length}'}, "
            f"got {positions.tolist()[:8]}{'...' if len(positions) > 8 else ''}."
        )
    return positions


def check_arc_options(
    k: int, p: float, normalization: str, weighting: str, ranking_position: str, strength: float
) -> None:
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}.")
    if not 0 < p < 1:
        raise ValueError(f"p must lie strictly between 0 and 1, got {p}.")
    if normalization not in NORMALIZATIONS:
        raise ValueError(f"normalization must be one of {NORMALIZATIONS}, got {normalization!r}.")
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting must be one of {WEIGHTINGS}, got {weighting!r}.")
    if ranking_position not in ("token", "prediction"):
        raise ValueError(f"ranking_position must be 'token' or 'prediction', got {ranking_position!r}.")
    if strength < 0:
        raise ValueError(f"strength must not be negative, got {strength}.")
