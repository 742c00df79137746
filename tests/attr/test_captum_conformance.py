"""Every configuration that Captum ships for its own tests: the inner method against itself inside MSEA."""

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

# Captum's remarks about its own configurations.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def pairs() -> Iterator[tuple[str, Attribution, dict[str, Any]]]:
    """Every configuration with each of its methods, on a model and arguments of its own."""
    for entry in config:
        for algorithm in entry["algorithms"]:
            _, model, kwargs, layer, noise_tunnel, _ = parse_test_config(entry)
            model, kwargs = copy.deepcopy(model), copy.deepcopy(kwargs)
            method = algorithm(model, get_target_layer(model, layer)) if layer else algorithm(model)
            name = f"{entry['name']} {algorithm.__name__}"
            yield name, NoiseTunnel(method) if noise_tunnel else method, kwargs


def same(actual: Any, expected: Any) -> bool:
    if isinstance(expected, Tensor):
        return isinstance(actual, Tensor) and actual.dtype == expected.dtype and torch.equal(actual, expected)
    return type(actual) is type(expected) and len(actual) == len(expected) and all(map(same, actual, expected))


def attribute(method: Attribution, kwargs: Mapping[str, Any]) -> Any:
    torch.manual_seed(0)
    np.random.seed(0)  # what GradientShap draws from
    return method.attribute(**kwargs)


def unequal(pyramid: Pyramid, scales: Sequence[float], weights: Sequence[float], only: Callable[[Any], bool]) -> Any:
    """Number of pairs, and names of those that differ from the inner method."""
    names, different = [], []
    for name, method, kwargs in pairs():
        if only(kwargs["inputs"]):
            names.append(name)
            msea = MSEA(method, scales=scales, weights=weights, pyramid=pyramid)
            if not same(attribute(msea, kwargs), attribute(method, kwargs)):
                different.append(name)
    return len(names), different


def test_scale_one_is_the_inner_method(capsys: pytest.CaptureFixture[str]) -> None:
    count, different = unequal(Resize(), (1.0,), (1,), lambda inputs: True)
    with capsys.disabled():
        print(f"\nscales=(1.0,): {count - len(different)} equal of {count} pairs of {len(config)} configurations")
    assert (len(config), count, different) == (77, 288, [])


def test_so_it_is_beside_a_scale_without_weight() -> None:
    count, different = unequal(LowPass(), (0.5, 1.0), (0, 1), lambda x: isinstance(x, Tensor) and x.ndim == 4)
    assert (count, different) == (29, [])
