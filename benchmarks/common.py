r"""Share what several benchmarks need: models, held-out scenes, training, options, tables, intervals, report files.

This is a module, not a script. It needs the package itself only.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
import typer
from transformers import AutoModelForImageTextToText, AutoProcessor

from captum_intramodal import ModelAdapter
from captum_intramodal.demo import Scene
from captum_intramodal.demo.scenes import CLASSES, SPRITES
from captum_intramodal.metrics import Interval, bootstrap_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from captum_intramodal.evaluation import Column

PROMPT = "describe the picture."

# First seed of each script's held-out scenes. Training scenes have seeds from 2**32.
ACCURACY_SEED = 1_000_000
LOCALIZATION_SEED = 2_000_000
TEXT_RELEVANCE_SEED = 3_000_000
CAPTUM_METHODS_SEED = 4_000_000

# Words and sprites of the demo model's training, and a second world that it has never processed.
OTHER_CLASSES = (
    "fox", "penguin", "duck", "fish", "butterfly", "carrot", "strawberry", "watermelon", "cookie", "airplane",
    "tractor", "train", "camera", "phone", "crown", "mushroom",
)  # fmt: skip
WORLDS = {"demo": (CLASSES, SPRITES), "other": (OTHER_CLASSES, Path(__file__).parent / "sprites")}

# Command-line options that several scripts have.
Checkpoint = Annotated[Path, typer.Option(help="Checkpoint directory.")]
Report = Annotated[Path | None, typer.Option(help="Markdown file to write, with its data beside it.")]
Threads = Annotated[int, typer.Option(min=1, help="CPU threads.")]
World = Annotated[str, typer.Option(help="'demo', or 'other': words and sprites that the demo model does not know.")]


def load_model(checkpoint: Path, threads: int) -> tuple[Any, Any]:
    """Load a checkpoint in float32 and its processor. A fixed number of threads makes figures reproducible."""
    torch.set_num_threads(threads)
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()
    return model, AutoProcessor.from_pretrained(checkpoint)


def load_adapter(checkpoint: Path, threads: int) -> ModelAdapter:
    """Load a checkpoint and its processor as a :class:`ModelAdapter`."""
    return ModelAdapter(*load_model(checkpoint, threads))


def save_atomically(state: dict[str, Any], path: Path) -> None:
    """Save a training run's state, so that a stopped process leaves the old file or the new one, never a part."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def warm_up_and_cosine(
    optimizer: torch.optim.Optimizer, learning_rate: float, warm_up: int, steps: int, start: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Raise the learning rate over ``warm_up`` steps, then lower it along a cosine to a fiftieth, from step ``start``.

    The schedule depends on this call's arguments alone, so a run can resume with more steps or another rate.
    """

    def rate(step: int) -> float:
        warm = min(1.0, (step + 1) / warm_up)
        return warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))))

    for group in optimizer.param_groups:
        group["initial_lr"] = learning_rate
    return torch.optim.lr_scheduler.LambdaLR(optimizer, rate, last_epoch=start - 1)


def world_named(name: str) -> tuple[tuple[str, ...], Path]:
    """Return the classes and the sprite folder of a world.

    Raises:
        BadParameter: There is no such world.
    """
    if name not in WORLDS:
        raise typer.BadParameter(f"--world is {name!r}; choose one of {', '.join(WORLDS)}.")
    return WORLDS[name]


def count_correct_object_words(answer: str, scene: Scene, vocabulary: set[str]) -> tuple[int, int]:
    """Count the object words that the answer and the true description have at the same place, and the object words of
    the longer of the two."""
    given = [word for word in answer.replace(",", " ").replace(".", " ").split() if word in vocabulary]
    true = [item.name for item in scene.objects]
    return sum(a == b for a, b in zip(given, true, strict=False)), max(len(given), len(true))


def weighted_mean(means: np.ndarray, counts: np.ndarray, axis: int = -1) -> np.ndarray:
    """Compute the mean over words from per-scene means and word counts, as a statistic for the bootstrap."""
    return ratio_of_sums(means * counts, counts, axis)


def ratio_of_sums(part: np.ndarray, total: np.ndarray, axis: int = -1) -> np.ndarray:
    """Divide two sums over scenes, as a statistic for the bootstrap."""
    ratio: np.ndarray = part.sum(axis) / total.sum(axis).clip(1e-9)
    return ratio


def weighted_interval(means: np.ndarray, counts: np.ndarray) -> Interval:
    """Compute the interval of a mean over words. Words count equally; scenes are resampled."""
    return bootstrap_interval(np.stack([means, counts], 1), weighted_mean)


def ratio_interval(part: np.ndarray, total: np.ndarray) -> Interval:
    """Compute the interval of a ratio of two sums. Scenes are resampled."""
    return bootstrap_interval(np.stack([part, total], 1), ratio_of_sums)


def format_interval(interval: Iterable[float], sign: str = "") -> str:
    """Format as ``estimate [low, high]`` with three decimals; ``sign="+"`` shows the sign of positive values."""
    estimate, low, high = (f"{value:{sign}.3f}" for value in interval)
    return f"{estimate} [{low}, {high}]"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], rule: str | None = None) -> list[str]:
    """Return the lines of a Markdown table; ``rule`` is the line below the header, if columns are not left-aligned."""
    lines = (f"| {' | '.join(row)} |" for row in rows)
    return [f"| {' | '.join(header)} |", rule or "|" + "---|" * len(header), *lines]


def write_report(out: Path | None, text: str, data: Any = None) -> None:
    """Write Markdown to ``out`` and, if there is data, JSON beside it. Do nothing if ``out`` is None."""
    if out is None:
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    if data is not None:
        out.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def column_heading(column: Column) -> str:
    """Return a metric's title with an arrow in the direction of better values."""
    return f"{column.title} {'↑' if column.higher_is_better else '↓'}"


def draw_interval(axis: Axes, at: float, interval: Interval, highlighted: bool, horizontal: bool = False) -> None:
    """Draw an estimate as a dot with its interval as a line."""
    estimate, low, high = interval
    error = [[estimate - low], [high - estimate]]
    style: dict[str, Any] = {"fmt": "o", "color": "tab:orange" if highlighted else "tab:blue"}
    if horizontal:
        axis.errorbar(estimate, at, xerr=error, markersize=3.5, **style)
    else:
        axis.errorbar(at, estimate, error, markersize=4, **style)
