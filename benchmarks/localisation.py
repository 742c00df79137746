r"""Where do the maps point? Localisation on held-out scenes of the demo model, whose object masks are exact.

    python benchmarks/localisation.py                     # the table of the README: 200 scenes
    python benchmarks/localisation.py --sweep             # the options of MSEA and ARC, to choose defaults

For each scene the model describes the picture, and every explainer explains that answer. Object words that name an
object of the scene give Obj-IoU (Otsu threshold against the object's visible mask) and pointing accuracy (the map's
maximum lies in the mask); function words give Func-IoU (share of the map below the mean Otsu threshold of the answer's
object words, maps on one common scale); F1-IoU is the harmonic mean of the two means. Intervals are 95 % percentile
bootstrap intervals over scenes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from common import load_adapter
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from train_demo import WORLDS

from captum_intramodal import ARC, ModelAdapter
from captum_intramodal.canvas import draw_on_canvas
from captum_intramodal.demo import CHECKPOINT, Scene, compose
from captum_intramodal.metrics import bootstrap_interval, f1_iou, function_iou, object_iou, otsu_threshold, pointing_hit
from captum_intramodal.msea import normalized_weights
from captum_intramodal.reading import Reading, read_answer
from captum_intramodal.tam import token_activation_map

HELD_OUT = 2_000_000
FUNCTION_WORDS = {"the", "a", "an", "some", "and"}
SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0)

# An explainer turns what the model said into maps of all text tokens over the picture, (T, rows, columns).
Explainer = Callable[[ModelAdapter, Reading], Tensor]


@dataclass(frozen=True)
class Method:
    """The paper's two methods with their options; no ARC for None."""

    scales: tuple[float, ...] = (1.0,)
    arc: dict[str, Any] | None = None
    aggregation: str = "mean"

    def __call__(self, adapter: ModelAdapter, reading: Reading) -> Tensor:
        levels = [level for level in reading.levels if level.scale in self.scales]
        chosen = Reading(**{**reading.__dict__, "levels": levels})
        (maps,) = chosen.maps(normalized_weights([level.scale for level in levels], None), self.aggregation)  # type: ignore[arg-type]
        if self.arc is None:
            return maps
        arc = ARC(model=adapter.lens, **self.arc)
        states = [reading.ranking_states[layer % len(adapter.lens.layers)] for layer in arc.layers]
        context = arc.compare(states, reading.last, reading.text.ids)
        return arc.suppress(maps, context)


@dataclass(frozen=True)
class TAM:
    """Token Activation Map from its definition, on the model's own grid of visual tokens."""

    filter: bool = True

    def __call__(self, adapter: ModelAdapter, reading: Reading) -> Tensor:
        (level,) = [level for level in reading.levels if level.scale == 1.0]
        picture = reading.pictures[0]
        boxes = level.boxes(0, picture.size)
        grid = len(boxes[:, 1].round().unique()), len(boxes[:, 0].round().unique())
        context = ARC(model=adapter.lens).compare([reading.last], reading.last, reading.text.ids)
        ids = reading.text.ids
        maps = token_activation_map(
            level.activation, context.text_activation, ids[:, None] == ids, grid=grid, filter=self.filter
        )
        return draw_on_canvas(maps, boxes, picture.size, (2 * grid[0], 2 * grid[1]))


MSEA_SCALES = (1.0, 1.5, 2.0)
MAIN: dict[str, Explainer] = {
    "logit lens": Method(),
    "TAM": TAM(),
    "TAM without its filter": TAM(filter=False),
    "MSEA": Method(MSEA_SCALES),
    "ARC": Method(arc={}),
    "MSEA + ARC": Method(MSEA_SCALES, arc={}),
}


def sweep() -> dict[str, Explainer]:
    """One option at a time, around the defaults."""
    methods: dict[str, Explainer] = dict(MAIN)
    for scales in (
        (0.75, 1.0, 1.5), (1.0, 1.5), (1.0, 2.0), (1.5, 2.0), (2.0,), (0.75, 1.0, 1.25, 1.5, 2.0), (0.5, 1.0, 1.5, 2.0),
    ):  # fmt: skip
        methods[f"MSEA {scales}"] = Method(scales)
    for aggregation in ("max", "geometric_mean"):
        methods[f"MSEA {aggregation}"] = Method(MSEA_SCALES, aggregation=aggregation)
    for weighting in ("uniform", "irrelevance", "relevance", "text_activation", "irrelevance*text_activation",
                      "relevance*text_activation"):  # fmt: skip
        for position in ("token", "prediction"):
            for least_squares in (True, False):
                options = {"weighting": weighting, "ranking_position": position, "least_squares": least_squares}
                name = f"MSEA + ARC {weighting}, {position}{'' if least_squares else ', no least squares'}"
                methods[name] = Method(MSEA_SCALES, arc=options)
    for strength in (0.25, 0.5, 0.75):
        methods[f"MSEA + ARC strength {strength}"] = Method(MSEA_SCALES, arc={"strength": strength})
    for k in (5, 10, 20):
        methods[f"MSEA + ARC k={k}"] = Method(MSEA_SCALES, arc={"k": k})
    for p in (0.5, 0.7, 0.98):
        methods[f"MSEA + ARC p={p}"] = Method(MSEA_SCALES, arc={"p": p})
    for layers in ((0,), (1,), (2,), (1, 2, 3)):
        methods[f"MSEA + ARC layers={layers}"] = Method(MSEA_SCALES, arc={"layers": layers})
    return methods


