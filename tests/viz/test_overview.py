"""The overview: which words it shows, and what it says about the others."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from captum_intramodal.viz import overview
from captum_intramodal.viz.overview import draw_overview
from tests.viz.helpers import make_explanation


@pytest.mark.parametrize(("count", "panels"), [(1, 2), (7, 8), (30, 13)])
def test_overview_shows_all_words_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, panels: int
) -> None:
    monkeypatch.setattr(overview, "MAX_WORDS", 12)
    path = tmp_path / "overview.png"
    draw_overview(make_explanation([*["price $5$"] * count, "."]), path, columns=4)
    with Image.open(path) as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    # At 150 dpi: four panels of 2 x 1.5 inches with gaps and margins, and at least 1.5 inches per row.
    assert pixels.shape[1] == round((4 * 2 + 3 * 0.16 + 2 * 0.4) * 150)
    rows = -(-panels // 4)
    assert rows * 225 < pixels.shape[0] < rows * 320 + 300
    assert pixels.std() > 20
    assert list(tmp_path.iterdir()) == [path]


def test_overview_states_how_many_words_it_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overview, "MAX_WORDS", 3)
    path = tmp_path / "overview.svg"
    explained = make_explanation([*"abcde", ".", "!"])
    draw_overview(explained, path)
    # The SVG keeps every text as a comment before its outlines.
    texts = re.findall(r"<!-- (.+?) -->", path.read_text(encoding="utf-8"))
    assert texts[-1].endswith("Punctuation left out: 2. Weakest words left out: 2.")
    peaks = explained.word_maps("answer")[0].max((1, 2))[:5]
    strongest = sorted(np.argsort(-peaks)[:3])
    assert [text for text in texts if len(text) == 1] == ["abcde"[i] for i in strongest]


def test_overview_needs_an_image(tmp_path: Path) -> None:
    explained = make_explanation(["a"])
    explained.images = []
    with pytest.raises(ValueError, match="image"):
        draw_overview(explained, tmp_path / "overview.png")
