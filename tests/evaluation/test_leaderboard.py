"""The leaderboard: against loops over words, whatever is missing, and what its files say."""

from __future__ import annotations

import base64
import csv
import itertools
import json
import math
import random
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from captum_intramodal.evaluation.leaderboard import Column, Comparison, Leaderboard, make_leaderboard
from captum_intramodal.metrics import FRACTIONS, bootstrap_interval, f1_iou, paired_bootstrap_difference
from captum_intramodal.metrics.statistics import paired_permutation_test
from tests.viz.test_page import ATTACK, Page
from tests.viz.test_page_in_browser import CHROMIUM, DRIVER, start

OBJ = Column("obj_iou", "Obj-IoU", True)
FUNC = Column("func_iou", "Func-IoU", True)
F1 = Column("f1_iou", "F1-IoU", True, of=("obj_iou", "func_iou"))
DELETION = Column("deletion", "deletion", False)
COLUMNS = (F1, OBJ, FUNC, DELETION)
N = 400


def record(index: int, scores: dict[str, dict[str, dict[str, float]]], **more: Any) -> dict[str, Any]:
    words = [{"text": "dog", "tokens": [1], "type": "noun", "category": "dog", "probability": 0.9}]
    return {"index": index, "id": f"id {index}", "answer": "a dog", "words": words, "scores": scores, **more}


def evaluation(samples: int = 25, labels: tuple[str, ...] = ("lens", "TAM", "MSEA"), seed: int = 0) -> list[Any]:
    """Records with samples skipped by TAM, samples without nouns and samples without function words."""
    rng = np.random.default_rng(seed)

    def values(words: list[str], mean: float) -> dict[str, float]:
        return {word: float(np.clip(mean + rng.normal(0, 0.05), 0, 1)) for word in words}

    records = []
    for index in range(samples):
        nouns = [str(word) for word in range(1, 1 + (index + 1) % 4)]
        functions = ["0", "5", "6"][: (index + 2) % 4]
        hard = rng.normal(0.4, 0.1)
        scores: dict[str, Any] = {}
        curves: dict[str, Any] = {}
        skipped = {"TAM": "tiles"} if "TAM" in labels and index % 8 == 3 else {}
        for quality, label in enumerate(labels):
            if label in skipped:
                continue

            columns = {
                "obj_iou": values(nouns, hard + 0.05 * quality),
                "func_iou": values(functions, hard + 0.03 * quality),
                "deletion": values(nouns, hard - 0.02 * quality),
            }
            scores[label] = {name: entries for name, entries in columns.items() if entries}
            curves[label] = {"insertion": {word: rng.random(len(FRACTIONS)).tolist() for word in nouns}}
        seconds = {label: float(rng.random()) for label in scores}
        records.append(record(index, scores, curves=curves, seconds=seconds, skipped=skipped))
    return records


@pytest.fixture(scope="module")
def records() -> list[Any]:
    return evaluation()


@pytest.fixture(scope="module")
def board(records: list[Any]) -> Leaderboard:
    return make_leaderboard(records, COLUMNS, n=N, seed=4)


def rows_of(records: list[Any], label: str, *names: str) -> dict[int, list[float]]:
    """Means of each column over the words of a sample, then the numbers of words; samples without any are left out."""
    rows = {}
    for sample in records:
        found = [list(sample["scores"].get(label, {}).get(name, {}).values()) for name in names]
        if any(found):
            means = [sum(values) / len(values) if values else 0.0 for values in found]
            rows[sample["index"]] = means + [float(len(values)) for values in found]
    return rows


def weighted_mean(means: Any, words: Any, axis: int) -> Any:
    return (means * words).sum(axis) / words.sum(axis)


def of_pair(board: Leaderboard, first: str, second: str, column: str) -> Comparison:
    return next(p for p in board.pairs if (p.first, p.second, p.column) == (first, second, column))


def test_means_run_over_words_and_intervals_over_samples(board: Leaderboard, records: list[Any]) -> None:
    for label, column in itertools.product(("lens", "TAM", "MSEA"), (OBJ, FUNC, DELETION)):
        every = [v for s in records for v in s["scores"].get(label, {}).get(column.name, {}).values()]
        table = list(rows_of(records, label, column.name).values())
        cell = board.rows[label][column.name]
        assert cell.interval.estimate == pytest.approx(sum(every) / len(every))
        assert cell.interval == pytest.approx(bootstrap_interval(table, weighted_mean, n=N, seed=4))
        assert (cell.words, cell.samples) == (len(every), len(table))
        assert len(table) < len(records)


