"""Inputs at half their size, and the arguments that an inner method gets there."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from captum.attr import (
    Attribution,
)
from torch import Tensor

from captum_intramodal import MSEA

SIZE = (16, 12)
HALF = (8, 6)


def half(value: Tensor) -> Tensor:
    """Shrink an image to half its size without the package's code."""
    return F.interpolate(value, size=HALF, mode="bilinear", antialias=True)


def at_half(inputs: Any, pyramid: Any = None, **kwargs: Any) -> dict[str, Any]:
    """Return the inputs and arguments that the inner method gets at scale 0.5."""
    calls: list[dict[str, Any]] = []

    class Spy(Attribution):
        def attribute(self, inputs: Any, **kwargs: Any) -> Any:  # type: ignore[override]
            calls.append({"inputs": inputs, **kwargs})
            return tuple(map(torch.zeros_like, inputs)) if isinstance(inputs, tuple) else torch.zeros_like(inputs)

    MSEA(Spy(lambda x: x), scales=(1.0, 0.5), pyramid=pyramid).attribute(inputs, **kwargs)
    return calls[1]
