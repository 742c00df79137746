r"""How is an explanation shown as one self-contained web page? HTML is escaped in one place:
:func:`html_escaping_environment`."""

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

from captum_intramodal.viz.style import heatmap_colors, resize_grid, word_peaks

__all__ = ["ExplanationLike", "page_template", "render_html"]

Part = Literal["prompt", "answer"]

# Longest side of an embedded image in pixels, and of an embedded heatmap in cells.
IMAGE_SIDE = 1600
GRID_SIDE = 48


# Protocols, because Explanation is defined on a higher floor, which this package must not import.
class WordLike(Protocol):
    """A word of the prompt or of the answer; ``start`` and ``end`` are its character offsets there."""

    @property
    def text(self) -> str: ...
    @property
    def start(self) -> int: ...
    @property
    def end(self) -> int: ...
    @property
    def probability(self) -> float | None: ...


class ExplanationLike(Protocol):
    """The part of an explanation that the page and the overview need."""

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
    r"""
    Render an explanation as one HTML file that needs no network.

    For the word under the pointer or the keyboard focus, the page shows its heatmap over the images and its relevance
    over the earlier words. Heatmaps are embedded as grids of bytes, not as images, which keeps pages of long answers
    small. A content security policy admits only the page's own script and style (by their hash) and embedded images.

    Args:

        explanation (Explanation): The explanation to show.

    Returns:
        **html** (*str*):
            The document. Words carry ``data-index``, counted through the prompt and on through the answer.

    Examples::

        >>> from captum_intramodal.viz.page import render_html
        >>> "<!DOCTYPE html>" in render_html(explanation)
        True
    """
    n_prompt = len(explanation.prompt_words)
    return page_template("explanation.html.j2").render(
        answer=explanation.answer,
        images=[_embed_image(image) for image in explanation.images],
        prompt_pieces=list(_split_at_words(explanation.prompt, explanation.prompt_words, 0)),
        answer_pieces=list(_split_at_words(explanation.answer, explanation.words, n_prompt)),
        settings=list(_flatten(explanation.settings)),
        data=_script_data(explanation),
    )


def html_escaping_environment() -> jinja2.Environment:
    """Return the Jinja environment of all templates: every value is HTML-escaped, and unknown names are errors.

    Nothing in the templates is marked safe. JSON inside ``<script>`` is written with Jinja's ``tojson``, which also
    escapes ``<``, ``>``, ``&`` and ``'``.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["csp_hash"] = lambda text: base64.b64encode(sha256(text.encode()).digest()).decode()
    return environment


@lru_cache
def page_template(name: str) -> jinja2.Template:
    """Load a template of this package."""
    return html_escaping_environment().get_template(name)


def _script_data(explanation: ExplanationLike) -> dict[str, Any]:
    """Collect what the page's script reads: only numbers and base64. Words are numbered prompt first, then answer."""
    maps = [
        _shrink(np.concatenate(pair))
        for pair in zip(explanation.word_maps("prompt"), explanation.word_maps("answer"), strict=True)
    ]
    words = [*explanation.prompt_words, *explanation.words]
    n_prompt = len(explanation.prompt_words)
    peaks = word_peaks(maps) if maps else np.zeros(len(words), np.float32)
    divisors = np.where(peaks > 0, peaks, 1)[:, None, None]
    relevance = np.concatenate([explanation.word_relevance("prompt"), explanation.word_relevance("answer")])
    # Only earlier words can be relevant for a word: row i of the triangle has i entries.
    triangle = np.tril_indices(len(words), -1)
    return {
        "colors": base64.b64encode(heatmap_colors().tobytes()).decode(),
        "maps": [{"grid": grids.shape[1:], "values": _encode_unit(grids / divisors)} for grids in maps],
        "peaks": [float(f"{peak:.5g}") for peak in peaks],
        # Top of the shared scale: the answer's strongest word, or the prompt's if all maps of the answer are 0.
        "strongest": float(peaks[n_prompt:].max(initial=0)) or float(peaks.max(initial=0)) or 1.0,
        "relevance": _encode_unit(relevance[triangle]),
        "probabilities": [None if word.probability is None else round(word.probability, 6) for word in words],
    }


def _encode_unit(values: np.ndarray) -> str:
    """Encode values in [0, 1] as one byte each, in base64."""
    return base64.b64encode(np.rint(255 * values).astype(np.uint8).tobytes()).decode()


def _shrink(grids: np.ndarray) -> np.ndarray:
    """Average maps down to at most GRID_SIDE cells per side."""
    height, width = grids.shape[1:]
    scale = GRID_SIDE / max(height, width)
    if scale >= 1:
        return grids
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.stack([resize_grid(grid, size, Image.Resampling.BOX) for grid in grids])


def _embed_image(image: Image.Image) -> dict[str, Any]:
    """Return an image as a data URL with its size, at most IMAGE_SIDE pixels per side."""
    small = image.convert("RGB")
    small.thumbnail((IMAGE_SIDE, IMAGE_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=90)
    url = "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
    return {"url": url, "width": small.width, "height": small.height}


def _split_at_words(text: str, words: Sequence[WordLike], first: int) -> Iterator[tuple[str, int | None]]:
    """Split a text into words, with their numbers counted from ``first``, and the text between them, with None."""
    end = 0
    for index, word in enumerate(words, first):
        if word.start > end:
            yield text[end : word.start], None
        yield text[word.start : word.end], index
        end = word.end
    if end < len(text):
        yield text[end:], None


def _flatten(settings: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Flatten nested settings into dotted names and text."""
    if isinstance(settings, Mapping):
        for key, value in settings.items():
            yield from _flatten(value, f"{path}.{key}" if path else str(key))
    elif isinstance(settings, (list, tuple)):
        yield path, ", ".join(map(str, settings))
    else:
        yield path, str(settings)
