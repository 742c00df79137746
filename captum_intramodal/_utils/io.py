r"""TODO."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

__all__ = ["write_atomically"]


def write_atomically(path: str | os.PathLike[str], content: bytes) -> Path:
    r"""Writes a file by way of a temporary sibling, so that readers see the old file or the new one, never a part.

    Args:
        path (str or PathLike): the file to create or replace; its folder must exist.
        content (bytes): what to write.

    Returns:
        Path: the file. Where writing fails, the old file stays and the temporary one is removed.

    Examples::

        >>> write_atomically("answer.txt", b"a dog")
    """
    final = Path(path)
    temporary = final.with_name(f".{final.name}.{secrets.token_hex(4)}")
    try:
        temporary.write_bytes(content)
        return temporary.replace(final)
    finally:
        temporary.unlink(missing_ok=True)
