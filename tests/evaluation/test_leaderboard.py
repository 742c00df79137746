"""The leaderboard: values, intervals and tests against loops over words, and missing values."""

from __future__ import annotations

import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from captum_intramodal.evaluation import Column, Leaderboard, make_leaderboard
from captum_intramodal.metrics import bootstrap_interval, f1_iou, paired_bootstrap_difference
from captum_intramodal.metrics.statistics import paired_permutation_test
from tests.evaluation.helpers import (
    COLUMNS,
    DELETION,
    FUNC,
    OBJ,
    N,
    find_pair,
    make_record,
    make_records,
)


def sample_rows(records: list[Any], label: str, *names: str) -> dict[int, list[float]]:
    """Compute the columns' means over each sample's words, then the numbers of words; omit samples without words."""
    rows = {}
    for sample in records:
        found = [list(sample["scores"].get(label, {}).get(name, {}).values()) for name in names]
        if any(found):
            means = [sum(values) / len(values) if values else 0.0 for values in found]
            rows[sample["index"]] = means + [float(len(values)) for values in found]
    return rows


def weighted_mean(means: Any, words: Any, axis: int) -> Any:
    return (means * words).sum(axis) / words.sum(axis)


def test_means_are_over_words_and_intervals_over_samples(board: Leaderboard, records: list[Any]) -> None:
    for label, column in itertools.product(("lens", "TAM", "MSEA"), (OBJ, FUNC, DELETION)):
        scores = [v for s in records for v in s["scores"].get(label, {}).get(column.name, {}).values()]
        table = list(sample_rows(records, label, column.name).values())
        cell = board.rows[label][column.name]
        assert cell.interval.estimate == pytest.approx(sum(scores) / len(scores))
        assert cell.interval == pytest.approx(bootstrap_interval(table, weighted_mean, n=N, seed=4))
        assert (cell.words, cell.samples) == (len(scores), len(table))
        assert len(table) < len(records)


def test_derived_columns_are_the_f1_of_two_means(board: Leaderboard, records: list[Any]) -> None:
    for label in ("lens", "TAM", "MSEA"):
        table = list(sample_rows(records, label, "obj_iou", "func_iou").values())
        cell = board.rows[label]["f1_iou"]
        assert cell.interval == pytest.approx(bootstrap_interval(table, f1_iou, n=N, seed=4))
        obj, func = (board.rows[label][name] for name in ("obj_iou", "func_iou"))
        harmonic = 2 / (1 / obj.interval.estimate + 1 / func.interval.estimate)
        assert cell.interval.estimate == pytest.approx(harmonic)
        assert cell.words == obj.words + func.words
        assert max(obj.samples, func.samples) < cell.samples


@pytest.mark.parametrize(("first", "second"), [("lens", "TAM"), ("lens", "MSEA"), ("TAM", "MSEA")])
@pytest.mark.parametrize("column", COLUMNS)
def test_pairs_are_compared_on_common_samples(
    board: Leaderboard, records: list[Any], first: str, second: str, column: Column
) -> None:
    names = column.of or (column.name,)
    first_rows, second_rows = sample_rows(records, first, *names), sample_rows(records, second, *names)
    common = sorted(first_rows.keys() & second_rows.keys())
    tables = [first_rows[i] for i in common], [second_rows[i] for i in common]
    statistic = f1_iou if column.of else weighted_mean
    pair = find_pair(board, first, second, column.name)
    assert pair.samples == len(common)
    assert pair.difference == pytest.approx(paired_bootstrap_difference(*tables, statistic, n=N, seed=4))
    assert pair.p == paired_permutation_test(*tables, statistic, n=N, seed=4)


def test_all_permutations_of_few_samples_are_tried() -> None:
    few = make_records(6, ("lens", "MSEA"))
    pair = find_pair(make_leaderboard(few, [DELETION], n=N), "lens", "MSEA", "deletion")
    first_rows, second_rows = (sample_rows(few, label, "deletion") for label in ("lens", "MSEA"))
    assert pair.p == paired_permutation_test(list(first_rows.values()), list(second_rows.values()), weighted_mean, n=N)
    assert pair.p * 2**pair.samples == round(pair.p * 2**pair.samples)


def test_holm_adjusts_p_values_as_computed_by_hand() -> None:
    # Constant differences on 3, 5 and 3 common samples: p = 2 / 8, 2 / 32 and 2 / 8; times 2, 3 and 1, then monotone.
    values = {"a": (0.1, range(5)), "b": (0.2, range(3)), "c": (0.4, range(5))}
    records = [
        make_record(i, {label: {"obj_iou": {"1": v + i / 100}} for label, (v, held) in values.items() if i in held})
        for i in range(5)
    ]
    board = make_leaderboard(records, [OBJ])
    found = {(p.first, p.second): (p.p, p.adjusted_p) for p in board.pairs}
    assert found == {("a", "b"): (2 / 8, 0.5), ("a", "c"): (2 / 32, 6 / 32), ("b", "c"): (2 / 8, 0.5)}


