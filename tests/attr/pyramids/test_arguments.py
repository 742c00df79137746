"""Arguments adapted to inputs of another size."""

from __future__ import annotations

from captum_intramodal.attr.pyramids.arguments import move_index


def test_indices_and_slices_move_to_the_same_place() -> None:
    assert [move_index(at, 4, 8) for at in range(-1, 4)] == [7, 1, 3, 5, 7]
    assert move_index(3, 5, 2) == 1
    assert move_index(slice(1, 3), 4, 8) == slice(2, 6)
    # A slice keeps at least one element.
    assert move_index(slice(3, 4), 4, 2) == slice(1, 2)
