r"""Does wrapping help? Captum methods alone, inside MSEA, inside ARC and inside both, on scenes of the demo model.

    python benchmarks/captum_methods.py --scenes 20 --out benchmarks/results/captum_methods.md

The model describes each held-out scene, and every method explains every token of that answer. Each object word that
names an object of the scene is scored: pointing and Obj-IoU against the object's exact mask, insertion and deletion
(blurred pixels, the word's probability). The score of a scene is the mean over its words. Intervals are 95 % percentile
bootstrap intervals over scenes. Differences are paired: same scenes, words and removed fractions.

Needs: the package only; several minutes on one core per scene.

Prints: one table of means. ``--out`` writes it and the paired differences as Markdown, and the values of all scenes as
JSON. The README quotes ``results/captum_methods.md``.
"""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
import torch
import typer
from captum.attr import Attribution, GradientShap, IntegratedGradients, LayerIntegratedGradients, Occlusion
from common import (
    CAPTUM_METHODS_SEED,
    PROMPT,
    Checkpoint,
    Report,
    Threads,
    format_interval,
    load_adapter,
    markdown_table,
    world_named,
    write_report,
)
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from captum_intramodal import ARC, MSEA, LayerLogitLens, ModelAdapter, PixelForward, VisualTokenAttribution
from captum_intramodal._utils.image import image_to_tensor
from captum_intramodal.adapter.answer_scorer import AnswerScorer
from captum_intramodal.demo import CHECKPOINT, Scene, compose
from captum_intramodal.metrics import (
    ImageRemoval,
    Interval,
    area_under_curve,
    bootstrap_interval,
    deletion_curve,
    insertion_curve,
    object_iou,
    paired_bootstrap_difference,
    pointing_hit,
)

SCALES = (1.0, 1.5)
# Higher is better, except for deletion.
METRICS = ("pointing", "Obj-IoU", "insertion", "deletion")

# By explainer and metric one value per scene.
Results = dict[str, dict[str, list[float]]]
Intervals = dict[str, dict[str, Interval]]


def make_methods(forward: PixelForward) -> dict[str, tuple[Attribution, dict[str, Any]]]:
    """Return each method with the arguments of its ``attribute``."""
    layers = forward.model.get_decoder().layers
    window = {"sliding_window_shapes": (3, 48, 48), "strides": (3, 48, 48), "perturbations_per_eval": 8}
    return {
        "LayerLogitLens": (VisualTokenAttribution(LayerLogitLens(forward, layers[-1])), {"n_targets": True}),
        "IntegratedGradients": (IntegratedGradients(forward), {"n_steps": 5}),
        "GradientShap": (GradientShap(forward), {"n_samples": 3, "stdevs": 0.05}),
        "Occlusion": (Occlusion(forward), window),
        "LayerIntegratedGradients": (
            VisualTokenAttribution(LayerIntegratedGradients(forward, layers[0])),
            {"n_steps": 5, "attribute_to_layer_input": True},
        ),
    }


def attribute(method: Attribution, forward: PixelForward, image: Tensor, options: dict[str, Any]) -> Tensor:
    """Compute the maps of all tokens of the answer, float32 (tokens, height, width), clipped at 0."""
    torch.manual_seed(0)
    if isinstance(method, GradientShap) or isinstance(getattr(method, "attribution_method", None), GradientShap):
        options = options | {"baselines": torch.stack([torch.zeros_like(image[0]), torch.full_like(image[0], 0.5)])}
    if options.get("n_targets"):  # One call for all tokens.
        maps: Tensor = method.attribute(image, target=torch.tensor([forward.answer_ids]))[0]
        return maps.clamp_min(0)
    each = [method.attribute(image, target=target, **options).detach().sum(1) for target in forward.targets]
    return torch.cat(each).clamp_min(0)


def score_map(values: Tensor, word: str, token: int, scene: Scene, scorer: AnswerScorer) -> dict[str, float]:
    """Compute all metrics of one word's map."""

    def probability(images: list[Image.Image]) -> Tensor:
        return scorer.log_probability(images)[:, token].exp()

    mask = torch.from_numpy(scene.mask_of(word))
    removal = ImageRemoval(probability, scene.image)
    importance = removal.importance(values)
    return {
        "pointing": pointing_hit(values, mask),
        "Obj-IoU": object_iou(values, mask),
        "insertion": area_under_curve(insertion_curve(removal, importance)),
        "deletion": area_under_curve(deletion_curve(removal, importance)),
    }


