r"""Where do the maps point? Localization on held-out scenes of the demo model, whose object masks are exact.

    python benchmarks/localization.py                     # the table of the README: 200 scenes

For each scene the model describes the image, and every explainer explains that answer. Object words that name an
object of the scene give Obj-IoU (Otsu threshold against the object's visible mask) and pointing accuracy (the map's
maximum lies in the mask); function words give Func-IoU (share of the map below the mean Otsu threshold of the answer's
object words, maps on one common scale); F1-IoU is the harmonic mean of the two means. Intervals are 95 % percentile
bootstrap intervals over scenes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
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

from captum_intramodal import ModelAdapter
from captum_intramodal.demo import CHECKPOINT, Scene, compose
from captum_intramodal.explainers import Explainer, make_explainer, shared_passes
from captum_intramodal.metrics import bootstrap_interval, f1_iou, function_iou, object_iou, otsu_threshold, pointing_hit
from captum_intramodal.models.hooks import evaluation_mode
from captum_intramodal.text.spans import decode_pieces

HELD_OUT = 2_000_000
PROMPT = "describe the picture."
FUNCTION_WORDS = {"the", "a", "an", "some", "and"}

# What the model sees of tiles, of which more is no more, cut-outs show it.
EXPLAINERS = {
    "logit lens": "logit_lens",
    "TAM": "tam",
    "TAM without its filter": "tam:filter=false",
    "MSEA": "msea:crops=true",
    "ARC": "arc",
    "MSEA + ARC": "msea+arc:crops=true",
}


def score(
    maps: Tensor, words: Sequence[str], scene: Scene, classes: set[str]
) -> tuple[list[float], list[float], list[float]]:
    """Obj-IoU and pointing of each object word, Func-IoU of each function word of one answer."""
    present = {item.name for item in scene.objects}
    objects, pointing, thresholds = [], [], []
    for word, values in zip(words, maps, strict=True):
        if word in classes:
            thresholds.append(otsu_threshold(values))
        if word in present:
            mask = torch.from_numpy(scene.mask_of(word))
            objects.append(object_iou(values, mask))
            pointing.append(pointing_hit(values, mask))
    functions = [
        function_iou(values[None], thresholds)
        for word, values in zip(words, maps, strict=True)
        if word in FUNCTION_WORDS and thresholds
    ]
    return objects, pointing, functions


def evaluate(
    adapter: ModelAdapter,
    explainers: dict[str, Explainer],
    count: int,
    world: str,
    objects: tuple[int, int],
    size: tuple[int, int],
) -> dict[str, np.ndarray]:
    """Per explainer an array (scenes, 6): the means of Obj-IoU, pointing and Func-IoU, then the numbers of words."""
    classes, sprites = WORLDS[world]
    rows: dict[str, list[list[float]]] = {name: [] for name in explainers}
    with shared_passes(explainers.values()):
        for index in track(range(count), description="Explaining"):
            scene = compose(HELD_OUT + index, size, objects, classes, sprites)
            with evaluation_mode(adapter.model):
                answer_ids = adapter.generate(adapter.prepare([scene.image], PROMPT))
            answer, spans = decode_pieces(adapter.tokenizer, answer_ids)
            words = [answer[start:end].strip() for start, end in spans]
            for name, explainer in explainers.items():
                (maps,) = explainer(adapter, [scene.image], PROMPT, answer_ids)
                scores = score(maps, words, scene, set(classes))
                rows[name].append([float(np.mean(s)) if s else 0.0 for s in scores] + [float(len(s)) for s in scores])
    return {name: np.array(values) for name, values in rows.items()}


def summarize(values: np.ndarray) -> dict[str, tuple[float, float, float]]:
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
    scenes: Annotated[int, typer.Option(min=1)] = 200,
    objects: Annotated[tuple[int, int], typer.Option(help="Fewest and most objects per scene.")] = (2, 4),
    size: Annotated[tuple[int, int], typer.Option(help="Width and height of the scenes in pixels.")] = (256, 192),
    tam: Annotated[bool, typer.Option(help="TAM too, which needs one grid of tokens: no tiles.")] = True,
    out: Annotated[
        Path | None, typer.Option(help="Write the table as Markdown, and the figures as JSON beside it.")
    ] = None,
    threads: int = 1,
) -> None:
    if world not in WORLDS:
        raise typer.BadParameter(f"There is no world {world}; there are {', '.join(WORLDS)}.")
    adapter = load_adapter(model, threads)
    explainers = {name: make_explainer(spec) for name, spec in EXPLAINERS.items() if tam or not spec.startswith("tam")}
    results = evaluate(adapter, explainers, scenes, world, objects, size)
    summaries = {name: summarize(values) for name, values in results.items()}
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
