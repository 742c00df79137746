r"""TODO."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from captum_intramodal.functional.imputation import Masks
from captum_intramodal.metrics.statistics import Array, Floats, finite

__all__ = ["FRACTIONS", "aopc", "area_under_curve", "deletion_curve", "insertion_curve", "road"]

# Which features are kept, bool (N, *features) -> the score of each, float (N,).
Score = Callable[[Masks], Array]


FRACTIONS: tuple[float, ...] = tuple(np.linspace(0, 1, 11).round(3).tolist())


def _ranks(values: Array, seed: int) -> npt.NDArray[np.int64]:
    """Rank of every feature in the order of importance, 0 for the most important; ties in random order."""
    flat = finite(values, "values").ravel()
    order = np.lexsort((np.random.default_rng(seed).random(flat.size), -flat))
    ranks = np.empty(flat.size, np.int64)
    ranks[order] = np.arange(flat.size)
    return ranks.reshape(np.shape(values))


def _counts(size: int, fractions: Sequence[float]) -> npt.NDArray[np.int64]:
    given = np.asarray(fractions, dtype=np.float64)
    if given.ndim != 1 or not given.size or not np.isfinite(given).all() or given.min() < 0 or given.max() > 1:
        raise ValueError(f"fractions must be numbers from 0 to 1, got {list(fractions)}.")
    if (np.diff(given) <= 0).any():
        raise ValueError(f"fractions must increase, got {list(fractions)}.")
    return np.rint(given * size).astype(np.int64)


def _scores(score: Score, kept: Masks) -> Floats:
    result = finite(score(kept), "scores")
    if result.shape != (len(kept),):
        raise ValueError(f"score must return one number for each of {len(kept)} masks, got shape {result.shape}.")
    return result


def insertion_curve(score: Score, values: Array, fractions: Sequence[float] = FRACTIONS, seed: int = 0) -> Floats:
    r"""Score with only the most important features, for growing fractions of them.

    Source: Petsiuk et al., "RISE: Randomized input sampling for explanation of black-box models", 2018.

    Args:

        score (Callable): From masks of the kept features, bool (N, \*shape of ``values``), to N scores, such as a
                    :class:`ImageRemoval`.
        values (Tensor or ndarray): Importance of each feature, any shape.
        fractions (Sequence[float]): Increasing fractions that are kept. Default: 0, 0.1, ..., 1
        seed (int): Of the order of equally important features. Default: ``0``

    Returns:
        **curve** (*ndarray*):
            float64, one score for each fraction. Higher early is better.

    Raises:
        ValueError: Fractions that do not increase from 0 to 1, values or scores that are not finite.

    Examples::

        >>> weights = np.array([0.1, 0.6, 0.3])
        >>> insertion_curve(lambda kept: kept @ weights, weights, fractions=(0, 1 / 3, 2 / 3, 1)).round(2).tolist()
        [0.0, 0.6, 0.9, 1.0]
    """
    ranks = _ranks(values, seed)
    return _scores(score, np.stack([ranks < count for count in _counts(ranks.size, fractions)]))


def deletion_curve(
    score: Score, values: Array, fractions: Sequence[float] = FRACTIONS, seed: int = 0, least_first: bool = False
) -> Floats:
    r"""Score without the most important features, for growing fractions of them.

    Source: Petsiuk et al., "RISE: Randomized input sampling for explanation of black-box models", 2018.

    Args:

        score, values, fractions, seed: See :func:`insertion_curve`; ``fractions`` are removed.
        least_first (bool): Remove the least important features first (ROAD's LeRF). Default: ``False``

    Returns:
        **curve** (*ndarray*):
            float64, one score for each fraction. Lower early is better (higher with ``least_first``).

    Raises:
        ValueError: As :func:`insertion_curve`.

    Examples::

        >>> weights = np.array([0.1, 0.6, 0.3])
        >>> deletion_curve(lambda kept: kept @ weights, weights, fractions=(0, 1 / 3, 2 / 3, 1)).round(2).tolist()
        [1.0, 0.4, 0.1, 0.0]
    """
    ranks = _ranks(values, seed)
    if least_first:
        ranks = ranks.size - 1 - ranks
    return _scores(score, np.stack([ranks >= count for count in _counts(ranks.size, fractions)]))


def area_under_curve(curve: Array, fractions: Sequence[float] = FRACTIONS) -> float:
    r"""Area under a curve by the trapezoidal rule, divided by the range of the fractions: the curve's mean height.

    Of an insertion curve it is RISE's *insertion* (higher is better), of a deletion curve *deletion* (lower is better).

    Args:

        curve (Tensor or ndarray): One score for each fraction.
        fractions (Sequence[float]): As given to the curve. Default: 0, 0.1, ..., 1

    Returns:
        **area** (*float*):
            In the scores' unit.

    Examples::

        >>> area_under_curve(np.array([0.0, 1.0, 1.0]), (0.0, 0.5, 1.0))
        0.75
    """
    heights, widths = finite(curve, "curve"), np.diff(np.asarray(fractions, dtype=np.float64))
    if heights.shape != (len(widths) + 1,) or not len(widths):
        raise ValueError(f"curve must have one score for each of {len(widths) + 1} (at least 2) fractions, "
                         f"but its shape is {heights.shape}.")  # fmt: skip
    return float(((heights[1:] + heights[:-1]) / 2 * widths).sum() / widths.sum())


def aopc(curve: Array) -> float:
    r"""Area over the perturbation curve, :math:`\frac{1}{L+1} \sum_{k=0}^{L} f(x^{(0)}) - f(x^{(k)})`.

    Source: Samek et al., "Evaluating the visualization of what a deep neural network has learned", 2017, Eq. 12.

    Args:

        curve (Tensor or ndarray): Of :func:`deletion_curve`; the first score is that of the whole input.

    Returns:
        **aopc** (*float*):
            Mean drop of the score; higher is better.

    Examples::

        >>> aopc(np.array([1.0, 0.5, 0.0]))
        0.5
    """
    scores = finite(curve, "curve")
    return float((scores[0] - scores).mean())


def road(score: Score, values: Array, fractions: Sequence[float] = FRACTIONS[1:-1], seed: int = 0) -> float:
    r"""Remove and debias: mean score without the least important features (LeRF), less that without the most important
    ones (MoRF).

    Source: Rong et al., "A consistent and efficient evaluation strategy for attribution methods", 2022, whose removal
    is :func:`noisy_linear_imputation`: use it with ``ImageRemoval(..., imputation="noisy_linear")``.

    Args:

        score, values, seed: See :func:`insertion_curve`.
        fractions (Sequence[float]): Removed fractions. Default: 0.1, 0.2, ..., 0.9

    Returns:
        **road** (*float*):
            Mean of (LeRF - MoRF) / 2 over the fractions; 0 for a map without information, higher is better.
    """
    ranks, counts = _ranks(values, seed), _counts(np.size(values), fractions)
    removed = [order < count for order in (ranks, ranks.size - 1 - ranks) for count in counts]
    morf, lerf = _scores(score, ~np.stack(removed)).reshape(2, -1)  # In one batch.
    return float((lerf - morf).mean() / 2)
