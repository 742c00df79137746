r"""Accuracy of the demo model on held-out scenes: the figures of its model card.

python benchmarks/demo_accuracy.py
python benchmarks/demo_accuracy.py --write      # and the model card with them
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from common import load_adapter
from rich.console import Console
from rich.progress import track
from rich.table import Table
from train_demo import WORLDS

from captum_intramodal import ModelAdapter
from captum_intramodal.demo import CHECKPOINT, Question, Scene, compose

HELD_OUT = 1_000_000  # first seed; training scenes have seeds from 2**32


def answer(adapter: ModelAdapter, scene: Scene, question: Question) -> str:
    ids = adapter.generate(adapter.prepare([scene.image], question.prompt), max_new_tokens=48)
    return str(adapter.tokenizer.decode(ids))


def object_words_right(given: str, scene: Scene, vocabulary: set[str]) -> tuple[int, int]:
    """Object words of the answer that stand where the true answer has the same one, and their number in the longer."""
    said = [word for word in given.replace(",", " ").replace(".", " ").split() if word in vocabulary]
    true = [item.name for item in scene.objects]
    return sum(a == b for a, b in zip(said, true, strict=False)), max(len(said), len(true))


def colors_right(given: str, scene: Scene) -> tuple[int, int]:
    phrases = [f"{item.color} {item.name}" for item in scene.objects if item.color]
    return sum(phrase in given for phrase in phrases), len(phrases)


def main(
    model: Annotated[Path, typer.Option(help="Checkpoint directory.")] = CHECKPOINT,
    world: Annotated[str, typer.Option(help="'demo' or 'other'.")] = "demo",
    scenes: Annotated[int, typer.Option(help="Held-out scenes per row.")] = 300,
    write: Annotated[bool, typer.Option("--write", help="Write the figures into the checkpoint's README.md.")] = False,
    threads: int = 1,
) -> None:
    adapter = load_adapter(model, threads)
    classes, sprites = WORLDS[world]
    right: dict[str, list[int]] = defaultdict(lambda: [0, 0])

    def count(name: str, hits: int, total: int) -> None:
        right[name][0] += hits
        right[name][1] += total

    for index in track(range(scenes), description="Asking"):
        for objects in ((1, 1), (2, 4), (5, 5)):
            seed = HELD_OUT + index
            rng = np.random.default_rng(seed)
            scene = compose(seed, (256, 192), objects, classes, sprites)
            described = answer(adapter, scene, scene.describe_question(rng))
            of = {1: "1 object", 5: "5 objects"}.get(objects[0], "2 to 4 objects")
            count(f"describe, {of}: object words", *object_words_right(described, scene, set(classes)))
            count(f"describe, {of}: whole answer", int(described == scene.description), 1)
            count("describe: color and object", *colors_right(described, scene))
            if objects == (2, 4):
                exists = scene.exists_question(rng, classes)
                given = answer(adapter, scene, exists)
                count("is there a X?", int(given.split(",")[0] == exists.answer.split(",")[0]), 1)
                relation = scene.relation_question(rng)
                if relation is not None:
                    count(
                        "what is left / right / above / below of the X?",
                        int(answer(adapter, scene, relation) == relation.answer),
                        1,
                    )
    table = Table("task", "right", "of", "accuracy", title=f"Held-out scenes, 256 x 192 px, {scenes} per row")
    rows = [
        (name, hits, total, f"{100 * hits / total:.1f} %") for name, (hits, total) in sorted(right.items()) if total
    ]
    for name, hits, total, share in rows:
        table.add_row(name, str(hits), str(total), share)
    Console(width=110).print(table)
    if write:
        card = (Path(__file__).parent / "demo_model_card.md").read_text(encoding="utf-8")
        lines = ["| task | right | of | accuracy |", "|---|---:|---:|---:|"]
        lines += [f"| {name} | {hits} | {total} | {share} |" for name, hits, total, share in rows]
        card = card.replace("{accuracies}", "\n".join(lines)).replace("{scenes}", str(scenes))
        (model / "README.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