def test_derived_columns_are_the_f1_of_two_means(board: Leaderboard, records: list[Any]) -> None:
    for label in ("lens", "TAM", "MSEA"):
        table = list(rows_of(records, label, "obj_iou", "func_iou").values())
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
    one, other = rows_of(records, first, *names), rows_of(records, second, *names)
    common = sorted(one.keys() & other.keys())
    tables = [one[i] for i in common], [other[i] for i in common]
    statistic = f1_iou if column.of else weighted_mean
    pair = of_pair(board, first, second, column.name)
    assert pair.samples == len(common)
    assert pair.difference == pytest.approx(paired_bootstrap_difference(*tables, statistic, n=N, seed=4))
    assert pair.p == paired_permutation_test(*tables, statistic, n=N, seed=4)


def test_few_samples_are_permuted_in_all_ways() -> None:
    few = evaluation(6, ("lens", "MSEA"))
    pair = of_pair(make_leaderboard(few, [DELETION], n=N), "lens", "MSEA", "deletion")
    one, other = (rows_of(few, label, "deletion") for label in ("lens", "MSEA"))
    assert pair.p == paired_permutation_test(list(one.values()), list(other.values()), weighted_mean, n=N)
    assert pair.p * 2**pair.samples == round(pair.p * 2**pair.samples)


def test_holm_by_hand() -> None:
    # Constant differences on 3, 5 and 3 common samples: p = 2 / 8, 2 / 32 and 2 / 8; times 2, 3 and 1, made monotone.
    levels = {"a": (0.1, range(5)), "b": (0.2, range(3)), "c": (0.4, range(5))}
    made = [
        record(i, {label: {"obj_iou": {"1": v + i / 100}} for label, (v, held) in levels.items() if i in held})
        for i in range(5)
    ]
    board = make_leaderboard(made, [OBJ])
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


def test_values_of_whole_answers() -> None:
    made = [
        record(i, {"a": {"aopc": {"answer": 0.1 * i}, "road": {"1": 0.2, "2": 0.4, "answer": 0.5 + 0.1 * i}}})
        for i in range(4)
    ]
    columns = [Column(name, name, True) for name in ("aopc", "road", "road:answer")]
    cells = make_leaderboard(made, columns, n=50).rows["a"]
    assert [cells[c.name].interval.estimate for c in columns] == pytest.approx([0.15, 0.3, 0.65])
    assert [cells[c.name].words for c in columns] == [4, 8, 4]


def test_what_nobody_has_is_missing() -> None:
    made = [
        record(0, {"a": {"obj_iou": {"1": 0.5}}, "b": {"obj_iou": {"1": 0.25}, "func_iou": {"2": 1.0}}}),
        record(1, {"a": {"obj_iou": {"1": 0.5}}, "b": {"func_iou": {"1": 0.5, "2": 0.0}}, "c": {}}),
        record(2, {"a": {}, "b": {}}),
    ]
    board = make_leaderboard(made, [*COLUMNS, Column("other", "other", True)], n=200)
    assert {label: set(cells) for label, cells in board.rows.items()} == {
        "a": {"obj_iou"}, "b": {"obj_iou", "func_iou", "f1_iou"}, "c": set(),
    }  # fmt: skip
    # In a quarter of the resamples each, b has no object word or no second sample: these count where defined.
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
    for name, some in (("a", board), ("b", other)):
        (tmp_path / name).mkdir()
        some.to_csv(tmp_path / name / "leaderboard.csv")
        some.pairs_to_csv(tmp_path / name / "pairs.csv")
        some.to_html(tmp_path / name / "leaderboard.html", {"seed": 4})
        contents.append({file.name: file.read_bytes() for file in (tmp_path / name).iterdir()})
    assert contents[0] == contents[1]
    assert len(contents[0]) == 3
    assert other.to_markdown() == board.to_markdown()


def tables_of(markdown: str) -> list[dict[str, list[str]]]:
    """Cells of each table by the first cell of the line."""
    blocks = re.findall(r"(?:^\|.*\n)+", markdown, re.MULTILINE)
    lines = [[re.split(r"(?<!\\)\|", line)[1:-1] for line in block.splitlines()] for block in blocks]
    return [{cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in block} for block in lines]


