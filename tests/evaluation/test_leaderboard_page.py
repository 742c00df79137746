"""The leaderboard's page: hostile text, plots, and the page in a browser."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from captum_intramodal.evaluation import Column, Leaderboard, make_leaderboard
from tests.evaluation.helpers import (
    COLUMNS,
    find_pair,
    make_records,
    parse_tables,
)
from tests.viz.helpers import ATTACK, CHROMIUM, DRIVER, Page, start_browser


@pytest.fixture(scope="module")
def hostile_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    labels = ("_lens $x$ | `b`", "TAM", ATTACK)
    path = tmp_path_factory.mktemp("page") / "leaderboard.html"
    columns = [*COLUMNS, Column("obj_iou:answer", ATTACK, True)]
    records = make_records(12, labels)
    records[0]["skipped"] = {ATTACK: ATTACK}
    del records[0]["scores"][ATTACK]
    board = make_leaderboard(records, columns, n=100)
    board.to_html(path, {"model": ATTACK, "versions": {"torch": "2"}})
    assert ATTACK not in board.to_markdown()
    assert parse_tables(board.to_markdown())[0].keys() >= {r"_lens $x$ \| \`b\`"}
    return path


def test_hostile_text_stays_text_on_the_page(hostile_page: Path) -> None:
    html = hostile_page.read_text(encoding="utf-8")
    page = Page(html)
    tags = [tag for tag, _ in page.tags]
    assert ATTACK not in html
    assert "script" not in tags
    assert not any(name.startswith("on") or name == "style" for _, attrs in page.tags for name in attrs)
    assert not re.search(r"https?://|@import|url\(", html)
    policy = next(attrs["content"] for _, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy and policy.startswith("default-src 'none'; img-src data:;") and "unsafe" not in policy
    assert tags.count("details") == 1 and '"torch": "2"' in html.replace("&#34;", '"')
    # One panel per column, one with the curves of each explainer, and one with cost.
    sources = [str(attrs["src"]) for tag, attrs in page.tags if tag == "img"]
    assert len(sources) == 5 + 3 + 1
    for source in sources:
        kind, _, content = source.partition(",")
        assert kind == "data:image/svg+xml;base64"
        assert ElementTree.fromstring(base64.b64decode(content)).tag.endswith("svg")


def test_labels_of_plots_are_not_cut_off(tmp_path: Path) -> None:
    wide = "W" * 32
    make_leaderboard(make_records(12, (wide, " ", "TAM")), COLUMNS, n=50).to_html(tmp_path / "page.html", {})
    sources = [attrs["src"] for tag, attrs in Page((tmp_path / "page.html").read_text("utf-8")).tags if tag == "img"]
    panel = base64.b64decode(str(sources[0]).partition(",")[2]).decode()
    (left,) = re.findall(rf"<!-- {wide} -->.*?translate\(([-\d.]+)", panel, re.DOTALL)
    assert float(left) >= 0


def test_plots_agree_with_the_table(board: Leaderboard, tmp_path: Path) -> None:
    board.to_html(tmp_path / "page.html", {})
    first = next(attrs["src"] for tag, attrs in Page((tmp_path / "page.html").read_text("utf-8")).tags if tag == "img")
    svg = base64.b64decode(str(first).partition(",")[2]).decode()
    # Texts precede their outlines as comments; dots are uses of a symbol, one per explainer.
    assert re.findall(r"<!-- (\w+) -->", svg)[-3:] == ["lens", "TAM", "MSEA"]
    dots = [
        (float(x), color) for x, color in re.findall(r'<use [^>]*?x="([\d.]+)" y="[\d.]+" style="fill: (#\w+)', svg)
    ]
    dots = [(x, color) for x, color in dots if color in ("#1c1f26", "#1f6fb4", "#8b919e", "#d1651a")]
    estimates = [row["f1_iou"].interval.estimate for row in board.rows.values()]
    assert np.corrcoef([x for x, _ in dots], estimates)[0, 1] == pytest.approx(1)
    better = [find_pair(board, "lens", label, "f1_iou").difference.high < 0 for label in ("TAM", "MSEA")]
    assert [color == "#1f6fb4" for _, color in dots] == [False, *better]


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None or DRIVER is None, reason="no Chromium and its driver in PATH")
def test_the_page_works_in_a_browser(hostile_page: Path, tmp_path: Path) -> None:
    driver = start_browser(tmp_path)
    try:
        driver.get(hostile_page.as_uri())
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
