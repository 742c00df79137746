r"""Localization metrics of explanation maps.

Obj-IoU, Func-IoU and F1-IoU follow the evaluation of Token Activation Map (Li et al., ICCV 2025), corrected in two
points: a map is scored as it is, without rescaling it together with the scores of the text tokens, and the map scored
for a token must be the map of that token. Which words are nouns or function words is the caller's business; these
functions see maps, masks and numbers. For a word of several tokens, or adjacent words that name one object, take the
largest :func:`object_iou`.

Maps and masks are tensors, on any device, or NumPy arrays; all computations are in float64 on the CPU. A cell is in the
foreground of a map if it is **greater** than the threshold. Wrong inputs raise ``ValueError`` with the numbers: a shape
that does not fit, a mask without a cell inside, NaN or infinity.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from captum_intramodal.metrics.statistics import Array, Floats, finite

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


# Rounding of the bilinear resize, relative to the range of a map.
_TIE = 1e-12


def otsu_threshold(values: Array | Sequence[float]) -> float:
    r"""Otsu's threshold: the split into two classes with the largest between-class variance.

    Candidates are the 255 inner edges of 256 equal bins from the smallest to the largest value; for each the variance
    :math:`w_0 w_1 (\mu_0 - \mu_1)^2` is that of the values themselves, not of bin centers. Of equal candidates, as in
    the gap between two clusters, the lowest is taken. Source: Otsu, "A threshold selection method from gray-level
    histograms", 1979.

    Args:

        values (Tensor, ndarray or sequence): Values of any shape and real dtype, at least one.

    Returns:
        **threshold** (*float*):
            The largest value of the lower class, so that ``values > threshold`` is exactly the upper class, and on
            256 gray levels the usual integer threshold. For a constant map the constant: nothing is above it.

    Examples::

        >>> otsu_threshold(torch.tensor([[0.0, 1.0, 2.0], [9.0, 8.0, 1.0]]))
        2.0
    """
    flat = finite(values, "values").ravel()
    low, high = flat.min(), flat.max()
    if low == high:
        return float(low)
    scaled = (flat - low) / (high - low)
    index = np.minimum((scaled * _BINS).astype(np.intp), _BINS - 1)
    # The extremes lie in the first and last bin: no class of a split is empty.
    below = np.bincount(index, minlength=_BINS)[:-1].cumsum()
    above = flat.size - below
    sum_below = np.bincount(index, weights=scaled, minlength=_BINS)[:-1].cumsum()
    between = below * above * np.square(sum_below / below - (scaled.sum() - sum_below) / above)
    return float(flat[index <= between.argmax()].max())


def iou(map: Array, mask: Array, threshold: float) -> float:
    r"""Intersection over union of a mask and the cells of a map above a threshold.

    Args:

        map (Tensor or ndarray): Map of any shape and real dtype.
        mask (Tensor or ndarray): Mask of the same shape, boolean, or integer with all but 0 inside; not empty.
        threshold (float): Cells greater than this are in the foreground.

    Returns:
        **iou** (*float*):
            From 0 to 1; 0 if no cell is above the threshold.

    Examples::

        >>> map = torch.tensor([[0.0, 0.6], [0.7, 0.9]])
        >>> mask = torch.tensor([[False, False], [True, True]])
        >>> round(iou(map, mask, threshold=0.5), 4)
        0.6667
    """
    values, inside = finite(map, "map"), _inside(mask)
    if values.shape != inside.shape:
        raise ValueError(f"map and mask must have one shape, but they have {values.shape} and {inside.shape}.")
    if np.isnan(threshold):
        raise ValueError("threshold is NaN.")
    foreground = values > threshold
    return float((foreground & inside).sum() / (foreground | inside).sum())


def object_iou(map: Array, mask: Array) -> float:
    r"""Obj-IoU of one token: its map, resized to the mask and split by Otsu's threshold, against the object's mask.

    Source: TAM's evaluation, without its rescaling of the map together with text scores; Otsu's threshold makes the
    result independent of the scale of the map and of an offset.

    Args:

        map (Tensor or ndarray): Map of a token on its own grid. Shape: h x w, any real dtype. Resized bilinearly
                    (pixel centers, no antialiasing) if the mask has another shape.
        mask (Tensor or ndarray): Mask of the object. Shape: H x W, boolean, or integer with all but 0 inside; not
                    empty.

    Returns:
        **iou** (*float*):
            From 0 to 1; 0 for a constant map.

    Examples::

        >>> map = torch.tensor([[0.0, 3.0], [0.0, 3.0]])
        >>> mask = torch.zeros(8, 8, dtype=torch.bool)
        >>> mask[:, 4:] = True
        >>> object_iou(map, mask)
        1.0
    """
    resized = _resize(map, mask)
    return iou(resized, mask, otsu_threshold(resized))


def pointing_hit(map: Array, mask: Array) -> float:
    r"""Pointing game: whether the largest cell of a map lies inside a mask.

    Source: Zhang et al., "Top-down neural attention by excitation backprop", ECCV 2016, without its tolerance around
    the mask. Among cells that share the largest value none is preferred: the result is the share of them that lies
    inside, so that a constant map scores the share of the mask.

    Args:

        map (Tensor or ndarray): Map. Shape: h x w, any real dtype; resized as in :func:`object_iou` if the mask has
                    another shape.
        mask (Tensor or ndarray): Mask. Shape: H x W, boolean, or integer with all but 0 inside; not empty.

    Returns:
        **hit** (*float*):
            1 or 0, or a share between them for ties.

    Examples::

        >>> mask = torch.tensor([[True, True], [False, False]])
        >>> pointing_hit(torch.tensor([[0.0, 2.0], [1.0, 0.0]]), mask)
        1.0
        >>> pointing_hit(torch.tensor([[0.0, 2.0], [2.0, 0.0]]), mask)
        0.5
    """
    resized, inside = _resize(map, mask), _inside(mask)
    tied = resized >= resized.max() - _TIE * np.ptp(resized)
    return float(inside[tied].mean())


def energy_inside(map: Array, mask: Array) -> float:
    r"""Share of a map's mass that lies inside a mask.

    Source: the energy-based pointing game of Wang et al., "Score-CAM", 2020. Needs no threshold.

    Args:

        map (Tensor or ndarray): Non-negative map. Shape: h x w, any real dtype; resized as in :func:`object_iou` if
                    the mask has another shape.
        mask (Tensor or ndarray): Mask. Shape: H x W, boolean, or integer with all but 0 inside; not empty.

    Returns:
        **energy** (*float*):
            From 0 to 1; the share of the mask for a constant positive map, 0 for a map of zeros.

    Examples::

        >>> map = torch.tensor([[0.0, 3.0], [1.0, 0.0]])
        >>> mask = torch.tensor([[True, True], [False, False]])
        >>> energy_inside(map, mask)
        0.75
    """
    resized, inside = _resize(map, mask), _inside(mask)
    if resized.min() < 0:
        raise ValueError(f"map must be non-negative, but its smallest value is {resized.min()}.")
    peak = resized.max()
    if peak == 0:
        return 0.0
    # Relative to the peak the sums of very small or large maps neither vanish nor overflow.
    resized = resized / peak
    return float(resized[inside].sum() / resized.sum())


def average_precision(map: Array, mask: Array) -> float:
    r"""Average precision of a map as a detector of a mask's cells: the area under its precision-recall curve.

    :math:`\sum_n (R_n - R_{n-1}) P_n` over all thresholds, without interpolation between them, as scikit-learn has it.
    Cells that share a value fall to one threshold, so that their order cannot matter. It asks for the order of the
    cells only; how far their values are apart does not count.

    Args:

        map (Tensor or ndarray): Map. Shape: h x w, any real dtype; resized as in :func:`object_iou` if the mask has
                    another shape.
        mask (Tensor or ndarray): Mask. Shape: H x W, boolean, or integer with all but 0 inside; not empty.

    Returns:
        **precision** (*float*):
            From 0 to 1; 1 if every cell inside is larger than all outside, the share of the mask for a constant map.

    Examples::

        >>> map = torch.tensor([[0.9, 0.1], [0.5, 0.2]])
        >>> mask = torch.tensor([[True, False], [False, True]])
        >>> round(average_precision(map, mask), 4)
        0.8333
    """
    resized, inside = _resize(map, mask), _inside(mask)
    order = np.argsort(-resized, axis=None)
    values = resized.ravel()[order]
    last = np.append(values[:-1] - values[1:] > _TIE * np.ptp(values), True).nonzero()[0]
    hits = inside.ravel()[order].cumsum()[last]
    return float((np.diff(hits, prepend=0) * hits / (last + 1)).sum() / hits[-1])


def function_iou(function_maps: Array, noun_thresholds: Array | Sequence[float]) -> float:
    r"""Func-IoU of one function word: the share of its map that is less active than the answer's nouns.

    A function word ("a", "of", "and") should light up nothing. Its cells are counted that lie strictly below the mean
    of the thresholds (:func:`otsu_threshold`) of all nouns of the answer, on the maps' own grid. Source: TAM's
    evaluation.

    Maps and thresholds must be in the same units, logits: scaling all of them alike changes nothing, but scaling each
    map to its own range would make the comparison meaningless.

    Args:

        function_maps (Tensor or ndarray): Maps of the tokens of one function word. Shape: K x H x W, K x V or any
                    other; tokens share a grid, so that the mean over all cells is the mean over tokens.
        noun_thresholds (Tensor, ndarray or sequence): Thresholds of the answer's nouns, at least one.

    Returns:
        **iou** (*float*):
            From 0 to 1; 1 if the word is less active than the nouns everywhere.

    Examples::

        >>> maps = torch.tensor([[[0.1, 0.2], [0.3, 5.0]], [[0.0, 0.0], [0.0, 0.0]]])  # two tokens on a 2 x 2 grid
        >>> function_iou(maps, [1.0, 3.0])
        0.875
    """
    threshold = finite(noun_thresholds, "noun_thresholds").mean()
    return float((finite(function_maps, "function_maps") < threshold).mean())


def f1_iou(
    obj: Array | Sequence[float],
    func: Array | Sequence[float],
    obj_words: Array | Sequence[float] | None = None,
    func_words: Array | Sequence[float] | None = None,
    axis: int = -1,
) -> np.float64 | Floats:
    r"""F1-IoU: harmonic mean of the data-set means of Obj-IoU and Func-IoU.

    It is not the mean of per-sample harmonic means. Source: TAM's evaluation, where both means run over words. To
    bootstrap over samples (:func:`bootstrap_interval`) give one mean for each sample and the number of words behind
    it; a sample that has no such word has the count 0, and its value, which must be a number, is ignored.

    Args:

        obj (Tensor, ndarray or sequence): Obj-IoU of words or samples, from 0 to 1. Shape: N, or ... x N to compute
                    many at once.
        func (Tensor, ndarray or sequence): Func-IoU of words or samples, from 0 to 1. Shape as ``obj``; N may differ.
        obj_words (Tensor, ndarray or sequence, optional): Words behind each value of ``obj``, with its shape.
                    Default: ``None`` (1 each)
        func_words (Tensor, ndarray or sequence, optional): Words behind each value of ``func``, with its shape.
                    Default: ``None`` (1 each)
        axis (int): The axis of the words or samples. Default: ``-1``

    Returns:
        **f1** (*float or ndarray*):
            From 0 to 1, without ``axis``; 0 where both means are 0.

    Examples::

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


