r"""The result of ``explain``: heatmaps and text relevance of every word, plots, pages, saving and loading."""

from __future__ import annotations

import json
import math
import os
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

from captum_intramodal._utils.io import replace_files, write_atomically
from captum_intramodal.attr.llm_input import grid_segments, number_segments
from captum_intramodal.attr.llm_result import MultimodalLLMAttributionResult
from captum_intramodal.errors import InvalidInputError, InvalidOptionError, SavedExplanationError
from captum_intramodal.text.spans import Word, group_words
from captum_intramodal.viz.page import render_html

__all__ = ["Explanation"]

Part = Literal["answer", "prompt"]

_TENSORS, _TEXTS = "explanation.safetensors", "explanation.json"
_FORMAT = 1
_SAVED_TENSORS = ("token_ids", "spans", "relevance", "probabilities")


@dataclass(frozen=True)
class Explanation:
    r"""
    Explanation of an answer about one or several images, word by word.

    Attributes:

        images (list[PIL.Image.Image]): The images, RGB.
        prompt, answer (str): Text of the prompt and of the answer.
        token_ids (Tensor): Ids of the prompt's tokens, then of the answer's, int64 (n,).
        spans (Tensor): First and last character (exclusive) of each token in prompt or answer, int64 (n, 2).
        maps (list[Tensor]): Per image the tokens' maps, float32 (n, rows, columns), not negative, comparable with each
            other.
        relevance (Tensor): Text activation of each earlier token (column) for a token (row): the logit lens of the
            token at the earlier token's position, clipped at 0, and 0 for the same token; float32 (n, n).
        probabilities (Tensor): Of the answer's tokens, each given all before it, float32 (n_answer,).
        settings (dict): All that is needed to repeat the explanation: versions, model id and revision, scales, options.
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
        """Return the rows of ``maps`` and ``relevance`` of a token index, a word or a word's text."""
        if part not in ("answer", "prompt"):
            raise InvalidOptionError(f"part must be 'answer' or 'prompt', got {part!r}.")
        first, count = (0, self._prompt_count) if part == "prompt" else (self._prompt_count, len(self.probabilities))
        if isinstance(index, str):
            words = self.words if part == "answer" else self.prompt_words
            index = next((word for word in words if word.text.lower() == index.lower()), index)
            if isinstance(index, str):
                raise InvalidInputError(f"The {part} has no word {index!r}; it has {', '.join(w.text for w in words)}.")
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
        Return the heatmap of a token or word over an image.

        Args:

            index (int, str or Word): Index of a token of the answer (of the prompt with ``part='prompt'``); or a word,
                        as text (its first occurrence) or from :attr:`words`. A word's map is the mean of its tokens'.
            size (tuple[int, int], optional): Height and width of the result.
                        Default: None, the height and width of the image.
            part (str, optional): ``'answer'`` or ``'prompt'``.
                        Default: ``'answer'``
            image (int, optional): Which image.
                        Default: 0
            normalize (str, optional): Which value becomes 1: the largest of this map (``'token'``), or of all the
                        answer's maps (``'answer'``), so that words without visual evidence stay dark.
                        Default: ``'token'``

        Returns:
            **heatmap** (*Tensor*):
                float32 (height, width) in [0, 1].

        Raises:
            IndexError: a token or image does not exist.
            InvalidInputError: a word does not exist, or the size is empty.

        Examples::

            >>> explanation.heatmap(1).shape == (image.height, image.width)
            True
            >>> float(explanation.heatmap(1, size=(24, 32)).max()) <= 1
            True
        """
        if not -len(self.maps) <= image < len(self.maps):
            raise IndexError(f"Image {image} does not exist; there are {len(self.maps)}.")
        if normalize not in ("token", "answer"):
            raise InvalidOptionError(f"normalize must be 'token' or 'answer', got {normalize!r}.")
        values = self.maps[image][self._rows(index, part)].mean(0)
        if normalize == "token":
            # The largest over all images: the image that matters less stays darker.
            largest = max(float(maps[self._rows(index, part)].mean(0).max()) for maps in self.maps)
        else:
            largest = max(float(maps[self._prompt_count :].max()) for maps in self.maps)
        if size is None:
            width, height = self.images[image].size
            size = (height, width)
        if len(size) != 2 or min(size) < 1:
            raise InvalidInputError(f"size must be (height, width), both at least 1, got {size}.")
        resized = F.interpolate(values[None, None], size=tuple(size), mode="bilinear", align_corners=False)[0, 0]
        return (resized / largest).clamp(0, 1) if largest > 0 else torch.zeros_like(resized)

    def text_relevance(self, index: int | str | Word, part: Part = "answer") -> Tensor:
        r"""
        Return the relevance of each earlier token for a token or word: the logit lens of its id at the earlier token's
        position, clipped at 0 (TAM's text activation). The position right before a token predicts it, so its relevance
        is always high.

        Args:

            index (int, str or Word): As in :meth:`heatmap`.
            part (str, optional): ``'answer'`` or ``'prompt'``.
                        Default: ``'answer'``

        Returns:
            **relevance** (*Tensor*):
                float32 in [0, 1]; the largest is 1, or all are 0 if nothing is relevant. One value per token before
                the (word's first) token: the prompt's tokens, then the answer's; :meth:`earlier_tokens` has their
                texts.
        """
        rows = self._rows(index, part)
        values = self.relevance[rows, : rows[0]].mean(0)
        largest = float(values.max()) if values.numel() else 0.0
        return values / largest if largest > 0 else torch.zeros_like(values)

    def earlier_tokens(self, index: int | str | Word, part: Part = "answer") -> list[str]:
        """Return the texts of the tokens whose relevance :meth:`text_relevance` returns."""
        return [*self.prompt_tokens, *self.tokens][: self._rows(index, part)[0]]

    def word_maps(self, part: Part) -> list[np.ndarray]:
        """Return per image the maps of all words, float32 (words, rows, columns), not negative, not normalized."""
        words = self.words if part == "answer" else self.prompt_words
        return [
            np.stack([maps[self._rows(word, part)].mean(0).numpy() for word in words])
            if words
            else np.zeros((0, *maps.shape[1:]), np.float32)
            for maps in self.maps
        ]

    def word_relevance(self, part: Part) -> np.ndarray:
        """Return the relevance of the prompt's and answer's words (columns) for each word (row), float32 in [0, 1]: the
        largest of the word's tokens, and 0 for words that do not come earlier."""
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
        Convert the answer's explanation to Captum's ``LLMAttributionResult``, which has plots.

        The attribution of a region is the mean of a token's map over it, that of an earlier token is its relevance;
        both are logits of the logit lens at a position, clipped at 0. The whole answer's are the sums over its tokens.

        Args:

            grid (tuple[int, int], optional): Rows and columns of regions in each image.
                        Default: ``(6, 6)``

        Returns:
            **result** (*MultimodalLLMAttributionResult*):
                Its features are the regions, the prompt's tokens, and the answer's tokens except the last.
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
        """Return the :meth:`text_relevance` of an answer's token or word as Captum's ``visualize_text`` draws it."""
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
        """Write the explanation as one self-contained page that needs no network, and return its path."""
        return write_atomically(Path(path), render_html(self).encode())

    def _repr_html_(self) -> str:
        """Return the page in a frame of its own, so that its styles and scripts do not mix with the notebook's."""
        from html import escape

        frame = escape(render_html(self), quote=True)
        return f'<iframe srcdoc="{frame}" sandbox="allow-scripts" style="width:100%;height:640px;border:0"></iframe>'

    def save(self, directory: str | os.PathLike[str]) -> Path:
        r"""
        Save tensors (safetensors), text and settings (JSON) and images (PNG) in a directory, which is created if it
        does not exist. Each file is written as a whole or not at all, the JSON file last.

        Returns:
            **directory** (*Path*)

        Examples::

            >>> from captum_intramodal import Explanation
            >>> Explanation.load(explanation.save("dog")).answer == explanation.answer
            True
        """
        directory = Path(directory)
        tensors = {f"maps.{i}": maps.contiguous() for i, maps in enumerate(self.maps)}
        tensors |= {name: getattr(self, name).contiguous() for name in _SAVED_TENSORS}
        texts = {
            "format": _FORMAT,
            "prompt": self.prompt,
            "answer": self.answer,
            "images": len(self.images),
            "settings": self.settings,
        }
        with replace_files(directory, last=_TEXTS) as temporary:
            for index, image in enumerate(self.images):
                image.save(temporary / f"image-{index}.png")
            save_file(tensors, temporary / _TENSORS)
            (temporary / _TEXTS).write_text(json.dumps(texts, indent=1, ensure_ascii=False), encoding="utf-8")
        return directory

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> Explanation:
        r"""
        Load an explanation that :meth:`save` saved.

        Raises:
            SavedExplanationError: the directory holds no complete explanation.
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
                **{name: tensors[name] for name in _SAVED_TENSORS},
            )
        except (OSError, KeyError, TypeError, json.JSONDecodeError, SafetensorError) as error:
            raise SavedExplanationError(
                f"{directory} holds no complete explanation: {type(error).__name__} while reading it. Save it again."
            ) from error

    def __repr__(self) -> str:
        return (
            f"Explanation({self.answer!r}, {len(self.words)} words, {len(self.images)} images, "
            f"scales={self.settings.get('scales')})"
        )