def test_curves_are_means_over_words(board: Leaderboard, records: list[Any]) -> None:
    for label in ("lens", "TAM"):
        found = [list(s["curves"].get(label, {}).get("insertion", {}).values()) for s in records]
        expected = np.mean([curve for curves in found for curve in curves], axis=0)
        curve = board.curves[label]["insertion"]
        assert [point.estimate for point in curve] == pytest.approx(expected)
        table = [[np.mean(curves, axis=0)[3], len(curves)] for curves in found if curves]
        assert curve[3] == pytest.approx(bootstrap_interval(table, weighted_mean, n=N, seed=4))


def test_values_of_whole_answers_have_their_own_mean() -> None:
    records = [
        make_record(i, {"a": {"aopc": {"answer": 0.1 * i}, "road": {"1": 0.2, "2": 0.4, "answer": 0.5 + 0.1 * i}}})
        for i in range(4)
    ]
    columns = [Column(name, name, True) for name in ("aopc", "road", "road:answer")]
    cells = make_leaderboard(records, columns, n=50).rows["a"]
    assert [cells[c.name].interval.estimate for c in columns] == pytest.approx([0.15, 0.3, 0.65])
    assert [cells[c.name].words for c in columns] == [4, 8, 4]


def test_values_that_an_explainer_lacks_are_missing() -> None:
    records = [
        make_record(0, {"a": {"obj_iou": {"1": 0.5}}, "b": {"obj_iou": {"1": 0.25}, "func_iou": {"2": 1.0}}}),
        make_record(1, {"a": {"obj_iou": {"1": 0.5}}, "b": {"func_iou": {"1": 0.5, "2": 0.0}}, "c": {}}),
        make_record(2, {"a": {}, "b": {}}),
    ]
    board = make_leaderboard(records, [*COLUMNS, Column("other", "other", True)], n=200)
    assert {label: set(cells) for label, cells in board.rows.items()} == {
        "a": {"obj_iou"}, "b": {"obj_iou", "func_iou", "f1_iou"}, "c": set(),
    }  # fmt: skip
    # A quarter of the resamples lack b's object word, and another quarter its second sample: these do not count.
    f1 = board.rows["b"]["f1_iou"].interval
    assert f1.estimate == pytest.approx(2 * 0.25 * 0.5 / 0.75)
    assert all(map(math.isfinite, f1))
    assert [(p.first, p.second, p.column, p.samples) for p in board.pairs] == [("a", "b", "obj_iou", 1)]
    assert "| c | – | – | – | – | – |" in board.to_markdown()


def test_the_order_of_records_does_not_matter(board: Leaderboard, records: list[Any], tmp_path: Path) -> None:
    shuffled = list(records)
    random.Random(1).shuffle(shuffled)
    other = make_leaderboard((json.loads(json.dumps(r)) for r in shuffled), COLUMNS, n=N, seed=4)
    assert other == board
    contents = []
    for name, each in (("a", board), ("b", other)):
        (tmp_path / name).mkdir()
        each.to_csv(tmp_path / name / "leaderboard.csv")
        each.pairs_to_csv(tmp_path / name / "pairs.csv")
        each.to_html(tmp_path / name / "leaderboard.html", {"seed": 4})
        contents.append({file.name: file.read_bytes() for file in (tmp_path / name).iterdir()})
    assert contents[0] == contents[1]
    assert len(contents[0]) == 3
    assert other.to_markdown() == board.to_markdown()


def test_invalid_input_is_refused() -> None:
    one = make_record(0, {"a": {"obj_iou": {"1": 0.5}}})
    with pytest.raises(ValueError, match="no records"):
        make_leaderboard([], [OBJ])
    with pytest.raises(ValueError, match="no columns"):
        make_leaderboard([one], [])
    with pytest.raises(ValueError, match=r"columns must differ.*'obj_iou'"):
        make_leaderboard([one], [OBJ, OBJ])
    with pytest.raises(ValueError, match=r"records must differ.*\[0\]"):
        make_leaderboard([one, one], [OBJ])
    with pytest.raises(ValueError, match="None of 1 records names an explainer"):
        make_leaderboard([make_record(0, {})], [OBJ])
    with pytest.raises(ValueError, match=r"one of \['a'\], but it is 'b'"):
        make_leaderboard([one], [OBJ], reference="b")
    with pytest.raises(ValueError, match="n must be positive, but it is 0"):
        make_leaderboard([one], [OBJ], n=0)
    with pytest.raises(ValueError, match=r"Sample 'id 0'.*'obj_iou' of 'a' must be 1 finite.*NaN"):
        make_leaderboard([make_record(0, {"a": {"obj_iou": {"1": math.nan}}})], [OBJ])
    with pytest.raises(ValueError, match=r"curves 'insertion' of 'a' must be 11 finite.*got 2"):
        make_leaderboard([{**one, "curves": {"a": {"insertion": {"1": [0.1, 0.2]}}}}], [OBJ])
    with pytest.raises(ValueError, match=r"'f1' must derive from two columns or none, got \('obj_iou',\)"):
        Column("f1", "F1", True, of=("obj_iou",))
