from __future__ import annotations

import pytest
import torch

from captum_intramodal._utils.memory import items_within, run_in_chunks
from captum_intramodal.errors import InvalidOptionError


def test_chunks_are_done_in_order() -> None:
    results = list(run_in_chunks(lambda chunk: list(range(10))[chunk], 10, 4))
    assert results == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert list(run_in_chunks(lambda chunk: chunk, 0, 4)) == []


def test_items_that_fit_into_the_working_memory() -> None:
    assert items_within(1000, 99) == 10
    assert items_within(1, 99) == 1
    with pytest.raises(InvalidOptionError, match="at least 1 byte, got 0"):
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
@pytest.mark.filterwarnings("ignore:Out of memory; continuing in chunks of 2:UserWarning")
def test_chunks_are_halved_with_a_warning_if_memory_runs_out(error: Exception) -> None:
    sizes = []

    def work(chunk: slice) -> list[int]:
        sizes.append(chunk.stop - chunk.start)
        if sizes[-1] > 3:
            raise error
        return list(range(10))[chunk]

    with pytest.warns(UserWarning, match="continuing in chunks of 5 instead of 10"):
        results = list(run_in_chunks(work, 10, 16))
    assert [item for result in results for item in result] == list(range(10))
    assert sizes == [10, 5, 2, 2, 2, 2, 2]


def test_other_errors_and_a_single_item_that_is_too_large_are_raised() -> None:
    def work(chunk: slice) -> None:
        raise error

    for error, size in ((RuntimeError("shapes do not fit"), 4), (MemoryError("one item is too large"), 1)):
        with pytest.raises(type(error), match=str(error)):
            list(run_in_chunks(work, 8, size))
