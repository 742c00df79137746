r"""Which regions make an answer most probable? A greedy search, the upper bound for insertion and deletion."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from captum_intramodal.adapter.answer_scorer import AnswerScorer
from captum_intramodal.explainers.base import BaseExplainer, Example, cell_grid, check_positive
from captum_intramodal.explainers.registry import register_explainer
from captum_intramodal.functional.imputation import Imputation, Imputer, check_imputation

__all__ = ["GreedySearch", "greedy_inclusion"]

Score = Callable[[Tensor], Tensor]


def greedy_inclusion(score: Score, regions: int, steps: int | None = None) -> Tensor:
    r"""
    Compute the importance of regions by greedy search, in the manner of EAGLE: each step adds to the set :math:`S` the
    region that raises most

    .. math::
        F(S) = f(S) - f(\bar S),

    the probability of a token given only the set (insertion), minus that without the set (deletion). The importance of
    a region is the sum of the positive gains of its step and of all later ones, so that it decreases in the order of
    inclusion, by the gain of each step.

    Args:

        score (Callable): Maps the regions that are kept, bool (N, regions), to probabilities of T tokens, (N, T).
        regions (int): Number of regions.
        steps (int, optional): Number of regions to add; the importance of the others is 0.
                    Default: None, all

    Returns:
        **importance** (*Tensor*):
            float32 (T, regions), not negative. Regions of steps without a gain are ordered by at most 1e-6.

    Raises:
        InvalidOptionError: There is less than one region or step.

    Examples::

        >>> from captum_intramodal.explainers import greedy_inclusion
        >>> weights = torch.tensor([[0.1], [0.6], [0.3]])
        >>> greedy_inclusion(lambda kept: kept.float() @ weights, 3)  # gains 1.2, 0.6, 0.2
        tensor([[0.2000, 2.0000, 0.8000]])
    """
    check_positive("regions", regions)
    steps = regions if steps is None else steps
    check_positive("steps", steps)
    scores = _memoized(score)

    def objective(kept: Tensor) -> Tensor:
        inserted, deleted = scores(torch.cat([kept, ~kept])).split(len(kept))
        return inserted - deleted

    start = objective(torch.zeros(1, regions, dtype=torch.bool))[0]
    result = torch.zeros(len(start), regions)
    for token, value in enumerate(start):
        chosen, order, gains = torch.zeros(regions, dtype=torch.bool), [], []
        for _ in range(min(steps, regions)):
            left = (~chosen).nonzero()[:, 0]
            values = objective(chosen | F.one_hot(left, regions).bool())[:, token]
            best = int(values.argmax())
            gains.append(values[best] - value)
            order.append(int(left[best]))
            value, chosen[order[-1]] = values[best], True
        positive = torch.stack(gains).clamp_min(0)
        rank = torch.arange(len(order), 0, -1) / len(order)
        result[token, order] = positive.flip(0).cumsum(0).flip(0) + 1e-6 * rank
    return result


def _memoized(score: Score) -> Score:
    """Score each set once: tokens and steps share sets, such as the empty one and all of one region."""
    known: dict[bytes, Tensor] = {}

    def scores(kept: Tensor) -> Tensor:
        keys = [row.numpy().tobytes() for row in kept]
        new = {key: row for key, row in zip(keys, kept, strict=True) if key not in known}
        if new:
            known.update(zip(new, score(torch.stack(list(new.values()))).float(), strict=True))
        return torch.stack([known[key] for key in keys])

    return scores


@register_explainer("greedy")
@dataclass(kw_only=True)
class GreedySearch(BaseExplainer):
    r"""
    Greedy search over the cells of a grid for those that make a token most probable if only they are kept, and least
    probable if they are removed (:func:`greedy_inclusion`).

    With R cells it runs up to R (R + 1) forward passes per token: an expensive upper bound for insertion and deletion.

    Args:

        cells (int, optional): Number of cells along the longer side.
                    Default: 6
        steps (int, optional): Number of cells to add.
                    Default: None, all
        imputation (str, optional): What replaces removed cells, see :class:`~captum_intramodal.metrics.Imputer`:
                    ``'blur'``, ``'mean'`` or ``'noisy_linear'``.
                    Default: ``'blur'``
        batch_size (int, optional): Number of prompts that run together; it does not affect the result.
                    Default: 16
        seed (int, optional): Seed of the noise of the imputation.
                    Default: 0
    """

    cells: int = 6
    steps: int | None = None
    imputation: Imputation = "blur"
    batch_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        check_positive("cells", self.cells)
        check_positive("batch_size", self.batch_size)
        check_imputation(self.imputation)

    def explain(self, example: Example) -> list[Tensor]:
        adapter, images, prompt, answer_ids = example
        scorer = AnswerScorer(adapter, prompt, answer_ids, self.batch_size)
        imputers = [Imputer(image, self.imputation, self.seed) for image in images]
        grids = [cell_grid(image, self.cells) for image in images]
        counts = [rows * columns for rows, columns in grids]

        def score(kept: Tensor) -> Tensor:
            results = []
            for part in kept.split(self.batch_size):  # This many images are in memory at a time.
                imputed = [
                    imputer(_enlarge_cells(cells.reshape(-1, *grid), image.size))
                    for imputer, image, cells, grid in zip(
                        imputers, images, part.split(counts, dim=1), grids, strict=True
                    )
                ]
                results.append(scorer.log_probability(list(zip(*imputed, strict=True))).exp())
            return torch.cat(results)

        values = greedy_inclusion(score, sum(counts), self.steps).split(counts, dim=1)
        return [value.reshape(-1, *grid) for value, grid in zip(values, grids, strict=True)]


def _enlarge_cells(cells: Tensor, size: tuple[int, int]) -> np.ndarray:
    """Enlarge cells (N, rows, columns) to the pixels of an image, bool (N, height, width)."""
    pixels: np.ndarray = F.interpolate(cells[:, None].float(), size[::-1], mode="nearest-exact")[:, 0].bool().numpy()
    return pixels
