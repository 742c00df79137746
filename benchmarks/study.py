r"""Which of MSEA and ARC improves which metric by how much: the runs of the study, and its report.

    python benchmarks/study.py demo hard demo_many hard_many wide --out RUNS            # the demo model
    python benchmarks/study.py llava llava_many llava_places --out RUNS --llava CHECKPOINT --sprites SPRITES
    python benchmarks/study.py demo hard ... --out RUNS ... --report benchmarks/results/study.md

``CHECKPOINT`` and ``SPRITES`` are what ``benchmarks/train_llava.py`` makes. Each run is an evaluation
(``captum-intramodal evaluate``) in ``RUNS/<name>``, where its leaderboard, page, tests of all pairs and records are; a
killed run goes on. ``--report`` writes the tables of the runs that it is given, and beside them a plot.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import matplotlib.pyplot as plt
import torch
import typer
from transformers import AutoModelForImageTextToText, AutoProcessor

from captum_intramodal.demo import CHECKPOINT
from captum_intramodal.evaluation import Leaderboard, evaluate

PLACES = "f1_iou tam_iou pointing energy average_precision"
ALL = f"{PLACES} insertion deletion road"
# Objects cover a few percent of an image: what matters happens there.
FRACTIONS = (0, 0.01, 0.02, 0.05, 0.1, 0.2)
LARGER = "interpolate_pos_encoding=true"


@dataclass(frozen=True)
class Run:
    """One evaluation; what it is compared in the report with are TAM as published and its better variant."""

    title: str
    data: str
    explainers: str
    metrics: str = ALL
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
        "centre_gaussian",
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
        PLACES,
        llava=True,
    ),
}
HEADING = """# Which part of the method improves what

Made by `python benchmarks/study.py demo hard demo_many hard_many wide --out RUNS`, `python benchmarks/study.py llava \
llava_many llava_places --out RUNS --llava CHECKPOINT --sprites SPRITES` with what `python benchmarks/train_llava.py` \
makes, and `--report`. The models' own answers; means over words with 95 % bootstrap intervals over scenes; \
differences are paired, p is that of a paired permutation test (10,000 swaps). Insertion, deletion and ROAD: of the \
object words' probabilities, at 0, 1, 2, 5, 10 and 20 % of the image. What it means is in the README.

![All figures](study.png)
"""
SHOWN = ("f1_iou", "pointing", "average_precision", "insertion", "deletion", "road")
RIVALS = ("tam", "tam:filter=false", "logit_lens")


def section(run: Run, board: Leaderboard, manifest: dict[str, object]) -> str:
    """Tables: the values, and the first explainer less its rivals."""
    columns = [column for column in board.columns if column.name in SHOWN]
    titles = [f"{column.title} {'↑' if column.higher_is_better else '↓'}" for column in columns]
    lines = [
        f"## {run.title}", "", f"`--data \"{run.data}\"`, {board.coverage.samples} scenes, coverage "
        f"{json.dumps({k: v for k, v in manifest['coverage'].items() if k != 'skipped'})}.",  # type: ignore[attr-defined]
        "", f"| explainer | {' | '.join(titles)} |", "|---|" + "---|" * len(columns),
    ]  # fmt: skip
    for label, row in board.rows.items():
        cells = ["–" if c.name not in row else "{:.3f} [{:.3f}, {:.3f}]".format(*row[c.name].interval) for c in columns]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    first = next(iter(board.rows))
    found = {(pair.first, pair.second, pair.column): pair for pair in board.pairs}
    lines += ["", f"| {first} less | {' | '.join(titles)} |", "|---|" + "---|" * len(columns)]
    for rival in (rival for rival in RIVALS if rival in board.rows):
        cells = []
        for column in columns:
            pair = found.get((first, rival, column.name))
            cells.append("–" if pair is None else "{:+.3f} [{:+.3f}, {:+.3f}]".format(*pair.difference) +
                         f", p {pair.p:.4f}")  # fmt: skip
        lines.append(f"| {rival} | {' | '.join(cells)} |")
    skipped = [f"{label}: {reason} ({count})" for label, reasons in board.coverage.skipped.items()
               for reason, count in reasons.items()]  # fmt: skip
    return "\n".join([*lines, *(["", f"Left out: {'; '.join(skipped)}"] if skipped else []), ""])


def draw(boards: dict[str, Leaderboard], file: Path) -> None:
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
                    estimate, low, high = board.rows[label][column].interval
                    color = "tab:orange" if y == 0 else "tab:blue"
                    axis.errorbar(estimate, -y, xerr=[[estimate - low], [high - estimate]], fmt="o", color=color,
                                  markersize=3.5)  # fmt: skip
            axis.set_yticks([-y for y in range(len(labels))], labels if number == 0 else [])
            axis.tick_params(labelsize=6)
            axis.set_title(f"{name}: {column}" if number == 0 else column, fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    plt.close(figure)


def main(
    names: Annotated[list[str], typer.Argument(help=f"Of {', '.join(RUNS)}.")],
    out: Annotated[Path, typer.Option(help="Directory of the runs.")],
    llava: Annotated[Path | None, typer.Option(help="Checkpoint of benchmarks/train_llava.py.")] = None,
    sprites: Annotated[Path | None, typer.Option(help="Its sprites.")] = None,
    report: Annotated[Path | None, typer.Option(help="Markdown to write, and a .png beside it.")] = None,
    threads: int = 1,
) -> None:
    if unknown := [name for name in names if name not in RUNS]:
        raise SystemExit(f"There is no run {', '.join(unknown)}; there are {', '.join(RUNS)}.")
    torch.set_num_threads(threads)
    boards: dict[str, Leaderboard] = {}
    sections = []
    for name in names:
        run = RUNS[name]
        if run.llava and (llava is None or sprites is None):
            raise SystemExit(f"{name} needs --llava and --sprites.")
        checkpoint, data = CHECKPOINT if llava is None or not run.llava else llava, run.data
        if run.llava and sprites is not None:
            classes = json.dumps(sorted(file.stem for file in sprites.glob("*.webp")), separators=(",", ":"))
            data += f",sprites={sprites},classes={classes}"
        model = AutoModelForImageTextToText.from_pretrained(checkpoint).eval()
        processor = AutoProcessor.from_pretrained(checkpoint)
        board = evaluate(
            model, processor, data, out / name, run.explainers.split(), run.metrics.split(),
            answers="model", fractions=FRACTIONS, progress=lambda done, total: print(f"{done} of {total}", end="\r"),
        )  # fmt: skip
        if board is None:
            raise SystemExit(f"Another process is at work in {out / name}.")
        boards[name] = board
        manifest = json.loads((out / name / "manifest.json").read_text(encoding="utf-8"))
        sections.append(section(run, board, manifest))
        print(sections[-1])
    if report is not None:
        report.parent.mkdir(parents=True, exist_ok=True)
        draw(boards, report.with_suffix(".png"))
        report.write_text("\n".join([HEADING.replace("study.png", f"{report.stem}.png"), *sections]), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
