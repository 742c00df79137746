r"""How much do the options of MSEA and ARC matter? Each option is varied alone, with the others at their defaults.

    python benchmarks/sensitivity.py --data "scenes:count=40" --out RUN --report benchmarks/results/sensitivity.md
    python benchmarks/sensitivity.py --model DIRECTORY --data "scenes:..." --out RUN

Each setting is an explainer of one evaluation (``captum-intramodal evaluate``), whose table, tests and records are in
``RUN``. A stopped run resumes if it is started again.

Needs: the package only (the demo checkpoint is part of it); about 15 seconds on one core per scene.

Prints: one table with a row per option and value, and the metrics' means with 95 % bootstrap intervals over scenes.
``--report`` writes it, with a plot of the same name beside it. The README quotes ``results/sensitivity.md``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import matplotlib.pyplot as plt
import typer
from common import (
    Checkpoint,
    Threads,
    column_heading,
    draw_interval,
    format_interval,
    load_model,
    markdown_table,
    write_report,
)
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

from captum_intramodal.demo import CHECKPOINT
from captum_intramodal.evaluation import Leaderboard, evaluate

BASE = "msea+arc"
SCALES = ("[1,1.5,2]", "[1]", "[1,1.5]", "[1,2]", "[1.5,2]", "[2]", "[0.75,1,1.5]", "[1,1.25,1.5,1.75,2]",
          "[0.5,1,1.5,2]", "[1,1.5,2,2.5,3]")  # fmt: skip
# By option its values; the default comes first.
SWEEP: dict[str, tuple[str, ...]] = {
    "scales": SCALES,
    "aggregation": ("mean", "max", "geometric_mean"),
    "layer": ("null", "2", "1", "0"),
    "weighting": ("irrelevance", "uniform", "relevance", "text_activation", "irrelevance*text_activation",
                  "relevance*text_activation"),
    "ranking_position": ("token", "prediction"),
    "layers": ("[-1]", "[2]", "[1]", "[0]", "[1,2,3]"),
    "k": ("50", "5", "10", "20"),
    "p": ("0.9", "0.5", "0.7", "0.98"),
    "least_squares": ("true", "false"),
    "strength": ("1.0", "0.25", "0.5", "0.75"),
}  # fmt: skip
# For comparison: the base without some of its parts, and TAM with and without its filter.
REFERENCES = ("logit_lens", "msea", "arc", "tam", "tam:filter=false")
# Columns of the leaderboard that are left out here.
OMITTED = ("obj_iou", "func_iou", "aopc")


def specs() -> dict[str, list[tuple[str, str]]]:
    """Return by option its values and their explainers; a default is the base itself."""
    return {
        option: [(value, BASE if value == values[0] else f"{BASE}:{option}={value}") for value in values]
        for option, values in SWEEP.items()
    }


def draw(board: Leaderboard, columns: list[str], file: Path) -> None:
    """Draw a row of panels per metric, a panel per option, and a dot with its interval per value."""
    headings = {column.name: column_heading(column) for column in board.columns}
    figure, axes = plt.subplots(
        len(columns), len(SWEEP), figsize=(1.9 * len(SWEEP), 2.0 * len(columns)), squeeze=False, sharey="row",
        gridspec_kw={"width_ratios": [2 + len(values) for values in SWEEP.values()]},
    )  # fmt: skip
    for number, (row, name) in enumerate(zip(axes, columns, strict=True)):
        for axis, (option, values) in zip(row, specs().items(), strict=True):
            for x, (_, spec) in enumerate(values):
                draw_interval(axis, x, board.rows[spec][name].interval, highlighted=spec == BASE)
            labels = [value for value, _ in values] if number == len(columns) - 1 else []
            axis.set_xticks(range(len(values)), labels, rotation=90)
            axis.tick_params(labelsize=6)
            axis.margins(x=0.1)
            if number == 0:
                axis.set_title(option, fontsize=8)
        row[0].set_ylabel(headings[name], fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=130)
    plt.close(figure)


def table(board: Leaderboard, columns: list[str]) -> str:
    """Return the Markdown table: references first, then each option with its values."""
    headings = [column_heading(column) for column in board.columns if column.name in columns]
    references = [("", [(spec, spec) for spec in REFERENCES])]
    rows = []
    for option, values in [*references, *specs().items()]:
        for index, (value, spec) in enumerate(values):
            if index or option in ("", "scales"):  # The base has one row only.
                label = value if index or not option else f"{value}, the default of this table"
                rows.append([option, label, *(format_interval(board.rows[spec][name].interval) for name in columns)])
    return "\n".join(markdown_table(["option", "value", *headings], rows)) + "\n"


def main(
    out: Annotated[Path, typer.Option(help="Directory of the run.")],
    model: Checkpoint = CHECKPOINT,
    data: Annotated[str, typer.Option(help="Data set, as in captum-intramodal evaluate.")] = "scenes:count=100",
    metrics: Annotated[str, typer.Option(help="Metrics, separated by spaces.")] = "f1_iou pointing",
    fractions: Annotated[str, typer.Option(help="Removed fractions of the image.")] = "0,0.01,0.02,0.05,0.1,0.2",
    report: Annotated[Path | None, typer.Option(help="Markdown file to write, with a plot beside it.")] = None,
    threads: Threads = 1,
) -> None:
    explainers = list(dict.fromkeys([BASE, *REFERENCES, *(spec for values in specs().values() for _, spec in values)]))
    with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn()) as bar:
        task = bar.add_task("Evaluating")
        board = evaluate(
            *load_model(model, threads),
            data,
            out,
            explainers,
            metrics.split(),
            answers="model",
            fractions=tuple(float(part) for part in fractions.split(",")),
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    if board is None:
        raise SystemExit(f"Another process is evaluating in {out}. Wait for it, or choose another --out.")
    columns = [column.name for column in board.columns if column.name not in OMITTED]
    write_report(report, table(board, columns))
    if report is not None:
        draw(board, columns, report.with_suffix(".png"))
    print(table(board, columns))


if __name__ == "__main__":
    typer.run(main)