def score_scene(
    adapter: ModelAdapter, scene: Scene, answer_ids: list[int], object_words: dict[int, str]
) -> dict[str, dict[str, float]]:
    """Compute by explainer the means of all metrics over the object words, which are given by their tokens."""
    forward = PixelForward(adapter, PROMPT, answer_ids)
    scorer = AnswerScorer(adapter, PROMPT, answer_ids)
    image = image_to_tensor(scene.image)
    methods = make_methods(forward)
    relevance = ARC(next(iter(methods.values()))[0]).forward_context(image)
    suppressor = ARC(model=adapter.lens)
    scores = {}
    for name, (method, options) in methods.items():
        plain = attribute(method, forward, image, options)
        wrapped = attribute(MSEA(method, scales=SCALES), forward, image, options)
        for label, maps in {
            name: plain,
            f"MSEA({name})": wrapped,
            f"ARC({name})": suppressor.suppress(plain, relevance),
            f"ARC(MSEA({name}))": suppressor.suppress(wrapped, relevance),
        }.items():
            each = [score_map(maps[token], word, token, scene, scorer) for token, word in object_words.items()]
            scores[label] = {metric: float(np.mean([values[metric] for values in each])) for metric in METRICS}
    return scores


def score_scenes(adapter: ModelAdapter, scenes: int, objects: tuple[int, int]) -> Results:
    """Score the first scenes of whose objects the answer names at least one."""
    classes, sprites = world_named("demo")
    results: Results = {}
    index = 0
    for _ in track(range(scenes), description="Explaining"):
        while True:
            scene = compose(CAPTUM_METHODS_SEED + index, (256, 192), objects, classes, sprites)
            index += 1
            answer_ids = adapter.generate(adapter.prepare([scene.image], PROMPT), 48)
            words = {i: adapter.tokenizer.decode([token]).strip() for i, token in enumerate(answer_ids)}
            object_words = {i: word for i, word in words.items() if word in {item.name for item in scene.objects}}
            if object_words:
                break
        for name, scores in score_scene(adapter, scene, answer_ids, object_words).items():
            for metric, value in scores.items():
                results.setdefault(name, {}).setdefault(metric, []).append(value)
    return results


def differences(results: Results) -> Intervals:
    """Compute the differences between each wrapped method and the method alone."""
    alone = [name for name in results if "(" not in name]
    return {
        name: {metric: paired_bootstrap_difference(results[name][metric], results[base][metric]) for metric in METRICS}
        for base in alone
        for name in results
        if name != base and base == name.rstrip(")").split("(")[-1]
    }


def rows_of(intervals: Intervals, sign: str = "") -> list[list[str]]:
    """Return the cells of a table, one row per explainer."""
    return [
        [name, *(format_interval(of_metric[metric], sign) for metric in METRICS)]
        for name, of_metric in intervals.items()
    ]


def main(
    model: Checkpoint = CHECKPOINT,
    scenes: Annotated[int, typer.Option(min=1, help="Number of scenes.")] = 20,
    objects: Annotated[tuple[int, int], typer.Option(help="Fewest and most objects per scene.")] = (2, 3),
    out: Report = None,
    threads: Threads = 1,
) -> None:
    results = score_scenes(load_adapter(model, threads), scenes, objects)
    means = {
        name: {metric: bootstrap_interval(values) for metric, values in of_metric.items()}
        for name, of_metric in results.items()
    }
    title = (
        f"{scenes} held-out scenes of the demo world, {objects[0]} to {objects[1]} objects; MSEA at scales {SCALES}."
    )
    header = ("explainer", *METRICS)
    table = Table(*header, title=title)
    for row in rows_of(means):
        table.add_row(*row)
    Console(width=140).print(table)
    lines = [f"{title} Deletion: lower is better.", "", *markdown_table(header, rows_of(means)), ""]
    lines += ["Wrapped minus alone, paired.", "", *markdown_table(header, rows_of(differences(results), "+")), ""]
    write_report(out, "\n".join(lines), results)


if __name__ == "__main__":
    typer.run(main)
