"""The page and the overview sheet: what is in the files."""

from __future__ import annotations

import base64
import json
import re
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from captum_intramodal._utils.io import write_atomically
from captum_intramodal.viz import overview
from captum_intramodal.viz.overview import draw_overview
from captum_intramodal.viz.page import render_html

ATTACK = "</script><img src=x onerror=alert(1)>"


def words_of(texts: list[str], separator: str, probability: float | None) -> tuple[str, list[Any]]:
    words, start = [], 0
    for index, text in enumerate(texts):
        end = start + len(text)
        words.append(SimpleNamespace(text=text, start=start, end=end, tokens=(index,), probability=probability))
        start = end + len(separator)
    return separator.join(texts), words


def explanation(answer: list[str], separator: str = " ", grid: tuple[int, int] = (6, 8), images: int = 1) -> Any:
    rng = np.random.default_rng(0)
    prompt_text, prompt_words = words_of(["what", "is", "this?"], " ", None)
    answer_text, words = words_of(answer, separator, 0.5)
    parts = {"prompt": (0, 3), "answer": (3, 3 + len(words))}
    maps = [rng.gamma(1.0, 2.0, size=(3 + len(words), *grid)).astype(np.float32) for _ in range(images)]
    maps[0][1] = 0
    relevance = np.tril(rng.uniform(size=(3 + len(words),) * 2), -1).astype(np.float32)
    return SimpleNamespace(
        images=[Image.effect_noise((80, 60), 60).convert("RGB") for _ in range(images)],
        prompt=prompt_text, answer=answer_text, words=words, prompt_words=prompt_words,
        word_maps=lambda part: [values[slice(*parts[part])] for values in maps],
        word_relevance=lambda part: relevance[slice(*parts[part])],
        settings={"model": ATTACK, "arc": {"scales": [1, 2]}},
    )  # fmt: skip


class Page(HTMLParser):
    """Tags with their attributes, the text of the answer's paragraph, and the contents of scripts and styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.raw: dict[str, list[str]] = {"script": [], "style": []}
        self.paragraphs: list[str] = []
        self._open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "input"):
            self._open.append(tag)
        if tag == "p":
            self.paragraphs.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] in self.raw:
            self.raw[self._open[-1]].append(data)
        if "p" in self._open:
            self.paragraphs[-1] += data

    @property
    def data(self) -> dict[str, Any]:
        return dict(json.loads(self.raw["script"][0]))


def decoded(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), np.uint8).astype(np.float32) / 255


def test_hostile_text_stays_text() -> None:
    answer = ["a", ATTACK, "\"quoted' & <b>bold</b>", "{{ 7 * 7 }}", "\u2028"]
    html = render_html(explanation(answer))
    page = Page(html)
    assert page.paragraphs == ["what is this?", " ".join(answer)]
    assert [tag for tag, _ in page.tags].count("script") == 2
    assert [attrs["src"] for tag, attrs in page.tags if tag == "img"] != []
    assert all(str(attrs["src"]).startswith("data:") for tag, attrs in page.tags if tag == "img")
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert ATTACK not in html


def test_text_between_words_is_kept() -> None:
    page = Page(render_html(explanation(["one", "two"], separator=",\n\n  ")))
    assert page.paragraphs[1] == "one,\n\n  two"
    indices = [attrs["data-index"] for tag, attrs in page.tags if attrs.get("class") == "word"]
    assert indices == ["0", "1", "2", "3", "4"]


def test_needs_no_network_and_has_a_strict_policy() -> None:
    html = render_html(explanation(["a", "dog"], images=2))
    page = Page(html)
    assert not re.search(r"https?://|@import|url\(", html)
    assert not any(tag in ("link", "iframe", "object", "base") for tag, _ in page.tags)
    assert not any("style" in attrs for _, attrs in page.tags)
    policy = next(attrs["content"] for _, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert "unsafe" not in policy
    for content in (page.raw["style"][0], page.raw["script"][1]):
        assert base64.b64encode(sha256(content.encode()).digest()).decode() in policy


def test_maps_and_relevance_survive_quantization() -> None:
    shown = explanation(["a", "dog", "."], images=2)
    data = Page(render_html(shown)).data
    expected = [np.concatenate(pair) for pair in zip(shown.word_maps("prompt"), shown.word_maps("answer"), strict=True)]
    peaks = np.max([grids.max((1, 2)) for grids in expected], axis=0)
    assert np.allclose(data["peaks"], peaks, rtol=1e-4)
    assert data["strongest"] == pytest.approx(peaks[3:].max())
    for sent, grids in zip(data["maps"], expected, strict=True):
        values = decoded(sent["values"]).reshape(-1, *sent["grid"])
        assert values.shape == grids.shape
        assert np.abs(values - grids / np.maximum(peaks, 1e-9)[:, None, None]).max() <= 1 / 255
    relevance = np.zeros((6, 6), np.float32)
    relevance[np.tril_indices(6, -1)] = decoded(data["relevance"])
    rows = np.concatenate([shown.word_relevance("prompt"), shown.word_relevance("answer")])
    assert np.abs(relevance - rows).max() <= 1 / 255
    assert data["probabilities"] == [None] * 3 + [0.5] * 3


def test_long_answers_stay_light() -> None:
    shown = explanation(["word"] * 500, grid=(96, 128))
    html = render_html(shown)
    assert Page(html).data["maps"][0]["grid"] == [36, 48]
    assert len(html) < 2_000_000


def test_empty_answer() -> None:
    assert Page(render_html(explanation([]))).data["peaks"][1] == 0


@pytest.mark.parametrize(("count", "panels"), [(1, 2), (7, 8), (30, 13)])
def test_overview_shows_all_words_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, panels: int
) -> None:
    monkeypatch.setattr(overview, "SHEET_WORDS", 12)
    path = tmp_path / "overview.png"
    draw_overview(explanation([*["price $5$"] * count, "."]), path, columns=4)
    with Image.open(path) as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    # At 150 dpi: four panels of 2 x 1.5 inches with gaps and margins, and at least 1.5 inches for every row.
    assert pixels.shape[1] == round((4 * 2 + 3 * 0.16 + 2 * 0.4) * 150)
    rows = -(-panels // 4)
    assert rows * 225 < pixels.shape[0] < rows * 320 + 300
    assert pixels.std() > 20
    assert list(tmp_path.iterdir()) == [path]


def test_overview_says_what_it_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overview, "SHEET_WORDS", 3)
    path = tmp_path / "overview.svg"
    shown = explanation([*"abcde", ".", "!"])
    draw_overview(shown, path)
    # The SVG keeps every text as a comment before its outlines.
    texts = re.findall(r"<!-- (.+?) -->", path.read_text(encoding="utf-8"))
    assert texts[-1].endswith("Punctuation left out: 2. Weakest words left out: 2.")
    peaks = shown.word_maps("answer")[0].max((1, 2))[:5]
    strongest = sorted(np.argsort(-peaks)[:3])
    assert [text for text in texts if len(text) == 1] == ["abcde"[i] for i in strongest]


def test_overview_needs_an_image(tmp_path: Path) -> None:
    shown = explanation(["a"])
    shown.images = []
    with pytest.raises(ValueError, match="image"):
        draw_overview(shown, tmp_path / "overview.png")


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_atomically(tmp_path / "page.html", b"old")

    def full(self: Path, content: bytes) -> int:
        with self.open("wb") as file:
            file.write(content[:1])
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="no space"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
