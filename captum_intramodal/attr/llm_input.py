r"""TODO."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from captum.attr import InterpretableInput
from PIL import Image, ImageFilter
from torch import Tensor

from captum_intramodal._utils.image import check_images
from captum_intramodal.adapter.encoding import Encoding
from captum_intramodal.adapter.model_adapter import ModelAdapter
from captum_intramodal.adapter.prompts import Prompt
from captum_intramodal.adapter.text_tokens import TextTokens, shown_prompt
from captum_intramodal.text.spans import group_words

__all__ = ["ImageTextInput", "Row", "grid_segments", "number_segments"]

Row = tuple[bool, ...]


# A blurred baseline keeps what is larger than this fraction of the image's longer side.
_BLUR = 1 / 16


class ImageTextInput(InterpretableInput):
    r"""
    Images and a prompt as the features that a perturbation method hides: regions of the original images, and words
    or tokens of the prompt. Present is 1, absent is 0.

    An absent region is painted over before the image goes through the model's own processor. An absent token is
    replaced by a baseline token, as Captum's ``TextTokenInput`` does, so that all others keep their places.

    Args:

        adapter (ModelAdapter): The model and its processor.
        images (PIL.Image.Image or Sequence[PIL.Image.Image]): The image or images, in the prompt's order.
        prompt (str or Sequence[Mapping]): The question; or chat messages, of which the last one's text has features.
        grid (tuple[int, int], optional): Rows and columns of regions in each image.
                    Default: ``(6, 6)``
        segmentations (Sequence[Tensor], optional): Instead of the grid: per image the segment that each pixel belongs
                    to, integer (height, width), superpixels for example.
                    Default: None
        image_baseline (str or tuple[int, int, int], optional): What an absent region shows: the image's mean color
                    (``'mean'``), the image itself without its details (``'blur'``), or an RGB color from 0 to 255.
                    Default: ``'mean'``
        text (str, optional): Features of the prompt: its ``'words'``, its ``'tokens'`` or ``'none'``.
                    Default: ``'words'``
        text_baseline (int or str, optional): The token that replaces absent ones.
                    Default: None, the tokenizer's unknown token; where it has none, its padding or end token.

    Attributes:
        n_itp_features (int): number of features.
        values (list[str]): their names: regions ``image_<image>_feature_<segment>``, then the text's.
        segmentations (list[Tensor]): per image the feature that each pixel belongs to, int64 (height, width).

    Raises:
        TypeError, ValueError: not images; a segmentation, grid or baseline that does not fit.

    Examples::

        >>> adapter = ModelAdapter(model, processor)
        >>> inp = ImageTextInput(adapter, image, "describe the picture.", grid=(4, 4))
        >>> inp.n_itp_features                                   # 16 regions, 3 words and a full stop
        20
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        images: Image.Image | Sequence[Image.Image],
        prompt: Prompt,
        *,
        grid: tuple[int, int] = (6, 6),
        segmentations: Sequence[Tensor] | None = None,
        image_baseline: Literal["mean", "blur"] | tuple[int, int, int] = "mean",
        text: Literal["words", "tokens", "none"] = "words",
        text_baseline: int | str | None = None,
    ) -> None:
        if text not in ("words", "tokens", "none"):
            raise ValueError(f"text must be 'words', 'tokens' or 'none', got {text!r}.")
        self.adapter = adapter
        self.images = check_images(images)
        self.prompt = prompt
        if segmentations is None:
            segmentations = [grid_segments(image.size, grid) for image in self.images]
        sizes = [tuple(segmentation.shape[::-1]) for segmentation in segmentations]
        if sizes != [image.size for image in self.images] or any(s.is_floating_point() for s in segmentations):
            raise ValueError(
                f"Segmentations of (width, height) {sizes} and types {[s.dtype for s in segmentations]} for images "
                f"of {[image.size for image in self.images]}; they must be integers, of the images' sizes."
            )
        self.segmentations, names = number_segments(segmentations)
        self._baselines = [_baseline(image, image_baseline) for image in self.images]
        self._inputs = adapter.prepare(self.images, prompt)
        self._text_key = "input_ids" if "input_ids" in self._inputs else "decoder_input_ids"
        self.text_baseline = _baseline_token(adapter, text_baseline)
        words, self._positions = self._text_features(text)
        self._n_regions = len(names)
        self.values = [*names, *words]
        self.n_itp_features = len(self.values)

    def _text_features(self, text: str) -> tuple[list[str], list[Tensor]]:
        """Names of the prompt's words or tokens, and their positions in the sequence."""
        if text == "none":
            return [], []
        ids = self._inputs[self._text_key][0]
        encoding = Encoding(self._inputs, ids.cpu(), len(ids), self.adapter.visual_positions(ids).cpu())
        read = TextTokens.of(self.adapter, encoding, shown_prompt(self.prompt))
        positions, spans = read.positions[read.shown.bool()], read.spans[read.shown.bool()].tolist()
        if text == "tokens":
            return [read.prompt[a:b].strip() for a, b in spans], list(positions[:, None])
        words = group_words(read.prompt, spans)
        return [word.text for word in words], [positions[list(word.tokens)] for word in words]

    def to_tensor(self) -> Tensor:
        """All features present: ones, float32 (1, features)."""
        return torch.ones(1, self.n_itp_features)

    def perturb_images(self, perturbed_tensor: Tensor) -> list[Image.Image]:
        """The images with their absent regions painted over."""
        absent = self._absent(perturbed_tensor)
        return [
            Image.fromarray(np.where(absent[segmentation].numpy()[..., None], baseline, np.asarray(image)))
            for image, segmentation, baseline in zip(self.images, self.segmentations, self._baselines, strict=True)
        ]

    def absent_positions(self, perturbed_tensor: Tensor) -> Tensor:
        """Positions of the prompt's absent tokens, int64."""
        absent = self._absent(perturbed_tensor)[self._n_regions :].tolist()
        gone = [positions for positions, away in zip(self._positions, absent, strict=True) if away]
        return torch.cat([torch.empty(0, dtype=torch.int64), *gone])

    def to_model_input(self, perturbed_tensor: Tensor | None = None) -> dict[str, Any]:
        r"""
        What the model reads when some features are absent.

        Args:

            perturbed_tensor (Tensor, optional): (1, features), 0 where a feature is absent.
                        Default: None, all are present.

        Returns:
            *dict*: the model's inputs for the prompt, one example.

        Raises:
            ValueError: another number of features; or the processor writes another prompt for the perturbed images,
                so that words cannot be found in it.
        """
        if perturbed_tensor is None:
            return dict(self._inputs)
        absent = self._absent(perturbed_tensor)
        shown_whole = not absent[: self._n_regions].any()
        inputs = (
            self._inputs if shown_whole else self.adapter.prepare(self.perturb_images(perturbed_tensor), self.prompt)
        )
        gone = self.absent_positions(perturbed_tensor)
        if not len(gone):
            return dict(inputs)
        ids = inputs[self._text_key].clone()
        if ids.shape != self._inputs[self._text_key].shape:
            raise ValueError(
                f"The processor makes {ids.shape[1]} tokens of the perturbed images and prompt, and "
                f"{self._inputs[self._text_key].shape[1]} of the originals; choose another image_baseline."
            )
        ids[0, gone.to(ids.device)] = self.text_baseline
        return inputs | {self._text_key: ids}

    def _absent(self, perturbed_tensor: Tensor) -> Tensor:
        if perturbed_tensor.numel() != self.n_itp_features:
            raise ValueError(
                f"Expected one value for each of {self.n_itp_features} features, got {tuple(perturbed_tensor.shape)}."
            )
        return perturbed_tensor.flatten().cpu() == 0


