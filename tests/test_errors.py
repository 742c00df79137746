from __future__ import annotations

import inspect
import pickle

import pytest

from captum_intramodal import errors
from captum_intramodal.errors import IntramodalError, InvalidInputError, InvalidOptionError, UnsupportedModelError

CLASSES = [getattr(errors, name) for name in errors.__all__]


def test_all_error_classes_are_listed() -> None:
    defined = [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if cls.__module__ == errors.__name__]
    assert set(defined) == set(CLASSES)


@pytest.mark.parametrize("cls", CLASSES)
def test_every_error_is_a_value_error_and_can_be_pickled(cls: type[IntramodalError]) -> None:
    assert issubclass(cls, IntramodalError) and issubclass(cls, ValueError)
    assert cls.__doc__ is not None
    copy = pickle.loads(pickle.dumps(cls("k must be at least 1, got 0.")))
    assert type(copy) is cls and str(copy) == "k must be at least 1, got 0."


def test_errors_of_one_cause_share_a_base() -> None:
    assert issubclass(errors.SpecError, InvalidOptionError)
    assert issubclass(errors.EmptyAnswerError, InvalidInputError)
    for cls in (errors.NoTokenGeometryError, errors.NoPixelMapError, errors.NoGradientError):
        assert issubclass(cls, UnsupportedModelError)
    assert not issubclass(errors.NotApplicableError, UnsupportedModelError)
