r"""Score changed inputs: how probable is an answer when pixels of the image or tokens of the text are removed?

Each class is a score function for :func:`insertion_curve`, :func:`deletion_curve` and :func:`road`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from captum_intramodal.adapter.answer_scorer import AnswerScorer, Images
from captum_intramodal.errors import InvalidInputError, InvalidOptionError
from captum_intramodal.functional.imputation import Imputation, Imputer, Masks
from captum_intramodal.metrics.arrays import Array, Floats, finite_array, resize_bilinear

__all__ = ["ImageRemoval", "TokenRemoval", "importance_at_pixels"]


class ImageRemoval:
    r"""Score an image from which pixels are removed: a function from masks of the kept pixels, bool (N, height, width),
    to N scores.

    Args:

        score (Callable): Function from a list of N images to N scores, such as
                    ``lambda images: scorer.log_probability(images)[:, token].exp()`` with an
                    :class:`~captum_intramodal.adapter.AnswerScorer`.
        image (PIL.Image.Image): The original image, RGB.
        imputation (str or PIL.Image.Image, optional): How to fill removed pixels, as in :class:`Imputer`.
                    Default: ``'blur'``
        seed (int, optional): Seed for the noise of ``'noisy_linear'``.
                    Default: ``0``

    Raises:
        TypeError: ``image`` is not a PIL image.
        InvalidOptionError: ``imputation`` is unknown.
        InvalidInputError: ``imputation`` is an image of a different size.

    Examples::

        >>> from captum_intramodal.adapter import AnswerScorer
        >>> from captum_intramodal.metrics import ImageRemoval, area_under_curve, deletion_curve
        >>> scorer = AnswerScorer(adapter, "describe the picture.", explanation.answer)
        >>> token = -2  # the last word; its period follows
        >>> removal = ImageRemoval(lambda images: scorer.log_probability(images)[:, token].exp(), image)
        >>> curve = deletion_curve(removal, removal.importance(explanation.maps[0][token]))
        >>> curve.shape, 0 < area_under_curve(curve) < 1
        ((11,), True)
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
        """Resize a map (rows, columns) bilinearly to the image's pixels: float64 (height, width)."""
        return importance_at_pixels(map, self.images.image.size)

    def __call__(self, kept: Masks) -> Array:
        """Score the image with only the kept pixels, for each mask."""
        return self.score(self.images(kept))


def importance_at_pixels(map: Array, size: tuple[int, int]) -> Floats:
    """Resize a map (rows, columns) bilinearly to an image of this size (width, height): float64 (height, width)."""
    values = finite_array(map, "map")
    if values.ndim != 2:
        raise InvalidInputError(f"map must be (rows, columns), got shape {values.shape}; pass one token's map.")
    return resize_bilinear(values, (size[1], size[0]))


class TokenRemoval:
    r"""Score an answer with text tokens before it removed: a function from masks of the kept tokens, bool (N, T), to N
    probabilities. It evaluates text relevance as :class:`ImageRemoval` evaluates image maps.

    Args:

        scorer (AnswerScorer): Scorer of the question and the answer.
        images (PIL.Image.Image or Sequence[PIL.Image.Image]): The prompt's image or images, which are not changed.
        positions (Tensor or Sequence[int]): Positions of T tokens of the prompt or the answer, int64 (T,), as in
                    :meth:`AnswerScorer.log_probability
                    <captum_intramodal.adapter.AnswerScorer.log_probability>`.
        token (int or Sequence[int], optional): Index of the answer token whose probability is the score; negative
                    indices count from the end. For several tokens, such as those of a word, the score is the product
                    of their probabilities.
                    Default: ``None``, the probability of the whole answer
        baseline (int, optional): Id of the token that replaces removed ones.
                    Default: ``None``, :attr:`ModelAdapter.baseline_token
                    <captum_intramodal.adapter.ModelAdapter.baseline_token>`

    Raises:
        InvalidInputError: ``positions`` are not int64 (T,).
        InvalidOptionError: The answer has no such ``token``.

    Examples::

        >>> from captum_intramodal.adapter import AnswerScorer
        >>> from captum_intramodal.metrics import TokenRemoval, deletion_curve
        >>> prompt = "describe the picture."
        >>> scorer = AnswerScorer(adapter, prompt, "a dog.")
        >>> prompt_length = adapter.sequence_length(adapter.prepare([image], prompt))
        >>> positions = torch.arange(prompt_length - 6, prompt_length)
        >>> removal = TokenRemoval(scorer, image, positions, token=1)
        >>> relevance = torch.tensor([0.1, 0.4, 0.0, 0.3, 0.2, 0.0])  # of the six tokens
        >>> deletion_curve(removal, relevance, fractions=(0, 0.5, 1)).shape
        (3,)
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
            raise InvalidInputError(
                f"positions must be int64 (T,), got {self.positions.dtype} {tuple(self.positions.shape)}."
            )
        if not self.tokens or not all(-count <= index < count for index in self.tokens):
            raise InvalidOptionError(
                f"token must be from {-count} to {count - 1} for an answer of {count} tokens, got {token}."
            )

    def __call__(self, kept: Masks) -> Tensor:
        """Compute the probability with only the kept tokens, for each mask."""
        removed = torch.from_numpy(~np.asarray(kept, dtype=np.bool_))
        scores = self.scorer.without_tokens(self.images, self.positions, removed, self.baseline)
        return scores[:, self.tokens].sum(1).exp()
