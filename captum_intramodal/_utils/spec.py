r"""Things that a line of text describes: ``name`` or ``name:option=value,option=value``."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable
from dataclasses import fields
from typing import Any, TypeVar

__all__ = ["build", "parse_spec", "settings_of"]

T = TypeVar("T")


def parse_spec(spec: str) -> tuple[str, dict[str, Any]]:
    r"""
    Args:

        spec (str): A name, and after a colon options ``name=value``, separated by commas. Values are JSON; what is none
                    is text up to the next comma and needs no quotes.

    Returns:
        tuple: the name and the options.

    Raises:
        ValueError: an option without a value, or one that is given twice.

    Examples::

        >>> parse_spec("msea:scales=[1,2],aggregation=max")
        ('msea', {'scales': [1, 2], 'aggregation': 'max'})
    """
    name, _, text = spec.strip().partition(":")
    options: dict[str, Any] = {}
    position = 0
    while position < len(text):
        found = re.compile(r"\s*(\w+)\s*=\s*").match(text, position)
        if found is None or found[1] in options:
            raise ValueError(
                f"{spec!r}: options are name=value, each once, separated by commas; got {text[position:]!r}."
            )
        try:
            value, end = json.JSONDecoder().raw_decode(text, found.end())
        except json.JSONDecodeError:
            end = -1
        if end != len(text) and text[end : end + 1] != ",":
            end = (text + ",").index(",", found.end())
            value = text[found.end() : end].strip()
        options[found[1]] = value
        position = end + 1
    return name, options


def settings_of(described: Any) -> dict[str, Any]:
    """The name and all options of a dataclass, JSON-able; of an option that has settings of its own, these."""
    options = {f.name: getattr(described, f.name) for f in fields(described)}
    text = json.dumps({"name": described.name} | options, default=lambda value: value.settings)
    settings: dict[str, Any] = json.loads(text)
    return settings


def build(spec: str, factory: Callable[..., T], options: dict[str, Any]) -> T:
    r"""
    What a factory makes of options.

    Raises:
        ValueError: options that the factory does not have, or a value that it does not take; the message begins with
            the spec.
    """
    known = inspect.signature(factory).parameters
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(
            f"{spec!r} has options {', '.join(unknown)} that do not exist; there are {', '.join(known) or 'none'}."
        )
    try:
        return factory(**options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{spec!r}: {error}") from error
