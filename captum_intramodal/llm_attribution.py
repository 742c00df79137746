r"""Captum's LLM results for pictures and text: of an explanation, or of a perturbation method on words and regions."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any, Literal

import numpy as np
import torch
from captum.attr import (
    Attribution,
    FeatureAblation,
    FeaturePermutation,
    InterpretableInput,
    Lime,
    LLMAttributionResult,
    Occlusion,
    PerturbationAttribution,
    ShapleyValueSampling,
)
from PIL import Image, ImageFilter
from torch import Tensor

from captum_intramodal._captum import log_usage
from captum_intramodal.adapter import Encoding, ModelAdapter, Prompt, check_images
from captum_intramodal.hooks import evaluation_mode
from captum_intramodal.reading import TextTokens, shown_prompt
from captum_intramodal.scoring import AnswerScorer
from captum_intramodal.text import decode_pieces, group_words

__all__ = [
    "ImageTextInput",
    "MultimodalLLMAttribution",
    "MultimodalLLMAttributionResult",
    "grid_segments",
    "number_segments",
]

Row = tuple[bool, ...]

# A blurred baseline keeps what is larger than this fraction of the picture's longer side.
_BLUR = 1 / 16


class MultimodalLLMAttributionResult(LLMAttributionResult):
    r"""
    Captum's result of an LLM attribution, whose input features are regions of pictures and pieces of text. It has the
    plots of Captum's own (``plot_token_attr``, ``plot_seq_attr``), and draws the regions over their picture.

    Args:

        input_tokens (list[str]): Names of the features: regions ``image_<picture>_feature_<segment>``, then text.
        output_tokens (list[str]): The answer's tokens.
        seq_attr (Tensor): Attributions of the whole answer, float32 (features,).
        token_attr (Tensor): Of each of its tokens, float32 (tokens, features).
        images (list[PIL.Image.Image]): The pictures.
        segmentations (list[Tensor]): Per picture the index of the feature that each pixel belongs to, int64
                    (height, width).
    """

    def __init__(
        self,
        *,
        input_tokens: list[str],
        output_tokens: list[str],
        seq_attr: Tensor,
        token_attr: Tensor,
        images: list[Image.Image],
        segmentations: list[Tensor],
    ) -> None:
        super().__init__(
            seq_attr=seq_attr, token_attr=token_attr, input_tokens=input_tokens, output_tokens=output_tokens
        )
        self.images = images
        self.segmentations = segmentations

    def heatmap(self, target_token_pos: int | tuple[int, int] | None = None, image: int = 0) -> Tensor:
        r"""
        Attributions of a picture's regions, in its frame.

        Args:

            target_token_pos (int or tuple[int, int], optional): An answer's token, or ``(first, end)`` of several,
                        whose attributions are summed up.
                        Default: None, the whole answer.
            image (int, optional): Which picture.
                        Default: 0

        Returns:
            *Tensor* float32 (height, width), of either sign.

        Raises:
            IndexError: a token or picture that does not exist.
        """
        if target_token_pos is None:
            attr = self.seq_attr
        elif isinstance(target_token_pos, int):
            attr = self.token_attr[target_token_pos]
        else:
            attr = self.token_attr[slice(*target_token_pos)].sum(0)
        result: Tensor = attr[self.segmentations[image]]
        return result

    def plot_image_heatmap(
        self, show: bool = False, target_token_pos: int | tuple[int, int] | None = None, image: int = 0
    ) -> Any:
        r"""
        Draws :meth:`heatmap` over the picture in grey: green speaks for the answer, red against it.

        Args:

            show (bool, optional): Show the plot instead of returning it.
                        Default: False
            target_token_pos, image: As in :meth:`heatmap`.

        Returns:
            None or *tuple[Figure, Axes]*, as Captum's plots.
        """
        import matplotlib.pyplot as plt

        heat = self.heatmap(target_token_pos, image).numpy()
        largest = float(np.abs(heat).max()) or 1.0
        figure, axes = plt.subplots()
        axes.imshow(self.images[image].convert("L"), cmap="gray")
        drawn = axes.imshow(heat, vmin=-largest, vmax=largest, cmap="RdYlGn", alpha=0.6)
        figure.colorbar(drawn, ax=axes, label="Attribution")
        axes.axis("off")
        if show:
            plt.show()
            return None
        return figure, axes


class ImageTextInput(InterpretableInput):
    r"""
    Pictures and a prompt as the features that a perturbation method hides: regions of the original pictures, and words
    or tokens of the prompt. Present is 1, absent is 0.

    An absent region is painted over before the picture goes through the model's own processor. An absent token is
    replaced by a baseline token, as Captum's ``TextTokenInput`` does, so that all others keep their places.

    Args:

        adapter (ModelAdapter): The model and its processor.
        images (PIL.Image.Image or Sequence[PIL.Image.Image]): The picture or pictures, in the prompt's order.
        prompt (str or Sequence[Mapping]): The question; or chat messages, of which the last one's text has features.
        grid (tuple[int, int], optional): Rows and columns of regions in each picture.
                    Default: ``(6, 6)``
        segmentations (Sequence[Tensor], optional): Instead of the grid: per picture the segment that each pixel belongs
                    to, integer (height, width), superpixels for example.
                    Default: None
        image_baseline (str or tuple[int, int, int], optional): What an absent region shows: the picture's mean colour
                    (``'mean'``), the picture itself without its details (``'blur'``), or an RGB colour from 0 to 255.
                    Default: ``'mean'``
        text (str, optional): Features of the prompt: its ``'words'``, its ``'tokens'`` or ``'none'``.
                    Default: ``'words'``
        text_baseline (int or str, optional): The token that replaces absent ones.
                    Default: None, the tokenizer's unknown token; where it has none, its padding or end token.

    Attributes:
        n_itp_features (int): number of features.
        values (list[str]): their names: regions ``image_<picture>_feature_<segment>``, then the text's.
        segmentations (list[Tensor]): per picture the feature that each pixel belongs to, int64 (height, width).

    Raises:
        TypeError, ValueError: not pictures; a segmentation, grid or baseline that does not fit.

    Examples::

        >>> adapter = ModelAdapter(model, processor)
        >>> inp = ImageTextInput(adapter, picture, "describe the picture.", grid=(4, 4))
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
                f"Segmentations of (width, height) {sizes} and types {[s.dtype for s in segmentations]} for pictures "
                f"of {[image.size for image in self.images]}; they must be integers, of the pictures' sizes."
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
        """The pictures with their absent regions painted over."""
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
            ValueError: another number of features; or the processor writes another prompt for the perturbed pictures,
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
                f"The processor makes {ids.shape[1]} tokens of the perturbed pictures and prompt, and "
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


