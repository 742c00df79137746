r"""Faithfulness of explanations: what the model says when what an explanation points at is removed, or is all there is.

Everything rests on one order: the features (pixels, or text tokens) from the most to the least important, ties in
random order. A *curve* holds the model's score when a growing fraction of them is kept or removed; insertion, deletion,
AOPC and ROAD are numbers read from curves. What removing means is the business of the score: :class:`ImageRemoval`
imputes pixels, :class:`TokenRemoval` replaces tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from captum_intramodal.adapter.answer_scorer import AnswerScorer, Images
from captum_intramodal.functional.imputation import Imputation, Imputer, Masks
from captum_intramodal.metrics.statistics import Array, Floats, finite

__all__ = ["ImageRemoval", "TokenRemoval", "importance_at_pixels"]


class ImageRemoval:
    r"""
    Score of an image of which some pixels are removed: from masks of the kept pixels to scores, as the curves need it.

    Args:

        score (Callable): From a list of N images to N scores, such as
                    ``lambda images: scorer.of_images(images)[:, token].exp()`` with an
                    :class:`~captum_intramodal.scoring.AnswerScorer`.
        image (PIL.Image.Image): The original, RGB.
        imputation (str or PIL.Image.Image, optional): What stands in the place of removed pixels, as :class:`Imputer`
                    takes it.
                    Default: ``'blur'``
        seed (int, optional): Of the noise.
                    Default: 0

    Raises:
        ValueError: an unknown imputation, or an image of another size.

    Examples::

        >>> removal = ImageRemoval(score, image)
        >>> curve = deletion_curve(removal, removal.importance(heatmap))
        >>> deletion = area_under_curve(curve)
    """

    def __init__(
        self,
        score: Callable[[list[Image.Image]], Array],
        image: Image.Image,
        imputation: Imputation | Image.Image = "blur",
        seed: int = 0,
    ) -> None:
        self.score = score
        self.images = Imputer(image, imputation, seed)

    def importance(self, map: Array) -> Floats:
        """A map (rows, columns) of any grid, bilinearly at the image's pixels: float64 (height, width)."""
        return importance_at_pixels(map, self.images.image.size)

    def __call__(self, kept: Masks) -> Array:
        return self.score(self.images(kept))


def importance_at_pixels(map: Array, size: tuple[int, int]) -> Floats:
    """A map (rows, columns) of any grid, bilinearly at the pixels of an image of this size (width, height): float64
    (height, width)."""
    values = torch.from_numpy(finite(map, "map").copy())
    if values.ndim != 2:
        raise ValueError(f"map must be (rows, columns), got shape {tuple(values.shape)}.")
    resized: Floats = interpolate(values[None, None], size[::-1], mode="bilinear", align_corners=False)[0, 0].numpy()
    return resized


class TokenRemoval:
    r"""
    Probability of an answer when some tokens before it are removed: from masks of the kept tokens to scores, as the
    curves need it. It asks of a text map what :class:`ImageRemoval` asks of an image's.

    Args:

        scorer (AnswerScorer): Of the question and the answer.
        images (PIL.Image.Image or Sequence[PIL.Image.Image]): The prompt's image or images, which stay.
        positions (Tensor or Sequence[int]): Positions of T tokens of the prompt or the answer, int64 (T,), counted as
                    :meth:`AnswerScorer.log_probability <captum_intramodal.scoring.AnswerScorer.log_probability>` does.
        token (int or Sequence[int], optional): The answer's token whose probability is the score, from 0; a negative
                    number counts from the end. Of several, as those of a word, the product of their probabilities.
                    Default: None, the probability of the whole answer.
        baseline (int, optional): The token that stands in the place of removed ones.
                    Default: None, :attr:`ModelAdapter.baseline_token
                    <captum_intramodal.adapter.ModelAdapter.baseline_token>`.

    Raises:
        ValueError: positions that are not int64 (T,), or an answer without that token.

    Examples::

        >>> removal = TokenRemoval(scorer, image, positions, token=1)
        >>> deletion = area_under_curve(deletion_curve(removal, relevance))     # relevance of the T tokens, float (T,)
    """

    def __init__(
        self,
        scorer: AnswerScorer,
        images: Images,
        positions: Tensor | Sequence[int],
        token: int | Sequence[int] | None = None,
        baseline: int | None = None,
    ) -> None:
        self.scorer = scorer
        self.images = images
        self.positions = torch.as_tensor(positions).cpu()
        count = len(scorer.answer_ids)
        self.tokens = list(range(count)) if token is None else [token] if isinstance(token, int) else list(token)
        self.baseline = baseline
        if self.positions.ndim != 1 or self.positions.dtype != torch.int64:
            raise ValueError(f"positions must be int64 (T,), got {self.positions.dtype} {tuple(self.positions.shape)}.")
        if not self.tokens or not all(-count <= each < count for each in self.tokens):
            raise ValueError(
                f"token must be from {-count} to {count - 1} for an answer of {count} tokens, got {token}."
            )

    def __call__(self, kept: Masks) -> Tensor:
        removed = torch.from_numpy(~np.asarray(kept, dtype=np.bool_))
        scores = self.scorer.without_tokens(self.images, self.positions, removed, self.baseline)
        return scores[:, self.tokens].sum(1).exp()
