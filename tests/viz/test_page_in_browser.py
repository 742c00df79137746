"""The page in a real browser: headless Chromium, from file://."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFilter

from captum_intramodal.demo.scenes import compose
from captum_intramodal.viz.page import render_html
from tests.viz.helpers import CHROMIUM, DRIVER, start_browser

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome; set $CHROMIUM"),
    pytest.mark.skipif(DRIVER is None, reason="no chromedriver in PATH"),
]


def make_explanation(seed: int = 7, repeat: int = 1, images: int = 1) -> Any:
    """A composed scene with its blurred masks as heatmaps and plausible relevances."""
    rng = np.random.default_rng(seed)
    scenes = [compose(seed + i) for i in range(images)]
    prompt = "what do you see?" if images == 1 else "what do the images show?"
    answer = "\n".join([" ".join(scene.description for scene in scenes)] * repeat)

    def split(text: str) -> list[Any]:
        return [
            SimpleNamespace(text=match[0], start=match.start(), end=match.end(), tokens=(i,), probability=None)
            for i, match in enumerate(re.finditer(r"\w+|[^\w\s]", text))
        ]

    words, prompt_words = split(answer), split(prompt)
    for word in words:
        word.probability = float(rng.uniform(0.55, 0.999))

    def map_of(word: str, scene: Any) -> np.ndarray:
        noise = rng.uniform(0, 0.07, size=(12, 16))
        for item, mask in zip(scene.objects, scene.masks, strict=True):
            if word in (item.name, item.color):
                blurred = Image.fromarray((255 * mask).astype(np.uint8)).filter(ImageFilter.GaussianBlur(8))
                noise = noise + np.asarray(blurred.resize((16, 12), Image.Resampling.BOX)) / 255 * rng.uniform(0.6, 1)
        return noise

    def word_maps(part: str) -> list[np.ndarray]:
        chosen = words if part == "answer" else prompt_words
        return [np.stack([map_of(word.text, scene) for word in chosen]).astype(np.float32) for scene in scenes]

    def word_relevance(part: str) -> np.ndarray:
        first, count = (0, len(prompt_words)) if part == "prompt" else (len(prompt_words), len(words))
        total = len(prompt_words) + len(words)
        raw = rng.uniform(0, 1, size=(count, total)) ** 6
        raw[np.arange(total)[None] >= np.arange(first, first + count)[:, None]] = 0
        return (raw / np.maximum(raw.max(1, keepdims=True), 1e-9)).astype(np.float32)

    return SimpleNamespace(
        images=[scene.image for scene in scenes], prompt=prompt, answer=answer, words=words, prompt_words=prompt_words,
        word_maps=word_maps, word_relevance=word_relevance,
        settings={"model": "demo", "arc": {"sources": "image", "scales": [1, 2, 4]}, "versions": {"torch": "2.15.0"}},
    )  # fmt: skip


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    driver = start_browser(tmp_path_factory.mktemp("chromium"))
    yield driver
    driver.quit()


@pytest.fixture
def page(browser: Any, tmp_path: Path) -> Any:
    return open_page(browser, tmp_path, make_explanation())


def open_page(browser: Any, folder: Path, shown: Any) -> Any:
    file = folder / "explanation.html"
    file.write_text(render_html(shown), encoding="utf-8")
    browser.get(file.as_uri())
    return browser


def word(page: Any, text: str) -> Any:
    return next(node for node in page.find_elements("css selector", ".word[data-index]") if node.text == text)


def hover(page: Any, node: Any) -> None:
    from selenium.webdriver import ActionChains

    ActionChains(page).move_to_element(node).perform()


def press(page: Any, *keys: str) -> None:
    from selenium.webdriver import ActionChains

    ActionChains(page).send_keys(*keys).perform()


def heatmap(page: Any) -> str:
    return str(page.execute_script("return document.querySelector('canvas.heatmap').toDataURL()"))


def opaque(page: Any) -> int:
    """Sum of the opacity of all pixels of the heatmap."""
    script = """
        const canvas = document.querySelector("canvas.heatmap");
        const {data} = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
        return data.reduce((sum, value, index) => index % 4 === 3 ? sum + value : sum, 0);
    """
    return int(page.execute_script(script))


def caption(page: Any) -> str:
    return str(page.find_element("id", "caption").text)


def shades(page: Any) -> list[float]:
    script = "return [...document.querySelectorAll('.word')].map(n => Number(n.style.getPropertyValue('--shade')))"
    return [float(value) for value in page.execute_script(script)]


def test_opens_with_a_heatmap_and_without_errors(page: Any) -> None:
    assert opaque(page) > 0
    assert "probability" in caption(page)
    assert page.get_log("browser") == []


def test_answer_keeps_its_text(page: Any) -> None:
    text = page.execute_script("return document.querySelector('.answer .text').textContent")
    assert text == make_explanation().answer


def test_hovering_shows_another_word(page: Any) -> None:
    hover(page, word(page, "key"))
    before, text = heatmap(page), caption(page)
    hover(page, word(page, "house"))
    assert heatmap(page) != before
    assert caption(page) != text
    assert caption(page).startswith("house")
    index = int(word(page, "house").get_attribute("data-index"))
    assert max(shades(page)[:index]) > 0
    assert not any(shades(page)[index:])
    hover(page, word(page, "see"))
    assert caption(page).startswith("see")
    assert "probability" not in caption(page)


def test_click_pins_and_escape_unpins(page: Any) -> None:
    word(page, "key").click()
    before = heatmap(page)
    hover(page, word(page, "house"))
    assert heatmap(page) == before
    assert caption(page).startswith("key")
    assert word(page, "key").get_attribute("aria-pressed") == "true"
    press(page, "\ue00c")
    hover(page, word(page, "book"))
    assert heatmap(page) != before
    assert caption(page).startswith("book")
    word(page, "key").click()
    word(page, "key").click()
    hover(page, word(page, "book"))
    assert caption(page).startswith("book")
    press(page, "\ue00c")
    assert opaque(page) == 0


def test_arrow_keys_step_through_the_words(page: Any) -> None:
    hover(page, word(page, "blue"))
    press(page, "\ue014")
    assert caption(page).startswith("key")
    press(page, "\ue012", "\ue012")
    assert caption(page).startswith("a")
    press(page, " ")
    assert "pinned" in caption(page)


def test_shared_scale_keeps_function_words_pale(page: Any) -> None:
    toggle = page.find_element("css selector", "[data-shared-scale]")
    hover(page, word(page, "shows"))
    assert toggle.get_attribute("aria-checked") == "true"
    pale = opaque(page)
    toggle.click()
    assert toggle.get_attribute("aria-checked") == "false"
    assert opaque(page) > 10 * max(pale, 1)


def test_opacity_slider(page: Any) -> None:
    script = """
        const slider = document.querySelector("#opacity");
        slider.value = 30;
        slider.dispatchEvent(new Event("input"));
        return document.querySelector("canvas.heatmap").style.opacity;
    """
    assert page.execute_script(script) == "0.3"


def test_several_images_and_a_long_answer(browser: Any, tmp_path: Path) -> None:
    page = open_page(browser, tmp_path, make_explanation(repeat=12, images=3))
    assert len(page.find_elements("css selector", ".word")) > 400
    assert len(page.find_elements("css selector", "canvas.heatmap")) == 3
    script = """
        const node = document.querySelectorAll(".word")[400], start = performance.now();
        node.dispatchEvent(new PointerEvent("pointerover", {bubbles: true}));
        return performance.now() - start;
    """
    assert page.execute_script(script) < 1000
    assert page.get_log("browser") == []


def test_phone_width_needs_no_sideways_scrolling(page: Any) -> None:
    metrics = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        assert page.execute_script("return document.documentElement.scrollWidth") <= 390
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_bright_words_of_the_demo_page_have_distinct_heatmaps(browser: Any, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from captum_intramodal import Explanation
    from captum_intramodal.cli import app

    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    browser.get_log("browser")
    browser.get((tmp_path / "index.html").as_uri())
    saved = Explanation.load(tmp_path)
    # ARC leaves words without visual evidence dark; the others each have a heatmap of their own.
    bright = {w.text for w in saved.words if float(saved.heatmap(w, normalize="answer").max()) > 0.3}
    assert len(bright) >= 2
    drawn = {}
    for node in browser.find_elements("css selector", ".word[data-index]"):
        hover(browser, node)
        drawn[node.text] = heatmap(browser)
    assert len({drawn[text] for text in bright}) == len(bright), "words share a heatmap"
    assert browser.get_log("browser") == []
