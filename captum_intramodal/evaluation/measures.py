r"""The metrics of an evaluation by name: what each asks of an explainer's maps of one answer.

A metric gives numbers per word of the answer, or one for the whole answer, in one or more columns of the table.
:data:`METRICS` lists them, :func:`make_metric` makes one from text: ``'deletion:imputation=mean'``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from captum.metrics import infidelity, sensitivity_max
from PIL import Image
from torch import Tensor

from captum_intramodal._utils.captum import format_tensor_into_tuples
from captum_intramodal._utils.image import image_to_tensor
from captum_intramodal._utils.spec import build, parse_spec, settings_of
from captum_intramodal.attr.pixel_forward import PixelForward
from captum_intramodal.evaluation.case import AnsweredSample
from captum_intramodal.evaluation.leaderboard import ANSWER, Column
from captum_intramodal.explainers import Explainer, shared_passes
from captum_intramodal.functional.imputation import Imputation, check_imputation
from captum_intramodal.metrics import (
    FUNCTION_WORD,
    OTHER_NOUN,
    OTHER_WORD,
    ImageRemoval,
    Imputer,
    TokenRemoval,
    aopc,
    area_under_curve,
    average_precision,
    deletion_curve,
    energy_inside,
    function_iou,
    insertion_curve,
    object_iou,
    otsu_threshold,
    pointing_hit,
    randomization_check,
    road,
    tam_scores,
)
from captum_intramodal.metrics.removal import importance_at_pixels

__all__ = ["METRICS", "Metric", "MetricResult", "make_metric"]

Of = Literal["words", "answer"]


@dataclass
class MetricResult:
    """What metrics found of one explainer on one answer.

    Attributes:
        scores (dict): column -> index of a word, or ``'answer'`` -> number.
        curves (dict): likewise, of curves over the case's fractions.
    """

    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    curves: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def add(self, column: str, where: int | str, value: float) -> None:
        self.scores.setdefault(column, {})[str(where)] = float(value)

    def add_curve(self, name: str, where: int | str, values: np.ndarray) -> None:
        self.curves.setdefault(name, {})[str(where)] = [round(float(value), 6) for value in values]


@dataclass(kw_only=True)
class Metric(ABC):
    """One metric with its options.

    Attributes:
        name (str): what :func:`make_metric` knows it by.
        columns (tuple[Column, ...]): what it adds to the table.
        settings (dict): everything that defines it, JSON-able.
    """

    name: ClassVar[str]
    columns: ClassVar[tuple[Column, ...]]

    @property
    def settings(self) -> dict[str, Any]:
        """The name and all options, JSON-able."""
        return settings_of(self)

    @abstractmethod
    def measure(self, case: AnsweredSample, explainer: Explainer, maps: Tensor, found: MetricResult) -> None:
        r"""
        Adds what it finds.

        Args:

            case (AnsweredSample): The answer.
            explainer (Explainer): Whose maps; some metrics ask it again, on changed images or of a changed model.
            maps (Tensor): Its maps of the answer's T tokens, float32 (T, rows, columns), not negative.
            found (MetricResult): Takes the results.
        """


def _mean_map(maps: Tensor, tokens: Sequence[int]) -> Tensor:
    return maps[list(tokens)].mean(0)


# --- Localization ----------------------------------------------------------------------------------------------------

_OBJ = Column("obj_iou", "Obj-IoU", True)
_FUNC = Column("func_iou", "Func-IoU", True)


@dataclass(kw_only=True)
class ObjectIoU(Metric):
    """:func:`~captum_intramodal.metrics.object_iou` of object words with a mask; the best of a word's tokens counts."""

    name: ClassVar[str] = "obj_iou"
    columns: ClassVar[tuple[Column, ...]] = (_OBJ,)

    def measure(self, case: AnsweredSample, explainer: Explainer, maps: Tensor, found: MetricResult) -> None:
        for index, (word, mask) in case.shown.items():
            found.add("obj_iou", index, max(object_iou(maps[token], mask) for token in word.tokens))


