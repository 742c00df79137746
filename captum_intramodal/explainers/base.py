r"""What is an explainer? The interface that evaluations call, and a base class with what all explainers share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from PIL import Image
from torch import Tensor

from captum_intramodal._utils.image import check_images
from captum_intramodal._utils.spec import settings_of
from captum_intramodal.adapter.model_adapter import ModelAdapter
from captum_intramodal.adapter.prompts import Prompt
from captum_intramodal.errors import InvalidInputError, InvalidOptionError, NotApplicableError, UnsupportedModelError
from captum_intramodal.models.hooks import evaluation_mode

__all__ = [
    "BaseExplainer",
    "Example",
    "Explainer",
    "TextMaps",
    "cell_grid",
    "check_decoder_sequence",
    "check_layer",
    "check_positive",
    "single_image",
]


class Explainer(Protocol):
    r"""
    Compute one map per token of an answer over the original images.

    Attributes:
        name (str): Name in tables.
        settings (dict): Everything that defines the explainer, JSON-able.
    """

    @property
    def name(self) -> str: ...

    @property
    def settings(self) -> dict[str, Any]: ...

    def __call__(
        self, adapter: ModelAdapter, images: Sequence[Image.Image], prompt: Prompt, answer_ids: Sequence[int]
    ) -> list[Tensor]:
        r"""
        Explain an answer.

        Args:

            adapter (ModelAdapter): The model and its processor.
            images (Sequence[PIL.Image.Image]): The images of the prompt.
            prompt (str or Sequence[Mapping]): The question.
            answer_ids (Sequence[int]): The T tokens of the answer, without those that end it.

        Returns:
            **maps** (*list[Tensor]*):
                For each image float32 (T, rows, columns) on the CPU, finite and not negative. Rows and columns divide
                the whole image evenly; their numbers are up to the explainer.

        Raises:
            NotApplicableError: The explainer does not apply to this example, such as one with several images.
            UnsupportedModelError: The model lacks what the explainer needs.
        """


class TextMaps(NamedTuple):
    r"""
    Relevance of the text tokens of a sequence to the tokens of the answer.

    Args:

        positions (Tensor): Positions of the P text tokens, the answer's included, int64 (P,).
        values (Tensor): For each of the answer's T tokens the relevance of all text tokens, float32 (T, P), not
                    negative; 0 for tokens that are not earlier.
    """

    positions: Tensor
    values: Tensor


class Example(NamedTuple):
    r"""
    An answer to explain.

    Args:

        adapter (ModelAdapter): The model and its processor.
        images (list[PIL.Image.Image]): The images of the prompt, RGB.
        prompt (str or Sequence[Mapping]): The question.
        answer_ids (list[int]): The T tokens of the answer, without those that end it.
    """

    adapter: ModelAdapter
    images: list[Image.Image]
    prompt: Prompt
    answer_ids: list[int]


@dataclass(kw_only=True)
class BaseExplainer(ABC):
    r"""
    Base class of explainers: their options are the fields of a dataclass.

    A call checks the input and puts the model into evaluation mode; a subclass implements :meth:`explain` and, if it
    also explains text, :meth:`relate_text`.

    Attributes:
        name (str): Name in specs, settings and tables; :func:`register_explainer` sets it.
        settings (dict): The name and all options, JSON-able.

    Examples::

        >>> from dataclasses import dataclass
        >>> from captum_intramodal.explainers import BaseExplainer
        >>> @dataclass(kw_only=True)
        ... class LeftHalf(BaseExplainer):
        ...     name = "left_half"
        ...
        ...     value: float = 1.0
        ...
        ...     def explain(self, example):
        ...         maps = torch.tensor([[self.value, 0.0]]).expand(len(example.answer_ids), 1, 2)
        ...         return [maps for _ in example.images]
        >>> LeftHalf().settings
        {'name': 'left_half', 'value': 1.0}
        >>> LeftHalf()(adapter, [image], "describe the picture.", adapter.tokenize_answer("a dog"))[0].shape
        torch.Size([2, 1, 2])
    """

    name: ClassVar[str]

    @property
    def settings(self) -> dict[str, Any]:
        """The name and all options, JSON-able."""
        return settings_of(self)

    def __call__(
        self, adapter: ModelAdapter, images: Sequence[Image.Image], prompt: Prompt, answer_ids: Sequence[int]
    ) -> list[Tensor]:
        """Explain an answer, see :meth:`Explainer.__call__`."""
        with _prepared(adapter, images, prompt, answer_ids) as example:
            maps = self.explain(example)
        return [m.detach().float().clamp_min(0).cpu() for m in maps]

    @abstractmethod
    def explain(self, example: Example) -> list[Tensor]:
        r"""
        Compute the maps of a checked example, in evaluation mode.

        Args:

            example (Example): The example.

        Returns:
            **maps** (*list[Tensor]*): for each image (T, rows, columns); negative values are set to 0 afterwards.
        """

    def explain_text(
        self, adapter: ModelAdapter, images: Sequence[Image.Image], prompt: Prompt, answer_ids: Sequence[int]
    ) -> TextMaps:
        r"""
        Compute the relevance of earlier text tokens to each token of the answer.

        Args:

            adapter, images, prompt, answer_ids: See :meth:`Explainer.__call__`.

        Returns:
            **relevance** (*TextMaps*): of all text tokens of the sequence.

        Raises:
            NotApplicableError: The explainer explains images only.
        """
        with _prepared(adapter, images, prompt, answer_ids) as example:
            positions, values = self.relate_text(example)
        return TextMaps(positions, values.detach().float().clamp_min(0).cpu())

    def relate_text(self, example: Example) -> TextMaps:
        """Compute the relevance of text tokens for a checked example, in evaluation mode."""
        raise NotApplicableError(f"{self.name} explains images only.")


@contextmanager
def _prepared(
    adapter: ModelAdapter, images: Sequence[Image.Image], prompt: Prompt, answer_ids: Sequence[int]
) -> Iterator[Example]:
    """Check the input of an explainer, and put the model into evaluation mode with gradients of its inputs."""
    ids = adapter.tokenize_answer(answer_ids)
    if len(ids) != len(answer_ids):
        raise InvalidInputError(
            f"The last {len(answer_ids) - len(ids)} of {len(answer_ids)} answer_ids end the answer; leave them out."
        )
    # RGB images stay the same objects, by which shared passes recognize an example.
    rgb = [image if getattr(image, "mode", "") == "RGB" else check_images(image)[0] for image in images]
    with torch.enable_grad(), evaluation_mode(adapter.model, gradients=True):
        yield Example(adapter, rgb, prompt, ids)


def single_image(explainer: Explainer, example: Example) -> Image.Image:
    """Return the only image of an example, for explainers that do not apply to several."""
    if len(example.images) != 1:
        raise NotApplicableError(f"{explainer.name} explains answers about one image, got {len(example.images)}.")
    return example.images[0]


def check_decoder_sequence(explainer: Explainer, example: Example) -> None:
    """Raise :class:`UnsupportedModelError` if the decoder's sequence contains no visual tokens."""
    adapter = example.adapter
    if adapter.is_encoder_decoder or adapter.geometry([image.size for image in example.images]).argument is not None:
        raise UnsupportedModelError(
            f"{explainer.name} needs visual tokens in its decoder's sequence; {type(adapter.model).__name__} has none."
        )


def check_layer(layer: int, count: int) -> None:
    """Raise :class:`InvalidOptionError` if a decoder with this number of layers has no such layer."""
    if not -count <= layer < count:
        raise InvalidOptionError(f"There is no layer {layer}; the decoder has {count}.")


def check_positive(name: str, value: float) -> None:
    """Raise :class:`InvalidOptionError` if an option is not positive."""
    if not value > 0:
        raise InvalidOptionError(f"{name} must be positive, got {value}.")


def cell_grid(image: Image.Image, cells: int) -> tuple[int, int]:
    """Return rows and columns of nearly square cells: ``cells`` along the longer side, none smaller than a pixel."""
    side = max(max(image.size) / cells, 1.0)
    return max(1, round(image.height / side)), max(1, round(image.width / side))
