r"""Which explainers are there, and how is one made from text, such as ``'msea+arc+grad_cam:layer=-3'``?"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

from captum_intramodal._utils.registry import Registry
from captum_intramodal._utils.spec import build, parse_spec
from captum_intramodal.errors import SpecError
from captum_intramodal.explainers.base import Explainer
from captum_intramodal.explainers.wrappers import ARCAround, MSEAAround

__all__ = ["EXPLAINERS", "make_explainer", "register_explainer"]

C = TypeVar("C", bound=type[Any])

_WRAPPERS: dict[str, type[MSEAAround] | type[ARCAround]] = {"msea": MSEAAround, "arc": ARCAround}
# The lens inside MSEA and ARC is an explainer of its own, for which all text tokens are context.
_LENS = ("logit_lens", *_WRAPPERS)
_FORMER_NAMES = {"centre_gaussian": "center_gaussian"}


def _is_explainer(cls: type) -> bool:
    """Return whether a class itself, not its metaclass, has the interface of an explainer."""
    declared = {name for base in cls.__mro__ for name in vars(base)}
    if is_dataclass(cls):
        declared |= {f.name for f in fields(cls)}
    is_abstract = inspect.isabstract(cls) or getattr(cls, "_is_protocol", False)
    return {"name", "settings", "__call__"} <= declared and not is_abstract


EXPLAINERS = Registry("explainer", _is_explainer, "a class that declares name, settings and __call__")


def register_explainer(name: str) -> Callable[[C], C]:
    r"""
    Register a class of explainers under a name, so that :func:`make_explainer` and the command line find it.

    Other packages can instead declare an entry point in the group ``captum_intramodal.explainers``. A class that is
    not registered can be used by its dotted name.

    Args:

        name (str): The name. It also becomes the class's ``name`` if the class does not define one.

    Returns:
        **decorator** (*Callable*): returns the class.

    Raises:
        SpecError: Another class is registered under this name.

    Examples::

        >>> from dataclasses import dataclass
        >>> from captum_intramodal.explainers import BaseExplainer, make_explainer, register_explainer
        >>> @register_explainer("uniform")
        ... @dataclass(kw_only=True)
        ... class Uniform(BaseExplainer):
        ...     value: float = 1.0
        ...
        ...     def explain(self, example):
        ...         return [torch.full((len(example.answer_ids), 1, 1), self.value) for _ in example.images]
        >>> make_explainer("uniform:value=2").settings
        {'name': 'uniform', 'value': 2}
    """

    def decorate(cls: C) -> C:
        EXPLAINERS.register(name)(cls)
        if "name" not in vars(cls):
            cls.name = name
        return cls

    return decorate


def make_explainer(spec: str) -> Explainer:
    r"""
    Make an explainer from its name and options.

    Args:

        spec (str): A name in :data:`EXPLAINERS` or the dotted name of a class with the interface of
                    :class:`Explainer` (``package.module.Class``), with ``msea+``, ``arc+`` or ``msea+arc+`` before it
                    to put it inside these; after a colon options ``name=value``, separated by commas. Values are
                    JSON; text needs no quotes.

    Returns:
        **explainer** (*Explainer*): options that the spec leaves out have their defaults.

    Raises:
        SpecError: The explainer or one of its options does not exist, or the spec cannot be parsed.
        InvalidOptionError: An option has a value that it does not take.

    Examples::

        >>> from captum_intramodal.explainers import make_explainer
        >>> make_explainer("msea+arc:scales=[1,1.5,2],k=20,weighting=uniform").settings["k"]
        20
        >>> make_explainer("msea+arc+grad_cam:layer=-3").name
        'msea+arc+grad_cam'
    """
    name, options = parse_spec(spec)
    if name in EXPLAINERS:
        return _build(spec, EXPLAINERS[name], options)
    prefix, plus, inner = name.rpartition("+")
    inner = _FORMER_NAMES.get(inner, inner)
    if not plus:
        return _build(spec, EXPLAINERS.resolve(inner), options)
    if prefix not in ("msea", "arc", "msea+arc") or inner in _LENS:
        raise SpecError(
            f"There is no explainer {name!r}: msea+, arc+ or msea+arc+ goes before one of "
            f"{', '.join(known for known in EXPLAINERS if not {*known.split('+')} & {*_LENS})}."
        )
    wrappers = prefix.split("+")
    own = {wrapper: {f.name for f in fields(_WRAPPERS[wrapper])} - {"base"} for wrapper in wrappers}
    rest = {key: value for key, value in options.items() if not any(key in names for names in own.values())}
    explainer = _build(spec, EXPLAINERS.resolve(inner), rest)
    for wrapper in wrappers:  # ARC is around MSEA.
        outer = {key: value for key, value in options.items() if key in own[wrapper]}
        explainer = _build(spec, _WRAPPERS[wrapper], outer | {"base": explainer})
    return explainer


def _build(spec: str, factory: Callable[..., Any], options: dict[str, Any]) -> Explainer:
    explainer: Explainer = build(spec, factory, options)
    return explainer
