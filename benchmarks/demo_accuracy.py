r"""How often does the demo model answer correctly? Accuracy on held-out scenes, by task.

    python benchmarks/demo_accuracy.py --scenes 200
    python benchmarks/demo_accuracy.py --scenes 200 --write      # also writes the model card

Needs: the package only (the demo checkpoint is part of it); about 2 minutes on one core for 200 scenes.

Prints: one table of correct answers, number of answers and accuracy. ``--write`` puts it into ``demo_model_card.md``
and saves that as the checkpoint's README.md. The README's section on the demo model quotes the table.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from common import (
    ACCURACY_SEED,
    Checkpoint,
    Threads,
    World,
    count_correct_object_words,
    load_adapter,
    markdown_table,
    world_named,
)
from rich.console import Console
from rich.progress import track
from rich.table import Table

from captum_intramodal import ModelAdapter
from captum_intramodal.demo import CHECKPOINT, Question, Scene, compose


def ask(adapter: ModelAdapter, scene: Scene, question: Question) -> str:
    """Return the model's answer to a question about a scene."""
    ids = adapter.generate(adapter.prepare([scene.image], question.prompt), max_new_tokens=48)
    return str(adapter.tokenizer.decode(ids))


def count_correct_colors(answer: str, scene: Scene) -> tuple[int, int]:
    """Count the painted objects whose color and name the answer has, and all painted objects."""
    phrases = [f"{item.color} {item.name}" for item in scene.objects if item.color]
    return sum(phrase in answer for phrase in phrases), len(phrases)


def measure_accuracy(
    adapter: ModelAdapter, classes: tuple[str, ...], sprites: Path, scenes: int
) -> list[tuple[str, int, int]]:
    """Return the task, the number of correct answers and the number of answers of each row."""
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])

    def count(task: str, correct: int, total: int) -> None:
        counts[task][0] += correct
        counts[task][1] += total

    for index in track(range(scenes), description="Asking"):
        for objects in ((1, 1), (2, 4), (5, 5)):
            seed = ACCURACY_SEED + index
            rng = np.random.default_rng(seed)
            scene = compose(seed, (256, 192), objects, classes, sprites)
            description = ask(adapter, scene, scene.describe_question(rng))
            number = {1: "1 object", 5: "5 objects"}.get(objects[0], "2 to 4 objects")
            words = count_correct_object_words(description, scene, set(classes))
            count(f"describe, {number}: object words", *words)
            count(f"describe, {number}: whole answer", int(description == scene.description), 1)
            count("describe: color and object", *count_correct_colors(description, scene))
            if objects != (2, 4):
                continue
            exists = scene.exists_question(rng, classes)
            answer = ask(adapter, scene, exists)
            count("is there a X?", int(answer.split(",")[0] == exists.answer.split(",")[0]), 1)
            relation = scene.relation_question(rng)
            if relation is not None:
                correct = ask(adapter, scene, relation) == relation.answer
                count("what is left / right / above / below of the X?", int(correct), 1)
    return [(task, correct, total) for task, (correct, total) in sorted(counts.items()) if total]


def main(
    model: Checkpoint = CHECKPOINT,
    world: World = "demo",
    scenes: Annotated[int, typer.Option(min=1, help="Held-out scenes per row.")] = 300,
    write: Annotated[bool, typer.Option("--write", help="Write the figures into the checkpoint's README.md.")] = False,
    threads: Threads = 1,
) -> None:
    classes, sprites = world_named(world)
    figures = measure_accuracy(load_adapter(model, threads), classes, sprites, scenes)
    rows = [(task, str(correct), str(total), f"{100 * correct / total:.1f} %") for task, correct, total in figures]
    table = Table("task", "right", "of", "accuracy", title=f"Held-out scenes, 256 x 192 px, {scenes} per row")
    for row in rows:
        table.add_row(*row)
    Console(width=110).print(table)
    if write:
        card = (Path(__file__).parent / "demo_model_card.md").read_text(encoding="utf-8")
        lines = markdown_table(("task", "right", "of", "accuracy"), rows, "|---|---:|---:|---:|")
        card = card.replace("{accuracies}", "\n".join(lines)).replace("{scenes}", str(scenes))
        (model / "README.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