def test_markdown_shows_best_differences_and_coverage(board: Leaderboard) -> None:
    markdown = board.to_markdown()
    values, differences, coverage = tables_of(markdown)
    assert values["explainer"] == ["F1-IoU ↑", "Obj-IoU ↑", "Func-IoU ↑", "deletion ↓", "seconds"]
    for k, column in enumerate(COLUMNS):
        estimates = {label: board.rows[label][column.name].interval.estimate for label in board.rows}
        best = (max if column.higher_is_better else min)(estimates, key=lambda label: estimates[label])
        assert {label for label in estimates if "**" in values[label][k]} == {best}
        estimate, low, high = board.rows["lens"][column.name].interval
        assert values["lens"][k].replace("*", "") == f"{estimate:.3f} [{low:.3f}, {high:.3f}]"
        for label in ("TAM", "MSEA"):
            pair = of_pair(board, "lens", label, column.name).difference
            sure = pair.low > 0 or pair.high < 0
            mark = ("▲" if (pair.estimate < 0) == column.higher_is_better else "▼") if sure else ""
            shown = f"{-pair.estimate:+.3f} [{-pair.high:+.3f}, {-pair.low:+.3f}] {mark}".strip()
            assert differences[label][k] == shown
    assert "lens" not in differences and "▲" in markdown
    assert coverage["F1-IoU"][0] == " to ".join(str(board.rows[label]["f1_iou"].words) for label in ("TAM", "lens"))
    assert "Covered: 25 samples; words by type: noun 25." in markdown
    assert markdown.endswith("\n- TAM: 22 of 25 samples. Left out: 3 x tiles\n")


def test_the_reference_is_chosen(board: Leaderboard, records: list[Any]) -> None:
    assert board.reference == "lens"
    differences = tables_of(make_leaderboard(records, [OBJ], reference="MSEA", n=50).to_markdown())[1]
    assert set(differences) == {"explainer", "---", "lens", "TAM"}
    assert differences["lens"][0].startswith("-0.1")


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ((0.00012, 0.0001), ("0.000120", "0.000100")),
        ((1234.5, 2.0), ("1234", "2")),
        ((0.0, -0.0001), ("0.000000", "-0.000100")),
    ],
)
def test_digits_follow_the_size_of_values(values: tuple[float, float], shown: tuple[str, str]) -> None:
    made = [record(0, {label: {"x": {"1": value}} for label, value in zip("ab", values, strict=True)})]
    table = tables_of(make_leaderboard(made, [Column("x", "x", True)], n=9).to_markdown())[0]
    a, b = shown
    assert (table["a"][0], table["b"][0]) == (f"**{a}** [{a}, {a}]", f"{b} [{b}, {b}]")


def test_csv_has_the_numbers(board: Leaderboard, tmp_path: Path) -> None:
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


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    labels = ("_lens $x$ | `b`", "TAM", ATTACK)
    path = tmp_path_factory.mktemp("page") / "leaderboard.html"
    columns = [*COLUMNS, Column("obj_iou:answer", ATTACK, True)]
    made = evaluation(12, labels)
    made[0]["skipped"] = {ATTACK: ATTACK}
    del made[0]["scores"][ATTACK]
    board = make_leaderboard(made, columns, n=100)
    board.to_html(path, {"model": ATTACK, "versions": {"torch": "2"}})
    assert ATTACK not in board.to_markdown()
    assert tables_of(board.to_markdown())[0].keys() >= {r"_lens $x$ \| \`b\`"}
    return path


