r"""Compute Obj-IoU and Func-IoU exactly as Token Activation Map (TAM; Li et al., ICCV 2025) does, with all its quirks.

Use these for comparison with published figures. For anything else use :func:`~captum_intramodal.metrics.object_iou` and
:func:`~captum_intramodal.metrics.function_iou`, which do not have these quirks:

- maps have 256 gray levels, are resized with OpenCV's fixed-point arithmetic and thresholded with its Otsu's method;
- an answer whose words do not cover all of its maps is silently ignored;
- of adjacent words of the same category the better counts. This also happens if that category is not in the mask: then
  the results of two other words are merged;
- a function word's map is compared on its own grid with a threshold found on maps of the mask's size.

Two more quirks are in how TAM computes its maps, not here: image and text scores are normalized to [0, 1] together,
and the map of the first generated token is that of the first prompt token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from captum_intramodal.errors import InvalidInputError
from captum_intramodal.metrics.arrays import Array

__all__ = ["FUNCTION_WORD", "OTHER_NOUN", "OTHER_WORD", "TAMScores", "tam_scores"]

# Labels of words; a noun that names an annotated category is labeled with the number of the category, from 1.
OTHER_NOUN, FUNCTION_WORD, OTHER_WORD = -1, -2, -3

# Fractional bits of OpenCV's interpolation weights.
_BITS = 11

_Bytes = npt.NDArray[np.uint8]


class TAMScores(NamedTuple):
    r"""Scores of the words of one answer.

    Args:

        object_iou (list[float]): Obj-IoU of the nouns that name a category in the mask; adjacent nouns of the same
                    category are merged.
        function_iou (list[float]): Func-IoU of the function words.
    """

    object_iou: list[float]
    function_iou: list[float]


def tam_scores(maps: Sequence[Array], words: Sequence[Sequence[int]], labels: Sequence[int], mask: Array) -> TAMScores:
    r"""Compute Obj-IoU and Func-IoU of the words of one answer as TAM's evaluation does.

    Args:

        maps (Sequence[Tensor or ndarray]): One map per token of the answer, uint8 (rows, columns).
        words (Sequence[Sequence[int]]): Indices of each word's tokens.
        labels (Sequence[int]): Each word's category from 1, ``OTHER_NOUN``, ``FUNCTION_WORD`` or ``OTHER_WORD``.
        mask (Tensor or ndarray): Category of each pixel, 0 for none, integer (height, width).

    Returns:
        **scores** (*TAMScores*):
            Two lists of numbers from 0 to 1; both are empty if the last word does not end with the last map. The F1-IoU
            of a data set is :func:`~captum_intramodal.metrics.f1_iou` of the lists of all answers.

    Raises:
        InvalidInputError: ``maps`` are not uint8 (rows, columns), ``mask`` is not integer (height, width), or the
            numbers of words and labels differ.

    Examples::

        >>> from captum_intramodal.metrics import FUNCTION_WORD, tam_scores
        >>> map = np.array([[0, 10], [20, 250]], np.uint8)
        >>> tam_scores([map, map // 50], [[0], [1]], [1, FUNCTION_WORD], np.array([[0, 0], [0, 1]]))
        TAMScores(object_iou=[1.0], function_iou=[1.0])
    """
    gray_maps = [_check_map(map) for map in maps]
    classes = np.asarray(mask.cpu() if isinstance(mask, Tensor) else mask)
    if classes.ndim != 2 or classes.dtype.kind not in "iu":
        raise InvalidInputError(f"mask must be integer (height, width), got {classes.dtype} {classes.shape}.")
    if len(words) != len(labels):
        raise InvalidInputError(f"{len(words)} words but {len(labels)} labels; pass one label per word.")
    if not words or words[-1][-1] != len(gray_maps) - 1:
        return TAMScores([], [])
    objects, thresholds = _score_nouns(gray_maps, words, labels, classes)
    if not thresholds:
        return TAMScores(objects, [])
    threshold = sum(thresholds) / len(thresholds)
    functions = [
        float(np.mean([(gray_maps[token] < threshold).mean() for token in tokens]))
        for tokens, label in zip(words, labels, strict=True)
        if label == FUNCTION_WORD
    ]
    return TAMScores(objects, functions)


def _score_nouns(
    maps: Sequence[_Bytes], words: Sequence[Sequence[int]], labels: Sequence[int], classes: npt.NDArray[np.integer]
) -> tuple[list[float], list[int]]:
    """Compute the Obj-IoU of nouns that name a category in the mask, and the thresholds of all nouns."""
    objects: list[float] = []
    thresholds: list[int] = []
    for number, (tokens, label) in enumerate(zip(words, labels, strict=True)):
        if label < OTHER_NOUN or label == 0:
            continue
        resized = [_resize(maps[token], classes.shape) for token in tokens]
        token_thresholds = [_otsu(map) for map in resized]
        thresholds.append(max(token_thresholds))
        inside = classes == label
        if label > 0 and inside.any():
            foregrounds = [map > threshold for map, threshold in zip(resized, token_thresholds, strict=True)]
            objects.append(max(float((f & inside).sum() / (f | inside).sum()) for f in foregrounds))
        # A quirk: if the category is not in the mask, this merges the results of two other words.
        if label > 0 and number > 0 and labels[number - 1] == label and len(objects) > 1:
            last = objects.pop()
            objects[-1] = max(objects[-1], last)
    return objects, thresholds


def _check_map(map: Array) -> _Bytes:
    """Convert a map to an array and check that it is uint8 (rows, columns)."""
    values = np.asarray(map.detach().cpu() if isinstance(map, Tensor) else map)
    if values.dtype != np.uint8 or values.ndim != 2:
        raise InvalidInputError(
            f"maps must be uint8 (rows, columns), got {values.dtype} {values.shape}; scale them to 0..255 and round."
        )
    return values


def _interpolation_weights(length: int, cells: int, clamp: bool) -> tuple[npt.NDArray[np.intp], ...]:
    """Find the two cells on either side of each pixel, and their weights in units of 2**-11."""
    position = ((np.arange(length) + 0.5) * (1 / (length / cells)) - 0.5).astype(np.float32)
    first = np.floor(position).astype(np.intp)
    share = position - first.astype(np.float32)
    if clamp:
        share[(first < 0) | (first >= cells - 1)] = 0
    low, high = (np.rint(s * np.float32(2**_BITS)).astype(np.intp) for s in (np.float32(1) - share, share))
    return first.clip(0, cells - 1), (first + 1).clip(0, cells - 1), low, high


def _resize(map: _Bytes, size: Sequence[int]) -> _Bytes:
    """Resize as OpenCV's bilinear resize of 8-bit images does: clamp only columns, and truncate products."""
    left, right, low, high = _interpolation_weights(size[1], map.shape[1], clamp=True)
    values = map.astype(np.intp)
    rows = (values[:, left] * low + values[:, right] * high) >> 4
    above, below, low, high = _interpolation_weights(size[0], map.shape[0], clamp=False)
    total = ((low[:, None] * rows[above]) >> 16) + ((high[:, None] * rows[below]) >> 16)
    return ((total + 2) >> 2).astype(np.uint8)


def _otsu(map: _Bytes) -> int:
    """Compute OpenCV's Otsu threshold, with means updated level by level: rounding decides between equal candidates."""
    counts, scale = np.bincount(map.ravel(), minlength=256), 1 / map.size
    mean = float(counts @ np.arange(256)) * scale
    below, mean_below, best, threshold = 0.0, 0.0, 0.0, 0
    epsilon = float(np.finfo(np.float32).eps)
    for level, probability in enumerate((counts * scale).tolist()):
        mean_below *= below
        below += probability
        above = 1 - below
        if min(below, above) < epsilon or max(below, above) > 1 - epsilon:
            continue
        mean_below = (mean_below + level * probability) / below
        mean_above = (mean - below * mean_below) / above
        variance = below * above * (mean_below - mean_above) ** 2
        if variance > best:
            best, threshold = variance, level
    return threshold
