"""Localization metrics, against masks and against the functions of captum_intramodal.metrics."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from captum_intramodal.datasets import Sample
from captum_intramodal.evaluation import AnsweredSample
from captum_intramodal.metrics import (
    average_precision,
    otsu_threshold,
    tam_scores,
)
from tests.evaluation.helpers import (
    MaskExplainer,
    demo_case,
    measure,
)


def test_true_masks_score_1_in_every_localization_metric() -> None:
    maps = MaskExplainer(demo_case().sample)(demo_case().adapter, [], "", demo_case().answer_ids)[0]
    found = measure("f1_iou", maps).scores
    assert found["obj_iou"] == {"4": 1.0, "7": 1.0}
    for name in ("pointing", "energy", "average_precision"):
        assert measure(name, maps).scores[name] == pytest.approx({"4": 1.0, "7": 1.0})
    assert measure("obj_iou", maps).scores == {"obj_iou": found["obj_iou"]}
    assert measure("func_iou", maps).scores == {"func_iou": found["func_iou"]}


def test_function_words_are_compared_with_the_thresholds_of_all_nouns() -> None:
    maps = torch.rand(len(demo_case().answer_ids), 12, 16)
    thresholds = [otsu_threshold(maps[token]) for token in (1, 4, 7)]
    expected = {str(i): float((maps[i] < sum(thresholds) / 3).float().mean()) for i in (0, 3, 5, 6)}
    assert measure("f1_iou", maps).scores["func_iou"] == pytest.approx(expected)


def test_obj_iou_takes_the_best_token_of_a_word_and_other_metrics_the_mean_map() -> None:
    adapter, image = demo_case().adapter, demo_case().sample.image
    mask = np.zeros(image.size[::-1], bool)
    mask[:96] = True
    answer = AnsweredSample(
        adapter, Sample("1", image, "what?", categories={"red book": mask}), adapter.tokenize_answer("a red book")
    )
    maps = torch.zeros(3, 192, 256)
    maps[1, 96:], maps[2, :96] = 3.0, 1.0
    assert measure("obj_iou", maps, of=answer).scores["obj_iou"] == {"1": 1.0}
    assert measure("pointing", maps, of=answer).scores["pointing"] == {"1": 0.0}
    assert measure("average_precision", maps, of=answer).scores["average_precision"]["1"] == pytest.approx(
        average_precision(maps[1:].mean(0), mask)
    )


def test_tam_iou_equals_tam_scores() -> None:
    sample = demo_case().sample
    maps = torch.rand(len(demo_case().answer_ids), 12, 16)
    labels = np.zeros((192, 256), np.int64)
    for number, name in ((1, "lemon"), (2, "donut")):
        labels[sample.categories[name]] = number
    classes = [-2, -1, -3, -2, 1, -2, -2, 2, -3]
    gray = list((maps / maps.max() * 255).to(torch.uint8))
    expected = tam_scores(gray, [[i] for i in range(9)], classes, labels)
    found = measure("tam_iou", maps).scores
    assert list(found["tam_obj_iou"].values()) == expected.object_iou
    assert list(found["tam_func_iou"].values()) == expected.function_iou
