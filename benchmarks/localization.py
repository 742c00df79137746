r"""Do the maps point to the right objects? Localization on held-out scenes with exact object masks.

    python benchmarks/localization.py --out benchmarks/results/localization.md
    python benchmarks/localization.py --model OTHER --world other --out benchmarks/results/localization-other.md
    python benchmarks/localization.py --model INTERNVL --out benchmarks/results/localization-tiles-1.md
    python benchmarks/localization.py --model INTERNVL --scenes 100 --size 512 384 --no-tam \
        --out benchmarks/results/localization-tiles-5.md

The model describes each scene, and every explainer explains that answer. Each object word that names an object of the
scene gives Obj-IoU (the map above its Otsu threshold against the object's visible mask) and pointing (is the map's
maximum inside the mask?). Each function word gives Func-IoU (the share of its map below the mean Otsu threshold of the
answer's object words, all maps on one scale). F1-IoU is the harmonic mean of the means of Obj-IoU and Func-IoU.
Intervals are 95 % percentile bootstrap intervals over scenes.

Needs: the package only for the first command, about 3 minutes on one core; for the others, checkpoints that
``train_demo.py`` trains with ``--world other`` and with ``--family internvl``.

Prints: one table. The README's section "Where maps point" quotes the tables of all four commands.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np
import torch
import typer
from common import (
    LOCALIZATION_SEED,
    PROMPT,
    Checkpoint,
    Report,
    Threads,
    World,
    format_interval,
    load_adapter,
    markdown_table,
    weighted_interval,
    world_named,
    write_report,
)
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from captum_intramodal import ModelAdapter
from captum_intramodal.demo import CHECKPOINT, Scene, compose
from captum_intramodal.explainers import Explainer, make_explainer, shared_passes
from captum_intramodal.metrics import (
    Interval,
    bootstrap_interval,
    f1_iou,
    function_iou,
    object_iou,
    otsu_threshold,
    pointing_hit,
)
from captum_intramodal.models.hooks import evaluation_mode
from captum_intramodal.text.spans import decode_pieces

FUNCTION_WORDS = {"the", "a", "an", "some", "and"}
COLUMNS = ("Obj-IoU", "Func-IoU", "F1-IoU", "pointing")
# Crops replace the scales at which a model with tiles gets no further detail.
EXPLAINERS = {
    "logit lens": "logit_lens",
    "TAM": "tam",
    "TAM without its filter": "tam:filter=false",
    "MSEA": "msea:crops=true",
    "ARC": "arc",
    "MSEA + ARC": "msea+arc:crops=true",
}


def score_answer(
    maps: Tensor, words: Sequence[str], scene: Scene, classes: set[str]
) -> tuple[list[float], list[float], list[float]]:
    """Compute Obj-IoU and pointing of each object word, and Func-IoU of each function word."""
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


def score_scenes(
    adapter: ModelAdapter,
    explainers: dict[str, Explainer],
    count: int,
    world: str,
    objects: tuple[int, int],
    size: tuple[int, int],
) -> dict[str, np.ndarray]:
    """Return per explainer an array (scenes, 6): means of Obj-IoU, pointing and Func-IoU, then the word counts."""
    classes, sprites = world_named(world)
    rows: dict[str, list[list[float]]] = {name: [] for name in explainers}
    with shared_passes(explainers.values()):
        for index in track(range(count), description="Explaining"):
            scene = compose(LOCALIZATION_SEED + index, size, objects, classes, sprites)
            with evaluation_mode(adapter.model):
                answer_ids = adapter.generate(adapter.prepare([scene.image], PROMPT))
            answer, spans = decode_pieces(adapter.tokenizer, answer_ids)
            words = [answer[start:end].strip() for start, end in spans]
            for name, explainer in explainers.items():
                (maps,) = explainer(adapter, [scene.image], PROMPT, answer_ids)
                scores = score_answer(maps, words, scene, set(classes))
                rows[name].append([float(np.mean(s)) if s else 0.0 for s in scores] + [float(len(s)) for s in scores])
    return {name: np.array(values) for name, values in rows.items()}


def summarize(values: np.ndarray) -> dict[str, Interval]:
    """Compute each metric's interval. Words count equally; scenes are resampled."""
    objects, pointing, functions, n_objects, n_pointing, n_functions = values.T
    return {
        "Obj-IoU": weighted_interval(objects, n_objects),
        "Func-IoU": weighted_interval(functions, n_functions),
        "F1-IoU": bootstrap_interval(np.stack([objects, functions, n_objects, n_functions], 1), f1_iou),
        "pointing": weighted_interval(pointing, n_pointing),
    }


def main(
    model: Checkpoint = CHECKPOINT,
    world: World = "demo",
    scenes: Annotated[int, typer.Option(min=1, help="Number of scenes.")] = 200,
    objects: Annotated[tuple[int, int], typer.Option(help="Fewest and most objects per scene.")] = (2, 4),
    size: Annotated[tuple[int, int], typer.Option(help="Width and height of the scenes in pixels.")] = (256, 192),
    tam: Annotated[bool, typer.Option(help="Include TAM, which needs one grid of tokens, so no tiles.")] = True,
    out: Report = None,
    threads: Threads = 1,
) -> None:
    world_named(world)  # A wrong name fails before the model is loaded.
    adapter = load_adapter(model, threads)
    explainers = {name: make_explainer(spec) for name, spec in EXPLAINERS.items() if tam or not spec.startswith("tam")}
    results = score_scenes(adapter, explainers, scenes, world, objects, size)
    summaries = {name: summarize(values) for name, values in results.items()}
    words = int(next(iter(results.values()))[:, 3].sum())
    title = (
        f"{scenes} held-out scenes of the {world} world, {size[0]} x {size[1]} pixels, {objects[0]} to {objects[1]} "
        f"objects, {words} object words"
    )
    rows = [[name, *(format_interval(summary[column]) for column in COLUMNS)] for name, summary in summaries.items()]
    table = Table("explainer", *COLUMNS, title=title)
    for row in rows:
        table.add_row(*row)
    Console(width=150).print(table)
    lines = [f"{title}; 95 % bootstrap intervals over scenes.", "", *markdown_table(("explainer", *COLUMNS), rows)]
    write_report(out, "\n".join(lines) + "\n", summaries)


if __name__ == "__main__":
    typer.run(main)
