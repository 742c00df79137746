r"""How much the options of MSEA and ARC matter: each one changed alone, around the defaults.

    python benchmarks/sensitivity.py --out RUN                            # the demo model, 100 scenes
    python benchmarks/sensitivity.py --model DIRECTORY --data "scenes:..." --out RUN

Every setting is an explainer of one evaluation (``captum-intramodal evaluate``), whose table, tests and records are in
``RUN``; a killed run goes on. ``--report FILE.md`` writes the table by option, and beside it a plot.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import matplotlib.pyplot as plt
import typer
from common import load_model
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

from captum_intramodal.demo import CHECKPOINT
from captum_intramodal.evaluation import Leaderboard, evaluate

BASE = "msea+arc"
SCALES = ("[1,1.5,2]", "[1]", "[1,1.5]", "[1,2]", "[1.5,2]", "[2]", "[0.75,1,1.5]", "[1,1.25,1.5,1.75,2]",
          "[0.5,1,1.5,2]", "[1,1.5,2,2.5,3]")  # fmt: skip
# Option -> its values; those of the default come first.
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
# What stands beside them: the base without parts, and the filter.
MARKS = ("logit_lens", "msea", "arc", "tam", "tam:filter=false")


def specs() -> dict[str, list[tuple[str, str]]]:
    """Per option the values and their explainers; a default is the base itself."""
    return {
        option: [(value, BASE if value == values[0] else f"{BASE}:{option}={value}") for value in values]
        for option, values in SWEEP.items()
    }


def draw(board: Leaderboard, columns: list[str], file: Path) -> None:
    """A row per column of the table, a panel per option, a dot with its interval per value."""
    chosen = {column.name: column for column in board.columns}
    figure, axes = plt.subplots(
        len(columns), len(SWEEP), figsize=(1.9 * len(SWEEP), 2.0 * len(columns)), squeeze=False, sharey="row",
        gridspec_kw={"width_ratios": [2 + len(values) for values in SWEEP.values()]},
    )  # fmt: skip
    for number, (row, name) in enumerate(zip(axes, columns, strict=True)):
        for axis, (option, values) in zip(row, specs().items(), strict=True):
            for x, (_, spec) in enumerate(values):
                estimate, low, high = board.rows[spec][name].interval
                color = "tab:orange" if spec == BASE else "tab:blue"
                axis.errorbar(x, estimate, [[estimate - low], [high - estimate]], fmt="o", color=color, markersize=4)
            axis.set_xticks(
                range(len(values)), [v for v, _ in values] if number == len(columns) - 1 else [], rotation=90
            )
            axis.tick_params(labelsize=6)
            axis.margins(x=0.1)
            if number == 0:
                axis.set_title(option, fontsize=8)
        row[0].set_ylabel(f"{chosen[name].title} {'↑' if chosen[name].higher_is_better else '↓'}", fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=130)
    plt.close(figure)


def table(board: Leaderboard, columns: list[str]) -> str:
    titles = [f"{c.title} {'↑' if c.higher_is_better else '↓'}" for c in board.columns if c.name in columns]
    lines = [f"| option | value | {' | '.join(titles)} |", f"|---|---|{'---|' * len(titles)}"]
    marks = [("", [(spec, spec) for spec in MARKS])]
    for option, values in [*marks, *specs().items()]:
        for index, (value, spec) in enumerate(values):
            if index or option == "scales" or not option:  # The defaults once.
                cells = [f"{i.estimate:.3f} [{i.low:.3f}, {i.high:.3f}]" for i in
                         (board.rows[spec][name].interval for name in columns)]  # fmt: skip
                shown = value if index or not option else f"{value}, the default of this table"
                lines.append(f"| {option} | {shown} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(
    out: Annotated[Path, typer.Option(help="Directory of the run.")],
    model: Annotated[Path, typer.Option(help="Checkpoint directory.")] = CHECKPOINT,
    data: str = "scenes:count=100",
    metrics: str = "f1_iou pointing",
    fractions: str = "0,0.01,0.02,0.05,0.1,0.2",
    report: Annotated[Path | None, typer.Option(help="Markdown to write, and a .png beside it.")] = None,
    threads: int = 1,
) -> None:
    explainers = list(dict.fromkeys([BASE, *MARKS, *(spec for values in specs().values() for _, spec in values)]))
    bar = Progress(*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    with bar:
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
        raise SystemExit("Another process is at work in this directory.")
    columns = [column.name for column in board.columns if column.name not in ("obj_iou", "func_iou", "aopc")]
    if report is not None:
        report.parent.mkdir(parents=True, exist_ok=True)
        draw(board, columns, report.with_suffix(".png"))
        report.write_text(table(board, columns), encoding="utf-8")
    print(table(board, columns))


if __name__ == "__main__":
    typer.run(main)