def score(
    maps: Tensor, reading: Reading, scene: Scene, classes: set[str]
) -> tuple[list[float], list[float], list[float]]:
    """Obj-IoU and pointing of each object word, Func-IoU of each function word of one answer."""
    shown = reading.text.ids[-reading.n_answer :]
    words = [reading.text.answer[a:b].strip() for a, b in reading.text.spans[-len(shown) :].tolist()]
    answer_maps = maps[-len(words) :]
    present = {item.name for item in scene.objects}
    objects, pointing, thresholds = [], [], []
    for word, values in zip(words, answer_maps, strict=True):
        if word in classes:
            thresholds.append(otsu_threshold(values))
        if word in present:
            mask = torch.from_numpy(scene.mask_of(word))
            objects.append(object_iou(values, mask))
            pointing.append(pointing_hit(values, mask))
    functions = [
        function_iou(values[None], thresholds)
        for word, values in zip(words, answer_maps, strict=True)
        if word in FUNCTION_WORDS and thresholds
    ]
    return objects, pointing, functions


def evaluate(
    adapter: ModelAdapter,
    methods: dict[str, Explainer],
    count: int,
    world: str,
    objects: tuple[int, int],
    size: tuple[int, int],
) -> dict[str, np.ndarray]:
    """Per method an array (scenes, 6): the means of Obj-IoU, pointing and Func-IoU, then the numbers of words."""
    classes, sprites = WORLDS[world]
    rows: dict[str, list[list[float]]] = {name: [] for name in methods}
    layers = range(len(adapter.lens.layers))
    for index in track(range(count), description="Explaining"):
        scene = compose(HELD_OUT + index, size, objects, classes, sprites)
        reading = read_answer(
            adapter, [scene.image], "describe the picture.", None, SCALES, ranking_layers=layers, crops=True
        )
        for name, method in methods.items():
            scores = score(method(adapter, reading), reading, scene, set(classes))
            rows[name].append([float(np.mean(s)) if s else 0.0 for s in scores] + [float(len(s)) for s in scores])
    return {name: np.array(values) for name, values in rows.items()}


def summarise(values: np.ndarray) -> dict[str, tuple[float, float, float]]:
    """Estimate and interval of each metric; words count equally, scenes are resampled."""
    obj, point, func, n_obj, n_point, n_func = values.T

    def weighted(mean: np.ndarray, number: np.ndarray, axis: int) -> Any:
        return (mean * number).sum(axis) / number.sum(axis).clip(1e-9)

    def f1(o: np.ndarray, f: np.ndarray, a: np.ndarray, b: np.ndarray, axis: int = -1) -> Any:
        return f1_iou(o, f, a, b, axis=axis)

    def mean(x: np.ndarray, number: np.ndarray, axis: int = -1) -> Any:
        return weighted(x, number, axis)

    return {
        "Obj-IoU": tuple(bootstrap_interval(np.stack([obj, n_obj], 1), mean)),
        "Func-IoU": tuple(bootstrap_interval(np.stack([func, n_func], 1), mean)),
        "F1-IoU": tuple(bootstrap_interval(np.stack([obj, func, n_obj, n_func], 1), f1)),
        "pointing": tuple(bootstrap_interval(np.stack([point, n_point], 1), mean)),
    }


def main(
    model: Annotated[Path, typer.Option(help="Checkpoint directory.")] = CHECKPOINT,
    world: Annotated[str, typer.Option(help="'demo', or 'other': words and sprites the demo has never seen.")] = "demo",
    scenes: int = 200,
    objects: Annotated[tuple[int, int], typer.Option(help="Fewest and most objects per scene.")] = (2, 4),
    size: Annotated[tuple[int, int], typer.Option(help="Width and height of the scenes in pixels.")] = (256, 192),
    tam: Annotated[bool, typer.Option(help="TAM too, which needs one grid of tokens: no tiles.")] = True,
    sweep_options: Annotated[bool, typer.Option("--sweep", help="Every option, one at a time.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Write the table as Markdown, and the figures as JSON beside it.")
    ] = None,
    threads: int = 1,
) -> None:
    adapter = load_adapter(model, threads)
    methods = {
        name: method
        for name, method in (sweep() if sweep_options else MAIN).items()
        if tam or not isinstance(method, TAM)
    }
    results = evaluate(adapter, methods, scenes, world, objects, size)
    summaries = {name: summarise(values) for name, values in results.items()}
    words = int(next(iter(results.values()))[:, 3].sum())
    title = (
        f"{scenes} held-out scenes of the {world} world, {size[0]} x {size[1]} pixels, {objects[0]} to {objects[1]} "
        f"objects, {words} object words"
    )
    columns = ("Obj-IoU", "Func-IoU", "F1-IoU", "pointing")
    table = Table("explainer", *columns, title=title)
    lines = [f"{title}; 95 % bootstrap intervals over scenes.", "", f"| explainer | {' | '.join(columns)} |"]
    lines.append("|---|" + "---|" * len(columns))
    for name, summary in summaries.items():
        cells = ["{:.3f} [{:.3f}, {:.3f}]".format(*summary[column]) for column in columns]
        table.add_row(name, *cells)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    Console(width=150).print(table)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text("\n".join(lines) + "\n", encoding="utf-8")
        out.with_suffix(".json").write_text(json.dumps(summaries, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
