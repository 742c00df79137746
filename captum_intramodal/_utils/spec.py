r"""Text specifications of objects: ``name`` or ``name:option=value,option=value``."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable
from dataclasses import fields
from typing import Any, TypeVar

from captum_intramodal.errors import SpecError

__all__ = ["build", "parse_spec", "settings_of"]

T = TypeVar("T")

_OPTION = re.compile(r"\s*(\w+)\s*=\s*")


def parse_spec(spec: str) -> tuple[str, dict[str, Any]]:
    r"""
    Parse a text specification.

    Args:

        spec (str): A name, optionally followed by a colon and options ``name=value``, separated by commas. Values are
                    JSON; anything else is text up to the next comma and needs no quotes.

    Returns:
        **name, options** (*tuple[str, dict]*): the parts.

    Raises:
        SpecError: an option has no value, or is given twice.

    Examples::

        >>> from captum_intramodal._utils.spec import parse_spec
        >>> parse_spec("msea:scales=[1,2],aggregation=max")
        ('msea', {'scales': [1, 2], 'aggregation': 'max'})
    """
    name, _, text = spec.strip().partition(":")
    options: dict[str, Any] = {}
    position = 0
    while position < len(text):
        found = _OPTION.match(text, position)
        if found is None or found[1] in options:
            raise SpecError(
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
    """Return the name and all options of a dataclass, JSON-able; for options with ``settings`` of their own, these."""
    options = {f.name: getattr(described, f.name) for f in fields(described)}
    text = json.dumps({"name": described.name} | options, default=lambda value: value.settings)
    settings: dict[str, Any] = json.loads(text)
    return settings


def build(spec: str, factory: Callable[..., T], options: dict[str, Any]) -> T:
    r"""
    Call a factory with the options of a text specification.

    Args:

        spec (str): The specification, used in messages.
        factory (Callable): Called with the options as keyword arguments; its own errors propagate.
        options (dict): The options.

    Returns:
        **built** (*Any*): the factory's result.

    Raises:
        SpecError: the factory does not have an option, needs one that is missing, or gets a value of a wrong type.

    Examples::

        >>> from captum_intramodal._utils.spec import build
        >>> build("fraction:numerator=1", lambda numerator, denominator=2: numerator / denominator, {"numerator": 1})
        0.5
    """
    parameters = inspect.signature(factory).parameters
    if unknown := sorted(set(options) - set(parameters)):
        raise SpecError(
            f"{spec!r} has no option {', '.join(unknown)}; its options are {', '.join(parameters) or 'none'}."
        )
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    required = [name for name, p in parameters.items() if p.default is p.empty and p.kind not in variadic]
    if missing := [name for name in required if name not in options]:
        raise SpecError(f"{spec!r} needs {' and '.join(missing)}: add {missing[0]}=... to it.")
    try:
        return factory(**options)
    except TypeError as error:
        given = ", ".join(f"{name}={value!r}" for name, value in options.items())
        raise SpecError(f"{spec!r} has an option whose value is of a wrong type; got {given or 'none'}.") from error