class MultimodalLLMAttribution(Attribution):
    r"""
    A Captum perturbation method on the features of pictures and text, as ``LLMAttribution`` is on those of text: its
    attributions are for the log-probability of each token of the answer, and of the whole.

    Every perturbation is one teacher-forced pass from its own processor inputs, without a cache, for all tokens of the
    answer together, so that pictures count for all of them. ``perturbations_per_eval`` perturbations run as one batch
    where the model says in a batch what it says alone, which is tried once; else one by one. A combination of
    features that occurs again is not run again.

    Args:

        attr_method (PerturbationAttribution): An instance such as ``FeatureAblation(model)``: FeatureAblation,
                    ShapleyValueSampling, ShapleyValues, Lime or KernelShap. It stays as it is; a copy runs.
        adapter (ModelAdapter): The model and its processor.
        attr_target (str, optional): ``'log_prob'`` or ``'prob'``.
                    Default: ``'log_prob'``

    Raises:
        TypeError: another method.
        ValueError: another ``attr_target``.

    Examples::

        >>> adapter = ModelAdapter(model, processor)
        >>> inp = ImageTextInput(adapter, picture, "describe the picture.", grid=(4, 4))
        >>> llm_attribution = MultimodalLLMAttribution(ShapleyValueSampling(model), adapter)
        >>> result = llm_attribution.attribute(inp, "a dog.", n_samples=10, perturbations_per_eval=8)
        >>> result.token_attr.shape                              # (tokens of the answer, features)
        >>> result.plot_image_heatmap(target_token_pos=1)
    """

    SUPPORTED_METHODS = (FeatureAblation, ShapleyValueSampling, Lime)
    # Subclasses of FeatureAblation that need windows of an image, or a batch of examples.
    UNSUPPORTED_METHODS = (Occlusion, FeaturePermutation)

    def __init__(
        self,
        attr_method: PerturbationAttribution,
        adapter: ModelAdapter,
        attr_target: Literal["log_prob", "prob"] = "log_prob",
    ) -> None:
        if not isinstance(attr_method, self.SUPPORTED_METHODS) or isinstance(attr_method, self.UNSUPPORTED_METHODS):
            raise TypeError(
                "attr_method must be an instance of FeatureAblation, ShapleyValueSampling, ShapleyValues, Lime or "
                f"KernelShap, got {attr_method!r}."
            )
        if attr_target not in ("log_prob", "prob"):
            raise ValueError(f"attr_target must be 'log_prob' or 'prob', got {attr_target!r}.")
        super().__init__(attr_method.forward_func)
        self.attr_method = attr_method
        self.adapter = adapter
        self.attr_target = attr_target

    @log_usage(part_of_slo=True)
    def attribute(
        self,
        inp: ImageTextInput,
        target: str | Sequence[int] | Tensor | None = None,
        num_trials: int = 1,
        max_new_tokens: int = 128,
        **kwargs: Any,
    ) -> MultimodalLLMAttributionResult:
        r"""
        Args:

            inp (ImageTextInput): Pictures and prompt.
            target (str, Sequence[int] or Tensor, optional): The answer, as text or token ids.
                        Default: None, the model's own greedy answer.
            num_trials (int, optional): How often the method runs; the attributions are averaged.
                        Default: 1
            max_new_tokens (int, optional): Where the model's own answer ends at the latest.
                        Default: 128
            **kwargs (Any, optional): Arguments of the method's ``attribute``, such as ``perturbations_per_eval`` and
                        ``n_samples``.

        Returns:
            *MultimodalLLMAttributionResult*: on the CPU; Lime and KernelShap too have attributions of each token, from
            the same samples.

        Raises:
            ValueError: an empty answer, words that the tokenizer does not know, or no trials.
        """
        if num_trials < 1:
            raise ValueError(f"num_trials must be at least 1, got {num_trials}.")
        if target is None:
            with evaluation_mode(self.adapter.model):
                answer_ids = self.adapter.generate(inp.to_model_input(), max_new_tokens)
            if not answer_ids:
                raise ValueError("The model answered nothing; there is no word to explain. Pass a target.")
        else:
            answer_ids = self.adapter.tokenize_answer(target.tolist() if isinstance(target, Tensor) else target)
        method = copy(self.attr_method)
        method.forward_func = _AnswerForward(self.adapter, inp, answer_ids, self.attr_target == "prob")
        attr = torch.zeros(1 + len(answer_ids), inp.n_itp_features)
        for _ in range(num_trials):
            # The same random features for every token, whose passes are then known.
            state = torch.get_rng_state()
            for output, row in enumerate(attr):
                torch.set_rng_state(state)
                row += method.attribute(inp.to_tensor(), target=output, **kwargs).reshape(-1) / num_trials
        answer, spans = decode_pieces(self.adapter.tokenizer, answer_ids)
        return MultimodalLLMAttributionResult(
            input_tokens=inp.values,
            output_tokens=[answer[a:b].strip() for a, b in spans],
            seq_attr=attr[0],
            token_attr=attr[1:],
            images=inp.images,
            segmentations=inp.segmentations,
        )

    def attribute_future(self) -> None:
        """This method is not implemented for MultimodalLLMAttribution."""
        raise NotImplementedError("attribute_future is not implemented for MultimodalLLMAttribution")


