r"""Write to the terminal, and end with one clear line if something goes wrong."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer
from rich.console import Console
from rich.markup import escape

__all__ = ["console", "fail", "one_line_errors"]

console = Console()
_error_console = Console(stderr=True, soft_wrap=True)


def fail(message: str, cause: BaseException | None = None) -> NoReturn:
    """Print one line on standard error, with the start of the cause's message, and exit with code 2."""
    if cause is not None:
        reason = _in_one_line(str(cause))
        message = f"{message}: {reason if len(reason) < 400 else f'{reason[:400]} ...'}"
    _error_console.print(f"[bold red]error:[/] {escape(_in_one_line(message))}", highlight=False)
    raise typer.Exit(2)


def _in_one_line(text: str) -> str:
    return " ".join(text.split())


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Print errors that a user can cause as one line, without a traceback."""
    try:
        yield
    except (ValueError, TypeError, ImportError) as error:
        # A run notes which sample, explainer and metric an error belongs to.
        fail(" ".join([str(error), *getattr(error, "__notes__", ())]))
