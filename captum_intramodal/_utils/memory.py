r"""Work in chunks that fit into a bound of memory, smaller ones if memory runs out all the same."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from captum_intramodal.errors import InvalidOptionError

__all__ = ["WORKING_MEMORY", "items_within", "run_in_chunks"]

# Default number of bytes that a step which works in chunks uses at a time.
WORKING_MEMORY = 2**24


T = TypeVar("T")


def items_within(working_memory: int, bytes_each: int) -> int:
    """Return how many items of ``bytes_each`` bytes fit into the working memory, at least 1.

    Raises:
        InvalidOptionError: ``working_memory`` is below 1.
    """
    if working_memory < 1:
        raise InvalidOptionError(f"working_memory must be at least 1 byte, got {working_memory}.")
    return max(1, working_memory // max(1, bytes_each))


def run_in_chunks(work: Callable[[slice], T], count: int, size: int) -> Iterator[T]:
    r"""
    Run ``work`` on ``count`` items, ``size`` of them at a time.

    If a chunk runs out of memory, it and those after it are halved, with a warning.

    Args:

        work (Callable): Returns the result for a slice of the items; called again with half the slice after it ran out
                    of memory.
        count (int): Number of items.
        size (int): Items per chunk, at least 1.

    Yields:
        **result** (*Any*): of each chunk, in order.

    Raises:
        RuntimeError or MemoryError: a single item runs out of memory.

    Examples::

        >>> from captum_intramodal._utils.memory import run_in_chunks
        >>> torch.cat(list(run_in_chunks(lambda chunk: torch.arange(5)[chunk] ** 2, 5, 2)))
        tensor([ 0,  1,  4,  9, 16])
    """
    start = 0
    while start < count:
        chunk = slice(start, min(start + size, count))
        try:
            result = work(chunk)
        except (RuntimeError, MemoryError) as error:
            if chunk.stop - start == 1 or not _is_out_of_memory(error):
                raise
            size = (chunk.stop - start) // 2
        else:
            yield result
            start = chunk.stop
            continue
        # Outside the handler: the error keeps the chunk's allocations alive.
        warnings.warn(f"Out of memory; continuing in chunks of {size} instead of {chunk.stop - start}.", stacklevel=2)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _is_out_of_memory(error: BaseException) -> bool:
    """Return whether a GPU or the machine ran out of memory; PyTorch reports the latter by its message alone."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in str(error)
