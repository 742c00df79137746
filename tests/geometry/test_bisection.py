from __future__ import annotations

from typing import Any

import pytest
import torch

from captum_intramodal.geometry import bisection, ownership
from captum_intramodal.geometry.measure import measure_geometry
from tests.geometry.helpers import preparer
from tests.testing.tiny import MODEL_TYPES, tiny


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_bisection_agrees_with_ownership(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = tiny(model_type)
    prepare, size = preparer(processor), (200, 136)
    found: list[Any] = []
    find_owners = ownership.PerturbationSweep.find_owners
    monkeypatch.setattr(
        ownership.PerturbationSweep, "find_owners", lambda self: found.append(find_owners(self)) or found[-1]
    )
    owned = measure_geometry(model, prepare, [size])
    assert found[0] is not None
    monkeypatch.setattr(ownership.PerturbationSweep, "find_owners", lambda self: None)
    bisected = measure_geometry(model, prepare, [size])
    assert owned.kinds == bisected.kinds
    torch.testing.assert_close(owned.boxes, bisected.boxes, atol=bisection.PRECISION, rtol=0)
