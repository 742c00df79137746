"""The page: hostile_page text, embedded data, and its content security policy."""

from __future__ import annotations

import base64
import re
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from captum_intramodal._utils.io import write_atomically
from captum_intramodal.viz.page import render_html
from tests.viz.helpers import ATTACK, Page, make_explanation


def decode(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), np.uint8).astype(np.float32) / 255


def test_hostile_text_stays_text() -> None:
    answer = ["a", ATTACK, "\"quoted' & <b>bold</b>", "{{ 7 * 7 }}", "\u2028"]
    html = render_html(make_explanation(answer))
    page = Page(html)
    assert page.paragraphs == ["what is this?", " ".join(answer)]
    assert [tag for tag, _ in page.tags].count("script") == 2
    assert [attrs["src"] for tag, attrs in page.tags if tag == "img"] != []
    assert all(str(attrs["src"]).startswith("data:") for tag, attrs in page.tags if tag == "img")
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert ATTACK not in html


def test_text_between_words_is_kept() -> None:
    page = Page(render_html(make_explanation(["one", "two"], separator=",\n\n  ")))
    assert page.paragraphs[1] == "one,\n\n  two"
    indices = [attrs["data-index"] for tag, attrs in page.tags if attrs.get("class") == "word"]
    assert indices == ["0", "1", "2", "3", "4"]


def test_needs_no_network_and_has_a_strict_policy() -> None:
    html = render_html(make_explanation(["a", "dog"], images=2))
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
    explained = make_explanation(["a", "dog", "."], images=2)
    data = Page(render_html(explained)).data
    expected = [
        np.concatenate(pair) for pair in zip(explained.word_maps("prompt"), explained.word_maps("answer"), strict=True)
    ]
    peaks = np.max([grids.max((1, 2)) for grids in expected], axis=0)
    assert np.allclose(data["peaks"], peaks, rtol=1e-4)
    assert data["strongest"] == pytest.approx(peaks[3:].max())
    for sent, grids in zip(data["maps"], expected, strict=True):
        values = decode(sent["values"]).reshape(-1, *sent["grid"])
        assert values.shape == grids.shape
        assert np.abs(values - grids / np.maximum(peaks, 1e-9)[:, None, None]).max() <= 1 / 255
    relevance = np.zeros((6, 6), np.float32)
    relevance[np.tril_indices(6, -1)] = decode(data["relevance"])
    rows = np.concatenate([explained.word_relevance("prompt"), explained.word_relevance("answer")])
    assert np.abs(relevance - rows).max() <= 1 / 255
    assert data["probabilities"] == [None] * 3 + [0.5] * 3


def test_pages_of_long_answers_stay_small() -> None:
    explained = make_explanation(["word"] * 500, grid=(96, 128))
    html = render_html(explained)
    assert Page(html).data["maps"][0]["grid"] == [36, 48]
    assert len(html) < 2_000_000


def test_an_empty_answer_has_a_page() -> None:
    assert Page(render_html(make_explanation([]))).data["peaks"][1] == 0


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
