r"""An explanation as one self-contained web page, and as one sheet of images."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, Protocol

import jinja2
import numpy as np
from PIL import Image

from captum_intramodal.viz.style import color_table, resize_grid, word_peaks

__all__ = ["ExplanationLike", "page_template", "render_html"]

Part = Literal["prompt", "answer"]


# Longest side of an embedded image (pixels) and of an embedded heatmap (cells).
IMAGE_SIDE = 1600


GRID_SIDE = 48


class WordLike(Protocol):
    """A word of the prompt or of the answer; ``start`` and ``end`` are its span of characters there."""

    @property
    def text(self) -> str: ...
    @property
    def start(self) -> int: ...
    @property
    def end(self) -> int: ...
    @property
    def probability(self) -> float | None: ...


class ExplanationLike(Protocol):
    """What the page and the sheet need to know of an explanation."""

    @property
    def images(self) -> Sequence[Image.Image]: ...
    @property
    def prompt(self) -> str: ...
    @property
    def answer(self) -> str: ...
    @property
    def words(self) -> Sequence[WordLike]: ...
    @property
    def prompt_words(self) -> Sequence[WordLike]: ...
    @property
    def settings(self) -> Mapping[str, Any]: ...

    def word_maps(self, part: Part, /) -> Sequence[np.ndarray]: ...
    def word_relevance(self, part: Part, /) -> np.ndarray: ...


def render_html(explanation: ExplanationLike) -> str:
    r"""Renders an explanation as one HTML file that needs no network.

    The page shows, for the word under the pointer or the keyboard focus, its heatmap over the images and its
    relevance over the earlier words. Each heatmap travels as a grid of bytes, not as an image, so the page stays
    light for long answers. A content security policy admits only the page's own script and style (by their hash)
    and images inside the file.

    Args:
        explanation (Explanation): the explanation to show.

    Returns:
        str: the HTML document. Words carry ``data-index``, counted through the prompt and on through the answer.

    Examples::

        >>> write_atomically("explanation.html", render_html(explanation).encode())
    """
    n_prompt = len(explanation.prompt_words)
    return page_template("explanation.html.j2").render(
        answer=explanation.answer,
        images=[_embed(image) for image in explanation.images],
        prompt_pieces=list(_pieces(explanation.prompt, explanation.prompt_words, 0)),
        answer_pieces=list(_pieces(explanation.answer, explanation.words, n_prompt)),
        settings=list(_flatten(explanation.settings)),
        data=_page_data(explanation),
    )


# --- the page ---------------------------------------------------------------------------------------------------------


@lru_cache
def page_template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["csp_hash"] = lambda text: base64.b64encode(sha256(text.encode()).digest()).decode()
    return environment.get_template(name)


def _page_data(explanation: ExplanationLike) -> dict[str, Any]:
    """All that the page's script reads: numbers and base64 only. Words are numbered prompt first, then answer."""
    maps = [
        _shrink(np.concatenate(pair))
        for pair in zip(explanation.word_maps("prompt"), explanation.word_maps("answer"), strict=True)
    ]
    words = [*explanation.prompt_words, *explanation.words]
    n_prompt = len(explanation.prompt_words)
    peaks = word_peaks(maps) if maps else np.zeros(len(words), np.float32)
    divisors = np.where(peaks > 0, peaks, 1)[:, None, None]
    relevance = np.concatenate([explanation.word_relevance("prompt"), explanation.word_relevance("answer")])
    # A word can only lean on earlier ones: row i of the triangle has i entries.
    triangle = np.tril_indices(len(words), -1)
    return {
        "colors": base64.b64encode(color_table().tobytes()).decode(),
        "maps": [{"grid": grids.shape[1:], "values": _bytes(grids / divisors)} for grids in maps],
        "peaks": [float(f"{peak:.5g}") for peak in peaks],
        # Top of the shared scale: the answer's strongest word. The prompt's only where the answer has nothing.
        "strongest": float(peaks[n_prompt:].max(initial=0)) or float(peaks.max(initial=0)) or 1.0,
        "relevance": _bytes(relevance[triangle]),
        "probabilities": [None if word.probability is None else round(word.probability, 6) for word in words],
    }


def _bytes(unit: np.ndarray) -> str:
    return base64.b64encode(np.rint(255 * unit).astype(np.uint8).tobytes()).decode()


def _shrink(grids: np.ndarray) -> np.ndarray:
    """Grids of at most GRID_SIDE cells a side, by averaging."""
    height, width = grids.shape[1:]
    scale = GRID_SIDE / max(height, width)
    if scale >= 1:
        return grids
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.stack([resize_grid(grid, size, Image.Resampling.BOX) for grid in grids])


def _embed(image: Image.Image) -> dict[str, Any]:
    small = image.convert("RGB")
    small.thumbnail((IMAGE_SIDE, IMAGE_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=90)
    url = "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
    return {"url": url, "width": small.width, "height": small.height}


def _pieces(text: str, words: Sequence[WordLike], first: int) -> Iterator[tuple[str, int | None]]:
    """The text cut into words (with their number) and what lies between them (with None)."""
    end = 0
    for index, word in enumerate(words, first):
        if word.start > end:
            yield text[end : word.start], None
        yield text[word.start : word.end], index
        end = word.end
    if end < len(text):
        yield text[end:], None


def _flatten(settings: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(settings, Mapping):
        for key, value in settings.items():
            yield from _flatten(value, f"{path}.{key}" if path else str(key))
    elif isinstance(settings, (list, tuple)):
        yield path, ", ".join(map(str, settings))
    else:
        yield path, str(settings)
