"""The interface of a pyramid."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from captum.attr import (
    InputXGradient,
)
from torch import Tensor

from captum_intramodal import MSEA, LowPass, Pyramid, Reprocess, Resize
from captum_intramodal.attr import pyramids


def test_a_custom_pyramid_is_used() -> None:
    image = torch.rand(2, 3, 16, 12)

    class Brightness:
        """A pyramid that scales brightness instead of size."""

        def down(
            self, inputs: tuple[Tensor, ...], kwargs: Mapping[str, Any], scale: float
        ) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
            return tuple(t * scale for t in inputs), dict(kwargs)

        def back(
            self, attributions: tuple[Tensor, ...], like: tuple[Tensor, ...], scale: float, preserve_sum: bool
        ) -> tuple[Tensor, ...]:
            return tuple(a / scale for a in attributions)

    inner = InputXGradient(lambda x: x.square().flatten(1).sum(1))
    actual = MSEA(inner, scales=(1.0, 2.0), pyramid=Brightness()).attribute(image)
    assert torch.allclose(actual, 2 * image**2 * (1 + 2) / 2)


def test_the_package_exports_every_pyramid() -> None:
    assert (pyramids.LowPass, pyramids.Pyramid, pyramids.Reprocess, pyramids.Resize) == (
        LowPass,
        Pyramid,
        Reprocess,
        Resize,
    )