def test_hostile_text_stays_text_on_the_page(hostile: Path) -> None:
    html = hostile.read_text(encoding="utf-8")
    page = Page(html)
    tags = [tag for tag, _ in page.tags]
    assert ATTACK not in html
    assert "script" not in tags
    assert not any(name.startswith("on") or name == "style" for _, attrs in page.tags for name in attrs)
    assert not re.search(r"https?://|@import|url\(", html)
    policy = next(attrs["content"] for _, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy and policy.startswith("default-src 'none'; img-src data:;") and "unsafe" not in policy
    assert tags.count("details") == 1 and '"torch": "2"' in html.replace("&#34;", '"')
    # A panel for each column, the curves of each explainer, and one of cost.
    sources = [str(attrs["src"]) for tag, attrs in page.tags if tag == "img"]
    assert len(sources) == 5 + 3 + 1
    for source in sources:
        kind, _, content = source.partition(",")
        assert kind == "data:image/svg+xml;base64"
        assert ElementTree.fromstring(base64.b64decode(content)).tag.endswith("svg")


def test_labels_of_plots_are_not_cut(tmp_path: Path) -> None:
    wide = "W" * 32
    make_leaderboard(evaluation(12, (wide, " ", "TAM")), COLUMNS, n=50).to_html(tmp_path / "page.html", {})
    sources = [attrs["src"] for tag, attrs in Page((tmp_path / "page.html").read_text("utf-8")).tags if tag == "img"]
    panel = base64.b64decode(str(sources[0]).partition(",")[2]).decode()
    (left,) = re.findall(rf"<!-- {wide} -->.*?translate\(([-\d.]+)", panel, re.DOTALL)
    assert float(left) >= 0


def test_plots_show_what_the_table_says(board: Leaderboard, tmp_path: Path) -> None:
    board.to_html(tmp_path / "page.html", {})
    first = next(attrs["src"] for tag, attrs in Page((tmp_path / "page.html").read_text("utf-8")).tags if tag == "img")
    svg = base64.b64decode(str(first).partition(",")[2]).decode()
    # Texts stand as comments before their outlines; dots are used symbols, one for each explainer.
    assert re.findall(r"<!-- (\w+) -->", svg)[-3:] == ["lens", "TAM", "MSEA"]
    dots = [
        (float(x), color) for x, color in re.findall(r'<use [^>]*?x="([\d.]+)" y="[\d.]+" style="fill: (#\w+)', svg)
    ]
    dots = [(x, color) for x, color in dots if color in ("#1c1f26", "#1f6fb4", "#8b919e", "#d1651a")]
    estimates = [row["f1_iou"].interval.estimate for row in board.rows.values()]
    assert np.corrcoef([x for x, _ in dots], estimates)[0, 1] == pytest.approx(1)
    better = [of_pair(board, "lens", label, "f1_iou").difference.high < 0 for label in ("TAM", "MSEA")]
    assert [color == "#1f6fb4" for _, color in dots] == [False, *better]


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None or DRIVER is None, reason="no Chromium and its driver in PATH")
def test_the_page_in_a_browser(hostile: Path, tmp_path: Path) -> None:
    driver = start(tmp_path)
    try:
        driver.get(hostile.as_uri())
        assert driver.get_log("browser") == []
        assert driver.execute_script("return [...document.images].every(image => image.naturalWidth > 100)")
        assert driver.find_element("tag name", "h1").text == "Leaderboard of explainers"
        driver.find_element("tag name", "summary").click()
        assert json.loads(driver.find_element("tag name", "pre").text)["model"] == ATTACK
        metrics = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        assert driver.execute_script("return document.documentElement.scrollWidth") <= 390
    finally:
        driver.quit()


def test_errors() -> None:
    one = record(0, {"a": {"obj_iou": {"1": 0.5}}})
    with pytest.raises(ValueError, match="no records"):
        make_leaderboard([], [OBJ])
    with pytest.raises(ValueError, match="no columns"):
        make_leaderboard([one], [])
    with pytest.raises(ValueError, match=r"columns must differ.*'obj_iou'"):
        make_leaderboard([one], [OBJ, OBJ])
    with pytest.raises(ValueError, match=r"records must differ.*\[0\]"):
        make_leaderboard([one, one], [OBJ])
    with pytest.raises(ValueError, match="None of 1 records names an explainer"):
        make_leaderboard([record(0, {})], [OBJ])
    with pytest.raises(ValueError, match=r"one of \['a'\], but it is 'b'"):
        make_leaderboard([one], [OBJ], reference="b")
    with pytest.raises(ValueError, match="n must be positive, but it is 0"):
        make_leaderboard([one], [OBJ], n=0)
    with pytest.raises(ValueError, match=r"Sample 'id 0'.*'obj_iou' of 'a' must be 1 finite.*nan"):
        make_leaderboard([record(0, {"a": {"obj_iou": {"1": math.nan}}})], [OBJ])
    with pytest.raises(ValueError, match=r"curves 'insertion' of 'a' must be 11 finite"):
        make_leaderboard([{**one, "curves": {"a": {"insertion": {"1": [0.1, 0.2]}}}}], [OBJ])
    with pytest.raises(ValueError, match=r"'f1' must derive from two columns or none, got \('obj_iou',\)"):
        Column("f1", "F1", True, of=("obj_iou",))