class _AnswerForward:
    """(Log-)probability of an answer, and of each of its tokens, as a function of which features are present."""

    def __init__(self, adapter: ModelAdapter, inp: ImageTextInput, answer_ids: list[int], as_probability: bool) -> None:
        self.scorer = AnswerScorer(adapter, inp.prompt, answer_ids)
        self.inp = inp
        self.as_probability = as_probability
        self.known: dict[Row, Tensor] = {}

    def __call__(self, features: Tensor) -> Tensor:
        """(B, features) -> (B, 1 + tokens), float32, on the CPU."""
        rows: list[Row] = [tuple(row) for row in (features != 0).tolist()]
        new = [row for row in dict.fromkeys(rows) if row not in self.known]
        if new:
            self.scorer.batch_size = len(new)
            pictures = [self.inp.perturb_images(torch.tensor(row)) for row in new]
            replaced = [self.inp.absent_positions(torch.tensor(row)) for row in new]
            read = self.scorer.log_probability(pictures, replaced, self.inp.text_baseline)
            self.known |= zip(new, read, strict=True)
        log_probability = torch.stack([self.known[row] for row in rows])
        values = torch.cat([log_probability.sum(1, keepdim=True), log_probability], dim=1)
        return values.exp() if self.as_probability else values


def grid_segments(size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """A picture of (width, height) in rows and columns of cells, counted row by row; int64 (height, width)."""
    (width, height), (rows, columns) = size, grid
    if not (1 <= rows <= height and 1 <= columns <= width):
        raise ValueError(f"grid must be (rows, columns), from 1 to the picture's {height} x {width}; got {grid}.")
    row, column = torch.arange(height) * rows // height, torch.arange(width) * columns // width
    return row[:, None] * columns + column


def number_segments(segmentations: Sequence[Tensor]) -> tuple[list[Tensor], list[str]]:
    """Segments of all pictures as features, counted on from picture to picture; and the features' names."""
    numbered: list[Tensor] = []
    names: list[str] = []
    for image, segmentation in enumerate(segmentations):
        segments, indices = segmentation.cpu().unique(return_inverse=True)
        numbered.append(len(names) + indices)
        names += [f"image_{image}_feature_{segment}" for segment in segments.tolist()]
    return numbered, names


def _baseline(image: Image.Image, baseline: Any) -> np.ndarray:
    """What the absent parts of a picture show, uint8 (height, width, 3) or (3,)."""
    pixels = np.asarray(image)
    if baseline == "mean":
        return pixels.mean((0, 1)).round().astype(np.uint8)
    if baseline == "blur":
        return np.asarray(image.filter(ImageFilter.GaussianBlur(_BLUR * max(image.size))))
    colour = np.asarray(baseline)
    if colour.shape != (3,) or colour.dtype.kind not in "iu" or colour.min() < 0 or colour.max() > 255:
        raise ValueError(f"image_baseline must be 'mean', 'blur' or a colour (r, g, b) from 0 to 255; got {baseline}.")
    return colour.astype(np.uint8)


def _baseline_token(adapter: ModelAdapter, baseline: int | str | None) -> int:
    tokenizer = adapter.tokenizer
    token = tokenizer(baseline, add_special_tokens=False)["input_ids"] if isinstance(baseline, str) else [baseline]
    if len(token) != 1:
        raise ValueError(f"text_baseline must be one token; {baseline!r} are {len(token)}.")
    known = adapter.baseline_token if token[0] is None else int(token[0])
    if not 0 <= known < len(tokenizer):
        raise ValueError(f"text_baseline must be a token of the vocabulary of {len(tokenizer)}; got {baseline!r}.")
    return known
