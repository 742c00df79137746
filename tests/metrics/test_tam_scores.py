"""TAM's scores agree with OpenCV, with values computed by hand, and with the published quirks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from captum_intramodal.errors import InvalidInputError
from captum_intramodal.metrics import FUNCTION_WORD, OTHER_NOUN, OTHER_WORD, TAMScores, tam_scores
from captum_intramodal.metrics.tam_scores import _otsu, _resize

# Results of OpenCV 4.11: cv2.resize(MAP, (7, 5)) and cv2.resize(MAP, (3, 2)).
MAP = (np.arange(12).reshape(3, 4) ** 2 * 2 % 256).astype(np.uint8)
LARGER = [
    [0, 1, 2, 5, 8, 14, 18],
    [13, 16, 20, 27, 35, 44, 50],
    [32, 38, 49, 61, 74, 89, 98],
    [90, 99, 115, 133, 151, 171, 184],
    [128, 140, 159, 181, 203, 227, 242],
]
SMALLER = [[9, 19, 35], [109, 151, 200]]

HOT = np.array([[0, 0], [0, 240]], np.uint8)
COLD = np.array([[3, 0], [0, 2]], np.uint8)
WIDE = np.array([[0, 0], [240, 240]], np.uint8)
MASK = np.array([[0, 0], [0, 1]])


def test_resize_and_threshold_equal_opencv() -> None:
    assert _resize(MAP, (5, 7)).tolist() == LARGER
    assert _resize(MAP, (2, 3)).tolist() == SMALLER
    assert _otsu(np.array(LARGER, np.uint8)) == 99 and _otsu(MAP) == 98
    assert _otsu(np.full((3, 3), 7, np.uint8)) == 0


def test_scores_computed_by_hand() -> None:
    # The Otsu threshold of HOT and WIDE is 0: HOT covers the one cell inside, 1/1, WIDE 1/2. Function words count cells
    # below the mean threshold.
    assert tam_scores([HOT, COLD], [[0], [1]], [1, FUNCTION_WORD], MASK) == TAMScores([1.0], [0.0])
    assert tam_scores([WIDE], [[0]], [1], MASK) == TAMScores([0.5], [])
    gray = np.array([[10, 10], [10, 250]], np.uint8)
    assert tam_scores([gray, COLD], [[0], [1]], [OTHER_NOUN, FUNCTION_WORD], MASK) == TAMScores([], [1.0])
    assert tam_scores([torch.from_numpy(HOT)], [[0]], [OTHER_WORD], torch.from_numpy(MASK)) == TAMScores([], [])


def test_words_score_as_their_best_token_and_adjacent_words_as_the_better_one() -> None:
    assert tam_scores([WIDE, HOT], [[0, 1]], [1], MASK).object_iou == [1.0]
    assert tam_scores([WIDE, HOT], [[0], [1]], [1, 1], MASK).object_iou == [1.0]
    assert tam_scores([WIDE, COLD, HOT], [[0], [1], [2]], [1, OTHER_WORD, 1], MASK).object_iou == [0.5, 1.0]


def test_published_quirks_are_kept() -> None:
    # An answer whose last word does not end with the last map is ignored.
    assert tam_scores([HOT, HOT], [[0]], [1], MASK) == TAMScores([], [])
    # Two adjacent words of a category that is not in the mask merge the results of two other words.
    words, labels = [[0], [1], [2], [3], [4]], [1, OTHER_WORD, 1, 2, 2]
    assert tam_scores([WIDE, COLD, HOT, HOT, HOT], words, labels, MASK).object_iou == [1.0]


@pytest.mark.parametrize(
    ("maps", "labels", "mask", "message"),
    [
        ([HOT / 255], [1], MASK, "uint8"),
        ([HOT[0]], [1], MASK, r"uint8 \(2,\)"),
        ([HOT], [1, 2], MASK, "1 words but 2 labels"),
        ([HOT], [1], MASK / 2, "mask must be integer"),
    ],
)
def test_wrong_inputs_are_rejected(maps: list[np.ndarray], labels: list[int], mask: np.ndarray, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        tam_scores(maps, [[0]], labels, mask)
