r"""Work in parts, so that it fits into a bound of memory."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

__all__ = ["WORKING_MEMORY", "items_within", "run_in_chunks"]

# Bytes that a step which works in parts takes at a time.
WORKING_MEMORY = 2**24


T = TypeVar("T")


def items_within(working_memory: int, bytes_each: int) -> int:
    """How many things of so many bytes fit into the working memory, at least one."""
    if working_memory < 1:
        raise ValueError(f"working_memory must be at least 1 byte, got {working_memory}.")
    return max(1, working_memory // max(1, bytes_each))


def run_in_chunks(work: Callable[[slice], T], count: int, size: int) -> Iterator[T]:
    r"""
    Does some work on ``size`` of ``count`` things at a time. Where memory runs out on a part, that part and those after
    it are halved, with a warning.

    Args:

        work (Callable): From a slice of the things to a result; called again on the first half after it ran out of
                    memory.
        count (int): Number of things.
        size (int): How many at a time, at least 1.

    Yields:
        **result** (*Any*):
            Of each part, in order.

    Raises:
        RuntimeError or MemoryError: the work runs out of memory on a single thing.

    Examples::

        >>> torch.cat(list(run_in_chunks(lambda part: torch.arange(5)[part] ** 2, 5, 2)))
        tensor([ 0,  1,  4,  9, 16])
    """
    start = 0
    while start < count:
        part = slice(start, min(start + size, count))
        try:
            result = work(part)
        except (RuntimeError, MemoryError) as error:
            if part.stop - start == 1 or not _out_of_memory(error):
                raise
            size = (part.stop - start) // 2
        else:
            yield result
            start = part.stop
            continue
        # Outside of the handler, as the error holds on to what the part had allocated.
        warnings.warn(f"Out of memory; going on in parts of {size} instead of {part.stop - start}.", stacklevel=2)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _out_of_memory(error: BaseException) -> bool:
    """Of a GPU, or of the machine: of that PyTorch says so in words alone."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in str(error)
