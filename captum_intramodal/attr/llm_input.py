r"""Describe images and a prompt as the features that a perturbation method removes: regions, and words or tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from captum.attr import InterpretableInput
from PIL import Image
from torch import Tensor

from captum_intramodal._utils.image import blur_image, check_images
from captum_intramodal.adapter.encoding import Encoding
from captum_intramodal.adapter.model_adapter import ModelAdapter
from captum_intramodal.adapter.prompts import Prompt
from captum_intramodal.adapter.text_tokens import TextTokens, user_text
from captum_intramodal.errors import InvalidInputError, InvalidOptionError
from captum_intramodal.text.spans import group_words

__all__ = ["ImageTextInput"]


class ImageTextInput(InterpretableInput):
    r"""
    Images and a prompt as features for a perturbation method: regions of the original images, and words or tokens of
    the prompt. In a feature vector, 1 means present and 0 absent.

    An absent region is painted over before the image goes through the model's own processor. An absent token is
    replaced by a baseline token, as in Captum's ``TextTokenInput``, so the other tokens keep their positions.

    Args:

        adapter (ModelAdapter): The model and its processor.
        images (PIL.Image.Image or Sequence[PIL.Image.Image]): The image or images, in the prompt's order.
        prompt (str or Sequence[Mapping]): The question; or chat messages, of which the last one's text has features.
        grid (tuple[int, int], optional): Rows and columns of regions in each image.
                    Default: ``(6, 6)``
        segmentations (Sequence[Tensor], optional): Regions that replace the grid: for each image, the segment that each
                    pixel belongs to, such as superpixels; integer (height, width).
                    Default: None
        image_baseline (str or tuple[int, int, int], optional): Content of an absent region: the image's mean color
                    (``'mean'``), the blurred image (``'blur'``), or an RGB color from 0 to 255.
                    Default: ``'mean'``
        text (str, optional): Features of the prompt: its ``'words'``, its ``'tokens'`` or ``'none'``.
                    Default: ``'words'``
        text_baseline (int or str, optional): The token that replaces absent ones.
                    Default: None, the tokenizer's unknown token, or else its padding or end token.

    Attributes:
        n_itp_features (int): Number of features.
        values (list[str]): Their names: regions ``image_<image>_feature_<segment>``, then the text's.
        segmentations (list[Tensor]): For each image, the feature that each pixel belongs to, int64 (height, width).

    Raises:
        TypeError: if ``images`` are not PIL images.
        InvalidOptionError: if ``grid``, ``image_baseline``, ``text`` or ``text_baseline`` is invalid.
        InvalidInputError: if the segmentations do not fit the images.

    Examples::

        >>> from captum_intramodal import ImageTextInput
        >>> inp = ImageTextInput(adapter, image, "describe the picture.", grid=(4, 4))
        >>> inp.n_itp_features  # 16 regions, 3 words and a full stop
        20
        >>> inp.values[-4:]
        ['describe', 'the', 'picture', '.']
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
            raise InvalidOptionError(f"text must be 'words', 'tokens' or 'none', got {text!r}.")
        self.adapter = adapter
        self.images = check_images(images)
        self.prompt = prompt
        if segmentations is None:
            segmentations = [grid_segments(image.size, grid) for image in self.images]
        sizes = [tuple(segmentation.shape[::-1]) for segmentation in segmentations]
        if sizes != [image.size for image in self.images] or any(s.is_floating_point() for s in segmentations):
            raise InvalidInputError(
                f"segmentations must be integers, of the images' (width, height) {[i.size for i in self.images]}; got "
                f"{sizes} and dtypes {[s.dtype for s in segmentations]}."
            )
        self.segmentations, region_names = number_segments(segmentations)
        self._baselines = [_image_baseline(image, image_baseline) for image in self.images]
        self._inputs = adapter.prepare(self.images, prompt)
        self._text_key = "input_ids" if "input_ids" in self._inputs else "decoder_input_ids"
        self.text_baseline = _baseline_token(adapter, text_baseline)
        text_names, self._positions = self._text_features(text)
        self._n_regions = len(region_names)
        self.values = [*region_names, *text_names]
        self.n_itp_features = len(self.values)

    def _text_features(self, text: str) -> tuple[list[str], list[Tensor]]:
        """Return the names of the prompt's words or tokens, and each one's positions in the sequence."""
        if text == "none":
            return [], []
        ids = self._inputs[self._text_key][0]
        encoding = Encoding(self._inputs, ids.cpu(), len(ids), self.adapter.visual_positions(ids).cpu())
        tokens = TextTokens.from_encoding(self.adapter, encoding, user_text(self.prompt))
        positions, spans = tokens.positions[tokens.displayed.bool()], tokens.spans[tokens.displayed.bool()].tolist()
        if text == "tokens":
            return [tokens.prompt[a:b].strip() for a, b in spans], list(positions[:, None])
        words = group_words(tokens.prompt, spans)
        return [word.text for word in words], [positions[list(word.tokens)] for word in words]

    def to_tensor(self) -> Tensor:
        """Return the feature vector with all features present, float32 (1, features)."""
        return torch.ones(1, self.n_itp_features)

    def perturb_images(self, perturbed_tensor: Tensor) -> list[Image.Image]:
        """Paint over the absent regions of the images."""
        absent = self._absent(perturbed_tensor)
        return [
            Image.fromarray(np.where(absent[segmentation].numpy()[..., None], baseline, np.asarray(image)))
            for image, segmentation, baseline in zip(self.images, self.segmentations, self._baselines, strict=True)
        ]

    def absent_positions(self, perturbed_tensor: Tensor) -> Tensor:
        """Return the positions of the prompt's absent tokens, int64."""
        absent = self._absent(perturbed_tensor)[self._n_regions :].tolist()
        replaced = [positions for positions, is_absent in zip(self._positions, absent, strict=True) if is_absent]
        return torch.cat([torch.empty(0, dtype=torch.int64), *replaced])

    def to_model_input(self, perturbed_tensor: Tensor | None = None) -> dict[str, Any]:
        r"""
        Prepare the model's inputs with some features absent.

        Args:

            perturbed_tensor (Tensor, optional): (1, features), 0 for absent features.
                        Default: None, all features present.

        Returns:
            **inputs** (*dict*): the model's inputs for the prompt, one example.

        Raises:
            InvalidInputError: if the number of features is wrong, or if the processor writes a longer or shorter
                prompt for the perturbed images, so that the words' positions are unknown.
        """
        if perturbed_tensor is None:
            return dict(self._inputs)
        inputs = self._inputs
        if self._absent(perturbed_tensor)[: self._n_regions].any():
            inputs = self.adapter.prepare(self.perturb_images(perturbed_tensor), self.prompt)
        replaced = self.absent_positions(perturbed_tensor)
        if not len(replaced):
            return dict(inputs)
        ids = inputs[self._text_key].clone()
        if ids.shape != self._inputs[self._text_key].shape:
            raise InvalidInputError(
                f"The prompt has {ids.shape[1]} tokens with the perturbed images and "
                f"{self._inputs[self._text_key].shape[1]} with the originals, so its words cannot be located; choose "
                "another image_baseline."
            )
        ids[0, replaced.to(ids.device)] = self.text_baseline
        return inputs | {self._text_key: ids}

    def _absent(self, perturbed_tensor: Tensor) -> Tensor:
        """Return whether each feature is absent, bool (features,)."""
        if perturbed_tensor.numel() != self.n_itp_features:
            raise InvalidInputError(
                f"Expected one value for each of {self.n_itp_features} features, got {tuple(perturbed_tensor.shape)}."
            )
        return perturbed_tensor.flatten().cpu() == 0


