r"""The errors that a user can cause. Each message tells what was given and what to do about it.

All derive from :class:`IntramodalError`, which is a :class:`ValueError`. A wrong *type* raises :class:`TypeError`, as
everywhere in Python.
"""

from __future__ import annotations

__all__ = [
    "DatasetError",
    "EmptyAnswerError",
    "IntramodalError",
    "InvalidInputError",
    "InvalidOptionError",
    "NoGradientError",
    "NoPixelMapError",
    "NoTokenGeometryError",
    "NotApplicableError",
    "SavedExplanationError",
    "SpecError",
    "UnsupportedModelError",
]


class IntramodalError(ValueError):
    """Base class of all errors raised by this package on purpose.

    Examples::

        >>> from captum_intramodal.errors import IntramodalError, InvalidOptionError
        >>> issubclass(InvalidOptionError, IntramodalError) and issubclass(IntramodalError, ValueError)
        True
    """


class InvalidOptionError(IntramodalError):
    """An option has a value that it does not take."""


class SpecError(InvalidOptionError):
    """A text specification (``name:option=value,...``) cannot be parsed, or names something that does not exist."""


class InvalidInputError(IntramodalError):
    """Images, texts or tensors do not have the required shape, dtype, range or number."""


class EmptyAnswerError(InvalidInputError):
    """There is no answer to explain: the given one is empty, or the model generated none."""


class UnsupportedModelError(IntramodalError):
    """A model or its processor does not support the requested method; other methods may still work."""


class NoTokenGeometryError(UnsupportedModelError):
    """The image regions of a model's visual tokens are unknown."""


class NoPixelMapError(UnsupportedModelError):
    """The elements of the processor's pixel tensors cannot be assigned to pixels of the image."""


class NoGradientError(UnsupportedModelError):
    """No gradient flows from the answer to the attributed tensor."""


class NotApplicableError(IntramodalError):
    """An explainer or metric does not apply to this example; an evaluation records it as skipped."""


class DatasetError(IntramodalError):
    """A data set's file or record is missing, damaged or inconsistent."""


class SavedExplanationError(IntramodalError):
    """A saved explanation is missing, damaged or of an unknown format."""
