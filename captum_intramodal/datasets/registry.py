r"""Register data sets by name: with a decorator, or by an entry point of another package."""

from __future__ import annotations

from captum_intramodal._utils.registry import Registry

__all__ = ["DATASETS", "register_dataset"]


def _has_samples(cls: type) -> bool:
    """Return True if instances of a class have a length and items."""
    # An enumeration has both itself, by its metaclass, but its members do not.
    attributes = {name for base in cls.__mro__ for name in vars(base)}
    return {"__len__", "__getitem__"} <= attributes


DATASETS = Registry("dataset", _has_samples, "a class with settings, __len__ and __getitem__")
register_dataset = DATASETS.register