@dataclass(kw_only=True)
class FunctionIoU(Metric):
    """Of function words, against the thresholds of all nouns (:func:`~captum_intramodal.metrics.function_iou`)."""

    name: ClassVar[str] = "func_iou"
    columns: ClassVar[tuple[Column, ...]] = (_FUNC,)

    def measure(self, case: AnsweredSample, explainer: Explainer, maps: Tensor, found: MetricResult) -> None:
        thresholds = [max(otsu_threshold(maps[token]) for token in word.tokens) for word in case.nouns.values()]
        if thresholds:
            for index, word in enumerate(case.words):
                if word.type == "function":
                    found.add("func_iou", index, function_iou(maps[list(word.tokens)], thresholds))


@dataclass(kw_only=True)
class F1IoU(Metric):
    """Obj-IoU, Func-IoU and the harmonic mean of their means, of the right token's maps as they are, no sample dropped:
    the corrected reading of TAM's definition."""

    name: ClassVar[str] = "f1_iou"
    columns: ClassVar[tuple[Column, ...]] = (_OBJ, _FUNC, Column("f1_iou", "F1-IoU", True, ("obj_iou", "func_iou")))

    def measure(self, case: AnsweredSample, explainer: Explainer, maps: Tensor, found: MetricResult) -> None:
        ObjectIoU().measure(case, explainer, maps, found)
        FunctionIoU().measure(case, explainer, maps, found)


@dataclass(kw_only=True)
class CompatibleIoU(Metric):
    r"""
    The same in TAM's own arithmetic (:func:`~captum_intramodal.metrics.tam_scores`), quirks included. Maps become gray
    levels by the largest value of the answer's maps, so that words stay comparable; masks become one label image, in
    which of overlapping categories the smallest is on top.
    """

    name: ClassVar[str] = "tam_iou"
    columns: ClassVar[tuple[Column, ...]] = (
        Column("tam_obj_iou", "Obj-IoU (TAM)", True),
        Column("tam_func_iou", "Func-IoU (TAM)", True),
        Column("tam_f1_iou", "F1-IoU (TAM)", True, ("tam_obj_iou", "tam_func_iou")),
    )

    def measure(self, case: AnsweredSample, explainer: Explainer, maps: Tensor, found: MetricResult) -> None:
        levels = (maps / maps.max().clamp_min(1e-30) * 255).to(torch.uint8)
        masks = case.sample.categories
        number = {name: index for index, name in enumerate(masks, start=1)}
        labels = np.zeros(case.sample.image.size[::-1], np.int64)
        for name in sorted(masks, key=lambda name: -int(masks[name].sum())):
            labels[masks[name]] = number[name]
        other = {"noun": OTHER_NOUN, "function": FUNCTION_WORD, "other": OTHER_WORD}
        classes = [other[word.type] if word.category is None else number[word.category] for word in case.words]
        scores = tam_scores(list(levels), [word.tokens for word in case.words], classes, labels)
        for column, values in zip(("tam_obj_iou", "tam_func_iou"), scores, strict=True):
            for index, value in enumerate(values):  # Merged words have no index of their own.
                found.add(column, index, value)


@dataclass(kw_only=True)
class _MaskMetric(Metric):
    """A number for a word's map, the mean of its tokens', and its mask."""

    def measure(self, case: AnsweredSample, explainer: Explainer, maps: Tensor, found: MetricResult) -> None:
        for index, (word, mask) in case.shown.items():
            found.add(self.name, index, self.compare(_mean_map(maps, word.tokens), mask))

    @abstractmethod
    def compare(self, map: Tensor, mask: np.ndarray) -> float: ...


@dataclass(kw_only=True)
class Pointing(_MaskMetric):
    """:func:`~captum_intramodal.metrics.pointing_hit` of object words."""

    name: ClassVar[str] = "pointing"
    columns: ClassVar[tuple[Column, ...]] = (Column("pointing", "pointing", True),)

    def compare(self, map: Tensor, mask: np.ndarray) -> float:
        return pointing_hit(map, mask)


