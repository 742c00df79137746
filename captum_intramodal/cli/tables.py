r"""Print explanations, model checks and leaderboards as tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.markup import escape
from rich.table import Column, Table

from captum_intramodal.cli.terminal import console

if TYPE_CHECKING:
    from captum_intramodal.evaluation import Leaderboard
    from captum_intramodal.explanation.explanation import Explanation
    from captum_intramodal.explanation.model_check import CheckReport
    from captum_intramodal.text.spans import Word

__all__ = ["print_explanation", "print_leaderboard", "print_report"]


def print_explanation(explanation: Explanation) -> None:
    """Print a row for each word: its probability, its strongest position, and its most relevant earlier token."""
    table = Table(
        "word",
        Column("probability", justify="right"),
        "strongest at (x, y)",
        "top earlier token",
        title=escape(explanation.answer),
        title_style="bold",
        title_justify="left",
    )
    for word in explanation.words:
        relevance = explanation.text_relevance(word)
        top = int(relevance.argmax()) if relevance.numel() and float(relevance.max()) > 0 else None
        table.add_row(
            escape(word.text),
            f"{word.probability:.2f}",
            _strongest_position(explanation, word),
            "" if top is None else escape(explanation.earlier_tokens(word)[top]),
        )
    console.print(table)


def _strongest_position(explanation: Explanation, word: Word) -> str:
    """Describe where a word's heatmap is strongest, unless it is weak compared with those of the other words."""
    import torch

    strengths = [
        float(explanation.heatmap(word, image=i, normalize="answer").max()) for i in range(len(explanation.images))
    ]
    image = max(range(len(strengths)), key=strengths.__getitem__)
    if strengths[image] < 0.15:
        return "[dim]no clear position[/]"
    heatmap = explanation.heatmap(word, image=image)
    row, column = divmod(int(torch.argmax(heatmap)), heatmap.shape[1])
    vertical = ("top", "middle", "bottom")[min(2, 3 * row // heatmap.shape[0])]
    horizontal = ("left", "center", "right")[min(2, 3 * column // heatmap.shape[1])]
    place = "center" if (vertical, horizontal) == ("middle", "center") else f"{vertical} {horizontal}"
    of_image = f" of image {image + 1}" if len(strengths) > 1 else ""
    return f"{place}{of_image} ({column}, {row})"


def print_report(report: CheckReport) -> None:
    """Print a row for each check of a model."""
    table = Table(title=escape(report.model), title_style="bold", title_justify="left", show_header=False)
    for check in report.checks:
        result = {True: "[green]holds[/]", False: "[bold red]fails[/]", None: "not tested"}[check.passed]
        table.add_row(result, check.name, escape(check.detail))
    console.print(table)


def print_leaderboard(board: Leaderboard) -> None:
    """Print a row for each explainer, and the number of samples that it skipped and why."""
    table = Table(
        Column("explainer", overflow="fold", min_width=12),
        *(f"{column.title} {'↑' if column.higher_is_better else '↓'}" for column in board.columns),
        box=box.SIMPLE_HEAD,  # narrow enough for eight metrics in 80 columns
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for label, row in board.rows.items():
        cells = [f"{row[column.name].interval.estimate:.3f}" if column.name in row else "–" for column in board.columns]
        table.add_row(escape(label), *cells)
    console.print(table)
    for label, reasons in board.coverage.skipped.items():
        for reason, count in reasons.items():
            console.print(f"{escape(label)} skipped {count} of {board.coverage.samples} samples: {escape(reason)}")
