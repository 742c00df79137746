"""Greedy search, the upper bound."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from captum_intramodal import PixelForward
from captum_intramodal.explainers import greedy_inclusion, make_explainer
from tests.explainers.helpers import PROMPT, answer_to, model_of
from tests.testing.tiny import random_image


def test_greedy_search_finds_the_only_region_that_matters() -> None:
    important = torch.tensor([3, 0])

    def score(kept: Tensor) -> Tensor:
        return 0.1 + 0.8 * kept[:, important].float()

    values = greedy_inclusion(score, 6)
    assert values.argmax(1).tolist() == important.tolist()
    assert torch.allclose(values.max(1).values, torch.tensor(1.6), atol=1e-5)
    assert float(values.sort(1).values[:, -2].max()) < 1e-5


def test_greedy_search_by_a_slow_loop() -> None:
    weights, pair = torch.tensor([0.2, 0.05, 0.3, -0.1, 0.15]), torch.tensor([1, 4])
    asked: list[tuple[bool, ...]] = []

    def probability(kept: Tensor) -> float:
        return float(0.2 + (weights * kept).sum() + 0.25 * kept[pair].all())

    def score(kept: Tensor) -> Tensor:
        asked.extend(tuple(row.tolist()) for row in kept)
        return torch.tensor([[probability(row)] for row in kept])

    values = greedy_inclusion(score, 5)[0]
    assert len(set(asked)) == len(asked)  # No set is scored twice.
    chosen: list[int] = []
    gains = []

    def objective(regions: list[int]) -> float:
        kept = torch.tensor([i in regions for i in range(5)])
        return probability(kept) - probability(~kept)

    while len(chosen) < 5:
        best = max(set(range(5)) - set(chosen), key=lambda i: objective([*chosen, i]))
        gains.append(objective([*chosen, best]) - objective(chosen))
        chosen.append(best)
    assert values.argsort(descending=True).tolist() == chosen
    expected = [sum(max(g, 0) for g in gains[rank:]) for rank in range(5)]
    assert torch.allclose(values[chosen], torch.tensor(expected), atol=1e-5)
    first = greedy_inclusion(score, 5, steps=2)[0]
    assert set(first.nonzero().flatten().tolist()) == set(chosen[:2])


def test_greedy_search_on_a_model_by_hand() -> None:
    adapter, image, ids = model_of("llava"), random_image(112, 112), answer_to(model_of("llava"))
    (maps,) = make_explainer("greedy:cells=2,steps=1,imputation=mean")(adapter, [image], PROMPT, ids)
    forward = PixelForward(adapter, PROMPT, ids, "token_log_probs")
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
    fill = torch.from_numpy(np.rint(np.array(image).mean((0, 1)))).float().reshape(1, 3, 1, 1) / 255

    def objective(kept: Tensor) -> Tensor:
        mask = kept.repeat_interleave(56, 0).repeat_interleave(56, 1)
        inserted, deleted = (forward(torch.where(m, pixels, fill))[0].exp() for m in (mask, ~mask))
        return inserted - deleted

    cells = torch.eye(4, dtype=torch.bool).reshape(4, 2, 2)
    values = torch.stack([objective(cell) for cell in cells])
    gains = values.max(0).values - objective(torch.zeros(2, 2, dtype=torch.bool))
    assert maps.flatten(1).argmax(1).tolist() == values.argmax(0).tolist()
    assert torch.allclose(maps.flatten(1).max(1).values, gains.clamp_min(0), atol=1e-5)