@dataclass(kw_only=True)
class Energy(_MaskMetric):
    """:func:`~captum_intramodal.metrics.energy_inside` of object words."""

    name: ClassVar[str] = "energy"
    columns: ClassVar[tuple[Column, ...]] = (Column("energy", "energy inside", True),)

    def compare(self, map: Tensor, mask: np.ndarray) -> float:
        return energy_inside(map, mask)


@dataclass(kw_only=True)
class AveragePrecision(_MaskMetric):
    """:func:`~captum_intramodal.metrics.average_precision` of object words."""

    name: ClassVar[str] = "average_precision"
    columns: ClassVar[tuple[Column, ...]] = (Column("average_precision", "average precision", True),)

    def compare(self, map: Tensor, mask: np.ndarray) -> float:
        return average_precision(map, mask)


# --- Faithfulness ----------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class _RemovalMetric(Metric):
    """
    Of object words, each with its own map, or of the whole answer with the mean of their maps.

    Args:

        of (str, optional): Whose probability, the ``'words'`` or the ``'answer'``.
                    Default: ``'words'``
        imputation (str, optional): See :class:`~captum_intramodal.metrics.ImageRemoval`.
                    Default: ``'blur'``; of ROAD ``'noisy_linear'``
        seed (int, optional): Of the noise, and of the order of equal values.
                    Default: 0
    """

    of_words: ClassVar[tuple[Column, ...]]

    of: Of = "words"
    imputation: Imputation = "blur"
    seed: int = 0

    @property
    def columns(self) -> tuple[Column, ...]:  # type: ignore[override]
        if self.of == "words":
            return self.of_words
        return tuple(
            replace(column, name=f"answer_{column.name}", title=f"{column.title} (answer)") for column in self.of_words
        )

    def __post_init__(self) -> None:
        if self.of not in ("words", ANSWER):
            raise ValueError(f"of must be 'words' or 'answer', got {self.of!r}.")
        check_imputation(self.imputation)

    def measure(self, case: AnsweredSample, explainer: Explainer, maps: Tensor, found: MetricResult) -> None:
        targets: dict[int | str, tuple[Sequence[int], Tensor]] = {
            index: (word.tokens, _mean_map(maps, word.tokens)) for index, word in case.objects.items()
        }
        if self.of == ANSWER and targets:
            targets = {ANSWER: (range(len(maps)), torch.stack([map for _, map in targets.values()]).mean(0))}
        for where, (tokens, map) in targets.items():
            removal = ImageRemoval(case.score(tokens), case.sample.image, self.imputation, self.seed)
            curve, values = self.remove(removal, removal.importance(map), case.fractions)
            for column, value in zip(self.columns, values, strict=True):
                found.add(column.name, where, value)
            if curve is not None:
                found.add_curve(self.columns[0].name, where, curve)

    @abstractmethod
    def remove(
        self, removal: ImageRemoval, importance: np.ndarray, fractions: Sequence[float]
    ) -> tuple[np.ndarray | None, tuple[float, ...]]:
        """A curve to draw, and a number for each column."""


@dataclass(kw_only=True)
class Insertion(_RemovalMetric):
    """Mean probability while the image is filled in, the most important pixels first."""

    name: ClassVar[str] = "insertion"
    of_words: ClassVar[tuple[Column, ...]] = (Column("insertion", "insertion", True),)

    def remove(
        self, removal: ImageRemoval, importance: np.ndarray, fractions: Sequence[float]
    ) -> tuple[np.ndarray | None, tuple[float, ...]]:
        curve = insertion_curve(removal, importance, fractions, self.seed)
        return curve, (area_under_curve(curve, fractions),)


@dataclass(kw_only=True)
class Deletion(_RemovalMetric):
    """Mean probability while pixels are removed, the most important first; AOPC is the mean drop."""

    name: ClassVar[str] = "deletion"
    of_words: ClassVar[tuple[Column, ...]] = (Column("deletion", "deletion", False), Column("aopc", "AOPC", True))

    def remove(
        self, removal: ImageRemoval, importance: np.ndarray, fractions: Sequence[float]
    ) -> tuple[np.ndarray | None, tuple[float, ...]]:
        curve = deletion_curve(removal, importance, fractions, self.seed)
        return curve, (area_under_curve(curve, fractions), aopc(curve))


