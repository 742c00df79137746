from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from captum_intramodal.errors import InvalidInputError, NoTokenGeometryError, UnsupportedModelError
from captum_intramodal.geometry.decoder_inputs import layer0_input, model_inputs, visual_rows
from captum_intramodal.models.placeholders import visual_positions
from tests.geometry.helpers import preparer
from tests.testing.tiny import random_image, tiny


def test_visual_positions() -> None:
    model, _ = tiny("llava")
    token = model.config.image_token_id
    assert visual_positions(model, torch.tensor([1, token, 2, token])).tolist() == [1, 3]
    assert visual_positions(model, torch.tensor([[token, 1]])).tolist() == [0]
    with pytest.raises(InvalidInputError, match="No image placeholder"):
        visual_positions(model, torch.tensor([1, 2]))
    with pytest.raises(InvalidInputError, match="one example"):
        visual_positions(model, torch.tensor([[token, 1], [token, 1]]))
    with pytest.raises(UnsupportedModelError, match="names no image placeholder"):
        visual_positions(SimpleNamespace(config=SimpleNamespace()), torch.tensor([1, token]))


def test_visual_rows() -> None:
    model, _ = tiny("llava")
    token = model.config.image_token_id
    assert visual_rows(model, {"input_ids": torch.tensor([[1, token, 2, token]])}, None, 4).tolist() == [1, 3]
    ids = {"input_ids": torch.tensor([[1, 2]])}
    assert visual_rows(model, ids, "hidden_states", 5).tolist() == [0, 1, 2], "before the sequence"
    assert visual_rows(model, ids, "encoder_hidden_states", 5).tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(NoTokenGeometryError, match=r"The 2 tokens .* include no image placeholder"):
        visual_rows(model, ids, None, 2)
    with pytest.raises(NoTokenGeometryError, match="have no input_ids"):
        visual_rows(model, {}, None, 2)


def test_decoder_layer_that_does_not_run() -> None:
    model, processor = tiny("llava")
    inputs = model_inputs(model, preparer(processor)([random_image(64, 64)]))
    model.forward = lambda **inputs: None
    with pytest.raises(UnsupportedModelError, match="does not run its decoder's first layer"):
        layer0_input(model, inputs)
