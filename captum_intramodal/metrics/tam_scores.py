r"""Obj-IoU and Func-IoU exactly as Token Activation Map (Li et al., ICCV 2025) evaluates them, quirks included.

For figures that stand beside published ones. For anything else take :func:`~captum_intramodal.metrics.object_iou` and
:func:`~captum_intramodal.metrics.function_iou`, which leave the quirks out:

- maps have 256 gray levels, are resized with OpenCV's fixed-point arithmetic and cut at its Otsu threshold;
- an answer whose words do not cover all of its maps is left out, silently;
- of adjacent words of one category the better counts, and also where the category is not in the mask at all: then two
  results of other words are merged;
- a function word's map is compared on its own grid with a threshold found on maps of the mask's size.

Two more lie in how TAM makes its maps, not here: image and text scores are brought to [0, 1] together, and the map of
the first generated token is that of the first prompt token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from captum_intramodal.metrics.statistics import Array

__all__ = ["FUNCTION_WORD", "OTHER_NOUN", "OTHER_WORD", "TAMScores", "tam_scores"]

# Labels of words; a noun that names an annotated category has that category's number, from 1.
OTHER_NOUN, FUNCTION_WORD, OTHER_WORD = -1, -2, -3


Bytes = npt.NDArray[np.uint8]


# Bits after the point of OpenCV's interpolation weights.
_BITS = 11


class TAMScores(NamedTuple):
    r"""Scores of the words of one answer.

    Args:

        object_iou (list[float]): Of nouns that name a category in the mask, adjacent ones of one category merged.
        function_iou (list[float]): Of function words.
    """

    object_iou: list[float]
    function_iou: list[float]


def tam_scores(maps: Sequence[Array], words: Sequence[Sequence[int]], labels: Sequence[int], mask: Array) -> TAMScores:
    r"""Obj-IoU and Func-IoU of the words of one answer, as TAM's evaluation computes them.

    Args:

        maps (Sequence[Tensor or ndarray]): One map per token of the answer, uint8 (rows, columns).
        words (Sequence[Sequence[int]]): The indices of each word's tokens.
        labels (Sequence[int]): Each word's category from 1, ``OTHER_NOUN``, ``FUNCTION_WORD`` or ``OTHER_WORD``.
        mask (Tensor or ndarray): Category of each pixel, 0 for none, integer (height, width).

    Returns:
        **scores** (*TAMScores*):
            Two lists of numbers from 0 to 1; both empty if the last word does not end with the last map. The data
            set's F1-IoU is :func:`~captum_intramodal.metrics.f1_iou` of all answers' lists.

    Raises:
        ValueError: maps that are not uint8 (rows, columns), or not one label per word.

    Examples::

        >>> map = np.array([[0, 10], [20, 250]], np.uint8)
        >>> tam_scores([map, map // 50], [[0], [1]], [1, FUNCTION_WORD], np.array([[0, 0], [0, 1]]))
        TAMScores(object_iou=[1.0], function_iou=[1.0])
    """
    levels = [_bytes(map) for map in maps]
    classes = np.asarray(mask.cpu() if isinstance(mask, Tensor) else mask)
    if classes.ndim != 2 or classes.dtype.kind not in "iu":
        raise ValueError(f"mask must be integer (height, width), got {classes.dtype} {classes.shape}.")
    if len(words) != len(labels):
        raise ValueError(f"{len(words)} words but {len(labels)} labels.")
    if not words or words[-1][-1] != len(levels) - 1:
        return TAMScores([], [])

    objects: list[float] = []
    thresholds: list[int] = []
    for number, (tokens, label) in enumerate(zip(words, labels, strict=True)):
        if label < OTHER_NOUN or label == 0:
            continue
        resized = [_resize(levels[token], classes.shape) for token in tokens]
        each = [_otsu(map) for map in resized]
        thresholds.append(max(each))
        inside = classes == label
        if label > 0 and inside.any():
            found = [map > threshold for map, threshold in zip(resized, each, strict=True)]
            objects.append(max(float((f & inside).sum() / (f | inside).sum()) for f in found))
        if label > 0 and number > 0 and labels[number - 1] == label and len(objects) > 1:
            last = objects.pop()
            objects[-1] = max(objects[-1], last)
    if not thresholds:
        return TAMScores(objects, [])
    mean = sum(thresholds) / len(thresholds)
    functions = [
        float(np.mean([(levels[token] < mean).mean() for token in tokens]))
        for tokens, label in zip(words, labels, strict=True)
        if label == FUNCTION_WORD
    ]
    return TAMScores(objects, functions)


def _bytes(map: Array) -> Bytes:
    values = np.asarray(map.detach().cpu() if isinstance(map, Tensor) else map)
    if values.dtype != np.uint8 or values.ndim != 2:
        raise ValueError(f"Maps must be uint8 (rows, columns), got {values.dtype} {values.shape}.")
    return values


def _weights(length: int, cells: int, clamp: bool) -> tuple[npt.NDArray[np.intp], ...]:
    """Per pixel the two cells that it lies between, and their weights in units of 2**-11."""
    position = ((np.arange(length) + 0.5) * (1 / (length / cells)) - 0.5).astype(np.float32)
    first = np.floor(position).astype(np.intp)
    share = position - first.astype(np.float32)
    if clamp:
        share[(first < 0) | (first >= cells - 1)] = 0
    low, high = (np.rint(s * np.float32(2**_BITS)).astype(np.intp) for s in (np.float32(1) - share, share))
    return first.clip(0, cells - 1), (first + 1).clip(0, cells - 1), low, high


def _resize(map: Bytes, size: Sequence[int]) -> Bytes:
    """OpenCV's bilinear resize of 8-bit images: only columns are clamped, and products are cut, not rounded."""
    left, right, low, high = _weights(size[1], map.shape[1], clamp=True)
    values = map.astype(np.intp)
    rows = (values[:, left] * low + values[:, right] * high) >> 4
    above, below, low, high = _weights(size[0], map.shape[0], clamp=False)
    total = ((low[:, None] * rows[above]) >> 16) + ((high[:, None] * rows[below]) >> 16)
    return ((total + 2) >> 2).astype(np.uint8)


def _otsu(map: Bytes) -> int:
    """OpenCV's Otsu threshold. The means are updated level by level: rounding decides between equal candidates."""
    counts, scale = np.bincount(map.ravel(), minlength=256), 1 / map.size
    mean = float(counts @ np.arange(256)) * scale
    below, mean_below, best, threshold = 0.0, 0.0, 0.0, 0
    epsilon = float(np.finfo(np.float32).eps)
    for level, p in enumerate((counts * scale).tolist()):
        mean_below *= below
        below += p
        above = 1 - below
        if min(below, above) < epsilon or max(below, above) > 1 - epsilon:
            continue
        mean_below = (mean_below + level * p) / below
        mean_above = (mean - below * mean_below) / above
        variance = below * above * (mean_below - mean_above) ** 2
        if variance > best:
            best, threshold = variance, level
    return threshold
