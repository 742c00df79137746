from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from captum_intramodal.errors import InvalidInputError
from captum_intramodal.geometry.token_geometry import TokenGeometry


def test_frames() -> None:
    images = TokenGeometry(torch.zeros(3, 4), ("local",) * 3, torch.tensor([0, 1, 2]), ((8, 8),) * 3)
    assert images.frames.tolist() == [[0, 0], [1, 1], [2, 2]]
    video = replace(images, image_index=torch.tensor([0, 0, 2]), last_image_index=torch.tensor([1, 1, 2]))
    assert video.frames.tolist() == [[0, 1], [0, 1], [2, 2]]
    assert [video.sees(frame).tolist() for frame in range(3)] == [[True, True, False]] * 2 + [[False, False, True]]


def test_geometry_without_local_tokens() -> None:
    empty = TokenGeometry(torch.full((1, 4), math.nan), ("global",), torch.zeros(1, dtype=torch.int64), ((8, 8),))
    assert all(math.isnan(side) for side in empty.token_size + empty.coverage())
    with pytest.raises(InvalidInputError, match="from 0 to 0, got 1"):
        empty.coverage(1)


def test_equal_tokens_at_two_sizes() -> None:
    boxes, index = torch.tensor([[0.0, 0, 32, 20], [32, 0, 64, 20]]), torch.tensor([0, 0])
    geometry = TokenGeometry(boxes, ("local", "local"), index, ((64, 20),))
    assert geometry.shows_same(TokenGeometry(2 * boxes, ("local", "local"), index, ((128, 40),)))
    assert not geometry.shows_same(TokenGeometry(2 * boxes, ("local", "local"), index, ((64, 20),)))
    assert not geometry.shows_same(TokenGeometry(boxes[:1], ("local",), index[:1], ((64, 20),)))
    assert not geometry.shows_same(None)
