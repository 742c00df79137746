"""TAM's requirements; its arithmetic is tested in tests/functional."""

from __future__ import annotations

import pytest

from captum_intramodal.errors import NotApplicableError
from captum_intramodal.explainers import make_explainer
from tests.explainers.helpers import PROMPT, answer_to, model_of
from tests.testing.tiny import random_image


def test_tam_does_not_apply_to_tiles() -> None:
    adapter = model_of("smolvlm")
    with pytest.raises(NotApplicableError, match="one raster"):
        make_explainer("tam")(adapter, [random_image(200, 136)], PROMPT, answer_to(adapter))
