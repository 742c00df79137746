r"""Which of MSEA and ARC improves which metric, and by how much? The runs of the study, and its report.

    python benchmarks/study.py demo hard demo_many hard_many wide --out RUNS            # the demo model
    python benchmarks/study.py llava llava_many llava_places --out RUNS --llava CHECKPOINT --sprites SPRITES
    python benchmarks/study.py demo hard ... --out RUNS ... --report benchmarks/results/study.md

Each run is an evaluation (``captum-intramodal evaluate``) in ``RUNS/<name>``, which holds its leaderboard, page, tests
of all pairs and records. A stopped run resumes if it is started again.

Needs: the package only for the demo's runs; for the LLaVA's, ``CHECKPOINT`` and ``SPRITES`` from ``train_llava.py``.
One core is enough. The runs with insertion, deletion and ROAD take longest: they run the model many times per word.

Prints: per run the tables of all values, and of the paired differences between the first explainer and TAM, TAM without
its filter, and the logit lens. ``--report`` writes the tables of the given runs, with a plot beside it. The README
quotes ``results/study.md``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import matplotlib.pyplot as plt
import torch
import typer
from common import Threads, column_heading, draw_interval, format_interval, markdown_table, write_report
from transformers import AutoModelForImageTextToText, AutoProcessor

from captum_intramodal.demo import CHECKPOINT
from captum_intramodal.evaluation import Column, Leaderboard, evaluate

LOCALIZATION_METRICS = "f1_iou tam_iou pointing energy average_precision"
ALL_METRICS = f"{LOCALIZATION_METRICS} insertion deletion road"
# Objects cover a few percent of an image, so most of the effect lies in small fractions.
FRACTIONS = (0, 0.01, 0.02, 0.05, 0.1, 0.2)
LARGER = "interpolate_pos_encoding=true"


@dataclass(frozen=True)
class Run:
    """One evaluation: its title in the report, and the options of ``captum-intramodal evaluate``."""

    title: str
    data: str
    explainers: str
    metrics: str = ALL_METRICS
    llava: bool = False


RUNS = {
    "demo": Run(
        "The demo model, scenes as in training",
        "scenes:count=30,objects=[2,4]",
        "msea+arc logit_lens msea arc tam tam:filter=false msea+arc:layer=1 random",
    ),
    "hard": Run(
        "The demo model, hard scenes: three to five objects that are smaller, two of one class, half hidden",
        "scenes:count=30,seed=2100000,objects=[3,5],overlap=0.4,same_class=2,scale=0.8",
        "msea+arc logit_lens msea arc tam tam:filter=false msea+arc:layer=1 random",
    ),
    "demo_many": Run(
        "As the first, more scenes and fewer explainers",
        "scenes:count=100,seed=2200000,objects=[2,4]",
        "msea+arc tam tam:filter=false logit_lens",
        "f1_iou insertion deletion",
    ),
    "hard_many": Run(
        "Hard scenes, more of them and fewer explainers",
        "scenes:count=100,seed=2300000,objects=[3,5],overlap=0.4,same_class=2,scale=0.8",
        "msea+arc tam tam:filter=false logit_lens",
        "f1_iou insertion deletion",
    ),
    "wide": Run(
        "The demo model, all explainers",
        "scenes:count=8,objects=[2,4]",
        "msea+arc logit_lens tam:filter=false attention attention_rollout attention_x_gradient grad_cam "
        "llava_cam:samples=4 input_x_gradient integrated_gradients:n_steps=8 occlusion greedy:cells=4 random "
        "center_gaussian",
    ),
    "llava": Run(
        "LLaVA of pretrained parts (DINOv2, SmolLM2), 112 pixels",
        "scenes:count=12,objects=[1,3],size=[112,112]",
        f"msea+arc:{LARGER} logit_lens msea:{LARGER} arc tam tam:filter=false random",
        llava=True,
    ),
    "llava_many": Run(
        "The same, more scenes and fewer explainers",
        "scenes:count=60,seed=2400000,objects=[1,3],size=[112,112]",
        f"msea+arc:{LARGER} tam tam:filter=false logit_lens arc arc:weighting=uniform",
        "f1_iou insertion deletion road",
        llava=True,
    ),
    "llava_places": Run(
        "The same, where maps point, on more scenes",
        "scenes:count=40,objects=[1,3],size=[112,112]",
        f"msea+arc:{LARGER} logit_lens msea:{LARGER} msea:crops=true arc msea+arc:crops=true arc:weighting=uniform "
        "arc:weighting=text_activation tam tam:filter=false logit_lens:layer=28 "
        "logit_lens:method=layer_gradient_x_activation attention random center_gaussian",
        LOCALIZATION_METRICS,
        llava=True,
    ),
}
HEADING = """# Which part of the method improves what

Made by `python benchmarks/study.py demo hard demo_many hard_many wide --out RUNS`, `python benchmarks/study.py llava \
llava_many llava_places --out RUNS --llava CHECKPOINT --sprites SPRITES` with what `python benchmarks/train_llava.py` \
makes, and `--report`. The models' own answers; means over words with 95 % bootstrap intervals over scenes; \
differences are paired, p is that of a paired permutation test (10,000 swaps). Insertion, deletion and ROAD: of the \
object words' probabilities, at 0, 1, 2, 5, 10 and 20 % of the image. The README interprets it.