def grid_segments(size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """An image of (width, height) in rows and columns of cells, counted row by row; int64 (height, width)."""
    (width, height), (rows, columns) = size, grid
    if not (1 <= rows <= height and 1 <= columns <= width):
        raise ValueError(f"grid must be (rows, columns), from 1 to the image's {height} x {width}; got {grid}.")
    row, column = torch.arange(height) * rows // height, torch.arange(width) * columns // width
    return row[:, None] * columns + column


def number_segments(segmentations: Sequence[Tensor]) -> tuple[list[Tensor], list[str]]:
    """Segments of all images as features, counted on from image to image; and the features' names."""
    numbered: list[Tensor] = []
    names: list[str] = []
    for image, segmentation in enumerate(segmentations):
        segments, indices = segmentation.cpu().unique(return_inverse=True)
        numbered.append(len(names) + indices)
        names += [f"image_{image}_feature_{segment}" for segment in segments.tolist()]
    return numbered, names


def _baseline(image: Image.Image, baseline: Any) -> np.ndarray:
    """What the absent parts of an image show, uint8 (height, width, 3) or (3,)."""
    pixels = np.asarray(image)
    if baseline == "mean":
        return pixels.mean((0, 1)).round().astype(np.uint8)
    if baseline == "blur":
        return np.asarray(image.filter(ImageFilter.GaussianBlur(_BLUR * max(image.size))))
    color = np.asarray(baseline)
    if color.shape != (3,) or color.dtype.kind not in "iu" or color.min() < 0 or color.max() > 255:
        raise ValueError(f"image_baseline must be 'mean', 'blur' or a color (r, g, b) from 0 to 255; got {baseline}.")
    return color.astype(np.uint8)


def _baseline_token(adapter: ModelAdapter, baseline: int | str | None) -> int:
    tokenizer = adapter.tokenizer
    token = tokenizer(baseline, add_special_tokens=False)["input_ids"] if isinstance(baseline, str) else [baseline]
    if len(token) != 1:
        raise ValueError(f"text_baseline must be one token; {baseline!r} are {len(token)}.")
    known = adapter.baseline_token if token[0] is None else int(token[0])
    if not 0 <= known < len(tokenizer):
        raise ValueError(f"text_baseline must be a token of the vocabulary of {len(tokenizer)}; got {baseline!r}.")
    return known
