"""What the model would say at another scale, and what scales count where it would say something else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from captum_intramodal import ModelAdapter, explain
from captum_intramodal.explainers import make_explainer
from captum_intramodal.explanation.activations import Activations, collect_answer_activations
from captum_intramodal.functional.aggregation import Aggregation
from captum_intramodal.models.hooks import evaluation_mode
from tests.testing.tiny import random_image, tiny

PROMPT, ANSWER, SCALES = "describe the picture", "a red dog and a blue cat", (1.0, 1.5, 2.0)


@pytest.fixture(scope="module")
def qwen() -> tuple[Any, Any]:
    return tiny("qwen2_vl")


@pytest.fixture(scope="module")
def reading(qwen: tuple[Any, Any]) -> Activations:
    adapter = ModelAdapter(*qwen)
    with evaluation_mode(adapter.model):
        return collect_answer_activations(adapter, [random_image()], PROMPT, ANSWER, SCALES, decisions=True)


def test_decisions_are_those_of_the_model_on_the_resized_image(qwen: tuple[Any, Any], reading: Activations) -> None:
    model, processor = qwen
    shown, ids = random_image(), reading.text.ids[-7:]
    assert reading.decisions is not None and list(reading.decisions) == list(SCALES)
    for level, decision in zip(reading.scale_maps, reading.decisions.values(), strict=True):
        text = processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": PROMPT}]}],
            add_generation_prompt=True,
        )
        resized = shown.resize(level.geometry.image_sizes[0])  # type: ignore[attr-defined]
        inputs = dict(processor(text=[text], images=[resized], return_tensors="pt"))
        inputs["input_ids"] = torch.cat([inputs["input_ids"], ids[None]], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        kinds = inputs.get("mm_token_type_ids")
        if kinds is not None:
            inputs["mm_token_type_ids"] = torch.cat([kinds, kinds.new_zeros(1, 7)], dim=1)
        with torch.no_grad():
            logits = model(**inputs).logits[0, -8:-1].float()
        assert torch.equal(decision.likeliest, logits.argmax(-1))
        expected = logits.log_softmax(-1).gather(1, ids[:, None])[:, 0]
        assert torch.allclose(decision.log_probability, expected, atol=1e-4)


@pytest.mark.parametrize("changed", ["drop", "weigh"])
@pytest.mark.parametrize("aggregation", ["mean", "max", "geometric_mean"])
def test_scales_of_another_decision_by_a_slow_loop(
    reading: Activations, changed: Any, aggregation: Aggregation
) -> None:
    decisions = reading.decisions
    assert decisions is not None
    grid = max((level.grid(0, (200, 136)) for level in reading.scale_maps), key=lambda g: g[0] * g[1])
    drawn = [level.rasterize(0, (200, 136), grid) for level in reading.scale_maps]
    (maps,) = reading.maps(torch.tensor([0.2, 0.3, 0.5]), aggregation, changed)
    (kept,) = reading.maps(torch.tensor([0.2, 0.3, 0.5]), aggregation)
    prompt = len(reading.text.ids) - 7
    assert torch.allclose(maps[:prompt], kept[:prompt])  # The prompt's tokens are nobody's decision.
    for token in range(7):
        weights = []
        for scale, weight in zip(SCALES, (0.2, 0.3, 0.5), strict=True):
            same = decisions[scale].likeliest[token] == decisions[1.0].likeliest[token]
            ratio = (decisions[scale].log_probability[token] - decisions[1.0].log_probability[token]).exp()
            weights.append(weight * float(same if changed == "drop" else min(ratio, torch.tensor(1.0))))
        total = sum(weights)
        used = [(w / total, m[prompt + token]) for w, m in zip(weights, drawn, strict=True) if w > 0]
        assert torch.allclose(maps[prompt + token], slow(used, aggregation), atol=1e-5)


def slow(used: list[tuple[float, Tensor]], aggregation: str) -> Tensor:
    if aggregation == "mean":
        return torch.stack([w * m for w, m in used]).sum(0)
    if aggregation == "max":
        return torch.stack([w * m for w, m in used]).amax(0) * len(used)
    product = torch.stack([m.clamp_min(1e-12) ** w for w, m in used]).prod(0)
    return product * torch.stack([m > 0 for _, m in used]).all(0)


def test_where_no_scale_is_left_all_count(reading: Activations) -> None:
    assert reading.decisions is not None
    others = {s: d._replace(likeliest=d.likeliest + (s > 1)) for s, d in reading.decisions.items()}
    others = {s: d if s > 1 else d._replace(likeliest=reading.decisions[1.5].likeliest) for s, d in others.items()}
    without = replace(reading, scale_maps=reading.scale_maps[1:2], decisions=others)
    pair = replace(without, scale_maps=[reading.scale_maps[1]] * 2)
    (maps,) = pair.maps(torch.tensor([0.5, 0.5]), "mean", "drop")
    (kept,) = without.maps(torch.tensor([1.0]))
    assert torch.allclose(maps, kept, atol=1e-6)


def test_explain_and_explainers_take_the_option(qwen: tuple[Any, Any], reading: Activations) -> None:
    result = explain(*qwen, random_image(), PROMPT, ANSWER, scales=SCALES, arc=None, changed_decisions="drop")
    (expected,) = reading.maps(torch.full((3,), 1 / 3), "mean", "drop")
    assert torch.allclose(result.maps[0], expected[reading.text.displayed], atol=1e-6)
    assert result.settings["changed_decisions"] == "drop"
    adapter = ModelAdapter(*qwen)
    spec = "msea:scales=[1,1.5,2],changed_decisions=drop"
    (maps,) = make_explainer(spec)(adapter, [random_image()], PROMPT, adapter.tokenize_answer(ANSWER))
    assert torch.allclose(maps, expected[-7:], atol=1e-6)


def test_errors(qwen: tuple[Any, Any]) -> None:
    with pytest.raises(ValueError, match=r"changed_decisions must be one of .*'forget'"):
        explain(*qwen, random_image(), PROMPT, ANSWER, changed_decisions="forget")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'forget'"):
        make_explainer("msea+arc:changed_decisions=forget")
    with pytest.raises(ValueError, match="shows the model a part of the image"):
        explain(*tiny("llava"), random_image(), PROMPT, ANSWER, scales=(1, 2), crops=True, changed_decisions="drop")
