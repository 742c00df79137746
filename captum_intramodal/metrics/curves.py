r"""Measure faithfulness: how does a score change as features are kept or removed in order of importance?

A *curve* holds the scores for growing fractions of kept or removed features, the most important first, ties in random
order. Insertion, deletion, AOPC and ROAD summarize curves in one number each. The score function decides how features
are removed: :class:`ImageRemoval` imputes pixels, :class:`TokenRemoval` replaces tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from captum_intramodal.errors import InvalidInputError, InvalidOptionError
from captum_intramodal.functional.imputation import Masks
from captum_intramodal.metrics.arrays import Array, Floats, finite_array

__all__ = ["FRACTIONS", "aopc", "area_under_curve", "deletion_curve", "insertion_curve", "road"]

# From masks of the kept features, bool (N, *features), to scores, float (N,).
Score = Callable[[Masks], Array]

# Default fractions of all curves: 0, 0.1, ..., 1.
FRACTIONS: tuple[float, ...] = tuple(np.linspace(0, 1, 11).round(3).tolist())


def insertion_curve(score: Score, values: Array, fractions: Sequence[float] = FRACTIONS, seed: int = 0) -> Floats:
    r"""Compute the score with only the most important features, for growing fractions of them.

    Source: Petsiuk et al., "RISE: Randomized input sampling for explanation of black-box models", 2018.

    Args:

        score (Callable): Function from masks of the kept features, bool (N, \*shape of ``values``), to N scores, such
                    as an :class:`ImageRemoval`.
        values (Tensor or ndarray): Importance of each feature, any shape.
        fractions (Sequence[float]): Increasing fractions of features to keep, from 0 to 1.
                    Default: 0, 0.1, ..., 1
        seed (int): Seed for the order of equally important features.
                    Default: ``0``

    Returns:
        **curve** (*ndarray*):
            float64, one score per fraction. Faithful explanations have high scores at small fractions.

    Raises:
        InvalidOptionError: ``fractions`` do not increase from 0 to 1.
        InvalidInputError: ``values`` or scores are not finite, or ``score`` does not return one number per mask.

    Examples::

        >>> from captum_intramodal.metrics import insertion_curve
        >>> weights = np.array([0.1, 0.6, 0.3])
        >>> insertion_curve(lambda kept: kept @ weights, weights, fractions=(0, 1 / 3, 2 / 3, 1)).round(2).tolist()
        [0.0, 0.6, 0.9, 1.0]
    """
    ranks = _importance_ranks(values, seed)
    return _evaluate(score, np.stack([ranks < count for count in _feature_counts(ranks.size, fractions)]))


def deletion_curve(
    score: Score, values: Array, fractions: Sequence[float] = FRACTIONS, seed: int = 0, least_first: bool = False
) -> Floats:
    r"""Compute the score without the most important features, for growing fractions of them.

    Source: Petsiuk et al., "RISE: Randomized input sampling for explanation of black-box models", 2018.

    Args:

        score (Callable): Function from masks of the kept features to scores, as for :func:`insertion_curve`.
        values (Tensor or ndarray): Importance of each feature, any shape.
        fractions (Sequence[float]): Increasing fractions of features to remove, from 0 to 1.
                    Default: 0, 0.1, ..., 1
        seed (int): Seed for the order of equally important features.
                    Default: ``0``
        least_first (bool): Remove the least important features first (ROAD's LeRF).
                    Default: ``False``

    Returns:
        **curve** (*ndarray*):
            float64, one score per fraction. Faithful explanations have low scores at small fractions (high scores
            with ``least_first``).

    Raises:
        InvalidOptionError: ``fractions`` do not increase from 0 to 1.
        InvalidInputError: ``values`` or scores are not finite, or ``score`` does not return one number per mask.

    Examples::

        >>> from captum_intramodal.metrics import deletion_curve
        >>> weights = np.array([0.1, 0.6, 0.3])
        >>> deletion_curve(lambda kept: kept @ weights, weights, fractions=(0, 1 / 3, 2 / 3, 1)).round(2).tolist()
        [1.0, 0.4, 0.1, 0.0]
    """
    ranks = _importance_ranks(values, seed)
    if least_first:
        ranks = ranks.size - 1 - ranks
    return _evaluate(score, np.stack([ranks >= count for count in _feature_counts(ranks.size, fractions)]))


def area_under_curve(curve: Array, fractions: Sequence[float] = FRACTIONS) -> float:
    r"""Compute the mean height of a curve: its area by the trapezoidal rule, divided by the range of the fractions.

    For an insertion curve this is RISE's *insertion* (higher is better), for a deletion curve its *deletion* (lower is
    better).

    Args:

        curve (Tensor or ndarray): One score per fraction.
        fractions (Sequence[float]): The curve's fractions.
                    Default: 0, 0.1, ..., 1

    Returns:
        **area** (*float*):
            Mean height, in the unit of the scores.

    Raises:
        InvalidInputError: ``curve`` is not finite or does not have one score per fraction.

    Examples::

        >>> from captum_intramodal.metrics import area_under_curve
        >>> area_under_curve(np.array([0.0, 1.0, 1.0]), (0.0, 0.5, 1.0))
        0.75
    """
    heights, widths = finite_array(curve, "curve"), np.diff(np.asarray(fractions, dtype=np.float64))
    if heights.shape != (len(widths) + 1,) or not len(widths):
        raise InvalidInputError(
            f"curve must have one score for each of {len(widths) + 1} (at least 2) fractions, but its shape is "
            f"{heights.shape}; pass the fractions that the curve was computed with."
        )
    return float(((heights[1:] + heights[:-1]) / 2 * widths).sum() / widths.sum())


def aopc(curve: Array) -> float:
    r"""Compute the area over the perturbation curve, :math:`\frac{1}{L+1} \sum_{k=0}^{L} f(x^{(0)}) - f(x^{(k)})`.

    Source: Samek et al., "Evaluating the visualization of what a deep neural network has learned", 2017, Eq. 12.

    Args:

        curve (Tensor or ndarray): Scores from :func:`deletion_curve`; the first is that of the complete input.

    Returns:
        **aopc** (*float*):
            Mean drop of the score; higher is better.

    Raises:
        InvalidInputError: ``curve`` is empty or not finite.

    Examples::

        >>> from captum_intramodal.metrics import aopc
        >>> aopc(np.array([1.0, 0.5, 0.0]))
        0.5
    """
    scores = finite_array(curve, "curve")
    return float((scores[0] - scores).mean())


def road(score: Score, values: Array, fractions: Sequence[float] = FRACTIONS[1:-1], seed: int = 0) -> float:
    r"""Compute ROAD (remove and debias): the mean score without the least important features (LeRF), minus the mean
    score without the most important ones (MoRF), halved.

    Source: Rong et al., "A consistent and efficient evaluation strategy for attribution methods", 2022. The paper
    removes pixels by :func:`noisy_linear_imputation`: pass ``ImageRemoval(..., imputation="noisy_linear")``.

    Args:

        score (Callable): Function from masks of the kept features to scores, as for :func:`insertion_curve`.
        values (Tensor or ndarray): Importance of each feature, any shape.
        fractions (Sequence[float]): Increasing fractions of features to remove, from 0 to 1.
                    Default: 0.1, 0.2, ..., 0.9
        seed (int): Seed for the order of equally important features.
                    Default: ``0``

    Returns:
        **road** (*float*):
            Mean of (LeRF - MoRF) / 2 over the fractions; higher is better, about 0 for an uninformative map.

    Raises:
        InvalidOptionError: ``fractions`` do not increase from 0 to 1.
        InvalidInputError: ``values`` or scores are not finite, or ``score`` does not return one number per mask.

    Examples::

        >>> from captum_intramodal.metrics import road
        >>> weights = np.array([0.1, 0.2, 0.3, 0.4])
        >>> round(road(lambda kept: kept @ weights, weights, fractions=(0.5,)), 2)
        0.2
    """
    ranks, counts = _importance_ranks(values, seed), _feature_counts(np.size(values), fractions)
    removed = [order < count for order in (ranks, ranks.size - 1 - ranks) for count in counts]
    morf, lerf = _evaluate(score, ~np.stack(removed)).reshape(2, -1)  # One call, so that the score can batch.
    return float((lerf - morf).mean() / 2)


def _importance_ranks(values: Array, seed: int) -> npt.NDArray[np.int64]:
    """Rank all features by importance, 0 for the most important; break ties at random."""
    flat = finite_array(values, "values").ravel()
    order = np.lexsort((np.random.default_rng(seed).random(flat.size), -flat))
    ranks = np.empty(flat.size, np.int64)
    ranks[order] = np.arange(flat.size)
    return ranks.reshape(np.shape(values))


def _feature_counts(size: int, fractions: Sequence[float]) -> npt.NDArray[np.int64]:
    """Convert fractions to numbers of features."""
    shares = np.asarray(fractions, dtype=np.float64)
    if shares.ndim != 1 or not shares.size or not np.isfinite(shares).all() or shares.min() < 0 or shares.max() > 1:
        raise InvalidOptionError(f"fractions must be numbers from 0 to 1, got {list(fractions)}.")
    if (np.diff(shares) <= 0).any():
        raise InvalidOptionError(f"fractions must increase, got {list(fractions)}.")
    return np.rint(shares * size).astype(np.int64)


def _evaluate(score: Score, kept: Masks) -> Floats:
    """Score all masks in one call and check the result."""
    scores = finite_array(score(kept), "scores")
    if scores.shape != (len(kept),):
        raise InvalidInputError(
            f"score must return one number for each of {len(kept)} masks, but it returned shape {scores.shape}."
        )
    return scores