![All figures](study.png)
"""
SHOWN = ("f1_iou", "pointing", "average_precision", "insertion", "deletion", "road")
RIVALS = ("tam", "tam:filter=false", "logit_lens")


def section(run: Run, board: Leaderboard, coverage: dict[str, object]) -> str:
    """Return one run's tables: all values, and the first explainer minus its rivals."""
    columns = [column for column in board.columns if column.name in SHOWN]
    headings = [column_heading(column) for column in columns]
    values = [
        [label, *("–" if c.name not in row else format_interval(row[c.name].interval) for c in columns)]
        for label, row in board.rows.items()
    ]
    first = next(iter(board.rows))
    described = json.dumps({key: value for key, value in coverage.items() if key != "skipped"})
    lines = [f"## {run.title}", ""]
    lines += [f'`--data "{run.data}"`, {board.coverage.samples} scenes, coverage {described}.', ""]
    lines += [*markdown_table(["explainer", *headings], values), ""]
    lines += markdown_table([f"{first} minus", *headings], difference_rows(board, first, columns))
    skipped = [
        f"{label}: {reason} ({count})"
        for label, reasons in board.coverage.skipped.items()
        for reason, count in reasons.items()
    ]
    return "\n".join([*lines, *(["", f"Left out: {'; '.join(skipped)}"] if skipped else []), ""])


def difference_rows(board: Leaderboard, first: str, columns: list[Column]) -> list[list[str]]:
    """Return per rival the paired differences to the first explainer, with p values."""
    pairs = {(pair.first, pair.second, pair.column): pair for pair in board.pairs}
    rows = []
    for rival in (rival for rival in RIVALS if rival in board.rows):
        found = [pairs.get((first, rival, column.name)) for column in columns]
        cells = ["–" if pair is None else f"{format_interval(pair.difference, '+')}, p {pair.p:.4f}" for pair in found]
        rows.append([rival, *cells])
    return rows


def draw(boards: dict[str, Leaderboard], file: Path) -> None:
    """Draw a row of panels per run, a panel per metric, and a dot with its interval per explainer."""
    height = sum(0.6 + 0.19 * len(board.rows) for board in boards.values())
    figure, axes = plt.subplots(
        len(boards), len(SHOWN), figsize=(2.1 * len(SHOWN) + 1.6, height), squeeze=False,
        gridspec_kw={"height_ratios": [1 + 0.25 * len(b.rows) for b in boards.values()]},
    )  # fmt: skip
    for row, (name, board) in zip(axes, boards.items(), strict=True):
        labels = list(board.rows)
        for number, (axis, column) in enumerate(zip(row, SHOWN, strict=True)):
            if not any(column in values for values in board.rows.values()):
                axis.set_axis_off()
                continue
            for y, label in enumerate(labels):
                if column in board.rows[label]:
                    interval = board.rows[label][column].interval
                    draw_interval(axis, -y, interval, highlighted=y == 0, horizontal=True)
            axis.set_yticks([-y for y in range(len(labels))], labels if number == 0 else [])
            axis.tick_params(labelsize=6)
            axis.set_title(f"{name}: {column}" if number == 0 else column, fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    plt.close(figure)


def run_evaluation(name: str, out: Path, llava: Path | None, sprites: Path | None) -> Leaderboard:
    """Run or resume one evaluation of the study."""
    run = RUNS[name]
    checkpoint, data = CHECKPOINT, run.data
    if run.llava and llava is not None and sprites is not None:
        classes = json.dumps(sorted(file.stem for file in sprites.glob("*.webp")), separators=(",", ":"))
        checkpoint, data = llava, f"{data},sprites={sprites},classes={classes}"
    model = AutoModelForImageTextToText.from_pretrained(checkpoint).eval()
    processor = AutoProcessor.from_pretrained(checkpoint)
    board = evaluate(
        model, processor, data, out, run.explainers.split(), run.metrics.split(),
        answers="model", fractions=FRACTIONS, progress=lambda done, total: print(f"{done} of {total}", end="\r"),
    )  # fmt: skip
    if board is None:
        raise SystemExit(f"Another process is evaluating in {out}. Wait for it, or choose another --out.")
    return board


def main(
    names: Annotated[list[str], typer.Argument(help=f"Runs, of {', '.join(RUNS)}.")],
    out: Annotated[Path, typer.Option(help="Directory of the runs.")],
    llava: Annotated[Path | None, typer.Option(help="Checkpoint of benchmarks/train_llava.py.")] = None,
    sprites: Annotated[Path | None, typer.Option(help="Its sprites.")] = None,
    report: Annotated[Path | None, typer.Option(help="Markdown file to write, with a plot beside it.")] = None,
    threads: Threads = 1,
) -> None:
    if unknown := [name for name in names if name not in RUNS]:
        raise typer.BadParameter(f"There is no run {', '.join(unknown)}; choose from {', '.join(RUNS)}.")
    if (llava is None or sprites is None) and (missing := [name for name in names if RUNS[name].llava]):
        raise typer.BadParameter(f"{', '.join(missing)}: pass --llava and --sprites.")
    torch.set_num_threads(threads)
    boards: dict[str, Leaderboard] = {}
    sections = []
    for name in names:
        boards[name] = run_evaluation(name, out / name, llava, sprites)
        manifest = json.loads((out / name / "manifest.json").read_text(encoding="utf-8"))
        sections.append(section(RUNS[name], boards[name], manifest["coverage"]))
        print(sections[-1])
    if report is not None:
        write_report(report, "\n".join([HEADING.replace("study.png", f"{report.stem}.png"), *sections]))
        draw(boards, report.with_suffix(".png"))


if __name__ == "__main__":
    typer.run(main)
