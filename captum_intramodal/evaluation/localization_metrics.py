r"""Do the maps of words lie on the objects that the words name? IoU, pointing, energy and average precision."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from captum_intramodal.evaluation.example import AnsweredSample
from captum_intramodal.evaluation.metric_base import Metric, MetricResult, word_map
from captum_intramodal.evaluation.metric_registry import register_metric
from captum_intramodal.evaluation.records import Column
from captum_intramodal.explainers import Explainer
from captum_intramodal.metrics import (
    FUNCTION_WORD,
    OTHER_NOUN,
    OTHER_WORD,
    average_precision,
    energy_inside,
    function_iou,
    object_iou,
    otsu_threshold,
    pointing_hit,
    tam_scores,
)

_OBJECT_IOU = Column("obj_iou", "Obj-IoU", True)
_FUNCTION_IOU = Column("func_iou", "Func-IoU", True)


@register_metric("obj_iou")
@dataclass(kw_only=True)
class ObjectIoU(Metric):
    """:func:`~captum_intramodal.metrics.object_iou` of object words that have a mask, for the best of a word's
    tokens."""

    columns: ClassVar[tuple[Column, ...]] = (_OBJECT_IOU,)

    def measure(self, case: AnsweredSample, explainer: Explainer, maps: Tensor, found: MetricResult) -> None:
        for index, (word, mask) in case.shown.items():
            found.add("obj_iou", index, max(object_iou(maps[token], mask) for token in word.tokens))


@register_metric("func_iou")
@dataclass(kw_only=True)
class FunctionIoU(Metric):
    """:func:`~captum_intramodal.metrics.function_iou` of function words, at the thresholds of all nouns."""

    columns: ClassVar[tuple[Column, ...]] = (_FUNCTION_IOU,)

    def measure(self, case: AnsweredSample, explainer: Explainer, maps: Tensor, found: MetricResult) -> None:
        thresholds = [max(otsu_threshold(maps[token]) for token in word.tokens) for word in case.nouns.values()]
        if thresholds:
            for index, word in enumerate(case.words):
                if word.type == "function":
                    found.add("func_iou", index, function_iou(maps[list(word.tokens)], thresholds))


@register_metric("f1_iou")
@dataclass(kw_only=True)
class F1IoU(Metric):
    """Obj-IoU, Func-IoU and the harmonic mean of their means: TAM's definition without the quirks of its code, on the
    unscaled maps of the right tokens and without dropping samples."""

    columns: ClassVar[tuple[Column, ...]] = (
        _OBJECT_IOU,
        _FUNCTION_IOU,
        Column("f1_iou", "F1-IoU", True, ("obj_iou", "func_iou")),
    )

    def measure(self, case: AnsweredSample, explainer: Explainer, maps: Tensor, found: MetricResult) -> None:
        ObjectIoU().measure(case, explainer, maps, found)
        FunctionIoU().measure(case, explainer, maps, found)


@register_metric("tam_iou")
@dataclass(kw_only=True)
class CompatibleIoU(Metric):
    r"""
    Obj-IoU, Func-IoU and F1-IoU in TAM's own arithmetic, quirks included, by
    :func:`~captum_intramodal.metrics.tam_scores`.

    Maps are scaled to gray levels by the largest value of all of the answer's maps, so that words stay comparable.
    Masks are merged into one label image; if categories overlap, the smallest is on top.
    """

    columns: ClassVar[tuple[Column, ...]] = (
        Column("tam_obj_iou", "Obj-IoU (TAM)", True),
        Column("tam_func_iou", "Func-IoU (TAM)", True),
        Column("tam_f1_iou", "F1-IoU (TAM)", True, ("tam_obj_iou", "tam_func_iou")),
    )

    def measure(self, case: AnsweredSample, explainer: Explainer, maps: Tensor, found: MetricResult) -> None:
        gray = (maps / maps.max().clamp_min(1e-30) * 255).to(torch.uint8)
        masks = case.sample.categories
        number = {name: index for index, name in enumerate(masks, start=1)}
        labels = np.zeros(case.sample.image.size[::-1], np.int64)
        for name in sorted(masks, key=lambda name: -int(masks[name].sum())):
            labels[masks[name]] = number[name]
        other = {"noun": OTHER_NOUN, "function": FUNCTION_WORD, "other": OTHER_WORD}
        classes = [other[word.type] if word.category is None else number[word.category] for word in case.words]
        scores = tam_scores(list(gray), [word.tokens for word in case.words], classes, labels)
        for column, values in zip(("tam_obj_iou", "tam_func_iou"), scores, strict=True):
            for index, value in enumerate(values):  # TAM merges words, so these are not indices among the words.
                found.add(column, index, value)


@dataclass(kw_only=True)
class _MaskMetric(Metric):
    """A metric that compares an object word's map, averaged over its tokens, with its mask."""

    def measure(self, case: AnsweredSample, explainer: Explainer, maps: Tensor, found: MetricResult) -> None:
        for index, (word, mask) in case.shown.items():
            found.add(self.name, index, self.compare(word_map(maps, word.tokens), mask))

    @abstractmethod
    def compare(self, map: Tensor, mask: np.ndarray) -> float: ...


@register_metric("pointing")
@dataclass(kw_only=True)
class Pointing(_MaskMetric):
    """:func:`~captum_intramodal.metrics.pointing_hit` of object words."""

    columns: ClassVar[tuple[Column, ...]] = (Column("pointing", "pointing", True),)

    def compare(self, map: Tensor, mask: np.ndarray) -> float:
        return pointing_hit(map, mask)


@register_metric("energy")
@dataclass(kw_only=True)
class Energy(_MaskMetric):
    """:func:`~captum_intramodal.metrics.energy_inside` of object words."""

    columns: ClassVar[tuple[Column, ...]] = (Column("energy", "energy inside", True),)

    def compare(self, map: Tensor, mask: np.ndarray) -> float:
        return energy_inside(map, mask)


@register_metric("average_precision")
@dataclass(kw_only=True)
class AveragePrecision(_MaskMetric):
    """:func:`~captum_intramodal.metrics.average_precision` of object words."""

    columns: ClassVar[tuple[Column, ...]] = (Column("average_precision", "average precision", True),)

    def compare(self, map: Tensor, mask: np.ndarray) -> float:
        return average_precision(map, mask)
