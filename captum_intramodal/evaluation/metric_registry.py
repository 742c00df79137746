r"""Which metrics are there, and how is one made from text, such as ``'deletion:imputation=mean'``?"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TypeVar

from captum_intramodal._utils.registry import Registry
from captum_intramodal._utils.spec import build, parse_spec
from captum_intramodal.evaluation.metric_base import Metric

__all__ = ["METRICS", "make_metric", "register_metric"]

M = TypeVar("M", bound=type[Metric])


def _is_metric(cls: type) -> bool:
    return issubclass(cls, Metric) and not inspect.isabstract(cls) and hasattr(cls, "name") and hasattr(cls, "columns")


METRICS = Registry("metric", _is_metric, "a subclass of Metric with a name, columns and measure()")


def register_metric(name: str) -> Callable[[M], M]:
    r"""
    Register a subclass of :class:`Metric` under a name, so that :func:`make_metric` and the command line find it.

    Other packages can instead declare an entry point in the group ``captum_intramodal.metrics``. A class that is not
    registered can be used by its dotted name.

    Args:

        name (str): The name. It also becomes the class's ``name`` if the class does not define one.

    Returns:
        **decorator** (*Callable*):
            Decorator that returns the class.

    Raises:
        SpecError: Another class is registered under this name.

    Examples::

        >>> from dataclasses import dataclass
        >>> from captum_intramodal.evaluation import METRICS, Column, Metric, register_metric
        >>> @register_metric("mean_value")
        ... @dataclass(kw_only=True)
        ... class MeanValue(Metric):
        ...     columns = (Column("mean_value", "mean value", True),)
        ...
        ...     def measure(self, case, explainer, maps, found):
        ...         found.add("mean_value", "answer", float(maps.mean()))
        >>> METRICS["mean_value"] is MeanValue
        True
    """

    def decorate(cls: M) -> M:
        METRICS.register(name)(cls)
        if "name" not in vars(cls):
            cls.name = name
        return cls

    return decorate


def make_metric(spec: str) -> Metric:
    r"""
    Make a metric from its name and options.

    Args:

        spec (str): A registered name, or the dotted name of a :class:`Metric` class (``package.module.Class``);
                    after a colon, options ``name=value``, separated by commas.

    Returns:
        **metric** (*Metric*):
            The metric; options that the spec leaves out have their defaults.

    Raises:
        SpecError: The metric or one of its options does not exist, or the spec cannot be parsed.
        InvalidOptionError: An option has a value that it does not take.

    Examples::

        >>> from captum_intramodal.evaluation import make_metric
        >>> make_metric("deletion:of=answer,imputation=mean").settings["imputation"]
        'mean'
    """
    name, options = parse_spec(spec)
    metric: Metric = build(spec, METRICS.resolve(name), options)
    return metric
