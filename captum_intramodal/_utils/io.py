r"""Atomic writes: a file is written to a temporary path, which then replaces the final one in a single step."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

__all__ = ["replace_atomically", "replace_files", "write_atomically"]


def write_atomically(path: str | os.PathLike[str], content: bytes) -> Path:
    r"""
    Write a file such that readers find the old file or the new one, never a part.

    Args:

        path (str or PathLike): The file to create or replace; its directory must exist.
        content (bytes): Its new content.

    Returns:
        **path** (*Path*): the file.

    Raises:
        OSError: writing fails. The old file stays, and no temporary file is left.

    Examples::

        >>> from captum_intramodal._utils.io import write_atomically
        >>> write_atomically("answer.txt", b"a dog").read_text()
        'a dog'
    """
    with replace_atomically(path) as temporary:
        temporary.write_bytes(content)
    return Path(path)


@contextmanager
def replace_atomically(path: str | os.PathLike[str], tag: str | None = None) -> Iterator[Path]:
    r"""
    Provide a temporary path to write a file to; at the end of the ``with`` block, the file replaces ``path``.

    Use it with libraries that write to a path themselves. If the block raises, ``path`` stays as it was and the
    temporary file is removed. The new file has the permissions of any other new file.

    Args:

        path (str or PathLike): The file to create or replace; its directory must exist.
        tag (str, optional): What distinguishes this writer in the name of the temporary file,
                    ``.<name>.<tag>.tmp``, so that the files of a killed writer can be found.
                    Default: None, random digits.

    Yields:
        **temporary** (*Path*): the path to write to, in the same directory.

    Examples::

        >>> from captum_intramodal._utils.io import replace_atomically
        >>> with replace_atomically("image.png") as temporary:
        ...     image.save(temporary, "PNG")
        >>> Image.open("image.png").size == image.size
        True
    """
    final = Path(path)
    temporary = final.with_name(f".{final.name}.{secrets.token_hex(4) if tag is None else tag}.tmp")
    try:
        yield temporary
        temporary.replace(final)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replace_files(directory: str | os.PathLike[str], last: str | None = None) -> Iterator[Path]:
    r"""
    Provide a temporary directory to write files to; at the end of the ``with`` block, they move to ``directory``.

    Each file appears whole and replaces one of the same name; other files stay. If the block raises, ``directory``
    stays as it was (a new one is not created) and the temporary directory is removed.

    Args:

        directory (str or PathLike): Directory of the files; created with its parents if it does not exist.
        last (str, optional): Name of the file to move after all others: once it is there, all are.
                    Default: None, all in alphabetical order.

    Yields:
        **temporary** (*Path*): the directory to write to.

    Raises:
        FileExistsError: ``directory`` is a file.

    Examples::

        >>> from captum_intramodal._utils.io import replace_files
        >>> with replace_files("saved", last="index.json") as temporary:
        ...     _ = (temporary / "index.json").write_text("{}")
        ...     _ = (temporary / "data.bin").write_bytes(b"0")
        >>> import os
        >>> sorted(os.listdir("saved"))
        ['data.bin', 'index.json']
    """
    final = Path(directory)
    if final.exists() and not final.is_dir():
        raise FileExistsError(f"{final} is a file; a directory is needed.")
    # Inside an existing directory, as its parent may be read-only or another file system.
    parent = final if final.is_dir() else final.parent
    parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=parent, prefix=f".{final.name}.") as name:
        temporary = Path(name)
        yield temporary
        final.mkdir(exist_ok=True)
        for file in sorted(temporary.iterdir(), key=lambda file: (file.name == last, file.name)):
            file.replace(final / file.name)
