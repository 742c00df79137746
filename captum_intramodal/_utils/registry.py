r"""Registries of named classes, extensible by a decorator, by entry points of other packages, and by dotted names."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from captum_intramodal.errors import SpecError

__all__ = ["Registry"]

C = TypeVar("C", bound=type)


class Registry(Mapping[str, Any]):
    r"""
    Map names to classes of one kind.

    Classes are registered by the decorator :meth:`register`, or by entry points of installed packages in the group
    ``captum_intramodal.<kind>s``, which are loaded when their name is first looked up.

    Args:

        kind (str): Kind of the classes, used in messages and in the name of the group, such as ``'explainer'``.
        accepts (Callable): Returns whether a class is of this kind; checked for entry points and dotted names.
        expected (str): Description of the classes that ``accepts`` accepts, used in messages.

    Examples::

        >>> from captum_intramodal._utils.registry import Registry
        >>> shapes = Registry("shape", lambda cls: hasattr(cls, "area"), "a class with a method area")
        >>> @shapes.register("square")
        ... class Square:
        ...     def area(self) -> float:
        ...         return 1.0
        >>> list(shapes), shapes["square"] is Square, shapes.resolve("square") is Square
        (['square'], True, True)
    """

    def __init__(self, kind: str, accepts: Callable[[type], bool], expected: str) -> None:
        self.kind = kind
        self.group = f"captum_intramodal.{kind}s"
        self._accepts = accepts
        self._expected = expected
        self._article = "an" if kind[0] in "aeiou" else "a"
        self._classes: dict[str, Any] = {}

    def register(self, name: str) -> Callable[[C], C]:
        r"""
        Return a class decorator that registers a class under a name.

        Args:

            name (str): The name.

        Raises:
            SpecError: another class is registered under this name.
        """

        def decorate(cls: C) -> C:
            known = self._classes.get(name, cls)
            if known is not cls and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
                raise SpecError(
                    f"The {self.kind} {name!r} is already registered, as {known.__module__}.{known.__qualname__}; "
                    "choose another name."
                )
            self._classes[name] = cls
            return cls

        return decorate

    def resolve(self, name: str) -> Any:
        r"""
        Return the class of a name.

        Args:

            name (str): A registered name, the name of an entry point, or a dotted name (``package.module:Class`` or
                        ``package.module.Class``).

        Returns:
            **class** (*type*): accepted by this registry.

        Raises:
            SpecError: the name is unknown, or is that of something else than a class of this kind.
        """
        if name in self:
            return self[name]
        if "." not in name and ":" not in name:
            raise SpecError(f"There is no {self.kind} {name!r}; registered are {', '.join(self)}.")
        try:
            found = pkgutil.resolve_name(name)
        except (ValueError, ImportError, AttributeError) as error:
            raise SpecError(
                f"{name!r} is neither a registered {self.kind} ({', '.join(self)}) nor the dotted name of a class that "
                "can be imported."
            ) from error
        return self._checked(name, found)

    def _checked(self, name: str, found: Any) -> Any:
        """Return what was found under a name if it is a class of this kind."""
        if not isinstance(found, type) or not self._accepts(found):
            raise SpecError(
                f"{name!r} is not {self._article} {self.kind}: expected {self._expected}, got {found!r:.80}."
            )
        return found

    def _entry_points(self) -> dict[str, EntryPoint]:
        """Return the group's entry points whose names are not registered yet."""
        return {point.name: point for point in entry_points(group=self.group) if point.name not in self._classes}

    def __getitem__(self, name: str) -> Any:
        if name not in self._classes:
            self._classes[name] = self._checked(name, self._entry_points()[name].load())
        return self._classes[name]

    def __contains__(self, name: object) -> bool:
        return name in self._classes or name in self._entry_points()

    def __iter__(self) -> Iterator[str]:
        return iter([*self._classes, *self._entry_points()])

    def __len__(self) -> int:
        return len(self._classes) + len(self._entry_points())