def grid_segments(size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Divide an image of (width, height) into rows and columns of segments, numbered row by row; int64 (height, width).

    Raises:
        InvalidOptionError: if the grid is empty or finer than the image.
    """
    (width, height), (rows, columns) = size, grid
    if not (1 <= rows <= height and 1 <= columns <= width):
        raise InvalidOptionError(f"grid must be (rows, columns), from 1 to the image's {height} x {width}; got {grid}.")
    row, column = torch.arange(height) * rows // height, torch.arange(width) * columns // width
    return row[:, None] * columns + column


def number_segments(segmentations: Sequence[Tensor]) -> tuple[list[Tensor], list[str]]:
    """Number the segments of all images consecutively; return each image's segments and the names of all."""
    numbered: list[Tensor] = []
    names: list[str] = []
    for image, segmentation in enumerate(segmentations):
        segments, indices = segmentation.cpu().unique(return_inverse=True)
        numbered.append(len(names) + indices)
        names += [f"image_{image}_feature_{segment}" for segment in segments.tolist()]
    return numbered, names


def _image_baseline(image: Image.Image, baseline: str | tuple[int, int, int]) -> np.ndarray:
    """Return the content of an image's absent regions, uint8 (height, width, 3) or (3,)."""
    pixels = np.asarray(image)
    if baseline == "mean":
        return pixels.mean((0, 1)).round().astype(np.uint8)
    if baseline == "blur":
        return np.asarray(blur_image(image, "baseline"))
    color = np.asarray(baseline)
    if color.shape != (3,) or color.dtype.kind not in "iu" or color.min() < 0 or color.max() > 255:
        raise InvalidOptionError(
            f"image_baseline must be 'mean', 'blur' or a color (r, g, b) from 0 to 255; got {baseline!r}."
        )
    return color.astype(np.uint8)


def _baseline_token(adapter: ModelAdapter, baseline: int | str | None) -> int:
    """Return the id of the baseline token, given as an id or as text."""
    tokenizer = adapter.tokenizer
    token = tokenizer(baseline, add_special_tokens=False)["input_ids"] if isinstance(baseline, str) else [baseline]
    if len(token) != 1:
        raise InvalidOptionError(f"text_baseline must be one token, got {len(token)} tokens for {baseline!r}.")
    token_id = adapter.baseline_token if token[0] is None else int(token[0])
    if not 0 <= token_id < len(tokenizer):
        raise InvalidOptionError(
            f"text_baseline must be an id of the vocabulary, from 0 to {len(tokenizer) - 1}; got {baseline!r}."
        )
    return token_id
