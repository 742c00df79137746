r"""Convert what users pass to metrics, tensors or arrays, to checked NumPy arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from captum_intramodal.errors import InvalidInputError

__all__ = ["Array", "Floats", "finite_array", "resize_bilinear"]

Array: TypeAlias = Tensor | npt.NDArray[Any]
Floats: TypeAlias = npt.NDArray[np.float64]


def finite_array(values: Array | Sequence[Any], name: str) -> Floats:
    """Convert values to float64 on the CPU; raise :class:`InvalidInputError` if there are none or one is not finite."""
    if isinstance(values, Tensor):
        values = values.detach().cpu().double().numpy()
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        raise InvalidInputError(f"{name} is empty (shape {array.shape}); pass at least one value.")
    invalid = int((~np.isfinite(array)).sum())
    if invalid:
        raise InvalidInputError(f"{name} holds NaN or infinity in {invalid} of {array.size} values; pass finite ones.")
    return array


def resize_bilinear(map: Floats, size: tuple[int, int]) -> Floats:
    """Resize a map (rows, columns) to (height, width) between pixel centers, without antialiasing."""
    values = torch.from_numpy(map.copy())[None, None]  # A caller's array may be read-only or flipped.
    resized: Floats = interpolate(values, size, mode="bilinear", align_corners=False)[0, 0].numpy()
    return resized
