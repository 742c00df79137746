r"""Does the model depend on what the maps highlight? Removal curves, infidelity, sensitivity and randomization."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import torch
from captum.metrics import infidelity, sensitivity_max
from torch import Tensor

from captum_intramodal._utils.captum import format_tensor_into_tuples
from captum_intramodal._utils.image import image_to_tensor, tensor_to_image
from captum_intramodal.attr.pixel_forward import PixelForward
from captum_intramodal.errors import InvalidOptionError, NotApplicableError
from captum_intramodal.evaluation.example import AnsweredSample
from captum_intramodal.evaluation.metric_base import Metric, MetricResult, word_map
from captum_intramodal.evaluation.metric_registry import register_metric
from captum_intramodal.evaluation.records import ANSWER, Column
from captum_intramodal.explainers import Explainer, shared_passes
from captum_intramodal.functional.imputation import Imputation, Imputer, check_imputation
from captum_intramodal.metrics import (
    ImageRemoval,
    TokenRemoval,
    aopc,
    area_under_curve,
    deletion_curve,
    insertion_curve,
    randomization_check,
    road,
)
from captum_intramodal.metrics.removal import importance_at_pixels


@dataclass(kw_only=True)
class _RemovalMetric(Metric):
    """
    A metric of the model's probability while pixels are removed or inserted by importance.

    Args:

        of (str, optional): ``'words'``: the probability of each object word, by its own map. ``'answer'``: the
                    probability of the whole answer, by the mean of the object words' maps.
                    Default: ``'words'``
        imputation (str, optional): See :class:`~captum_intramodal.metrics.ImageRemoval`.
                    Default: ``'blur'``; for ROAD ``'noisy_linear'``
        seed (int, optional): Seed of the noise, and of the order of equal values.
                    Default: 0
    """

    word_columns: ClassVar[tuple[Column, ...]]

    of: Literal["words", "answer"] = "words"
    imputation: Imputation = "blur"
    seed: int = 0

    @property
    def columns(self) -> tuple[Column, ...]:  # type: ignore[override]
        if self.of == "words":
            return self.word_columns
        return tuple(
            replace(column, name=f"answer_{column.name}", title=f"{column.title} (answer)")
            for column in self.word_columns
        )

    def __post_init__(self) -> None:
        if self.of not in ("words", ANSWER):
            raise InvalidOptionError(f"of must be 'words' or 'answer', got {self.of!r}.")
        check_imputation(self.imputation)

    def measure(self, case: AnsweredSample, explainer: Explainer, maps: Tensor, found: MetricResult) -> None:
        targets: dict[int | str, tuple[Sequence[int], Tensor]] = {
            index: (word.tokens, word_map(maps, word.tokens)) for index, word in case.objects.items()
        }
        if self.of == ANSWER and targets:
            targets = {ANSWER: (range(len(maps)), torch.stack([map for _, map in targets.values()]).mean(0))}
        for where, (tokens, map) in targets.items():
            removal = ImageRemoval(case.score(tokens), case.sample.image, self.imputation, self.seed)
            curve, values = self.score_removal(removal, removal.importance(map), case.fractions)
            for column, value in zip(self.columns, values, strict=True):
                found.add(column.name, where, value)
            if curve is not None:
                found.add_curve(self.columns[0].name, where, curve)

    @abstractmethod
    def score_removal(
        self, removal: ImageRemoval, importance: np.ndarray, fractions: Sequence[float]
    ) -> tuple[np.ndarray | None, tuple[float, ...]]:
        """Return a curve to plot, if any, and one value per column."""


@register_metric("insertion")
@dataclass(kw_only=True)
class Insertion(_RemovalMetric):
    """Mean probability while pixels are inserted, most important first."""

    word_columns: ClassVar[tuple[Column, ...]] = (Column("insertion", "insertion", True),)

    def score_removal(
        self, removal: ImageRemoval, importance: np.ndarray, fractions: Sequence[float]
    ) -> tuple[np.ndarray | None, tuple[float, ...]]:
        curve = insertion_curve(removal, importance, fractions, self.seed)
        return curve, (area_under_curve(curve, fractions),)


@register_metric("deletion")
@dataclass(kw_only=True)
class Deletion(_RemovalMetric):
    """Mean probability while pixels are removed, most important first, and AOPC, the mean drop in probability."""

    word_columns: ClassVar[tuple[Column, ...]] = (Column("deletion", "deletion", False), Column("aopc", "AOPC", True))

    def score_removal(
        self, removal: ImageRemoval, importance: np.ndarray, fractions: Sequence[float]
    ) -> tuple[np.ndarray | None, tuple[float, ...]]:
        curve = deletion_curve(removal, importance, fractions, self.seed)
        return curve, (area_under_curve(curve, fractions), aopc(curve))


@register_metric("road")
@dataclass(kw_only=True)
class Road(_RemovalMetric):
    """:func:`~captum_intramodal.metrics.road`, at the fractions between 0 and 1."""

    word_columns: ClassVar[tuple[Column, ...]] = (Column("road", "ROAD", True),)

    imputation: Imputation = "noisy_linear"

    def score_removal(
        self, removal: ImageRemoval, importance: np.ndarray, fractions: Sequence[float]
    ) -> tuple[np.ndarray | None, tuple[float, ...]]:
        inner = [fraction for fraction in fractions if 0 < fraction < 1]  # At the ends, all maps score the same.
        return None, (road(removal, importance, inner, self.seed),)


@register_metric("text_removal")
@dataclass(kw_only=True)
class TextRemoval(Metric):
    r"""
    Mean probability of object words while the earlier text tokens are inserted or replaced, most relevant first. It
    applies to explainers of text.

    Args:

        seed (int, optional): Seed of the order of equal values.
                    Default: 0
    """

    columns: ClassVar[tuple[Column, ...]] = (
        Column("text_insertion", "insertion of words", True),
        Column("text_deletion", "deletion of words", False),
    )

    seed: int = 0

    def measure(self, case: AnsweredSample, explainer: Explainer, maps: Tensor, found: MetricResult) -> None:
        explain_text = getattr(explainer, "explain_text", None)
        if explain_text is None:
            raise NotApplicableError(f"{explainer.name} does not explain text.")
        image, count = case.sample.image, len(case.answer_ids)
        text = explain_text(case.adapter, [image], case.sample.prompt, case.answer_ids)
        for index, word in case.objects.items():
            earlier = len(text.positions) - count + word.tokens[0]
            relevance = text.values[list(word.tokens), :earlier].mean(0)
            removal = TokenRemoval(case.scorer, image, text.positions[:earlier], word.tokens)
            for column, compute_curve in (("text_insertion", insertion_curve), ("text_deletion", deletion_curve)):
                curve = compute_curve(removal, relevance, case.fractions, self.seed)
                found.add(column, index, area_under_curve(curve, case.fractions))
                found.add_curve(column, index, curve)


@register_metric("infidelity")
@dataclass(kw_only=True)
class Infidelity(Metric):
    r"""
    Captum's ``infidelity`` of the object words' log-probabilities.

    Squares at random places, with a third of the image's shorter side, are blurred. Infidelity is the squared error
    between the sum of the map over a square and the drop in log-probability that blurring it causes, at the best
    scale of the map (``normalize=True``).

    Args:

        samples (int, optional): Number of squares.
                    Default: 20
        seed (int, optional): Seed of the squares' places.
                    Default: 0
    """

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
            map = torch.from_numpy(importance_at_pixels(word_map(maps, tokens), image.size)).float()
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


@register_metric("sensitivity")
@dataclass(kw_only=True)
class Sensitivity(Metric):
    r"""
    Captum's ``sensitivity_max`` of the object words' maps: the largest change under uniform noise on the image,
    relative to the norm of the maps. Answers without object words, and maps that are 0, have no value.

    Args:

        radius (float, optional): Largest noise, for pixels in [0, 1].
                    Default: 0.02
        samples (int, optional): Number of noisy images.
                    Default: 3
        seed (int, optional): Seed of the noise.
                    Default: 0
    """

    columns: ClassVar[tuple[Column, ...]] = (Column("sensitivity", "max-sensitivity", False),)

    radius: float = 0.02
    samples: int = 3
    seed: int = 0

    def measure(self, case: AnsweredSample, explainer: Explainer, maps: Tensor, found: MetricResult) -> None:
        words = list(case.objects.values())
        if not words or not float(maps.max()) > 0:
            return

        def explain(pixels: Tensor | tuple[Tensor, ...]) -> tuple[Tensor]:
            explained = []
            for noisy in format_tensor_into_tuples(pixels)[0]:
                (noisy_maps,) = explainer(case.adapter, [tensor_to_image(noisy)], case.sample.prompt, case.answer_ids)
                explained.append(torch.stack([word_map(noisy_maps, word.tokens) for word in words]))
            return (torch.stack(explained),)

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            value = sensitivity_max(
                explain, image_to_tensor(case.sample.image), perturb_radius=self.radius, n_perturb_samples=self.samples
            )
        found.add("sensitivity", ANSWER, float(value))


@register_metric("randomization")
@dataclass(kw_only=True)
class Randomization(Metric):
    r"""
    Mean absolute Spearman correlation between the object words' maps and those of the model as its weights are
    randomized, cumulatively from the head to the vision tower (:func:`~captum_intramodal.metrics.randomization_check`).
    It needs one explanation per layer of the model. Answers without object words, and constant maps, have no value.

    Args:

        seed (int, optional): Seed of the random weights.
                    Default: 0
    """

    columns: ClassVar[tuple[Column, ...]] = (Column("randomization", "randomization", False),)

    seed: int = 0

    def measure(self, case: AnsweredSample, explainer: Explainer, maps: Tensor, found: MetricResult) -> None:
        words = list(case.objects.values())
        if not words or not np.ptp(torch.stack([word_map(maps, word.tokens) for word in words]).numpy()):
            return

        def explain() -> Tensor:
            with shared_passes():  # Passes of the model with other weights must not be reused.
                (changed,) = explainer(case.adapter, [case.sample.image], case.sample.prompt, case.answer_ids)
            return torch.stack([word_map(changed, word.tokens) for word in words])

        steps = randomization_check(case.adapter.model, explain, seed=self.seed)
        found.add("randomization", ANSWER, float(np.mean([abs(step.rank_correlation) for step in steps])))
