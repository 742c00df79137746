from __future__ import annotations

from typing import Any

import pytest
import torch

from captum_intramodal.geometry import ownership


@pytest.mark.parametrize("options", [{}, {"padding": 1}, {"groups": 3}, {"stride": 1}])
def test_convolutions_of_patches_are_matrix_products(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    for kind, kernel in ((torch.nn.Conv2d, (4, 5)), (torch.nn.Conv3d, (2, 4, 5))):
        convolution = kind(3, 6, kernel, **({"stride": kernel} | options))
        for size in (kernel, tuple(2 * side for side in kernel)):
            hidden = torch.randn(7, 3, *size)
            actual = ownership._convolve_patches(convolution, hidden)
            torch.testing.assert_close(actual, convolution(hidden), atol=1e-5, rtol=1e-4)