def _inside(mask: Array) -> npt.NDArray[np.bool_]:
    array = np.asarray(mask.detach().cpu().numpy() if isinstance(mask, Tensor) else mask)
    if array.dtype.kind not in "biu":
        raise ValueError(f"mask must be boolean or integer, but its dtype is {array.dtype}.")
    if not array.any():
        raise ValueError(f"mask of shape {array.shape} has no cell inside.")
    return array.astype(np.bool_)


def _resize(map: Array, mask: Array) -> Floats:
    values = finite(map, "map")
    if values.ndim != 2 or len(mask.shape) != 2:
        raise ValueError(f"map and mask must be H x W, but they have {values.shape} and {tuple(mask.shape)}.")
    if values.shape == tuple(mask.shape) or 0 in mask.shape:
        return values
    image = torch.from_numpy(values.copy())[None, None]  # a caller's array may be read-only or flipped
    resized = interpolate(image, tuple(mask.shape), mode="bilinear", align_corners=False)
    # Rounding can leave the range by a bit, which would give a constant map a threshold inside its noise.
    return resized[0, 0].numpy().clip(values.min(), values.max())


def _weighted_mean(
    values: Array | Sequence[float], words: Array | Sequence[float] | None, axis: int, name: str
) -> np.float64 | Floats:
    array = finite(values, name)
    if words is None:
        mean: np.float64 | Floats = array.mean(axis)
        return mean
    weights = finite(words, f"{name}_words")
    if weights.shape != array.shape:
        raise ValueError(
            f"{name} and {name}_words must have one shape, but they have {array.shape} and {weights.shape}."
        )
    total = weights.sum(axis)
    if weights.min() < 0 or np.any(total == 0):
        raise ValueError(
            f"{name}_words must be non-negative with a positive sum, but the smallest is {weights.min()} and the "
            f"smallest sum {np.min(total)}."
        )
    weighted: np.float64 | Floats = (array * weights).sum(axis) / total
    return weighted
