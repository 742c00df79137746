"""Every configuration that Captum ships for its own tests, with and without MSEA around the method."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from captum.attr import Attribution, NoiseTunnel
from captum.testing.attr.helpers.gen_test_utils import get_target_layer, parse_test_config
from captum.testing.attr.helpers.test_config import config
from torch import Tensor

from captum_intramodal import MSEA, LowPass, Pyramid, Resize

# Captum warns about its own configurations.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def configured_methods() -> Iterator[tuple[str, Attribution, dict[str, Any]]]:
    """Yield every configuration with each of its methods, with a fresh model and fresh arguments."""
    for entry in config:
        for algorithm in entry["algorithms"]:
            _, model, kwargs, layer, noise_tunnel, _ = parse_test_config(entry)
            model, kwargs = copy.deepcopy(model), copy.deepcopy(kwargs)
            method = algorithm(model, get_target_layer(model, layer)) if layer else algorithm(model)
            name = f"{entry['name']} {algorithm.__name__}"
            yield name, NoiseTunnel(method) if noise_tunnel else method, kwargs


def are_equal(actual: Any, expected: Any) -> bool:
    if isinstance(expected, Tensor):
        return isinstance(actual, Tensor) and actual.dtype == expected.dtype and torch.equal(actual, expected)
    return type(actual) is type(expected) and len(actual) == len(expected) and all(map(are_equal, actual, expected))


def attribute(method: Attribution, kwargs: Mapping[str, Any]) -> Any:
    torch.manual_seed(0)
    np.random.seed(0)  # GradientShap draws from it
    return method.attribute(**kwargs)


def compare(
    pyramid: Pyramid, scales: Sequence[float], weights: Sequence[float], only: Callable[[Any], bool]
) -> tuple[int, list[str]]:
    """Count the methods compared, and name those that MSEA changes."""
    count, different = 0, []
    for name, method, kwargs in configured_methods():
        if only(kwargs["inputs"]):
            count += 1
            msea = MSEA(method, scales=scales, weights=weights, pyramid=pyramid)
            if not are_equal(attribute(msea, kwargs), attribute(method, kwargs)):
                different.append(name)
    return count, different


def test_scale_one_is_the_inner_method(capsys: pytest.CaptureFixture[str]) -> None:
    count, different = compare(Resize(), (1.0,), (1,), lambda inputs: True)
    with capsys.disabled():
        print(f"\nscales=(1.0,): {count - len(different)} equal of {count} pairs of {len(config)} configurations")
    assert (len(config), count, different) == (77, 288, [])


def test_a_scale_without_weight_changes_nothing() -> None:
    count, different = compare(LowPass(), (0.5, 1.0), (0, 1), lambda x: isinstance(x, Tensor) and x.ndim == 4)
    assert (count, different) == (29, [])
