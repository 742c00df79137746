r"""Measure localization: does an explanation map highlight the object that the token names?

Obj-IoU, Func-IoU and F1-IoU follow the evaluation of Token Activation Map (TAM; Li et al., ICCV 2025) with two
corrections: a map is scored as it is, without rescaling it together with the scores of the text tokens, and each token
is scored with its own map. The caller decides which words are nouns or function words; these functions take maps, masks
and numbers. For a word of several tokens, or adjacent words that name one object, use the largest :func:`object_iou`.

Maps and masks are tensors on any device, or NumPy arrays; everything is computed in float64 on the CPU. A cell belongs
to the foreground of a map if it is **greater** than the threshold. Invalid input raises :class:`InvalidInputError`
with the offending numbers: shapes that do not match, a mask without a cell inside, NaN or infinity.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor

from captum_intramodal.errors import InvalidInputError, InvalidOptionError
from captum_intramodal.metrics.arrays import Array, Floats, finite_array, resize_bilinear

__all__ = [
    "average_precision",
    "energy_inside",
    "f1_iou",
    "function_iou",
    "iou",
    "object_iou",
    "otsu_threshold",
    "pointing_hit",
]

_BINS = 256

# Values closer than this, relative to the range of a map, differ only by rounding in the bilinear resize.
_TIE = 1e-12


def otsu_threshold(values: Array | Sequence[float]) -> float:
    r"""Compute Otsu's threshold, which splits values into two classes with the largest between-class variance.

    The candidates are the 255 inner edges of 256 equal bins from the smallest to the largest value. The between-class
    variance :math:`w_0 w_1 (\mu_0 - \mu_1)^2` is computed from the values themselves, not from bin centers. If
    candidates are equally good, as in the gap between two clusters, the lowest is used.

    Source: Otsu, "A threshold selection method from gray-level histograms", 1979.

    Args:

        values (Tensor, ndarray or sequence): Values of any shape and real dtype, at least one.

    Returns:
        **threshold** (*float*):
            The largest value of the lower class, so that ``values > threshold`` is exactly the upper class; for 256
            gray levels this is the usual integer threshold. For a constant map it is the constant: no value exceeds it.

    Raises:
        InvalidInputError: ``values`` is empty or not finite.

    Examples::

        >>> from captum_intramodal.metrics import otsu_threshold
        >>> otsu_threshold(torch.tensor([[0.0, 1.0, 2.0], [9.0, 8.0, 1.0]]))
        2.0
    """
    flat = finite_array(values, "values").ravel()
    low, high = flat.min(), flat.max()
    if low == high:
        return float(low)
    scaled = (flat - low) / (high - low)
    index = np.minimum((scaled * _BINS).astype(np.intp), _BINS - 1)
    # The extremes lie in the first and last bins, so no class of a split is empty.
    below = np.bincount(index, minlength=_BINS)[:-1].cumsum()
    above = flat.size - below
    sum_below = np.bincount(index, weights=scaled, minlength=_BINS)[:-1].cumsum()
    between = below * above * np.square(sum_below / below - (scaled.sum() - sum_below) / above)
    return float(flat[index <= between.argmax()].max())


def iou(map: Array, mask: Array, threshold: float) -> float:
    r"""Compute the intersection over union of a mask and the cells of a map above a threshold.

    Args:

        map (Tensor or ndarray): Map of any shape and real dtype.
        mask (Tensor or ndarray): Mask of the same shape, boolean, or integer with 0 outside; at least one cell inside.
        threshold (float): Cells greater than this are in the foreground.

    Returns:
        **iou** (*float*):
            From 0 to 1; 0 if no cell is above the threshold.

    Raises:
        InvalidInputError: ``map`` and ``mask`` differ in shape, or one of them is invalid.
        InvalidOptionError: ``threshold`` is NaN.

    Examples::

        >>> from captum_intramodal.metrics import iou
        >>> map = torch.tensor([[0.0, 0.6], [0.7, 0.9]])
        >>> mask = torch.tensor([[False, False], [True, True]])
        >>> round(iou(map, mask, threshold=0.5), 4)
        0.6667
    """
    values, inside = finite_array(map, "map"), _boolean_mask(mask)
    if values.shape != inside.shape:
        raise InvalidInputError(
            f"map and mask must have the same shape, but have {values.shape} and {inside.shape}; resize the map first."
        )
    if np.isnan(threshold):
        raise InvalidOptionError("threshold is NaN; pass a number.")
    foreground = values > threshold
    return float((foreground & inside).sum() / (foreground | inside).sum())


def object_iou(map: Array, mask: Array) -> float:
    r"""Compute the Obj-IoU of one token: resize its map to the object's mask, split it by Otsu's threshold, and compute
    the IoU of the two.

    Source: TAM's evaluation, without its rescaling of the map together with text scores; because of Otsu's threshold
    the result does not depend on the scale and offset of the map.

    Args:

        map (Tensor or ndarray): The token's map on its own grid. Shape: h x w, any real dtype. Resized bilinearly
                    (between pixel centers, without antialiasing) if the mask has a different shape.
        mask (Tensor or ndarray): The object's mask. Shape: H x W, boolean, or integer with 0 outside; at least one
                    cell inside.

    Returns:
        **iou** (*float*):
            From 0 to 1; 0 for a constant map.

    Raises:
        InvalidInputError: ``map`` or ``mask`` is not H x W, not finite or empty.

    Examples::

        >>> from captum_intramodal.metrics import object_iou
        >>> map = torch.tensor([[0.0, 3.0], [0.0, 3.0]])
        >>> mask = torch.zeros(8, 8, dtype=torch.bool)
        >>> mask[:, 4:] = True
        >>> object_iou(map, mask)
        1.0
    """
    resized = _resize(map, mask)
    return iou(resized, mask, otsu_threshold(resized))


def pointing_hit(map: Array, mask: Array) -> float:
    r"""Play the pointing game: check if the largest cell of a map lies inside a mask.

    Source: Zhang et al., "Top-down neural attention by excitation backprop", ECCV 2016, without its tolerance around
    the mask. If several cells share the largest value, the result is the share of them inside the mask; a constant map
    thus scores the share of the image that the mask covers.

    Args:

        map (Tensor or ndarray): Map. Shape: h x w, any real dtype; resized as in :func:`object_iou` if the mask has
                    a different shape.
        mask (Tensor or ndarray): Mask. Shape: H x W, boolean, or integer with 0 outside; at least one cell inside.

    Returns:
        **hit** (*float*):
            1 or 0, or a share between them for ties.

    Raises:
        InvalidInputError: ``map`` or ``mask`` is not H x W, not finite or empty.

    Examples::

        >>> from captum_intramodal.metrics import pointing_hit
        >>> mask = torch.tensor([[True, True], [False, False]])
        >>> pointing_hit(torch.tensor([[0.0, 2.0], [1.0, 0.0]]), mask)
        1.0
        >>> pointing_hit(torch.tensor([[0.0, 2.0], [2.0, 0.0]]), mask)
        0.5
    """
    resized, inside = _resize(map, mask), _boolean_mask(mask)
    tied = resized >= resized.max() - _TIE * np.ptp(resized)
    return float(inside[tied].mean())


def energy_inside(map: Array, mask: Array) -> float:
    r"""Compute the share of a map's total value that lies inside a mask; no threshold is needed.

    Source: the energy-based pointing game of Wang et al., "Score-CAM: Score-weighted visual explanations for
    convolutional neural networks", 2020.

    Args:

        map (Tensor or ndarray): Non-negative map. Shape: h x w, any real dtype; resized as in :func:`object_iou` if
                    the mask has a different shape.
        mask (Tensor or ndarray): Mask. Shape: H x W, boolean, or integer with 0 outside; at least one cell inside.

    Returns:
        **energy** (*float*):
            From 0 to 1; for a constant positive map the share of the image that the mask covers, 0 for a map of zeros.

    Raises:
        InvalidInputError: ``map`` has a negative value, or ``map`` or ``mask`` is not H x W, not finite or empty.

    Examples::

        >>> from captum_intramodal.metrics import energy_inside
        >>> map = torch.tensor([[0.0, 3.0], [1.0, 0.0]])
        >>> mask = torch.tensor([[True, True], [False, False]])
        >>> energy_inside(map, mask)
        0.75
    """
    resized, inside = _resize(map, mask), _boolean_mask(mask)
    if resized.min() < 0:
        raise InvalidInputError(f"map must be non-negative, but its smallest value is {resized.min()}; clip it at 0.")
    peak = resized.max()
    if peak == 0:
        return 0.0
    # Dividing by the peak keeps the sums of very small or large maps from vanishing or overflowing.
    resized = resized / peak
    return float(resized[inside].sum() / resized.sum())


def average_precision(map: Array, mask: Array) -> float:
    r"""Compute the average precision of a map as a detector of a mask's cells: the area under its precision-recall
    curve.

    The sum :math:`\sum_n (R_n - R_{n-1}) P_n` runs over all thresholds without interpolation, as in scikit-learn. Equal
    values share a threshold, so that the order of their cells does not matter. The result depends only on the order
    of the values, not on the distances between them.

    Args:

        map (Tensor or ndarray): Map. Shape: h x w, any real dtype; resized as in :func:`object_iou` if the mask has
                    a different shape.
        mask (Tensor or ndarray): Mask. Shape: H x W, boolean, or integer with 0 outside; at least one cell inside.

    Returns:
        **precision** (*float*):
            From 0 to 1; 1 if every cell inside is larger than all cells outside. For a constant map, the share of the
            image that the mask covers.

    Raises:
        InvalidInputError: ``map`` or ``mask`` is not H x W, not finite or empty.

    Examples::

        >>> from captum_intramodal.metrics import average_precision
        >>> map = torch.tensor([[0.9, 0.1], [0.5, 0.2]])
        >>> mask = torch.tensor([[True, False], [False, True]])
        >>> round(average_precision(map, mask), 4)
        0.8333
    """
    resized, inside = _resize(map, mask), _boolean_mask(mask)
    order = np.argsort(-resized, axis=None)
    values = resized.ravel()[order]
    last = np.append(values[:-1] - values[1:] > _TIE * np.ptp(values), True).nonzero()[0]
    hits = inside.ravel()[order].cumsum()[last]
    return float((np.diff(hits, prepend=0) * hits / (last + 1)).sum() / hits[-1])


def function_iou(function_maps: Array, noun_thresholds: Array | Sequence[float]) -> float:
    r"""Compute the Func-IoU of one function word: the share of its map that is less active than the answer's nouns.

    A function word ("a", "of", "and") should activate no region. On the maps' own grid, the function counts the cells
    strictly below the mean of the thresholds (:func:`otsu_threshold`) of all nouns of the answer.

    Maps and thresholds must be in the same unit, such as logits. A common factor does not change the result; scaling
    each map to its own range makes the comparison meaningless.

    Source: TAM's evaluation.

    Args:

        function_maps (Tensor or ndarray): Maps of the tokens of one function word. Any shape, such as K x H x W or
                    K x V; all tokens share a grid, so that the mean over all cells is the mean over tokens.
        noun_thresholds (Tensor, ndarray or sequence): Thresholds of the answer's nouns, at least one.

    Returns:
        **iou** (*float*):
            From 0 to 1; 1 if the word is less active than the nouns everywhere.

    Raises:
        InvalidInputError: Maps or thresholds are empty or not finite.

    Examples::

        >>> from captum_intramodal.metrics import function_iou
        >>> maps = torch.tensor([[[0.1, 0.2], [0.3, 5.0]], [[0.0, 0.0], [0.0, 0.0]]])  # two tokens on a 2 x 2 grid
        >>> function_iou(maps, [1.0, 3.0])
        0.875
    """
    threshold = finite_array(noun_thresholds, "noun_thresholds").mean()
    return float((finite_array(function_maps, "function_maps") < threshold).mean())


def f1_iou(
    obj: Array | Sequence[float],
    func: Array | Sequence[float],
    obj_words: Array | Sequence[float] | None = None,
    func_words: Array | Sequence[float] | None = None,
    axis: int = -1,
) -> np.float64 | Floats:
    r"""Compute the F1-IoU: the harmonic mean of a data set's mean Obj-IoU and mean Func-IoU.

    This is not the mean of per-sample harmonic means. To bootstrap over samples (:func:`bootstrap_interval`), pass each
    sample's mean and the number of words it was computed from. If a sample has no such word, pass the count 0; its
    value is ignored, but must be finite.

    Source: TAM's evaluation, where both means run over words.

    Args:

        obj (Tensor, ndarray or sequence): Obj-IoU of words or samples, from 0 to 1. Shape: N, or ... x N to compute
                    many at once.
        func (Tensor, ndarray or sequence): Func-IoU of words or samples, from 0 to 1. Shape as ``obj``; N may differ.
        obj_words (Tensor, ndarray or sequence, optional): Number of words behind each value of ``obj``, in its shape.
                    Default: ``None``, 1 each
        func_words (Tensor, ndarray or sequence, optional): Number of words behind each value of ``func``, in its
                    shape.
                    Default: ``None``, 1 each
        axis (int): Axis of the words or samples.
                    Default: ``-1``

    Returns:
        **f1** (*float or ndarray*):
            From 0 to 1, reduced along ``axis``; 0 if both means are 0.

    Raises:
        InvalidInputError: A value is not finite, counts are negative or sum to 0, or shapes differ.

    Examples::

        >>> from captum_intramodal.metrics import f1_iou
        >>> float(f1_iou([0.2, 0.8], [1.0, 0.0]))
        0.5
        >>> float(f1_iou([0.5, 0.0], [0.5, 0.5], obj_words=[3, 0], func_words=[1, 2]))  # no noun in the second sample
        0.5
    """
    first = _weighted_mean(obj, obj_words, axis, "obj")
    second = _weighted_mean(func, func_words, axis, "func")
    total = first + second
    f1: np.float64 | Floats = 2 * first * second / np.where(total > 0, total, 1)
    return f1


def _boolean_mask(mask: Array) -> npt.NDArray[np.bool_]:
    """Convert a mask to a boolean array and check that it has a cell inside."""
    array = np.asarray(mask.detach().cpu().numpy() if isinstance(mask, Tensor) else mask)
    if array.dtype.kind not in "biu":
        raise InvalidInputError(f"mask must be boolean or integer, but its dtype is {array.dtype}; threshold it first.")
    if not array.any():
        raise InvalidInputError(f"mask of shape {array.shape} has no cell inside; skip objects that are not visible.")
    return array.astype(np.bool_)


def _resize(map: Array, mask: Array) -> Floats:
    """Resize a map to the shape of a mask, if they differ."""
    values, size = finite_array(map, "map"), tuple(mask.shape)
    if values.ndim != 2 or len(size) != 2:
        raise InvalidInputError(f"map and mask must be H x W, but they have shapes {values.shape} and {size}.")
    if values.shape == size or 0 in size:
        return values
    # Rounding can slightly leave the range, which would give a constant map a threshold within its noise.
    return resize_bilinear(values, size).clip(values.min(), values.max())


def _weighted_mean(
    values: Array | Sequence[float], words: Array | Sequence[float] | None, axis: int, name: str
) -> np.float64 | Floats:
    """Average values along an axis, each weighted by its number of words."""
    array = finite_array(values, name)
    if words is None:
        mean: np.float64 | Floats = array.mean(axis)
        return mean
    weights = finite_array(words, f"{name}_words")
    if weights.shape != array.shape:
        raise InvalidInputError(
            f"{name} and {name}_words must have the same shape, but have {array.shape} and {weights.shape}."
        )
    total = weights.sum(axis)
    if weights.min() < 0 or np.any(total == 0):
        raise InvalidInputError(
            f"{name}_words must be non-negative with a positive sum, but the smallest is {weights.min()} and the "
            f"smallest sum {np.min(total)}."
        )
    weighted: np.float64 | Floats = (array * weights).sum(axis) / total
    return weighted