@dataclass(kw_only=True)
class Road(_RemovalMetric):
    """:func:`~captum_intramodal.metrics.road`."""

    name: ClassVar[str] = "road"
    of_words: ClassVar[tuple[Column, ...]] = (Column("road", "ROAD", True),)

    imputation: Imputation = "noisy_linear"

    def remove(
        self, removal: ImageRemoval, importance: np.ndarray, fractions: Sequence[float]
    ) -> tuple[np.ndarray | None, tuple[float, ...]]:
        inner = [fraction for fraction in fractions if 0 < fraction < 1]  # At the ends all maps are equal.
        return None, (road(removal, importance, inner, self.seed),)


@dataclass(kw_only=True)
class TextRemoval(Metric):
    """Mean probability of object words while the earlier text tokens are filled in or replaced, the most relevant
    first. Of explainers that say which words matter."""

    name: ClassVar[str] = "text_removal"
    columns: ClassVar[tuple[Column, ...]] = (
        Column("text_insertion", "insertion of words", True),
        Column("text_deletion", "deletion of words", False),
    )

    seed: int = 0

    def measure(self, case: AnsweredSample, explainer: Explainer, maps: Tensor, found: MetricResult) -> None:
        image, count = case.sample.image, len(case.answer_ids)
        try:
            text = explainer.explain_text(case.adapter, [image], case.sample.prompt, case.answer_ids)  # type: ignore[attr-defined]
        except (AttributeError, ValueError):  # Not every explainer says something of text.
            return
        for index, word in case.objects.items():
            earlier = len(text.positions) - count + word.tokens[0]
            relevance = text.values[list(word.tokens), :earlier].mean(0)
            removal = TokenRemoval(case.scorer, image, text.positions[:earlier], word.tokens)
            for column, curve_of in (("text_insertion", insertion_curve), ("text_deletion", deletion_curve)):
                curve = curve_of(removal, relevance, case.fractions, self.seed)
                found.add(column, index, area_under_curve(curve, case.fractions))
                found.add_curve(column, index, curve)


