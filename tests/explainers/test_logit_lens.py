"""The logit lens with and without MSEA and ARC."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image

from captum_intramodal import explain
from captum_intramodal.demo import IMAGES
from captum_intramodal.errors import InvalidOptionError, SpecError
from captum_intramodal.explainers import EXPLAINERS, make_explainer
from tests.explainers.helpers import PROMPT, answer_to, demo_adapter, model_of
from tests.testing.tiny import random_image


@pytest.mark.parametrize(
    "spec", ["logit_lens", "msea:scales=[1,1.5,2]", "arc", "msea+arc", "msea+arc:k=5,strength=0.5"]
)
def test_lens_maps_are_those_of_explain(spec: str) -> None:
    adapter, image = demo_adapter(), Image.open(IMAGES[0]).convert("RGB")
    ids = adapter.generate(adapter.prepare([image], "describe the picture."))
    options = {"k": 5, "strength": 0.5} if "k=5" in spec else "arc" in spec
    scales = "auto" if "msea" in spec else (1.0,)
    expected = explain(
        adapter.model, adapter.processor, image, "describe the picture.", ids, scales=scales, arc=options or None
    )
    (maps,) = make_explainer(spec)(adapter, [image], "describe the picture.", ids)
    assert torch.allclose(maps, expected.maps[0][-len(ids) :], atol=1e-6)


LENS = {
    "layer": None,
    "method": "logit_lens",
    "crops": False,
    "interpolate_pos_encoding": False,
    "logit_normalization": "raw",
}
MSEA = {"scales": "auto", "scale_weights": None, "aggregation": "mean", "changed_decisions": "keep"}
RANKING = {
    "layers": [-1],
    "k": 50,
    "p": 0.9,
    "normalization": "truncated",
    "weighting": "irrelevance",
    "ranking_position": "token",
    "least_squares": True,
    "strength": 1.0,
}


@pytest.mark.parametrize(
    ("name", "options"),
    [("logit_lens", LENS), ("msea", LENS | MSEA), ("arc", LENS | RANKING), ("msea+arc", LENS | MSEA | RANKING)],
)
def test_each_lens_has_exactly_the_options_that_apply(name: str, options: dict[str, Any]) -> None:
    assert list(make_explainer(name).settings.items()) == list(({"name": name} | options).items())
    for other in {*MSEA, *RANKING, "msea", "arc"} - set(options):
        with pytest.raises(SpecError, match=f"has no option {other}"):
            make_explainer(f"{name}:{other}=1")
        with pytest.raises(TypeError, match=other):
            EXPLAINERS[name](**{other: 1})


@pytest.mark.parametrize("spec", ["logit_lens", "msea:scales=[1,2]", "tam"])
def test_without_arc_nothing_is_ranked(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, ids = model_of("qwen2_vl"), answer_to(model_of("qwen2_vl"))
    explainer: Any = make_explainer(spec)
    assert explainer.pass_request.ranking_layers == ()
    for name in ("topk", "rank"):
        monkeypatch.setattr(type(adapter.lens), name, None)
    explainer(adapter, [random_image(112, 84)], PROMPT, ids)
    explainer.explain_text(adapter, [random_image(112, 84)], PROMPT, ids)


def test_options_that_exclude_each_other_are_refused() -> None:
    with pytest.raises(InvalidOptionError, match="choose one"):
        make_explainer("msea:crops=true,interpolate_pos_encoding=true")
    with pytest.raises(InvalidOptionError, match="method must be one of"):
        make_explainer("logit_lens:method=lens")
