"""The leaderboard as Markdown and CSV."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from captum_intramodal.evaluation import Column, Leaderboard, make_leaderboard
from tests.evaluation.helpers import (
    COLUMNS,
    OBJ,
    find_pair,
    make_record,
    parse_tables,
)


def test_markdown_shows_best_differences_and_coverage(board: Leaderboard) -> None:
    markdown = board.to_markdown()
    values, differences, coverage = parse_tables(markdown)
    assert values["explainer"] == ["F1-IoU ↑", "Obj-IoU ↑", "Func-IoU ↑", "deletion ↓", "seconds"]
    for k, column in enumerate(COLUMNS):
        estimates = {label: board.rows[label][column.name].interval.estimate for label in board.rows}
        best = (max if column.higher_is_better else min)(estimates, key=lambda label: estimates[label])
        assert {label for label in estimates if "**" in values[label][k]} == {best}
        estimate, low, high = board.rows["lens"][column.name].interval
        assert values["lens"][k].replace("*", "") == f"{estimate:.3f} [{low:.3f}, {high:.3f}]"
        for label in ("TAM", "MSEA"):
            pair = find_pair(board, "lens", label, column.name).difference
            significant = pair.low > 0 or pair.high < 0
            mark = ("▲" if (pair.estimate < 0) == column.higher_is_better else "▼") if significant else ""
            text = f"{-pair.estimate:+.3f} [{-pair.high:+.3f}, {-pair.low:+.3f}] {mark}".strip()
            assert differences[label][k] == text
    assert "lens" not in differences and "▲" in markdown
    assert coverage["F1-IoU"][0] == " to ".join(str(board.rows[label]["f1_iou"].words) for label in ("TAM", "lens"))
    assert "Covered: 25 samples; words by type: noun 25." in markdown
    assert markdown.endswith("\n- TAM: 22 of 25 samples. Left out: 3 x tiles\n")


def test_the_reference_can_be_chosen(board: Leaderboard, records: list[Any]) -> None:
    assert board.reference == "lens"
    differences = parse_tables(make_leaderboard(records, [OBJ], reference="MSEA", n=50).to_markdown())[1]
    assert set(differences) == {"explainer", "---", "lens", "TAM"}
    assert differences["lens"][0].startswith("-0.1")


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ((0.00012, 0.0001), ("0.000120", "0.000100")),
        ((1234.5, 2.0), ("1234", "2")),
        ((0.0, -0.0001), ("0.000000", "-0.000100")),
    ],
)
def test_decimals_follow_the_magnitude_of_values(values: tuple[float, float], texts: tuple[str, str]) -> None:
    records = [make_record(0, {label: {"x": {"1": value}} for label, value in zip("ab", values, strict=True)})]
    table = parse_tables(make_leaderboard(records, [Column("x", "x", True)], n=9).to_markdown())[0]
    a, b = texts
    assert (table["a"][0], table["b"][0]) == (f"**{a}** [{a}, {a}]", f"{b} [{b}, {b}]")


def test_csv_files_contain_the_exact_numbers(board: Leaderboard, tmp_path: Path) -> None:
    board.to_csv(tmp_path / "leaderboard.csv")
    with (tmp_path / "leaderboard.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["explainer"] for line in lines] == ["lens", "TAM", "MSEA"]
    cell = board.rows["TAM"]["f1_iou"]
    names = ("f1_iou", "f1_iou_low", "f1_iou_high", "f1_iou_words", "f1_iou_samples")
    assert [float(lines[1][name]) for name in names] == [*cell.interval, cell.words, cell.samples]
    assert float(lines[1]["seconds"]) == board.seconds["TAM"]
    assert lines[1]["scored_samples"] == "22"
    board.pairs_to_csv(tmp_path / "pairs.csv")
    with (tmp_path / "pairs.csv").open(encoding="utf-8", newline="") as file:
        pairs = list(csv.reader(file))[1:]
    assert [line[:3] + [float(number) for number in line[3:]] for line in pairs] == [
        [p.first, p.second, p.column, *p.difference, p.p, p.adjusted_p, p.samples] for p in board.pairs
    ]
    assert len(pairs) == 3 * len(COLUMNS)
