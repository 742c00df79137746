"""Explainers by name: specs, registration, dotted names and what is refused."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from captum_intramodal._utils import registry as registry_module
from captum_intramodal.errors import SpecError
from captum_intramodal.explainers import EXPLAINERS, BaseExplainer, Example, make_explainer, register_explainer
from tests.explainers.helpers import PROMPT, answer_to, model_of
from tests.testing.tiny import random_image


class Uniform:
    """An explainer of another package, which derives from nothing."""

    name = "uniform"

    def __init__(self, value: float = 1.0) -> None:
        self.value = value

    @property
    def settings(self) -> dict[str, Any]:
        return {"name": self.name, "value": self.value}

    def __call__(self, adapter: Any, images: Any, prompt: Any, answer_ids: Any) -> list[Tensor]:
        return [torch.full((len(answer_ids), 2, 2), float(self.value)) for _ in images]


@dataclass(kw_only=True)
class Derived(BaseExplainer):
    value: float = 1.0

    def explain(self, example: Example) -> list[Tensor]:
        return [torch.full((len(example.answer_ids), 2, 2), float(self.value)) for _ in example.images]


@pytest.fixture
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restore the registered classes after the test."""
    monkeypatch.setattr(EXPLAINERS, "_classes", dict(EXPLAINERS._classes))


@pytest.fixture
def _my_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of the user's own."""
    module = ModuleType("my_maps")
    module.Uniform, module.Nameless = Uniform, Derived  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_maps", module)


def test_all_explainers_are_registered() -> None:
    assert set(EXPLAINERS) >= {
        "logit_lens", "msea", "arc", "msea+arc", "tam", "attention", "attention_rollout", "attention_x_gradient",
        "grad_cam", "llava_cam", "input_x_gradient", "integrated_gradients", "occlusion", "greedy", "random",
        "center_gaussian",
    }  # fmt: skip


@pytest.mark.usefixtures("_own_registry")
def test_a_decorated_class_is_made_by_its_name() -> None:
    registered = register_explainer("derived")(Derived)
    assert registered is Derived and registered.name == "derived"
    assert make_explainer("derived:value=2").settings == {"name": "derived", "value": 2}
    del Derived.name
    with pytest.raises(SpecError, match="'tam' is already registered"):
        register_explainer("tam")(Derived)


@pytest.mark.usefixtures("_my_maps")
def test_a_dotted_name_works_alone_and_inside_msea_and_arc() -> None:
    assert make_explainer("my_maps.Uniform:value=2").settings == {"name": "uniform", "value": 2}
    explainer = make_explainer("msea+arc+my_maps.Uniform:value=2,scales=[1,2],k=3")
    assert explainer.name == "msea+arc+uniform" and explainer.settings["k"] == 3
    assert explainer.settings["base"]["base"] == {"name": "uniform", "value": 2}
    adapter = model_of("qwen2_vl")
    (maps,) = make_explainer("msea+my_maps.Uniform:value=2,scales=[1,2]")(
        adapter, [random_image(112, 84)], PROMPT, answer_to(adapter)
    )
    assert torch.allclose(maps, torch.full((3, 2, 2), 2.0))


def test_an_entry_point_of_another_package_works_alone_and_inside_arc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EXPLAINERS, "_classes", dict(EXPLAINERS._classes))
    points = [
        EntryPoint("uniform", f"{__name__}:Uniform", EXPLAINERS.group),
        EntryPoint("system", "os:system", EXPLAINERS.group),
    ]
    monkeypatch.setattr(registry_module, "entry_points", lambda group: points if group == EXPLAINERS.group else [])
    assert isinstance(make_explainer("uniform"), Uniform)
    assert make_explainer("arc+uniform:value=3").settings["base"] == {"name": "uniform", "value": 3}
    with pytest.raises(SpecError, match="'system' is not an explainer"):
        make_explainer("system:command=true")


@pytest.mark.usefixtures("_my_maps")
@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "subprocess.Popen",
        "functools.partial",
        "enum.Enum",
        "my_maps.Nameless",
        "captum_intramodal.explainers.Explainer",
        "captum_intramodal.explainers.BaseExplainer",
        "no_such_package.Maps",
    ],
)
@pytest.mark.parametrize("prefix", ["", "arc+"])
def test_a_dotted_name_of_anything_but_an_explainer_is_refused_without_a_call(
    name: str, prefix: str, tmp_path: Path
) -> None:
    marker = tmp_path / "called"
    option = "args" if name == "subprocess.Popen" else "command"
    with pytest.raises(SpecError, match=f"'{name}' is (not|neither)"):
        make_explainer(f"{prefix}{name}:{option}=touch {marker}")
    assert not marker.exists()


def test_the_former_name_is_an_alias() -> None:
    assert make_explainer("centre_gaussian:cells=4").settings == make_explainer("center_gaussian:cells=4").settings
    assert make_explainer("arc+centre_gaussian").name == "arc+center_gaussian"
    assert "centre_gaussian" not in EXPLAINERS


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("lens", "There is no explainer 'lens'; registered are .*logit_lens, msea, arc"),
        ("arc+msea+tam", "no explainer"),
        ("tam:filtre=false", "no option filtre; its options are filter, layer"),
        ("tam:filter", "name=value"),
        ("msea:scales=[1,-2]", "-2"),
        ("msea+arc:k=0", "k"),
        ("greedy:imputation=black", "imputation must be one of"),
        ("msea+attention:cells=3", "cells"),
        ("+tam", "no explainer"),
        ("arc+logit_lens", "no explainer"),
        ("arc+lens", "There is no explainer 'lens'"),
    ],
)
def test_errors_in_a_spec(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_explainer(spec)
