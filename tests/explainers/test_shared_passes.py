"""Forward passes that explainers share."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch

from captum_intramodal.explainers import make_explainer, shared_passes
from tests.explainers.helpers import PROMPT, answer_to, model_of
from tests.testing.tiny import random_image

module = import_module("captum_intramodal.explainers.pass_sharing")


def test_shared_passes_change_nothing_and_save_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, image, ids = model_of("qwen2_vl"), random_image(112, 84), answer_to(model_of("qwen2_vl"))
    specs = ("logit_lens", "tam", "msea:scales=[1,2]", "msea:scales=[1.5,2]", "msea+arc:scales=[1,1.5],layers=[0,-1]")
    explainers = [make_explainer(spec) for spec in specs]
    alone = [e(adapter, [image], PROMPT, ids)[0] for e in explainers]
    calls = []
    collect_activations = module.collect_activations

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(args[4].scales)
        return collect_activations(*args, **options)

    monkeypatch.setattr(module, "collect_activations", counted)
    with shared_passes(explainers):
        together = [e(adapter, [image], PROMPT, ids)[0] for e in explainers]
        assert calls == [(1.0, 1.5, 2.0)]
        explainers[0](adapter, [random_image(112, 84, 1)], PROMPT, ids)
        assert len(calls) == 2
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    explainers[0](adapter, [image], PROMPT, ids)
    assert len(calls) == 3


def test_shared_passes_if_scales_are_dropped() -> None:
    adapter, image, ids = model_of("llava"), random_image(112, 112), answer_to(model_of("llava"))
    explainers = [make_explainer(s) for s in ("logit_lens", "msea:scales=[1,2]", "msea:scales=[0.5,1]", "msea", "tam")]
    alone = [e(adapter, [image], PROMPT, ids)[0] for e in explainers]
    with shared_passes(explainers):
        together = [e(adapter, [image], PROMPT, ids)[0] for e in explainers]
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
