r"""Faithfulness of explanations: what the model says when what an explanation points at is removed, or is all there is.

Everything rests on one order: the features (pixels, or text tokens) from the most to the least important, ties in
random order. A *curve* holds the model's score when a growing fraction of them is kept or removed; insertion, deletion,
AOPC and ROAD are numbers read from curves. What removing means is the business of the score: :class:`PictureRemoval`
imputes pixels, :class:`TokenRemoval` replaces tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d, interpolate

from captum_intramodal.metrics.statistics import Array, Floats, finite
from captum_intramodal.scoring import AnswerScorer, Pictures

__all__ = [
    "FRACTIONS",
    "Imputation",
    "Imputer",
    "PictureRemoval",
    "TokenRemoval",
    "aopc",
    "area_under_curve",
    "check_imputation",
    "deletion_curve",
    "importance_at_pixels",
    "insertion_curve",
    "noisy_linear_imputation",
    "road",
]

Imputation = Literal["blur", "mean", "noisy_linear"]
IMPUTATIONS: tuple[str, ...] = get_args(Imputation)
Masks = npt.NDArray[np.bool_]
# Which features are kept, bool (N, *features) -> the score of each, float (N,).
Score = Callable[[Masks], Array]

FRACTIONS: tuple[float, ...] = tuple(np.linspace(0, 1, 11).round(3).tolist())


def _ranks(values: Array, seed: int) -> npt.NDArray[np.int64]:
    """Rank of every feature in the order of importance, 0 for the most important; ties in random order."""
    flat = finite(values, "values").ravel()
    order = np.lexsort((np.random.default_rng(seed).random(flat.size), -flat))
    ranks = np.empty(flat.size, np.int64)
    ranks[order] = np.arange(flat.size)
    return ranks.reshape(np.shape(values))


def _counts(size: int, fractions: Sequence[float]) -> npt.NDArray[np.int64]:
    given = np.asarray(fractions, dtype=np.float64)
    if given.ndim != 1 or not given.size or not np.isfinite(given).all() or given.min() < 0 or given.max() > 1:
        raise ValueError(f"fractions must be numbers from 0 to 1, got {list(fractions)}.")
    if (np.diff(given) <= 0).any():
        raise ValueError(f"fractions must increase, got {list(fractions)}.")
    return np.rint(given * size).astype(np.int64)


def _scores(score: Score, kept: Masks) -> Floats:
    result = finite(score(kept), "scores")
    if result.shape != (len(kept),):
        raise ValueError(f"score must return one number for each of {len(kept)} masks, got shape {result.shape}.")
    return result


def insertion_curve(score: Score, values: Array, fractions: Sequence[float] = FRACTIONS, seed: int = 0) -> Floats:
    r"""Score with only the most important features, for growing fractions of them.

    Source: Petsiuk et al., "RISE: Randomized input sampling for explanation of black-box models", 2018.

    Args:

        score (Callable): From masks of the kept features, bool (N, \*shape of ``values``), to N scores, such as a
                    :class:`PictureRemoval`.
        values (Tensor or ndarray): Importance of each feature, any shape.
        fractions (Sequence[float]): Increasing fractions that are kept. Default: 0, 0.1, ..., 1
        seed (int): Of the order of equally important features. Default: ``0``

    Returns:
        **curve** (*ndarray*):
            float64, one score for each fraction. Higher early is better.

    Raises:
        ValueError: Fractions that do not increase from 0 to 1, values or scores that are not finite.

    Examples::

        >>> weights = np.array([0.1, 0.6, 0.3])
        >>> insertion_curve(lambda kept: kept @ weights, weights, fractions=(0, 1 / 3, 2 / 3, 1)).round(2).tolist()
        [0.0, 0.6, 0.9, 1.0]
    """
    ranks = _ranks(values, seed)
    return _scores(score, np.stack([ranks < count for count in _counts(ranks.size, fractions)]))


def deletion_curve(
    score: Score, values: Array, fractions: Sequence[float] = FRACTIONS, seed: int = 0, least_first: bool = False
) -> Floats:
    r"""Score without the most important features, for growing fractions of them.

    Source: Petsiuk et al., "RISE: Randomized input sampling for explanation of black-box models", 2018.

    Args:

        score, values, fractions, seed: See :func:`insertion_curve`; ``fractions`` are removed.
        least_first (bool): Remove the least important features first (ROAD's LeRF). Default: ``False``

    Returns:
        **curve** (*ndarray*):
            float64, one score for each fraction. Lower early is better (higher with ``least_first``).

    Raises:
        ValueError: As :func:`insertion_curve`.

    Examples::

        >>> weights = np.array([0.1, 0.6, 0.3])
        >>> deletion_curve(lambda kept: kept @ weights, weights, fractions=(0, 1 / 3, 2 / 3, 1)).round(2).tolist()
        [1.0, 0.4, 0.1, 0.0]
    """
    ranks = _ranks(values, seed)
    if least_first:
        ranks = ranks.size - 1 - ranks
    return _scores(score, np.stack([ranks >= count for count in _counts(ranks.size, fractions)]))


def area_under_curve(curve: Array, fractions: Sequence[float] = FRACTIONS) -> float:
    r"""Area under a curve by the trapezoidal rule, divided by the range of the fractions: the curve's mean height.

    Of an insertion curve it is RISE's *insertion* (higher is better), of a deletion curve *deletion* (lower is better).

    Args:

        curve (Tensor or ndarray): One score for each fraction.
        fractions (Sequence[float]): As given to the curve. Default: 0, 0.1, ..., 1

    Returns:
        **area** (*float*):
            In the scores' unit.

    Examples::

        >>> area_under_curve(np.array([0.0, 1.0, 1.0]), (0.0, 0.5, 1.0))
        0.75
    """
    heights, widths = finite(curve, "curve"), np.diff(np.asarray(fractions, dtype=np.float64))
    if heights.shape != (len(widths) + 1,) or not len(widths):
        raise ValueError(f"curve must have one score for each of {len(widths) + 1} (at least 2) fractions, "
                         f"but its shape is {heights.shape}.")  # fmt: skip
    return float(((heights[1:] + heights[:-1]) / 2 * widths).sum() / widths.sum())


def aopc(curve: Array) -> float:
    r"""Area over the perturbation curve, :math:`\frac{1}{L+1} \sum_{k=0}^{L} f(x^{(0)}) - f(x^{(k)})`.

    Source: Samek et al., "Evaluating the visualization of what a deep neural network has learned", 2017, Eq. 12.

    Args:

        curve (Tensor or ndarray): Of :func:`deletion_curve`; the first score is that of the whole input.

    Returns:
        **aopc** (*float*):
            Mean drop of the score; higher is better.

    Examples::

        >>> aopc(np.array([1.0, 0.5, 0.0]))
        0.5
    """
    scores = finite(curve, "curve")
    return float((scores[0] - scores).mean())


def road(score: Score, values: Array, fractions: Sequence[float] = FRACTIONS[1:-1], seed: int = 0) -> float:
    r"""Remove and debias: mean score without the least important features (LeRF), less that without the most important
    ones (MoRF).

    Source: Rong et al., "A consistent and efficient evaluation strategy for attribution methods", 2022, whose removal
    is :func:`noisy_linear_imputation`: use it with ``PictureRemoval(..., imputation="noisy_linear")``.

    Args:

        score, values, seed: See :func:`insertion_curve`.
        fractions (Sequence[float]): Removed fractions. Default: 0.1, 0.2, ..., 0.9

    Returns:
        **road** (*float*):
            Mean of (LeRF - MoRF) / 2 over the fractions; 0 for a map without information, higher is better.
    """
    ranks, counts = _ranks(values, seed), _counts(np.size(values), fractions)
    removed = [order < count for order in (ranks, ranks.size - 1 - ranks) for count in counts]
    morf, lerf = _scores(score, ~np.stack(removed)).reshape(2, -1)  # In one batch.
    return float((lerf - morf).mean() / 2)


def check_imputation(imputation: str) -> None:
    """That it is the name of one."""
    if imputation not in IMPUTATIONS:
        raise ValueError(f"imputation must be one of {', '.join(IMPUTATIONS)}; got {imputation!r}.")


class Imputer:
    r"""
    Something else in the place of removed pixels.

    Args:

        picture (PIL.Image.Image): The original.
        imputation (str or PIL.Image.Image, optional): What stands in the place of removed pixels. ``'blur'``: the
                    picture blurred with a standard deviation of a tenth of its shorter side (RISE's choice for
                    insertion). ``'mean'``: its mean colour. ``'noisy_linear'``: :func:`noisy_linear_imputation` of the
                    kept pixels. Or a picture of the same size.
                    Default: ``'blur'``
        seed (int, optional): Of the noise.
                    Default: 0

    Raises:
        TypeError: no picture.
        ValueError: an unknown imputation, or a picture of another size; masks of another shape.

    Examples::

        >>> (half,) = Imputer(picture, "mean")(np.arange(picture.width) < np.full((1, picture.height, 1), 100))
    """

    def __init__(self, picture: Image.Image, imputation: Imputation | Image.Image = "blur", seed: int = 0) -> None:
        if not isinstance(picture, Image.Image):
            raise TypeError(
                f"picture must be a PIL image, got {type(picture).__name__}; open a file with PIL.Image.open."
            )
        self.picture = picture = picture.convert("RGB")
        self.seed = seed
        self._pixels = np.asarray(picture)
        if isinstance(imputation, Image.Image):
            if imputation.size != picture.size:
                raise ValueError(f"imputation has size {imputation.size}, the picture {picture.size}.")
            self._fill: npt.NDArray[np.uint8] | None = np.asarray(imputation.convert("RGB"))
        elif imputation == "blur":
            self._fill = np.asarray(picture.filter(ImageFilter.GaussianBlur(min(picture.size) / 10)))
        elif imputation == "mean":
            mean = np.rint(self._pixels.mean((0, 1))).astype(np.uint8)
            self._fill = np.broadcast_to(mean, self._pixels.shape)
        elif imputation == "noisy_linear":
            self._fill = None
        else:
            raise ValueError(f"imputation must be a picture or one of {', '.join(IMPUTATIONS)}; got {imputation!r}.")

    def __call__(self, kept: Masks) -> list[Image.Image]:
        """The picture with the pixels outside each mask, bool (N, height, width), imputed."""
        kept = np.asarray(kept, dtype=bool)
        if kept.ndim != 3 or kept.shape[1:] != self._pixels.shape[:2]:
            raise ValueError(f"Masks of shape {kept.shape} for pictures of {self._pixels.shape[:2]}.")
        if self._fill is None:
            imputed = noisy_linear_imputation(self._pixels, kept, seed=self.seed)
        else:
            imputed = np.where(kept[..., None], self._pixels, self._fill)
        return [Image.fromarray(pixels) for pixels in imputed]

    def nothing_kept(self) -> Image.Image:
        """The picture with all pixels imputed."""
        return self(np.zeros((1, *self._pixels.shape[:2]), bool))[0]


class PictureRemoval:
    r"""
    Score of a picture of which some pixels are removed: from masks of the kept pixels to scores, as the curves need it.

    Args:

        score (Callable): From a list of N pictures to N scores, such as
                    ``lambda pictures: scorer.of_pictures(pictures)[:, token].exp()`` with an
                    :class:`~captum_intramodal.scoring.AnswerScorer`.
        picture (PIL.Image.Image): The original, RGB.
        imputation (str or PIL.Image.Image, optional): What stands in the place of removed pixels, as :class:`Imputer`
                    takes it.
                    Default: ``'blur'``
        seed (int, optional): Of the noise.
                    Default: 0

    Raises:
        ValueError: an unknown imputation, or a picture of another size.

    Examples::

        >>> removal = PictureRemoval(score, picture)
        >>> curve = deletion_curve(removal, removal.importance(heatmap))
        >>> deletion = area_under_curve(curve)
    """

    def __init__(
        self,
        score: Callable[[list[Image.Image]], Array],
        picture: Image.Image,
        imputation: Imputation | Image.Image = "blur",
        seed: int = 0,
    ) -> None:
        self.score = score
        self.pictures = Imputer(picture, imputation, seed)

    def importance(self, map: Array) -> Floats:
        """A map (rows, columns) of any grid, bilinearly at the picture's pixels: float64 (height, width)."""
        return importance_at_pixels(map, self.pictures.picture.size)

    def __call__(self, kept: Masks) -> Array:
        return self.score(self.pictures(kept))


def importance_at_pixels(map: Array, size: tuple[int, int]) -> Floats:
    """A map (rows, columns) of any grid, bilinearly at the pixels of a picture of this size (width, height): float64
    (height, width)."""
    values = torch.from_numpy(finite(map, "map").copy())
    if values.ndim != 2:
        raise ValueError(f"map must be (rows, columns), got shape {tuple(values.shape)}.")
    resized: Floats = interpolate(values[None, None], size[::-1], mode="bilinear", align_corners=False)[0, 0].numpy()
    return resized


class TokenRemoval:
    r"""
    Probability of an answer when some tokens before it are removed: from masks of the kept tokens to scores, as the
    curves need it. It asks of a text map what :class:`PictureRemoval` asks of a picture's.

    Args:

        scorer (AnswerScorer): Of the question and the answer.
        pictures (PIL.Image.Image or Sequence[PIL.Image.Image]): The prompt's picture or pictures, which stay.
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

        >>> removal = TokenRemoval(scorer, picture, positions, token=1)
        >>> deletion = area_under_curve(deletion_curve(removal, relevance))     # relevance of the T tokens, float (T,)
    """

    def __init__(
        self,
        scorer: AnswerScorer,
        pictures: Pictures,
        positions: Tensor | Sequence[int],
        token: int | Sequence[int] | None = None,
        baseline: int | None = None,
    ) -> None:
        self.scorer = scorer
        self.pictures = pictures
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
        scores = self.scorer.without_tokens(self.pictures, self.positions, removed, self.baseline)
        return scores[:, self.tokens].sum(1).exp()


def noisy_linear_imputation(
    pixels: npt.NDArray[np.uint8], kept: Masks, noise: float = 0.01, seed: int = 0
) -> npt.NDArray[np.uint8]:
    r"""
    Fills removed pixels so that a model can hardly tell where something was removed: each is the weighted mean of its
    eight neighbours (direct ones 1/6, diagonal ones 1/12), plus Gaussian noise. The equations of all of them are solved
    together, by conjugate gradients from coarse to fine; what is left of the error lies below the noise.

    Source: Rong et al., "A consistent and efficient evaluation strategy for attribution methods", 2022, section 4.2.

    Args:

        pixels (ndarray): The picture, uint8 (height, width, channels).
        kept (ndarray): Which pixels are kept, bool (N, height, width).
        noise (float): Standard deviation of the noise, as a fraction of the range of values. Default: ``0.01``
        seed (int): Of the noise. Default: ``0``

    Returns:
        **imputed** (*ndarray*):
            uint8 (N, height, width, channels); kept pixels as they are. Where none is kept, the mean colour and noise.

    Raises:
        ValueError: shapes that do not belong together.

    Examples::

        >>> picture = np.full((8, 8, 3), 200, np.uint8)
        >>> kept = np.ones((1, 8, 8), bool)
        >>> kept[:, 2:5, 2:5] = False
        >>> bool((noisy_linear_imputation(picture, kept, noise=0.0) == 200).all())
        True
    """
    if pixels.ndim != 3 or kept.ndim != 3 or kept.shape[1:] != pixels.shape[:2]:
        raise ValueError(
            f"pixels must be (height, width, channels) and kept (N, height, width), got {pixels.shape}, {kept.shape}."
        )
    values = torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)
    masks = torch.from_numpy(kept)[:, None]
    filled = _solve_means(values.expand(len(masks), -1, -1, -1), masks, values.mean((1, 2))[:, None, None])
    shaken = np.random.default_rng(seed).normal(0, noise * 255, pixels.shape).astype(np.float32)
    imputed = (filled.permute(0, 2, 3, 1).numpy() + shaken).round().clip(0, 255).astype(np.uint8)
    return np.where(kept[..., None], pixels, imputed)


