"""Tensors and arrays of every kind become finite float64 arrays."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from captum_intramodal.errors import InvalidInputError
from captum_intramodal.metrics.arrays import finite_array, resize_bilinear


@pytest.mark.parametrize("values", [[1, 2], np.array([1, 2], np.uint8), torch.tensor([1.0, 2.0], dtype=torch.bfloat16)])
def test_values_of_every_type_become_float64(values: object) -> None:
    array = finite_array(values, "values")  # type: ignore[arg-type]
    assert array.dtype == np.float64 and array.tolist() == [1, 2]


def test_gradients_are_detached() -> None:
    assert finite_array(torch.ones(2, requires_grad=True), "values").tolist() == [1, 1]


def test_empty_and_infinite_values_are_rejected_by_name() -> None:
    with pytest.raises(InvalidInputError, match=r"map is empty \(shape \(0, 3\)\)"):
        finite_array(torch.ones(0, 3), "map")
    with pytest.raises(InvalidInputError, match="map holds NaN or infinity in 2 of 3 values"):
        finite_array([1.0, np.nan, np.inf], "map")


def test_maps_are_resized_between_pixel_centers() -> None:
    resized = resize_bilinear(np.array([[0.0, 4.0]])[:, ::-1], (2, 4))
    assert resized.tolist() == [[4, 3, 1, 0]] * 2
