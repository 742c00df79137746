from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from captum_intramodal._utils.image import noise_image
from captum_intramodal.errors import InvalidInputError, InvalidOptionError, NoTokenGeometryError
from captum_intramodal.geometry.measure import measure_geometry
from captum_intramodal.geometry.oracle import geometry_oracle
from captum_intramodal.geometry.token_geometry import TokenGeometry
from tests.geometry.helpers import preparer
from tests.testing.tiny import MODEL_TYPES, tiny


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_wrong_boxes_are_rejected(model_type: str) -> None:
    model, processor = tiny(model_type)
    prepare, size = preparer(processor), (180, 180)
    geometry = measure_geometry(model, prepare, [size])
    transposed = replace(geometry, boxes=geometry.boxes[:, [1, 0, 3, 2]])
    shifted = replace(geometry, boxes=geometry.boxes.roll(1, dims=0))
    assert geometry_oracle(model, prepare, [noise_image(size)], geometry) >= 0.97
    assert geometry_oracle(model, prepare, [noise_image(size)], transposed, blocks=20) <= 0.5
    assert geometry_oracle(model, prepare, [noise_image(size)], shifted, blocks=20) <= 0.5


def test_errors() -> None:
    model, processor = tiny("llava")
    prepare = preparer(processor)
    geometry = TokenGeometry(torch.zeros(3, 4), ("local",) * 3, torch.zeros(3, dtype=torch.int64), ((64, 64),))
    with pytest.raises(InvalidInputError, match="64 visual tokens, but the geometry has 3"):
        geometry_oracle(model, prepare, [noise_image((64, 64))], geometry)
    with pytest.raises(InvalidInputError, match="sizes"):
        geometry_oracle(model, prepare, [noise_image((64, 60))], geometry)
    with pytest.raises(InvalidOptionError, match="blocks"):
        geometry_oracle(model, prepare, [noise_image((64, 64))], geometry, blocks=0)
    with pytest.raises(NoTokenGeometryError, match="no local tokens"):
        geometry_oracle(model, prepare, [noise_image((64, 64))], replace(geometry, kinds=("global",) * 3))
