from __future__ import annotations

from dataclasses import FrozenInstanceError
from types import SimpleNamespace

import pytest

from captum_intramodal.errors import InvalidOptionError
from captum_intramodal.models import families
from captum_intramodal.models.decoder import decoder_layers, lens_layers
from captum_intramodal.models.families import Family, family_of, register_family
from tests.testing.tiny import tiny


@pytest.fixture(autouse=True)
def rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registrations end with the test."""
    monkeypatch.setattr(families, "_FAMILIES", dict(families._FAMILIES))


def test_a_family_is_found_by_the_model_type_of_a_config() -> None:
    assert family_of(SimpleNamespace(model_type="emu3")) == Family("emu3", code_raster_ends=1)
    assert family_of(SimpleNamespace(model_type="chameleon")).code_raster_ends == 0


@pytest.mark.parametrize("config", [SimpleNamespace(model_type="unheard_of"), SimpleNamespace(), None])
def test_without_a_row_the_general_rules_hold(config: object) -> None:
    family = family_of(config)
    assert family == Family(getattr(config, "model_type", ""))
    assert (family.final_states, family.code_raster_ends, family.answer_token_type) == (None, None, None)
    assert not family.interleaves_images and not family.attends_ahead


def test_a_registered_row_is_found_and_replaces_an_earlier_one() -> None:
    config = SimpleNamespace(model_type="my_vlm")
    register_family(Family("my_vlm", answer_token_type=1))
    assert family_of(config).answer_token_type == 1
    register_family(Family("my_vlm", attends_ahead=True))
    assert family_of(config) == Family("my_vlm", attends_ahead=True)


def test_a_row_without_a_model_type_is_refused() -> None:
    with pytest.raises(InvalidOptionError, match="model_type must be that of the config"):
        register_family(Family(""))


def test_rows_cannot_be_changed_in_place() -> None:
    with pytest.raises(FrozenInstanceError):
        family_of(SimpleNamespace(model_type="emu3")).attends_ahead = True  # type: ignore[misc]


def test_a_registered_row_changes_the_layers_of_the_lens() -> None:
    model, _ = tiny("llava")
    decoder, layers = model.get_decoder(), decoder_layers(model)
    assert list(lens_layers(model)) == list(layers)
    register_family(Family(decoder.config.model_type, final_states="norm"))
    assert list(lens_layers(model)) == [*layers[:-1], decoder.norm]
