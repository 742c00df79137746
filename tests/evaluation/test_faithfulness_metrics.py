"""Faithfulness metrics, against the functions of captum_intramodal.metrics and known extremes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from captum_intramodal.adapter.answer_scorer import AnswerScorer
from captum_intramodal.errors import NotApplicableError
from captum_intramodal.evaluation import evaluate
from captum_intramodal.explainers import TextMaps, make_explainer
from captum_intramodal.metrics import (
    ImageRemoval,
    TokenRemoval,
    area_under_curve,
    deletion_curve,
    insertion_curve,
    randomization_check,
)
from tests.evaluation.helpers import (
    MaskExplainer,
    demo_case,
    demo_model,
    measure,
)


def test_deletion_and_insertion_equal_curves_computed_by_hand() -> None:
    sample, maps = demo_case().sample, torch.rand(len(demo_case().answer_ids), 12, 16)
    scorer = AnswerScorer(demo_case().adapter, sample.prompt, sample.answer or "")
    removal = ImageRemoval(lambda p: scorer.log_probability(p)[:, 4].exp(), sample.image, "mean")
    deletion = deletion_curve(removal, removal.importance(maps[4]))
    found = measure("deletion:imputation=mean", maps)
    assert found.scores["deletion"]["4"] == pytest.approx(area_under_curve(deletion), abs=1e-5)
    assert found.scores["aopc"]["4"] == pytest.approx(float((deletion[0] - deletion).mean()), abs=1e-5)
    assert found.curves["deletion"]["4"] == pytest.approx(deletion.tolist(), abs=1e-5)
    assert set(found.scores["deletion"]) == {"4", "7"}

    whole = ImageRemoval(lambda p: scorer.log_probability(p).sum(1).exp(), sample.image, "blur")
    curve = insertion_curve(whole, whole.importance(maps[[4, 7]].mean(0)))
    found = measure("insertion:of=answer", maps)
    assert found.scores == {"answer_insertion": {"answer": pytest.approx(area_under_curve(curve), abs=1e-5)}}


def test_curves_are_evaluated_at_the_fractions_of_the_run(tmp_path: Path) -> None:
    steps = (0, 0.02, 0.1)
    evaluate(*demo_model(), "scenes:count=1", tmp_path, ["center_gaussian"], ["deletion", "road"], fractions=steps)
    record = json.loads((tmp_path / "samples.jsonl").read_text())
    curves = record["curves"]["center_gaussian"]["deletion"]
    assert {len(curve) for curve in curves.values()} == {3}
    expected = {i: ((a + b) / 2 * 0.02 + (b + c) / 2 * 0.08) / 0.1 for i, (a, b, c) in curves.items()}
    assert record["scores"]["center_gaussian"]["deletion"] == pytest.approx(expected, abs=1e-5)


def test_road_is_high_for_masks_and_changes_sign_for_inverted_masks() -> None:
    masks = MaskExplainer(demo_case().sample)(demo_case().adapter, [], "", demo_case().answer_ids)[0]
    order = masks + torch.rand_like(masks) / 2  # No ties.
    good = measure("road", order).scores["road"]
    bad = measure("road", 1.5 - order).scores["road"]
    assert min(good.values()) > 0.1
    assert bad == pytest.approx({i: -value for i, value in good.items()}, abs=1e-6)


def test_text_removal_equals_a_curve_computed_by_hand() -> None:
    class TextExplainer:
        def explain_text(self, adapter: Any, images: Any, prompt: Any, answer_ids: Any) -> TextMaps:
            return TextMaps(positions, values)

    sample, ids = demo_case().sample, demo_case().answer_ids
    positions = make_explainer("random").explain_text(demo_case().adapter, [sample.image], sample.prompt, ids).positions
    values = torch.rand(len(ids), len(positions))
    found = measure("text_removal", torch.zeros(len(ids), 2, 2), TextExplainer())
    earlier = len(positions) - len(ids) + 7
    scorer = AnswerScorer(demo_case().adapter, sample.prompt, ids)
    removal = TokenRemoval(scorer, sample.image, positions[:earlier], token=7)
    expected = area_under_curve(deletion_curve(removal, values[7, :earlier]))
    assert found.scores["text_deletion"]["7"] == pytest.approx(expected, abs=1e-5)
    with pytest.raises(NotApplicableError, match="masks does not explain text"):
        measure("text_removal", torch.zeros(9, 2, 2), MaskExplainer(sample))
    with pytest.raises(NotApplicableError, match="images only"):
        measure("text_removal", torch.zeros(9, 2, 2), make_explainer("greedy"))


def test_infidelity_is_lower_for_masks_than_for_flipped_masks_at_any_scale() -> None:
    masks = MaskExplainer(demo_case().sample)(demo_case().adapter, [], "", demo_case().answer_ids)[0]
    good = measure("infidelity", masks).scores["infidelity"]
    flipped = measure("infidelity", masks.flip(1, 2)).scores["infidelity"]
    larger = measure("infidelity", 7 * masks).scores["infidelity"]
    assert set(good) == {"4", "7"} and all(good[i] < flipped[i] for i in good)
    assert larger == pytest.approx(good, rel=1e-4)  # Maps are compared at their best scale.


def test_sensitivity_is_zero_for_maps_that_noise_does_not_change() -> None:
    class ConstantExplainer:
        def __call__(self, adapter: Any, images: Any, prompt: Any, answer_ids: Any) -> list[Tensor]:
            return [torch.ones(9, 3, 4)]

    assert measure("sensitivity", torch.ones(9, 3, 4), ConstantExplainer()).scores == {"sensitivity": {"answer": 0.0}}
    lens = make_explainer("logit_lens")
    (maps,) = lens(demo_case().adapter, [demo_case().sample.image], demo_case().sample.prompt, demo_case().answer_ids)
    before = torch.get_rng_state()
    changed = measure("sensitivity:samples=1", maps, lens).scores["sensitivity"]["answer"]
    assert 0 < changed < 1 and torch.equal(torch.get_rng_state(), before)


def test_randomization_equals_randomization_check() -> None:
    lens, sample = make_explainer("logit_lens"), demo_case().sample

    def explain() -> Tensor:
        (maps,) = lens(demo_case().adapter, [sample.image], sample.prompt, demo_case().answer_ids)
        return maps[[4, 7]]

    steps = randomization_check(demo_case().adapter.model, explain)
    (maps,) = lens(demo_case().adapter, [sample.image], sample.prompt, demo_case().answer_ids)
    found = measure("randomization", maps, lens).scores["randomization"]["answer"]
    assert found == pytest.approx(float(np.mean([abs(step.rank_correlation) for step in steps])), abs=1e-6)
