from __future__ import annotations

import pytest
import torch

from captum_intramodal._utils.memory import items_within, run_in_chunks


def test_parts_are_done_in_order() -> None:
    parts = list(run_in_chunks(lambda part: list(range(10))[part], 10, 4))
    assert parts == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert list(run_in_chunks(lambda part: part, 0, 4)) == []


def test_as_many_as_fit() -> None:
    assert items_within(1000, 99) == 10
    assert items_within(1, 99) == 1
    with pytest.raises(ValueError, match="at least 1 byte, got 0"):
        items_within(0, 99)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried ..."),
    ],
    ids=["GPU", "NumPy", "CPU"],
)
def test_out_of_memory_halves_the_parts_and_says_so(error: Exception) -> None:
    tried = []

    def work(part: slice) -> list[int]:
        tried.append(part.stop - part.start)
        if tried[-1] > 3:
            raise error
        return list(range(10))[part]

    with pytest.warns(UserWarning, match="going on in parts of 5 instead of 10"):
        parts = list(run_in_chunks(work, 10, 16))
    assert [thing for part in parts for thing in part] == list(range(10))
    assert tried == [10, 5, 2, 2, 2, 2, 2]


def test_other_errors_and_a_single_thing_too_large_are_raised() -> None:
    def work(part: slice) -> None:
        raise error

    for error, size in ((RuntimeError("shapes do not fit"), 4), (MemoryError("one is too large"), 1)):
        with pytest.raises(type(error), match=str(error)):
            list(run_in_chunks(work, 8, size))
