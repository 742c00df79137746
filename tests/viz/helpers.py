"""Explanations, a parser of pages, and a browser for the tests of HTML."""

from __future__ import annotations

import json
import os
import shutil
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

CHROMIUM = os.environ.get("CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
DRIVER = shutil.which("chromedriver")
ATTACK = "</script><img src=x onerror=alert(1)>"
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
    "--hide-scrollbars",
)  # fmt: skip


def make_words(texts: list[str], separator: str, probability: float | None) -> tuple[str, list[Any]]:
    """Join texts, and return the text with its words and their offsets."""
    words, start = [], 0
    for index, text in enumerate(texts):
        end = start + len(text)
        words.append(SimpleNamespace(text=text, start=start, end=end, tokens=(index,), probability=probability))
        start = end + len(separator)
    return separator.join(texts), words


def make_explanation(answer: list[str], separator: str = " ", grid: tuple[int, int] = (6, 8), images: int = 1) -> Any:
    """Make an explanation of noise images with random maps and relevances."""
    rng = np.random.default_rng(0)
    prompt_text, prompt_words = make_words(["what", "is", "this?"], " ", None)
    answer_text, words = make_words(answer, separator, 0.5)
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
    """A parsed page: tags with their attributes, text of paragraphs, and contents of scripts and styles."""

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


def start_browser(folder: Path, *flags: str) -> Any:
    """Start headless Chromium with its profile in this folder."""
    webdriver = pytest.importorskip("selenium.webdriver")
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, "--window-size=1280,900", f"--user-data-dir={folder}", *flags):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options=options, service=Service(executable_path=DRIVER))
