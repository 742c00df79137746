r"""Measure the work after the model's pass (maps, rankings, suppression) against a cost model and against each size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from costs.measuring import Cost, Report, inference, peak_bytes, table, take_turns
from costs.model import PROMPT, TOKEN, Shape, build, noise_image
from costs.tam import OwnTAM, compute_tam
from PIL import Image
from torch import Tensor

from captum_intramodal import ARC, ModelAdapter
from captum_intramodal.adapter.text_tokens import TextTokens
from captum_intramodal.explanation.activations import Activations
from captum_intramodal.explanation.context import relate, suppress_together
from captum_intramodal.explanation.scale_maps import TokenScaleMaps
from captum_intramodal.functional.aggregation import normalized_weights
from captum_intramodal.functional.rank_overlap import pairwise_rank_biased_overlap
from captum_intramodal.functional.rasterize import raster_grid, rasterize
from captum_intramodal.geometry.token_geometry import TokenGeometry
from captum_intramodal.models.logit_lens import LogitLens


@dataclass(frozen=True)
class LastStates:
    """Hidden states of the last layer for an image and an answer, and the boxes of the visual tokens."""

    lens: LogitLens
    visual: Tensor
    text: Tensor  # of the T text tokens, then of the positions before them
    ids: Tensor
    n_answer: int
    geometry: TokenGeometry

    @classmethod
    def random(cls, lens: LogitLens, visual_tokens: int, text_tokens: int, n_answer: int) -> LastStates:
        """Draw random states."""
        generator = torch.Generator().manual_seed(0)
        device, dtype = lens._weight.device, lens._weight.dtype
        image = noise_image(visual_tokens)
        rows, columns = image.height // TOKEN, image.width // TOKEN
        row, column = torch.arange(visual_tokens) // columns, torch.arange(visual_tokens) % columns
        boxes = TOKEN * torch.stack([column, row, column + 1, row + 1], dim=1).float()
        at_tokens = torch.randn(text_tokens + 1, lens.hidden_size, generator=generator)
        return cls(
            lens,
            torch.randn(rows * columns, lens.hidden_size, generator=generator).to(device, dtype),
            torch.cat([at_tokens[1:], at_tokens[:-1]]).to(device, dtype),
            torch.randint(20, lens.vocab_size, (text_tokens,), generator=generator),
            n_answer,
            TokenGeometry(boxes, ("local",) * len(boxes), torch.zeros(len(boxes), dtype=torch.int64), (image.size,)),
        )

    def activations(self) -> Activations:
        """Compute the maps, and wrap all states as the activations of one explanation."""
        count = len(self.ids)
        positions = torch.arange(count)
        activation = self.lens.activation(self.visual, self.ids).T.clamp_min(0).cpu()
        return Activations(
            images=[Image.new("RGB", self.geometry.image_sizes[0])],
            text=TextTokens(positions, self.ids, positions[:, None], torch.ones(count, dtype=torch.bool), "", ""),
            scale_maps=[TokenScaleMaps(1.0, activation, self.geometry)],
            method="logit_lens",
            dropped=[],
            ranking_states={-1: self.text},
            last=self.text,
            n_answer=self.n_answer,
            working_memory=self.lens.working_memory,
        )

    def maps(self) -> list[Tensor]:
        """Compute maps only."""
        return self.activations().maps(normalized_weights((1.0,), None))

    def maps_and_arc(self) -> list[Tensor]:
        """Compute maps, rankings, probabilities and suppression."""
        arc, activations = ARC(model=self.lens), self.activations()
        maps = activations.maps(normalized_weights((1.0,), None))
        return suppress_together(arc, maps, relate(arc, activations)[0])


@dataclass(frozen=True)
class Stage:
    """A stage of the work after the pass: the least operations and bytes that it needs, and how to run it."""

    operations: float
    bytes_moved: float
    work: Callable[[], Any]


def stages(states: LastStates) -> dict[str, Stage]:
    """Return the cost model: operations (a multiplication and an addition are two), and bytes that have to be read or
    written at least once."""
    lens, arc = states.lens, ARC(model=states.lens)
    v, d = states.visual.shape
    t, vocabulary, k = len(states.ids), lens.vocab_size, arc.k
    width = states.visual.element_size()
    size = states.geometry.image_sizes[0]
    grid = raster_grid(states.geometry.boxes, size)
    cells = grid[0] * grid[1]
    tokens = states.text[:t]
    values = lens.activation(states.visual, states.ids).T.clamp_min(0)
    ranking = lens.topk(tokens, k)
    maps = rasterize(values.cpu(), states.geometry.boxes, size, grid)
    context = arc.relate([ranking], states.text, states.ids)
    return {
        "maps: lens at the visual tokens": Stage(
            2.0 * v * d * t, width * (v + t) * d + 4 * v * t, lambda: lens.activation(states.visual, states.ids)
        ),
        "drawing: V values to C cells": Stage(
            8.0 * cells * t, 4 * t * (v + cells), lambda: rasterize(values.cpu(), states.geometry.boxes, size, grid)
        ),
        "rankings: top-k over the vocabulary": Stage(
            2.0 * t * d * vocabulary, width * d * vocabulary + 8 * t * k, lambda: lens.rank(tokens, k)
        ),
        "relevance: rank-biased overlap of pairs": Stage(
            2.0 * t * t * k, 8 * t * k + 4 * t * t, lambda: pairwise_rank_biased_overlap(ranking, ranking)
        ),
        "text activation": Stage(
            2.0 * t * t * d, 2 * width * t * d + 4 * t * t, lambda: lens.activation(tokens, states.ids)
        ),
        "suppression": Stage(2.0 * t * t * cells, 8 * t * cells, lambda: arc.suppress(maps, context)),
    }


def ceilings(device: str) -> tuple[float, float]:
    """Measure operations per second of a float32 matrix product, and bytes per second of a copy (read and written)."""
    a, b = (torch.randn(2048, 2048, device=device) for _ in range(2))
    source = torch.randn(2**26, device=device)
    target = torch.empty_like(source)
    cost = take_turns({"product": lambda: a @ b, "copy": lambda: target.copy_(source)}, 5)
    return 2 * 2048**3 / min(cost["product"].seconds), 8 * 2**26 / min(cost["copy"].seconds)


def report_stages(states: LastStates, device: str, report: Report) -> None:
    """Report how long each stage takes, and how long this machine would need at least."""
    flops, bandwidth = ceilings(device)
    each = stages(states)
    costs = take_turns({name: stage.work for name, stage in each.items()}, 5)
    rows = []
    for name, stage in each.items():
        least = max(stage.operations / flops, stage.bytes_moved / bandwidth)
        took = costs[name].median
        figures = (stage.operations / 1e9, stage.bytes_moved / 1e6, 1e3 * least, 1e3 * took)
        rows.append([name, *(f"{figure:.3g}" for figure in figures), f"{least / took:.0%}"])
    title = (
        f"## Cost model of the part after the pass\n\nThis machine: {flops / 1e9:.0f} GFLOP/s (float32 product), "
        f"{bandwidth / 1e9:.1f} GB/s (copy)."
    )
    header = ["stage", "GFLOP", "MB", "least ms", "ms", "of the ceiling"]
    report.add(title, "", *table(header, rows))
    report.figures["stages"] = {"flops": flops, "bandwidth": bandwidth, "rows": rows}


# By size and work: the size's value, seconds, peak MB.
Curves = dict[str, dict[str, list[tuple[float, float, float]]]]


def report_growth(
    shape: Shape, dtype: torch.dtype, device: str, tam: Path | None, report: Report, plot: Path | None, runs: int
) -> None:
    """Report time and memory of the work after the pass against each size, with the others as in the benchmark."""
    base = {"visual tokens": 1024, "answer tokens": 64, "vocabulary": shape.vocabulary, "hidden size": shape.hidden}
    sizes = {
        "visual tokens": [64, 256, 1024, 4096],
        "answer tokens": [8, 32, 128, 512],
        "vocabulary": [1024, 8192, 38_912, shape.vocabulary],
        "hidden size": [256, 512, 1024, 2048],
    }
    own = None if tam is None else OwnTAM(tam)
    curves: Curves = {}
    built: Shape | None = None
    for name, values in sizes.items():
        curves[name] = {}
        for value in values:
            wanted = base | {name: value}
            hidden = wanted["hidden size"]
            one_layer = Shape(hidden, 1, 64, hidden // 64, max(1, hidden // 256), wanted["vocabulary"], 64, 1)
            if one_layer != built:
                built, adapter = one_layer, build(one_layer, dtype, device)
            # TAM's own code takes minutes for the larger sizes.
            with_own = own if name == "visual tokens" and value < 4096 else None
            with inference(adapter):
                costs = measure_size(adapter, wanted["visual tokens"], wanted["answer tokens"], with_own, runs)
            for method, cost in costs.items():
                point = (float(value), cost.median, (cost.peak or 0) / 1e6)
                curves[name].setdefault(method, []).append(point)
        rows = [
            [method, *(f"{took:.3g} s, {peak:.3g} MB" for _, took, peak in points), *[""] * (len(values) - len(points))]
            for method, points in curves[name].items()
        ]
        report.add(f"Against {name}:", "", *table(["after the pass", *map(str, values)], rows))
    report.figures["growth"] = curves
    if plot is not None:
        draw(curves, plot)


def measure_size(
    adapter: ModelAdapter, visual_tokens: int, n_answer: int, own: OwnTAM | None, runs: int
) -> dict[str, Cost]:
    """Measure this package's work after the pass, its TAM and, if given, TAM's own code on random states."""
    states = LastStates.random(adapter.lens, visual_tokens, n_answer + 6, n_answer)
    width, height = states.geometry.image_sizes[0]
    grid = height // TOKEN, width // TOKEN

    def our_tam() -> Tensor:
        text = states.text[: len(states.ids)]
        return compute_tam(states.lens, states.visual, text, states.ids, states.ids, 4, grid)

    works: dict[str, Callable[[], Any]] = {"maps + ARC": states.maps_and_arc, "our TAM": our_tam}
    if own is not None:
        image = noise_image(visual_tokens)
        encoding = adapter.encode(adapter.prepare([image], PROMPT), states.ids[-n_answer:].tolist())
        shape = (len(encoding.input_ids) - 1, states.lens.hidden_size)
        hidden = torch.randn(shape, device=adapter.device).to(adapter.model.dtype)
        ids = encoding.input_ids.tolist()
        works["TAM's own code"] = lambda: own(adapter, hidden, ids, encoding.prompt_length, image)
    costs = {}
    for method, work in works.items():
        slow = method == "TAM's own code"
        costs[method] = take_turns({method: work}, 1 if slow else runs, warm_up=not slow)[method]
        costs[method].peak = peak_bytes(work, adapter.device.type)
    return costs


def draw(curves: Curves, path: Path) -> None:
    """Draw time and memory against each size."""
    plt.switch_backend("agg")
    figure, axes = plt.subplots(2, len(curves), figsize=(14, 6), sharex="col", sharey="row", layout="constrained")
    for column, (name, methods) in enumerate(curves.items()):
        for row, label in enumerate(("seconds", "peak extra MB")):
            axis = axes[row][column]
            for method, points in methods.items():
                axis.plot([p[0] for p in points], [p[row + 1] for p in points], "o-", label=method)
            axis.set(xscale="log", yscale="log")
            values = [int(p[0]) for p in max(methods.values(), key=len)]
            axis.set_xticks(values, [f"{value:,}" for value in values])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
            if column == 0:
                axis.set_ylabel(label)
        axes[1][column].set_xlabel(name)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.suptitle("After the model's pass: time and memory against each size")
    figure.savefig(path, dpi=120)
    plt.close(figure)