@dataclass(kw_only=True)
class Infidelity(Metric):
    r"""
    Captum's ``infidelity`` of object words' log-probabilities: the squared error between what a map says that a square
    of the image is worth (the map's sum there) and what the model loses when the square is blurred, for squares of a
    third of the shorter side at random places. The map's best scale is taken (``normalize=True``).

    Args:

        samples (int, optional): Number of squares.
                    Default: 20
        seed (int, optional): Of their places.
                    Default: 0
    """

    name: ClassVar[str] = "infidelity"
    columns: ClassVar[tuple[Column, ...]] = (Column("infidelity", "infidelity", False),)

    samples: int = 20
    seed: int = 0

    def measure(self, case: AnsweredSample, explainer: Explainer, maps: Tensor, found: MetricResult) -> None:
        image = case.sample.image
        blurred = image_to_tensor(Imputer(image, "blur").nothing_kept())
        forward = PixelForward(case.adapter, case.sample.prompt, case.answer_ids, "token_log_probs")
        side = max(1, min(image.size) // 3)

        def blur_squares(inputs: Tensor) -> tuple[Tensor, Tensor]:
            generator = np.random.default_rng(self.seed)
            squares = torch.zeros(len(inputs), 1, image.height, image.width)
            for square in squares:
                y, x = (int(generator.integers(n - side + 1)) for n in (image.height, image.width))
                square[:, y : y + side, x : x + side] = 1
            return squares.expand_as(inputs), torch.lerp(inputs, blurred.expand_as(inputs), squares)

        for index, word in case.objects.items():
            tokens = list(word.tokens)
            map = torch.from_numpy(importance_at_pixels(_mean_map(maps, tokens), image.size)).float()
            value = infidelity(
                lambda pixels, tokens=tokens: forward(pixels)[:, tokens].sum(1),
                blur_squares,
                image_to_tensor(image),
                (map / 3).expand(1, 3, -1, -1),  # The sum over channels is the map.
                n_perturb_samples=self.samples,
                max_examples_per_batch=case.batch_size,
                normalize=True,
            )
            found.add("infidelity", index, float(value))


@dataclass(kw_only=True)
class Sensitivity(Metric):
    """
    Captum's ``sensitivity_max`` of the object words' maps: how much they change, relative to their norm, when the
    image gets uniform noise.

    Args:

        radius (float, optional): Largest noise, of pixels in [0, 1].
                    Default: 0.02
        samples (int, optional): Number of noisy images, of which the worst counts.
                    Default: 3
        seed (int, optional): Of the noise.
                    Default: 0
    """

    name: ClassVar[str] = "sensitivity"
    columns: ClassVar[tuple[Column, ...]] = (Column("sensitivity", "max-sensitivity", False),)

    radius: float = 0.02
    samples: int = 3
    seed: int = 0

    def measure(self, case: AnsweredSample, explainer: Explainer, maps: Tensor, found: MetricResult) -> None:
        words = list(case.objects.values())
        if not words or not float(maps.max()) > 0:
            return

        def explain(pixels: Tensor | tuple[Tensor, ...]) -> tuple[Tensor]:
            shown = [_image(each) for each in format_tensor_into_tuples(pixels)[0]]
            each = [explainer(case.adapter, [image], case.sample.prompt, case.answer_ids)[0] for image in shown]
            return (torch.stack([torch.stack([_mean_map(maps, word.tokens) for word in words]) for maps in each]),)

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            value = sensitivity_max(
                explain, image_to_tensor(case.sample.image), perturb_radius=self.radius, n_perturb_samples=self.samples
            )
        found.add("sensitivity", ANSWER, float(value))


@dataclass(kw_only=True)
class Randomization(Metric):
    """
    Mean magnitude of Spearman's correlation of the object words' maps with those of the model while it loses its
    weights, from the head to the vision tower (:func:`~captum_intramodal.metrics.randomization_check`). One explanation
    per layer of the model.

    Args:

        seed (int, optional): Of the random weights.
                    Default: 0
    """

    name: ClassVar[str] = "randomization"
    columns: ClassVar[tuple[Column, ...]] = (Column("randomization", "randomization", False),)

    seed: int = 0

    def measure(self, case: AnsweredSample, explainer: Explainer, maps: Tensor, found: MetricResult) -> None:
        words = list(case.objects.values())
        if not words or not np.ptp(torch.stack([_mean_map(maps, word.tokens) for word in words]).numpy()):
            return

        def explain() -> Tensor:
            with shared_passes():  # Those of other weights are not its own.
                changed = explainer(case.adapter, [case.sample.image], case.sample.prompt, case.answer_ids)[0]
            return torch.stack([_mean_map(changed, word.tokens) for word in words])

        steps = randomization_check(case.adapter.model, explain, seed=self.seed)
        found.add("randomization", ANSWER, float(np.mean([abs(step.rank_correlation) for step in steps])))


def _image(pixels: Tensor) -> Image.Image:
    """The nearest image of 8 bits."""
    levels = (pixels.detach().clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).cpu().numpy())


METRICS: dict[str, Callable[..., Metric]] = {
    metric.name: metric
    for metric in (
        ObjectIoU, FunctionIoU, F1IoU, CompatibleIoU, Pointing, Energy, AveragePrecision, Insertion, Deletion, Road,
        TextRemoval, Infidelity, Sensitivity, Randomization,
    )
}  # fmt: skip


def make_metric(spec: str) -> Metric:
    r"""
    A metric from its name and options.

    Args:

        spec (str): A name in :data:`METRICS`; after a colon options ``name=value``, separated by commas.

    Returns:
        Metric: options that the spec leaves out have their defaults.

    Raises:
        ValueError: an unknown metric, an option that it does not have, or a value that it does not take.

    Examples::

        >>> make_metric("deletion:of=answer,imputation=mean").settings["imputation"]
        'mean'
    """
    name, options = parse_spec(spec)
    if name not in METRICS:
        raise ValueError(f"There is no metric {name!r}; there are {', '.join(METRICS)}.")
    return build(spec, METRICS[name], options)
