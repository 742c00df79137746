r"""Does wrapping help? Captum methods alone, inside MSEA, inside ARC and inside both, on scenes of the demo model.

    python benchmarks/captum_methods.py --scenes 20 --out benchmarks/results/captum_methods.md

The model describes each held-out scene; every method explains every token of that answer. Object words that name an
object of the scene are scored: pointing and Obj-IoU against the object's exact mask, insertion and deletion (blurred
pixels, the word's probability). A scene's score is the mean of its words; intervals are 95 % percentile bootstrap
intervals over scenes, and differences are paired: the same scenes, words and removed fractions.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from captum.attr import Attribution, GradientShap, IntegratedGradients, LayerIntegratedGradients, Occlusion
from common import load_adapter
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from train_demo import WORLDS

from captum_intramodal import ARC, MSEA, LayerLogitLens, ModelAdapter, PixelForward, VisualTokenAttribution
from captum_intramodal._utils.image import image_to_tensor
from captum_intramodal.adapter.answer_scorer import AnswerScorer
from captum_intramodal.demo import CHECKPOINT, Scene, compose
from captum_intramodal.metrics import (
    ImageRemoval,
    area_under_curve,
    bootstrap_interval,
    deletion_curve,
    insertion_curve,
    object_iou,
    paired_bootstrap_difference,
    pointing_hit,
)

HELD_OUT = 4_000_000
SCALES = (1.0, 1.5)
PROMPT = "describe the picture."
# Better is higher, but for deletion.
METRICS = ("pointing", "Obj-IoU", "insertion", "deletion")


def methods(forward: PixelForward) -> dict[str, tuple[Attribution, dict[str, Any]]]:
    """Each method with the arguments of its attribute."""
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
    """Maps of all tokens of the answer, float32 (tokens, height, width), clipped at 0."""
    torch.manual_seed(0)
    if isinstance(method, GradientShap) or isinstance(getattr(method, "attribution_method", None), GradientShap):
        options = options | {"baselines": torch.stack([torch.zeros_like(image[0]), torch.full_like(image[0], 0.5)])}
    if options.get("n_targets"):  # All at once.
        maps: Tensor = method.attribute(image, target=torch.tensor([forward.answer_ids]))[0]
        return maps.clamp_min(0)
    each = [method.attribute(image, target=target, **options).detach().sum(1) for target in forward.targets]
    return torch.cat(each).clamp_min(0)


def evaluate(adapter: ModelAdapter, scenes: int, objects: tuple[int, int]) -> dict[str, dict[str, list[float]]]:
    """By explainer and metric one value per scene."""
    classes, sprites = WORLDS["demo"]
    results: dict[str, dict[str, list[float]]] = {}
    index = 0
    for _ in track(range(scenes), description="Explaining"):
        while True:
            scene = compose(HELD_OUT + index, (256, 192), objects, classes, sprites)
            index += 1
            answer_ids = adapter.generate(adapter.prepare([scene.image], PROMPT), 48)
            words = {i: adapter.tokenizer.decode([token]).strip() for i, token in enumerate(answer_ids)}
            named = {i: word for i, word in words.items() if word in {item.name for item in scene.objects}}
            if named:
                break
        for name, scores in explain(adapter, scene, answer_ids, named).items():
            for metric, value in scores.items():
                results.setdefault(name, {}).setdefault(metric, []).append(value)
    return results


def explain(
    adapter: ModelAdapter, scene: Scene, answer_ids: list[int], named: dict[int, str]
) -> dict[str, dict[str, float]]:
    forward = PixelForward(adapter, PROMPT, answer_ids)
    scorer = AnswerScorer(adapter, PROMPT, answer_ids)
    image = image_to_tensor(scene.image)
    relevance = ARC(next(iter(methods(forward).values()))[0]).forward_context(image)
    suppressor = ARC(model=adapter.lens)
    scores = {}
    for name, (method, options) in methods(forward).items():
        plain = attribute(method, forward, image, options)
        wrapped = attribute(MSEA(method, scales=SCALES), forward, image, options)
        for label, maps in {
            name: plain,
            f"MSEA({name})": wrapped,
            f"ARC({name})": suppressor.suppress(plain, relevance),
            f"ARC(MSEA({name}))": suppressor.suppress(wrapped, relevance),
        }.items():
            scores[label] = score(maps, scene, scorer, named)
    return scores


def score(maps: Tensor, scene: Scene, scorer: AnswerScorer, named: dict[int, str]) -> dict[str, float]:
    values: dict[str, list[float]] = {metric: [] for metric in METRICS}
    for token, word in named.items():
        mask = torch.from_numpy(scene.mask_of(word))
        values["pointing"].append(pointing_hit(maps[token], mask))
        values["Obj-IoU"].append(object_iou(maps[token], mask))

        def probability(images: list[Any], token: int = token) -> Tensor:
            return scorer.log_probability(images)[:, token].exp()

        removal = ImageRemoval(probability, scene.image)
        importance = removal.importance(maps[token])
        values["insertion"].append(area_under_curve(insertion_curve(removal, importance)))
        values["deletion"].append(area_under_curve(deletion_curve(removal, importance)))
    return {metric: float(np.mean(each)) for metric, each in values.items()}


def differences(results: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, tuple[float, float, float]]]:
    """Each wrapped method less the method alone."""
    alone = [name for name in results if "(" not in name]
    return {
        name: {
            metric: tuple(paired_bootstrap_difference(results[name][metric], results[base][metric]))
            for metric in METRICS
        }
        for base in alone
        for name in results
        if name != base and base == name.rstrip(")").split("(")[-1]
    }


def markdown(title: str, rows: dict[str, dict[str, tuple[float, float, float]]], sign: str) -> list[str]:
    lines = [title, "", f"| explainer | {' | '.join(METRICS)} |", "|---|" + "---|" * len(METRICS)]
    for name, row in rows.items():
        cells = [f"{{:{sign}.3f}} [{{:{sign}.3f}}, {{:{sign}.3f}}]".format(*row[metric]) for metric in METRICS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return [*lines, ""]


def main(
    model: Annotated[Path, typer.Option(help="Checkpoint directory.")] = CHECKPOINT,
    scenes: int = 20,
    objects: Annotated[tuple[int, int], typer.Option(help="Fewest and most objects per scene.")] = (2, 3),
    out: Annotated[Path | None, typer.Option(help="Write the tables as Markdown, and the values as JSON.")] = None,
    threads: int = 1,
) -> None:
    results = evaluate(load_adapter(model, threads), scenes, objects)
    means: dict[str, dict[str, tuple[float, float, float]]] = {
        name: {metric: tuple(bootstrap_interval(values)) for metric, values in row.items()}
        for name, row in results.items()
    }
    title = (
        f"{scenes} held-out scenes of the demo world, {objects[0]} to {objects[1]} objects; MSEA at scales {SCALES}."
    )
    lines = markdown(f"{title} Deletion: lower is better.", means, "")
    lines += markdown("Wrapped less alone, paired.", differences(results), "+")
    show: Callable[[Table], None] = Console(width=140).print
    table = Table("explainer", *METRICS, title=title)
    for name, row in means.items():
        table.add_row(name, *("{:.3f} [{:.3f}, {:.3f}]".format(*row[metric]) for metric in METRICS))
    show(table)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text("\n".join(lines), encoding="utf-8")
        out.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