def _solve_means(values: Tensor, kept: Tensor, otherwise: Tensor, iterations: int = 10) -> Tensor:
    """Kept values (N, C, H, W), elsewhere the means of their neighbours; ``otherwise`` if none is kept."""
    known = kept.to(values)
    if max(values.shape[2:]) == 1:
        return torch.where(kept, values, otherwise)
    weight = avg_pool2d(known, 2, ceil_mode=True)
    coarse = avg_pool2d(values * known, 2, ceil_mode=True) / weight.clamp_min(torch.finfo(values.dtype).tiny)
    solved = _solve_means(coarse, weight > 0, otherwise, iterations)
    guess = interpolate(solved, values.shape[2:], mode="bilinear", align_corners=False)

    channels = values.shape[1]
    kernel = torch.tensor([[1.0, 2.0, 1.0], [2.0, 0.0, 2.0], [1.0, 2.0, 1.0]]).to(values) / 12
    degree = conv2d(torch.ones_like(known[:1]), kernel[None, None], padding=1)

    def equations(x: Tensor) -> Tensor:
        neighbours = conv2d(x, kernel.expand(channels, 1, 3, 3), padding=1, groups=channels)
        return (degree * x - neighbours) * (1 - known)

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum((2, 3), keepdim=True)

    x = torch.where(kept, values, guess)
    residual = -equations(x)
    direction, energy = residual, dot(residual, residual)
    solved_below = 1e-6 * values.shape[2] * values.shape[3]
    for _ in range(iterations):
        image = equations(direction)
        step = torch.where(energy > solved_below, energy / dot(direction, image), 0.0)
        x, residual = x + step * direction, residual - step * image
        previous, energy = energy, dot(residual, residual)
        direction = residual + torch.where(previous > solved_below, energy / previous, 0.0) * direction
    return x
