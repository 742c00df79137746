r"""What :func:`captum_intramodal.explain` returns: maps and text relevance of every word, to look at, save and load."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from captum.attr import visualization
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from captum_intramodal._utils.io import write_atomically
from captum_intramodal.attr.llm_input import grid_segments, number_segments
from captum_intramodal.attr.llm_result import MultimodalLLMAttributionResult
from captum_intramodal.text.spans import Word, group_words
from captum_intramodal.viz.page import render_html

__all__ = ["Explanation"]

Part = Literal["answer", "prompt"]


_TENSORS, _TEXTS = "explanation.safetensors", "explanation.json"


_FORMAT = 1


@dataclass(frozen=True)
class Explanation:
    r"""
    Explanation of an answer about one or several images, word by word.

    Attributes:

        images (list[PIL.Image.Image]): The images, RGB.
        prompt, answer (str): What was asked and answered.
        token_ids (Tensor): Ids of the prompt's tokens, then of the answer's, int64 (n,).
        spans (Tensor): Characters of each token in the prompt or answer, int64 (n, 2).
        maps (list[Tensor]): Per image the tokens' maps, float32 (n, rows, columns), not negative, all on one scale.
        relevance (Tensor): How much each earlier token (column) speaks for a token (row): the logit lens of the token
            at the earlier token's position, clipped at 0, 0 for the same token; float32 (n, n).
        probabilities (Tensor): Of the answer's tokens, each given all before it, float32 (n_answer,).
        settings (dict): Everything needed to repeat the explanation: versions, model id and revision, scales, options.
    """

    images: list[Image.Image]
    prompt: str
    answer: str
    token_ids: Tensor
    spans: Tensor
    maps: list[Tensor]
    relevance: Tensor
    probabilities: Tensor
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def _prompt_count(self) -> int:
        return len(self.token_ids) - len(self.probabilities)

    def _texts(self, text: str, spans: Tensor) -> list[str]:
        return [text[a:b].strip() for a, b in spans.tolist()]

    @cached_property
    def tokens(self) -> list[str]:
        """The answer's tokens."""
        return self._texts(self.answer, self.spans[self._prompt_count :])

    @cached_property
    def prompt_tokens(self) -> list[str]:
        """The prompt's tokens."""
        return self._texts(self.prompt, self.spans[: self._prompt_count])

    @cached_property
    def words(self) -> list[Word]:
        """The answer's words."""
        return group_words(self.answer, self.spans[self._prompt_count :].tolist(), self.probabilities.tolist())

    @cached_property
    def prompt_words(self) -> list[Word]:
        """The prompt's words."""
        return group_words(self.prompt, self.spans[: self._prompt_count].tolist())

    def _rows(self, index: int | str | Word, part: Part) -> list[int]:
        """Rows of ``maps`` and ``relevance`` of a token index, a word or a word's text."""
        if part not in ("answer", "prompt"):
            raise ValueError(f"part must be 'answer' or 'prompt', got {part!r}.")
        first, count = (0, self._prompt_count) if part == "prompt" else (self._prompt_count, len(self.probabilities))
        if isinstance(index, str):
            words = self.words if part == "answer" else self.prompt_words
            index = next((word for word in words if word.text.lower() == index.lower()), index)
            if isinstance(index, str):
                raise ValueError(f"The {part} has no word {index!r}; it has {', '.join(w.text for w in words)}.")
        if isinstance(index, Word):
            return [first + token for token in index.tokens]
        if not -count <= index < count:
            raise IndexError(f"Token {index} does not exist; the {part} has {count} tokens.")
        return [first + index % count]

    def heatmap(
        self,
        index: int | str | Word,
        size: tuple[int, int] | None = None,
        part: Part = "answer",
        image: int = 0,
        normalize: Literal["token", "answer"] = "token",
    ) -> Tensor:
        r"""
        Where a token or word comes from in an image.

        Args:

            index (int, str or Word): Index of a token of the answer (of the prompt with ``part='prompt'``); or a word,
                        as text (its first occurrence) or from :attr:`words`. A word's map is the mean of its tokens'.
            size (tuple[int, int], optional): Height and width of the result.
                        Default: None, the height and width of the image.
            part (str, optional): ``'answer'`` or ``'prompt'``.
                        Default: ``'answer'``
            image (int, optional): Which image.
                        Default: 0
            normalize (str, optional): What becomes 1: the largest value of this map (``'token'``), or of all the
                        answer's maps (``'answer'``), so that words without visual evidence stay dark.
                        Default: ``'token'``

        Returns:
            *Tensor* float32 (height, width) in [0, 1].

        Raises:
            IndexError, ValueError: a token, word or image that does not exist, or an empty size.
        """
        if not -len(self.maps) <= image < len(self.maps):
            raise IndexError(f"Image {image} does not exist; there are {len(self.maps)}.")
        if normalize not in ("token", "answer"):
            raise ValueError(f"normalize must be 'token' or 'answer', got {normalize!r}.")
        values = self.maps[image][self._rows(index, part)].mean(0)
        if normalize == "token":
            # The largest over all images: of two images the one that matters less stays darker.
            largest = max(float(maps[self._rows(index, part)].mean(0).max()) for maps in self.maps)
        else:
            largest = max(float(maps[self._prompt_count :].max()) for maps in self.maps)
        if size is None:
            width, height = self.images[image].size
            size = (height, width)
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"size must be (height, width), both at least 1, got {size}.")
        resized = F.interpolate(values[None, None], size=tuple(size), mode="bilinear", align_corners=False)[0, 0]
        return (resized / largest).clamp(0, 1) if largest > 0 else torch.zeros_like(resized)

    def text_relevance(self, index: int | str | Word, part: Part = "answer") -> Tensor:
        r"""
        How much each earlier token speaks for a token or word: the logit lens of the token's id at the earlier token's
        position, clipped at 0 (TAM's text activation). The position right before a token, which predicts it, always
        says much for it.

        Args:

            index (int, str or Word): As in :meth:`heatmap`.
            part (str, optional): ``'answer'`` or ``'prompt'``.
                        Default: ``'answer'``

        Returns:
            *Tensor* float32 in [0, 1], the largest is 1 (all zero where nothing matters); one value per token before
            the (word's first) token: the prompt's tokens, then the answer's. Their texts are :meth:`earlier_tokens`.
        """
        rows = self._rows(index, part)
        values = self.relevance[rows, : rows[0]].mean(0)
        largest = float(values.max()) if values.numel() else 0.0
        return values / largest if largest > 0 else torch.zeros_like(values)

    def earlier_tokens(self, index: int | str | Word, part: Part = "answer") -> list[str]:
        """Texts of the tokens that :meth:`text_relevance` speaks of."""
        return [*self.prompt_tokens, *self.tokens][: self._rows(index, part)[0]]

    def word_maps(self, part: Part) -> list[np.ndarray]:
        """Per image the raw maps of all words, float32 (words, rows, columns), not negative, on one scale."""
        words = self.words if part == "answer" else self.prompt_words
        return [
            np.stack([maps[self._rows(word, part)].mean(0).numpy() for word in words])
            if words
            else np.zeros((0, *maps.shape[1:]), np.float32)
            for maps in self.maps
        ]

    def word_relevance(self, part: Part) -> np.ndarray:
        """Relevance of the prompt's and answer's words (columns) for each word (row), float32 in [0, 1]; a word of
        several tokens counts with its largest. 0 for words that are not earlier."""
        columns = [self._rows(word, "prompt") for word in self.prompt_words]
        columns += [self._rows(word, "answer") for word in self.words]
        words = self.words if part == "answer" else self.prompt_words
        result = np.zeros((len(words), len(columns)), np.float32)
        for row, word in enumerate(words):
            values = self.text_relevance(word, part)
            for column, tokens in enumerate(columns):
                if tokens[-1] < len(values):
                    result[row, column] = float(values[tokens].max())
        return result

    def to_llm_attribution_result(self, grid: tuple[int, int] = (6, 6)) -> MultimodalLLMAttributionResult:
        r"""
        The answer's explanation as Captum's ``LLMAttributionResult``, with its plots.

        A region's attribution is the mean of a token's map there, an earlier token's is its relevance: both are logits
        of the logit lens at a position, clipped at 0. The whole answer's are the sums over its tokens.

        Args:

            grid (tuple[int, int], optional): Rows and columns of regions in each image.
                        Default: ``(6, 6)``

        Returns:
            *MultimodalLLMAttributionResult*: its features are the regions, the prompt's tokens, and the answer's but
            the last.
        """
        answer = slice(self._prompt_count, None)
        regions = [F.adaptive_avg_pool2d(maps[answer], grid).flatten(1) for maps in self.maps]
        token_attr = torch.cat([*regions, self.relevance.tril(-1)[answer, :-1]], dim=1)
        segmentations, names = number_segments([grid_segments(image.size, grid) for image in self.images])
        return MultimodalLLMAttributionResult(
            input_tokens=[*names, *self.prompt_tokens, *self.tokens[:-1]],
            output_tokens=self.tokens,
            seq_attr=token_attr.sum(0),
            token_attr=token_attr,
            images=self.images,
            segmentations=segmentations,
        )

    def to_visualization_record(self, index: int | str | Word) -> visualization.VisualizationDataRecord:
        """The :meth:`text_relevance` of an answer's token or word, as Captum's ``visualize_text`` draws it."""
        rows, relevance = self._rows(index, "answer"), self.text_relevance(index)
        text = self.answer[int(self.spans[rows[0], 0]) : int(self.spans[rows[-1], 1])].strip()
        return visualization.VisualizationDataRecord(
            word_attributions=relevance,
            pred_prob=float(self.probabilities[[row - self._prompt_count for row in rows]].prod()),
            pred_class=text,
            true_class="",
            attr_class=text,
            attr_score=float(relevance.sum()),
            raw_input_ids=self.earlier_tokens(index),
            convergence_score=math.nan,
        )

    def to_html(self, path: str | os.PathLike[str]) -> Path:
        """Writes the explanation as one self-contained page that needs no network; returns its path."""
        return write_atomically(Path(path), render_html(self).encode())

    def _repr_html_(self) -> str:
        """The page inside a notebook, in a frame of its own so that styles and scripts do not mix."""
        from html import escape

        frame = escape(render_html(self), quote=True)
        return f'<iframe srcdoc="{frame}" sandbox="allow-scripts" style="width:100%;height:640px;border:0"></iframe>'

    def save(self, directory: str | os.PathLike[str]) -> Path:
        r"""
        Saves tensors (safetensors), texts and settings (JSON) and images (PNG) into a directory, which is made where
        it does not exist. Each file appears whole or not at all, the JSON file last.

        Returns:
            *Path* of the directory.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        tensors = {f"maps.{i}": maps.contiguous() for i, maps in enumerate(self.maps)}
        tensors |= {name: getattr(self, name).contiguous() for name in _STORED}
        texts = {
            "format": _FORMAT,
            "prompt": self.prompt,
            "answer": self.answer,
            "images": len(self.images),
            "settings": self.settings,
        }
        with tempfile.TemporaryDirectory(dir=directory, prefix=".saving-") as partial:
            temporary = Path(partial)
            for index, image in enumerate(self.images):
                image.save(temporary / f"image-{index}.png")
            save_file(tensors, temporary / _TENSORS)
            (temporary / _TEXTS).write_text(json.dumps(texts, indent=1, ensure_ascii=False), encoding="utf-8")
            for name in sorted(os.listdir(temporary), key=lambda name: name == _TEXTS):
                os.replace(temporary / name, directory / name)
        return directory

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> Explanation:
        r"""
        Loads what :meth:`save` saved.

        Raises:
            ValueError: the directory holds no complete explanation.
        """
        directory = Path(directory)
        try:
            texts = json.loads((directory / _TEXTS).read_text(encoding="utf-8"))
            tensors = load_file(directory / _TENSORS)
            images = []
            for index in range(texts["images"]):
                with Image.open(directory / f"image-{index}.png") as image:
                    images.append(image.convert("RGB"))
            return cls(
                images=images,
                prompt=texts["prompt"],
                answer=texts["answer"],
                maps=[tensors[f"maps.{i}"] for i in range(texts["images"])],
                settings=texts["settings"],
                **{name: tensors[name] for name in _STORED},
            )
        except (OSError, KeyError, TypeError, json.JSONDecodeError, SafetensorError) as error:
            raise ValueError(f"{directory} holds no complete explanation ({type(error).__name__}: {error}).") from error

    def __repr__(self) -> str:
        return (
            f"Explanation({self.answer!r}, {len(self.words)} words, {len(self.images)} images, "
            f"scales={self.settings.get('scales')})"
        )


_STORED: Sequence[str] = ("token_ids", "spans", "relevance", "probabilities")
