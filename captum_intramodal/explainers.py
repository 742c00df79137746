r"""The explainers that an evaluation compares: each a name and options that define it, each the same call.

An explainer turns an answer into one map per token over the original images. :data:`EXPLAINERS` lists them,
:func:`make_explainer` makes one from text: ``'logit_lens:layer=-2'``, ``'msea+arc:scales=[1,2],k=20'``,
``'arc+grad_cam'``.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, get_args

import numpy as np
import torch
import torch.nn.functional as F
from captum.attr import Attribution, InputXGradient, IntegratedGradients, LayerGradCam, NoiseTunnel, Occlusion
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedModel

from captum_intramodal._utils.image import check_images, image_to_tensor, resize_images
from captum_intramodal._utils.spec import build, parse_spec, settings_of
from captum_intramodal.adapter.answer_scorer import AnswerScorer
from captum_intramodal.adapter.encoding import Encoding
from captum_intramodal.adapter.model_adapter import ModelAdapter
from captum_intramodal.adapter.prompts import Prompt
from captum_intramodal.adapter.text_tokens import text_positions
from captum_intramodal.attr.arc import ARC
from captum_intramodal.attr.pixel_forward import PixelForward
from captum_intramodal.attr.visual_token_attribution import VisualTokenAttribution, draw_positions
from captum_intramodal.errors import NotApplicableError
from captum_intramodal.explanation.activations import Activations, collect_answer_activations
from captum_intramodal.explanation.context import suppress_together
from captum_intramodal.explanation.options import CHANGED_DECISIONS, ChangedDecisions, Method
from captum_intramodal.explanation.scale_maps import TokenScaleMaps
from captum_intramodal.explanation.scale_views import select_views
from captum_intramodal.functional.aggregation import (
    AGGREGATIONS,
    Aggregation,
    aggregate,
    check_scales,
    normalized_weights,
)
from captum_intramodal.functional.context_relevance import (
    ContextRelevance,
    RankingPosition,
    Weighting,
    check_arc_options,
)
from captum_intramodal.functional.imputation import Imputation, Imputer, check_imputation
from captum_intramodal.functional.rank_overlap import Normalization
from captum_intramodal.functional.rasterize import rasterize
from captum_intramodal.functional.tam import token_activation_map
from captum_intramodal.models.decoder import decoder_layers
from captum_intramodal.models.hooks import evaluation_mode
from captum_intramodal.models.ranking import DEFAULT_RANKING_LENGTH

__all__ = [
    "EXPLAINERS",
    "Explainer",
    "TextMaps",
    "eager_attention",
    "greedy_inclusion",
    "make_explainer",
    "shared_passes",
]

Scales = Sequence[float] | Literal["auto"]
Baseline = Literal["black", "mean", "blur"]


class Explainer(Protocol):
    r"""
    What an evaluation compares.

    Attributes:
        name (str): what it is called in tables.
        settings (dict): everything that defines it, JSON-able.
    """

    @property
    def name(self) -> str: ...

    @property
    def settings(self) -> dict[str, Any]: ...

    def __call__(
        self, adapter: ModelAdapter, images: Sequence[Image.Image], prompt: Prompt, answer_ids: Sequence[int]
    ) -> list[Tensor]:
        r"""
        Args:

            adapter (ModelAdapter): The model and its processor.
            images (Sequence[PIL.Image.Image]): The prompt's images.
            prompt (str or Sequence[Mapping]): The question.
            answer_ids (Sequence[int]): The answer's T tokens, without those that end it.

        Returns:
            *list[Tensor]*: per image float32 (T, rows, columns) on the CPU, finite and not negative. Rows and columns
            divide the whole image evenly; how many they are is up to the explainer.

        Raises:
            ValueError: what this explainer cannot do, such as a model without the parts that it reads.
        """


class TextMaps(NamedTuple):
    r"""
    Relevance of a sequence's text tokens for the answer's.

    Args:

        positions (Tensor): Positions of the P text tokens, the answer's included, int64 (P,).
        values (Tensor): float32 (T, P) of the answer's T tokens, not negative; 0 for tokens that are not earlier.
    """

    positions: Tensor
    values: Tensor


@dataclass(kw_only=True)
class _Explainer(ABC):
    """What all explainers share: checks, borrowed state, and settings from their fields."""

    name: ClassVar[str]

    @property
    def settings(self) -> dict[str, Any]:
        """The name and all options, JSON-able."""
        return settings_of(self)

    def __call__(
        self, adapter: ModelAdapter, images: Sequence[Image.Image], prompt: Prompt, answer_ids: Sequence[int]
    ) -> list[Tensor]:
        """See :meth:`Explainer.__call__`."""
        ids = adapter.tokenize_answer(answer_ids)
        if len(ids) != len(answer_ids):
            raise ValueError(
                f"The last {len(answer_ids) - len(ids)} of {len(answer_ids)} answer_ids end the answer; leave them out."
            )
        with torch.enable_grad(), evaluation_mode(adapter.model, gradients=True):
            # Those that are in RGB already stay the same objects, by which shared readings know them.
            shown = [image if getattr(image, "mode", "") == "RGB" else check_images(image)[0] for image in images]
            maps = self.explain(adapter, shown, prompt, ids)
        return [m.detach().float().clamp_min(0).cpu() for m in maps]

    @abstractmethod
    def explain(
        self, adapter: ModelAdapter, images: list[Image.Image], prompt: Prompt, answer_ids: list[int]
    ) -> list[Tensor]:
        """The maps of checked input, in evaluation mode; negative values are clipped afterwards."""

    def explain_text(
        self, adapter: ModelAdapter, images: Sequence[Image.Image], prompt: Prompt, answer_ids: Sequence[int]
    ) -> TextMaps:
        r"""
        What earlier text tokens matter to each of the answer's tokens.

        Args:

            adapter, images, prompt, answer_ids: As in a call.

        Returns:
            TextMaps: relevance of the sequence's text tokens.

        Raises:
            ValueError: an explainer that says nothing of text.
        """
        raise NotApplicableError(f"{self.name} explains images only.")


# --- One reading of the model for several explainers -----------------------------------------------------------------


@dataclass(frozen=True)
class PassRequest:
    """What an explainer wants to be read."""

    scales: tuple[float, ...] | Literal["auto"] = (1.0,)
    ranking_layers: tuple[int, ...] = (-1,)
    layer: int | None = None
    method: Method = "logit_lens"
    crops: bool = False
    interpolate_pos_encoding: bool = False
    decisions: bool = False

    @property
    def kind(self) -> tuple[Any, ...]:
        return self.layer, self.method, self.crops, self.interpolate_pos_encoding, self.decisions

    @property
    def divisible(self) -> bool:
        """Whether each scale is seen the same whatever others are, as long as none is left out."""
        return self.scales != "auto" and not self.crops and not self.interpolate_pos_encoding

    def together(self, other: PassRequest) -> PassRequest:
        """What serves both; scales that cannot be added stay this one's own."""
        layers = tuple(sorted({*self.ranking_layers, *other.ranking_layers}))
        scales = self.scales
        if self.divisible and other.divisible:
            scales = tuple(sorted({*map(float, self.scales), *map(float, other.scales)}))
        return replace(self, scales=scales, ranking_layers=layers)

    def items_within(self, known: PassRequest, reading: Activations) -> Activations | None:
        """What would have been read, from a reading of more; None if that does not tell."""
        if self.kind != known.kind or not set(self.ranking_layers) <= set(known.ranking_layers):
            return None
        if self.scales == known.scales:
            return reading
        if not self.divisible or not known.divisible or reading.dropped or not set(self.scales) <= set(known.scales):
            return None
        return replace(reading, scale_maps=[level for level in reading.scale_maps if level.scale in self.scales])

    def read(self, example: _Example) -> Activations:
        adapter, images, prompt, answer_ids = example
        return collect_answer_activations(
            adapter,
            list(images),
            prompt,
            answer_ids,
            self.scales,
            layer=self.layer,
            ranking_layers=self.ranking_layers,
            method=self.method,
            crops=self.crops,
            interpolate_pos_encoding=self.interpolate_pos_encoding,
            decisions=self.decisions,
        )


_Example = tuple[ModelAdapter, Sequence[Image.Image], Prompt, list[int]]


@dataclass
class SharedPasses:
    """Readings of the last example."""

    wishes: list[PassRequest]
    example: _Example | None = None
    readings: list[tuple[PassRequest, Activations]] = field(default_factory=list)

    def read(self, example: _Example, wish: PassRequest) -> Activations:
        if self.example is None or not _same(example, self.example):
            self.example, self.readings = example, []
        more = wish
        for other in self.wishes:
            more = more.together(other) if other.kind == wish.kind else more
        for wanted in (None, more, wish):
            if wanted is not None and all(known != wanted for known, _ in self.readings):
                self.readings.append((wanted, wanted.read(example)))
            for known, reading in self.readings:
                if (part := wish.items_within(known, reading)) is not None:
                    return part
        raise RuntimeError(f"The model was read as {wish} asks, and still that is missing.")


_SHARED: ContextVar[SharedPasses | None] = ContextVar("shared_passes", default=None)


@contextmanager
def shared_passes(explainers: Iterable[Explainer] = ()) -> Iterator[None]:
    r"""
    Explainers that read the model with a logit lens share their passes: within the ``with`` statement an example is
    read once for all of them, as long as one after another is asked about it. Results are the same as without.

    The last example (same adapter, same image objects, prompt and answer) is kept. Neither the model's weights nor
    the images may change meanwhile.

    Args:

        explainers (Iterable[Explainer], optional): Those that will be asked: the first one's passes then serve all,
                    with all their scales and ranking layers.
                    Default: none

    Examples::

        >>> with shared_passes(explainers):
        ...     for images, prompt, answer_ids in examples:
        ...         maps = [explainer(adapter, images, prompt, answer_ids) for explainer in explainers]
    """
    token = _SHARED.set(SharedPasses([e.wish for e in explainers if isinstance(e, LogitLensMaps | TAM | ARCAround)]))
    try:
        yield
    finally:
        _SHARED.reset(token)


def _same(one: _Example, other: _Example) -> bool:
    return (
        one[0] is other[0]
        and len(one[1]) == len(other[1])
        and all(a is b for a, b in zip(one[1], other[1], strict=True))
        and one[2:] == other[2:]
    )


def _read(example: _Example, wish: PassRequest) -> Activations:
    shared = _SHARED.get()
    return wish.read(example) if shared is None else shared.read(example, wish)


# --- Logit lens, MSEA, ARC, TAM --------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class _ScaleOptions:
    """Options of MSEA, as in :func:`captum_intramodal.explain`."""

    scales: Scales = "auto"
    scale_weights: Sequence[float] | None = None
    aggregation: Aggregation = "mean"

    def __post_init__(self) -> None:
        if self.aggregation not in AGGREGATIONS:
            raise ValueError(f"aggregation must be one of {AGGREGATIONS}, got {self.aggregation!r}.")
        if self.scales != "auto":
            self.scales = check_scales(self.scales)
            normalized_weights(self.scales, self.scale_weights)
        elif self.scale_weights is not None:
            raise ValueError(f"scale_weights need the scales that they belong to; scales is {self.scales!r}.")

    def weights_of(self, kept: Sequence[float]) -> Tensor:
        if self.scale_weights is None or len(kept) < 2:
            return normalized_weights(kept, None)
        weight_of = dict(zip(self.scales, self.scale_weights, strict=True))
        return normalized_weights(kept, [weight_of[scale] for scale in kept])


@dataclass(kw_only=True)
class _RankingOptions:
    """Options of ARC, as in :class:`captum_intramodal.ActivationRankingCorrelation`."""

    layers: Sequence[int] = (-1,)
    k: int = DEFAULT_RANKING_LENGTH
    p: float = 0.9
    normalization: Normalization = "truncated"
    weighting: Weighting = "irrelevance"
    ranking_position: RankingPosition = "token"
    least_squares: bool = True
    strength: float = 1.0

    def __post_init__(self) -> None:
        check_arc_options(self.k, self.p, self.normalization, self.weighting, self.ranking_position, self.strength)
        self.layers = tuple(self.layers)

    def compare(self, adapter: ModelAdapter, reading: Activations) -> tuple[ARC, ContextRelevance]:
        arc = ARC(model=adapter.lens, **{f.name: getattr(self, f.name) for f in fields(_RankingOptions)})
        states = [reading.ranking_states[layer] for layer in arc.layers]
        return arc, arc.compare(states, reading.last, reading.text.ids)

    def suppress(self, adapter: ModelAdapter, maps: Sequence[Tensor], reading: Activations) -> list[Tensor]:
        """Of maps of all text tokens, or of the last ones, which are then each other's only context."""
        arc, context = self.compare(adapter, reading)
        last = (slice(-len(maps[0]), None),) * 2
        explained = replace(
            context,
            relevance=context.relevance[last],
            text_activation=context.text_activation[last],
            context=context.context[last],
        )
        return suppress_together(arc, maps, explained)


@dataclass(kw_only=True)
class LogitLensMaps(_Explainer):
    r"""
    Logit lens at the visual tokens, clipped at 0.

    Args:

        layer (int, optional): Decoder layer whose output is read.
                    Default: None, the last
        method (str, optional): As in :func:`captum_intramodal.explain`, for models that the lens cannot read.
                    Default: ``'logit_lens'``
        crops, interpolate_pos_encoding (bool, optional): As there, for scales of models of a fixed input size.
                    Default: False
    """

    name: ClassVar[str] = "logit_lens"

    layer: int | None = None
    method: Method = "logit_lens"
    crops: bool = False
    interpolate_pos_encoding: bool = False

    @property
    def wish(self) -> PassRequest:
        return PassRequest(
            getattr(self, "scales", (1.0,)),
            tuple(getattr(self, "layers", (-1,))),
            self.layer,
            self.method,
            self.crops,
            self.interpolate_pos_encoding,
            getattr(self, "changed_decisions", "keep") != "keep",
        )

    def explain(
        self, adapter: ModelAdapter, images: list[Image.Image], prompt: Prompt, answer_ids: list[int]
    ) -> list[Tensor]:
        reading = _read((adapter, images, prompt, answer_ids), self.wish)
        return [m[-len(answer_ids) :] for m in self.maps(adapter, reading)]

    def explain_text(
        self, adapter: ModelAdapter, images: Sequence[Image.Image], prompt: Prompt, answer_ids: Sequence[int]
    ) -> TextMaps:
        """Text activation, in ARC times rank-biased overlap: what is left where irrelevant context is suppressed."""
        reading = _read((adapter, images, prompt, list(answer_ids)), self.wish)
        ranking = self if isinstance(self, _RankingOptions) else _RankingOptions()
        _, context = ranking.compare(adapter, reading)
        weighting: Weighting = "relevance*text_activation" if ranking is self else "text_activation"
        return TextMaps(reading.text.positions, context.weights(weighting)[-len(answer_ids) :].cpu())

    def maps(self, adapter: ModelAdapter, reading: Activations) -> list[Tensor]:
        """Of all text tokens."""
        kept = [level.scale for level in reading.scale_maps]
        options = self if isinstance(self, MSEAMaps) else MSEAMaps()
        maps = reading.maps(options.weights_of(kept), options.aggregation, options.changed_decisions)
        return self.suppress(adapter, maps, reading) if isinstance(self, _RankingOptions) else maps


@dataclass(kw_only=True)
class MSEAMaps(_ScaleOptions, LogitLensMaps):
    r"""
    The logit lens at several scales.

    Args:

        scales, scale_weights, aggregation, changed_decisions (optional): See :func:`captum_intramodal.explain`.
        layer, method, crops, interpolate_pos_encoding (optional): See :class:`LogitLensMaps`.
    """

    name: ClassVar[str] = "msea"

    changed_decisions: ChangedDecisions = "keep"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.changed_decisions not in CHANGED_DECISIONS:
            raise ValueError(f"changed_decisions must be one of {CHANGED_DECISIONS}, got {self.changed_decisions!r}.")


@dataclass(kw_only=True)
class ARCMaps(_RankingOptions, LogitLensMaps):
    """The logit lens without the interference of irrelevant context."""

    name: ClassVar[str] = "arc"


@dataclass(kw_only=True)
class MSEAAndARCMaps(_RankingOptions, MSEAMaps):
    """The logit lens at several scales, without the interference of irrelevant context: ``explain()``."""

    name: ClassVar[str] = "msea+arc"

    def __post_init__(self) -> None:
        MSEAMaps.__post_init__(self)
        _RankingOptions.__post_init__(self)


@dataclass(kw_only=True)
class TAM(_Explainer):
    r"""
    Token Activation Map from its definition (:mod:`captum_intramodal.tam`), for one image that is one raster of
    visual tokens.

    Args:

        filter (bool, optional): The rank Gaussian filter, its second step.
                    Default: True
        layer (int, optional): Decoder layer whose output the lens reads.
                    Default: None, the last
    """

    name: ClassVar[str] = "tam"

    filter: bool = True
    layer: int | None = None

    @property
    def wish(self) -> PassRequest:
        return PassRequest(layer=self.layer)

    def explain(
        self, adapter: ModelAdapter, images: list[Image.Image], prompt: Prompt, answer_ids: list[int]
    ) -> list[Tensor]:
        image = _single(self, images)
        reading = _read((adapter, images, prompt, answer_ids), self.wish)
        (level,) = reading.scale_maps
        if not isinstance(level, TokenScaleMaps):
            raise NotApplicableError(
                f"TAM needs a map per visual token, which {type(adapter.model).__name__} does not have."
            )
        placed = level.geometry.is_local
        boxes = level.boxes(0, image.size)[placed]
        grid = len(boxes[:, 1].round().unique()), len(boxes[:, 0].round().unique())
        if grid[0] * grid[1] != len(boxes):
            raise NotApplicableError(
                f"TAM needs one raster of visual tokens, but the {len(boxes)} of this image have {grid[0]} different "
                f"heights and {grid[1]} different places along them; tiles and thumbnails are none."
            )
        context = ARC(model=adapter.lens).compare([reading.last], reading.last, reading.text.ids)
        ids = reading.text.ids
        maps = token_activation_map(
            level.activation[:, placed], context.text_activation, ids[:, None] == ids, grid=grid, filter=self.filter
        )
        drawn = rasterize(maps, boxes, image.size, (2 * grid[0], 2 * grid[1]))
        return [drawn[-len(answer_ids) :]]

    def explain_text(
        self, adapter: ModelAdapter, images: Sequence[Image.Image], prompt: Prompt, answer_ids: Sequence[int]
    ) -> TextMaps:
        """The text activation, by which it weighs its context."""
        return LogitLensMaps(layer=self.layer).explain_text(adapter, images, prompt, answer_ids)


# --- MSEA and ARC around any explainer -------------------------------------------------------------------------------


@dataclass(kw_only=True)
class MSEAAround(_ScaleOptions, _Explainer):
    r"""
    MSEA around any explainer: it explains the images at each scale that shows the model something of its own; its
    maps, interpolated to the finest of their grids, are aggregated as they are.

    Args:

        base (Explainer): The explainer.
        scales, scale_weights, aggregation (optional): See :func:`captum_intramodal.explain`.
    """

    base: Explainer

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"msea+{self.base.name}"

    def explain(
        self, adapter: ModelAdapter, images: list[Image.Image], prompt: Prompt, answer_ids: list[int]
    ) -> list[Tensor]:
        with torch.no_grad():
            sights, _ = select_views(adapter, images, self.scales, adapter.prepare(images, prompt))
        seen = []
        for scale in sights:
            sizes = [(max(1, round(p.width * scale)), max(1, round(p.height * scale))) for p in images]
            shown = resize_images(images, sizes)
            seen.append(self.base(adapter, shown, prompt, answer_ids))
        weights = self.weights_of(list(sights))
        result = []
        for maps in zip(*seen, strict=True):
            grid = max((m.shape[1:] for m in maps), key=torch.Size.numel)
            drawn = [F.interpolate(m[None], grid, mode="bilinear", align_corners=False)[0] for m in maps]
            result.append(aggregate(drawn, weights, self.aggregation))
        return result


@dataclass(kw_only=True)
class ARCAround(_RankingOptions, _Explainer):
    r"""
    ARC around any explainer. An explainer has maps of the answer's tokens only: those are the context.

    Args:

        base (Explainer): The explainer.
        layers, k, p, normalization, weighting, ranking_position, least_squares, strength (optional): See
            :class:`captum_intramodal.ActivationRankingCorrelation`.
    """

    base: Explainer

    @property
    def name(self) -> str:  # type: ignore[override]
        if isinstance(self.base, MSEAAround):  # As the lens inside both is called.
            return f"msea+arc+{self.base.base.name}"
        return f"arc+{self.base.name}"

    @property
    def wish(self) -> PassRequest:
        return PassRequest(ranking_layers=tuple(self.layers), method="auto")

    def explain(
        self, adapter: ModelAdapter, images: list[Image.Image], prompt: Prompt, answer_ids: list[int]
    ) -> list[Tensor]:
        maps = self.base(adapter, images, prompt, answer_ids)
        return self.suppress(adapter, maps, _read((adapter, images, prompt, answer_ids), self.wish))


# --- Attention -------------------------------------------------------------------------------------------------------


@contextmanager
def eager_attention(model: PreTrainedModel) -> Iterator[None]:
    """The model computes its attention weights, which only transformers' eager implementation returns; each part's own
    implementation is given back."""
    parts = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    before = [part.config._attn_implementation for part in parts]
    try:
        model.set_attn_implementation("eager")
        yield
    finally:
        # Outer parts first, as each sets those inside it; of their configs, as some parts refuse what they had.
        for part, implementation in zip(parts, before, strict=True):
            part.config._attn_implementation = implementation


@dataclass(kw_only=True)
class _AttentionMaps(_Explainer):
    """Attention of the position that predicts a token."""

    # Whether what passes from position to position otherwise, as by linear attention, would be missed.
    needs_all_layers: ClassVar[bool] = True

    def explain(
        self, adapter: ModelAdapter, images: list[Image.Image], prompt: Prompt, answer_ids: list[int]
    ) -> list[Tensor]:
        encoding, values = self.read(adapter, images, prompt, answer_ids)
        return draw_positions(values, adapter, encoding.input_ids, [image.size for image in images])

    def explain_text(
        self, adapter: ModelAdapter, images: Sequence[Image.Image], prompt: Prompt, answer_ids: Sequence[int]
    ) -> TextMaps:
        """The same values at the text tokens."""
        with torch.enable_grad(), evaluation_mode(adapter.model, gradients=True):
            encoding, values = self.read(adapter, images, prompt, answer_ids)
        positions = text_positions(adapter, encoding)
        # The position before a token sees all up to itself.
        return TextMaps(positions, values.detach().float().clamp_min(0).cpu()[:, positions])

    def read(
        self, adapter: ModelAdapter, images: Sequence[Image.Image], prompt: Prompt, answer_ids: Sequence[int]
    ) -> tuple[Encoding, Tensor]:
        """The sequence, and what each of its positions says of the answer's T tokens, (T, positions)."""
        _check_sequence(self, adapter, [image.size for image in images])
        encoding = adapter.encode(adapter.prepare(list(images), prompt), list(answer_ids))
        length, layers = len(encoding.input_ids), len(decoder_layers(adapter.model))
        with eager_attention(adapter.model):
            output = self.run(adapter, encoding)
        attentions = [a for a in getattr(output, "attentions", None) or () if a is not None]
        shapes = sorted({tuple(a.shape) for a in attentions})
        enough = len(attentions) == layers if self.needs_all_layers else attentions
        if not enough or any(len(shape) != 4 or shape[2:] != (length, length) for shape in shapes):
            raise NotApplicableError(
                f"{type(adapter.model).__name__} gave self-attention of {len(attentions)} of its {layers} layers, of "
                f"shape {', '.join(map(str, shapes)) or 'none'}; {self.name} needs (1, heads, {length}, {length}) of "
                f"{'all layers' if self.needs_all_layers else 'at least one'}."
            )
        return encoding, self.rows(encoding, output.logits[0], attentions)

    def run(self, adapter: ModelAdapter, encoding: Encoding) -> Any:
        with torch.no_grad():
            return adapter.run(encoding.inputs | {"output_attentions": True})

    @abstractmethod
    def rows(self, encoding: Encoding, logits: Tensor, attentions: list[Tensor]) -> Tensor:
        """(T, positions) of the answer's T tokens, from logits and each layer's (1, heads, positions, positions)."""


@dataclass(kw_only=True)
class AttentionMaps(_AttentionMaps):
    r"""
    Attention of one decoder layer, mean over its heads, from the position that predicts each token.

    Args:

        layer (int, optional): Which of those that have attention weights.
                    Default: -1
    """

    name: ClassVar[str] = "attention"
    needs_all_layers: ClassVar[bool] = False

    layer: int = -1

    def rows(self, encoding: Encoding, logits: Tensor, attentions: list[Tensor]) -> Tensor:
        _check_layer(self.layer, len(attentions))
        return attentions[self.layer][0].float().mean(0)[_predicting(encoding)]


@dataclass(kw_only=True)
class AttentionRollout(_AttentionMaps):
    r"""
    Attention rollout (Abnar & Zuidema, 2020): the product over all layers of the heads' mean attention, mixed with the
    identity for the residual connection.

    Args:

        residual (float, optional): Share of the identity, from 0 to 1.
                    Default: 0.5
    """

    name: ClassVar[str] = "attention_rollout"

    residual: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.residual <= 1:
            raise ValueError(f"residual must be from 0 to 1, got {self.residual}.")

    def rows(self, encoding: Encoding, logits: Tensor, attentions: list[Tensor]) -> Tensor:
        rows = _one_hot(encoding, attentions[0].device)
        for attention in reversed(attentions):
            mixed = (1 - self.residual) * (rows @ attention[0].float().mean(0).to(rows)) + self.residual * rows
            rows = mixed / mixed.sum(1, keepdim=True)
        return rows


@dataclass(kw_only=True)
class AttentionXGradient(_AttentionMaps):
    r"""
    Relevance of attention times gradient (Chefer et al., "Generic attention-model explainability", 2021), for a
    decoder's self-attention: from :math:`R = I`, layer by layer :math:`R \leftarrow R + \bar A R` with
    :math:`\bar A` the heads' mean of :math:`\max(0, \nabla A \odot A)`. One backward pass per token, from its
    logit; the attention of all layers is kept for it.
    """

    name: ClassVar[str] = "attention_x_gradient"

    def run(self, adapter: ModelAdapter, encoding: Encoding) -> Any:
        def follow(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            # A leaf itself must not be changed in place.
            return output.detach().requires_grad_().clone()

        with adapter.model.get_input_embeddings().register_forward_hook(follow):
            return adapter.run(encoding.inputs | {"output_attentions": True})

    def rows(self, encoding: Encoding, logits: Tensor, attentions: list[Tensor]) -> Tensor:
        logits = encoding.rows(logits)[_predicting(encoding)]
        scores = logits.gather(1, torch.tensor(encoding.answer_ids, device=logits.device)[:, None])[:, 0]
        result = []
        for score, row in zip(scores, _one_hot(encoding, attentions[0].device), strict=True):
            gradients = torch.autograd.grad(score, attentions, retain_graph=True)
            for attention, gradient in zip(reversed(attentions), reversed(gradients), strict=True):
                relevant = (attention.detach() * gradient)[0].clamp_min(0).float().mean(0)
                row = row + row @ relevant.to(row)
            result.append(row)
        return torch.stack(result)


def _check_sequence(explainer: Explainer, adapter: ModelAdapter, sizes: Sequence[tuple[int, int]]) -> None:
    if adapter.is_encoder_decoder or adapter.geometry(sizes).argument is not None:
        raise NotApplicableError(
            f"{explainer.name} needs visual tokens in its decoder's sequence; {type(adapter.model).__name__} has none."
        )


def _predicting(encoding: Encoding) -> slice:
    """Positions before each of the answer's tokens."""
    return slice(encoding.prompt_length - 1, -1)


def _one_hot(encoding: Encoding, device: torch.device) -> Tensor:
    return torch.eye(len(encoding.input_ids), device=device)[_predicting(encoding)]


def _check_layer(layer: int, count: int) -> None:
    if not -count <= layer < count:
        raise ValueError(f"There is no layer {layer}; the decoder has {count}.")


# --- Captum's methods ------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class GradCAM(_Explainer):
    r"""
    Grad-CAM on visual tokens: Captum's ``LayerGradCam`` of each token's log-probability at the output of a decoder
    layer, clipped at 0.

    Args:

        layer (int, optional): Which; no token is predicted from the last one's visual tokens: their gradient is 0.
                    Default: -2
    """

    name: ClassVar[str] = "grad_cam"

    layer: int = -2

    def explain(
        self, adapter: ModelAdapter, images: list[Image.Image], prompt: Prompt, answer_ids: list[int]
    ) -> list[Tensor]:
        image = image_to_tensor(_single(self, images))
        _check_sequence(self, adapter, [images[0].size])
        layers = decoder_layers(adapter.model)
        _check_layer(self.layer, len(layers))
        forward = PixelForward(adapter, prompt, answer_ids, "token_log_probs")
        method = VisualTokenAttribution(LayerGradCam(forward, layers[self.layer]))
        return [torch.cat([self.attribute(method, image, target)[0] for target in forward.targets])]

    def attribute(self, method: VisualTokenAttribution, image: Tensor, target: Any) -> Tensor:
        maps: Tensor = method.attribute(image, target=target)
        return maps


@dataclass(kw_only=True)
class LLaVACAM(GradCAM):
    r"""
    In the manner of LLaVA-CAM (Zhang et al., "From redundancy to relevance", 2025): Grad-CAM at a decoder layer,
    averaged over noisy copies of the image.

    Args:

        layer (int, optional): See :class:`GradCAM`.
                    Default: -2
        samples (int, optional): Number of copies.
                    Default: 10
        noise (float, optional): Standard deviation of their noise, of pixels in [0, 1].
                    Default: 0.1
        seed (int, optional): Of the noise, the same for all tokens.
                    Default: 0
    """

    name: ClassVar[str] = "llava_cam"

    samples: int = 10
    noise: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        _check_positive("samples", self.samples)
        if not self.noise >= 0:
            raise ValueError(f"noise must not be negative, got {self.noise}.")

    def attribute(self, method: VisualTokenAttribution, image: Tensor, target: Any) -> Tensor:
        torch.manual_seed(self.seed)  # The random state is given back by __call__.
        maps: Tensor = NoiseTunnel(method).attribute(
            image, nt_type="smoothgrad", nt_samples=self.samples, nt_samples_batch_size=1, stdevs=float(self.noise),
            target=target,
        )  # fmt: skip
        return maps


@dataclass(kw_only=True)
class _PixelMaps(_Explainer):
    """A method of the image's pixels: channels are summed, pixels averaged over cells, negative cells are 0."""

    cells: int = 24

    def __post_init__(self) -> None:
        _check_positive("cells", self.cells)

    def explain(
        self, adapter: ModelAdapter, images: list[Image.Image], prompt: Prompt, answer_ids: list[int]
    ) -> list[Tensor]:
        image = _single(self, images)
        forward = PixelForward(adapter, prompt, answer_ids, "token_log_probs")
        values = self.attribute(forward, image)
        return [F.adaptive_avg_pool2d(values.detach().float().sum(1), _grid(image, self.cells))]

    @abstractmethod
    def attribute(self, forward: PixelForward, image: Image.Image) -> Tensor:
        """(T, 3, height, width) of either sign."""


@dataclass(kw_only=True)
class InputXGradientMaps(_PixelMaps):
    r"""
    Captum's ``InputXGradient`` of each token's log-probability.

    Args:

        cells (int, optional): Cells along the longer side, over which pixels are averaged.
                    Default: 24
    """

    name: ClassVar[str] = "input_x_gradient"

    def attribute(self, forward: PixelForward, image: Image.Image) -> Tensor:
        return _each_target(InputXGradient(forward), forward, image)


@dataclass(kw_only=True)
class IntegratedGradientsMaps(_PixelMaps):
    r"""
    Captum's ``IntegratedGradients`` of each token's log-probability.

    Args:

        cells (int, optional): See :class:`InputXGradientMaps`.
                    Default: 24
        n_steps (int, optional): Steps of the integral.
                    Default: 20
        baseline (str, optional): Where it begins: ``'black'``, the image's ``'mean'`` color, or the image
                    ``'blur'``\ red as in :class:`~captum_intramodal.metrics.Imputer`.
                    Default: ``'black'``
    """

    name: ClassVar[str] = "integrated_gradients"

    n_steps: int = 20
    baseline: Baseline = "black"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_baseline(self.baseline)
        _check_positive("n_steps", self.n_steps)

    def attribute(self, forward: PixelForward, image: Image.Image) -> Tensor:
        options = {"baselines": _baseline(image, self.baseline), "n_steps": self.n_steps, "internal_batch_size": 1}
        return _each_target(IntegratedGradients(forward), forward, image, **options)


@dataclass(kw_only=True)
class OcclusionMaps(_PixelMaps):
    r"""
    Captum's ``Occlusion`` of all tokens' log-probabilities together.

    Args:

        cells (int, optional): See :class:`InputXGradientMaps`.
                    Default: 24
        window (float, optional): Side of the square that is hidden, as a fraction of the image's shorter side.
                    Default: 0.25
        stride (float, optional): Its step, as a fraction of its side.
                    Default: 0.5
        baseline (str, optional): What hides, see :class:`IntegratedGradientsMaps`.
                    Default: ``'mean'``
        batch_size (int, optional): Images that run together; changes no result.
                    Default: 16
    """

    name: ClassVar[str] = "occlusion"

    window: float = 0.25
    stride: float = 0.5
    baseline: Baseline = "mean"
    batch_size: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_baseline(self.baseline)
        if not (0 < self.window <= 1 and 0 < self.stride <= 1):
            raise ValueError(f"window and stride must be above 0 and at most 1, got {self.window} and {self.stride}.")

    def attribute(self, forward: PixelForward, image: Image.Image) -> Tensor:
        side = max(1, round(self.window * min(image.size)))
        step = max(1, round(self.stride * side))
        with torch.no_grad():
            values: Tensor = Occlusion(forward).attribute(
                image_to_tensor(image), (3, side, side), strides=(3, step, step),
                baselines=_baseline(image, self.baseline), perturbations_per_eval=self.batch_size,
            )  # fmt: skip
        return values


def _each_target(method: Attribution, forward: PixelForward, image: Image.Image, **options: Any) -> Tensor:
    pixels = image_to_tensor(image).requires_grad_()  # Else Captum warns that it asks for that.
    return torch.cat([method.attribute(pixels, target=target, **options).detach() for target in forward.targets])


def _check_baseline(baseline: str) -> None:
    if baseline not in get_args(Baseline):
        raise ValueError(f"baseline must be one of {', '.join(get_args(Baseline))}; got {baseline!r}.")


def _baseline(image: Image.Image, kind: Baseline) -> Tensor:
    if kind == "black":
        return torch.zeros(1, 3, image.height, image.width)
    return image_to_tensor(Imputer(image, kind).nothing_kept())


# --- Upper and lower marks -------------------------------------------------------------------------------------------


def greedy_inclusion(score: Callable[[Tensor], Tensor], regions: int, steps: int | None = None) -> Tensor:
    r"""
    Importance of regions by greedy search, in the manner of EAGLE: at each step the region is added to the set
    :math:`S` that raises most

    .. math::
        F(S) = f(S) - f(\bar S),

    what a token gains from seeing the set alone (insertion) and loses without it (deletion). A region's importance is
    the sum of the gains of its step and all later ones, as far as they are positive: it falls with the rank of
    inclusion, each time by what the step gained.

    Args:

        score (Callable): From the regions that are kept, bool (N, regions), to probabilities of T tokens, (N, T).
        regions (int): Number of regions.
        steps (int, optional): Regions that are added; the others' importance is 0.
                    Default: None, all

    Returns:
        *Tensor* float32 (T, regions), not negative. Regions of steps without a gain keep their order by 1e-6 and less.

    Raises:
        ValueError: fewer than one region or step.

    Examples::

        >>> weights = torch.tensor([[0.1], [0.6], [0.3]])
        >>> greedy_inclusion(lambda kept: kept.float() @ weights, 3)     # gains 1.2, 0.6, 0.2
        tensor([[0.2000, 2.0000, 0.8000]])
    """
    _check_positive("regions", regions)
    steps = regions if steps is None else steps
    _check_positive("steps", steps)
    known: dict[bytes, Tensor] = {}

    def scores(kept: Tensor) -> Tensor:
        keys = [row.numpy().tobytes() for row in kept]
        # Tokens and steps share sets: the empty one, all of one region, ...
        new = {key: row for key, row in zip(keys, kept, strict=True) if key not in known}
        if new:
            known.update(zip(new, score(torch.stack(list(new.values()))).float(), strict=True))
        return torch.stack([known[key] for key in keys])

    def objective(kept: Tensor) -> Tensor:
        inserted, deleted = scores(torch.cat([kept, ~kept])).split(len(kept))
        return inserted - deleted

    start = objective(torch.zeros(1, regions, dtype=torch.bool))[0]
    result = torch.zeros(len(start), regions)
    for token, value in enumerate(start):
        chosen, order, gains = torch.zeros(regions, dtype=torch.bool), [], []
        for _ in range(min(steps, regions)):
            left = (~chosen).nonzero()[:, 0]
            values = objective(chosen | F.one_hot(left, regions).bool())[:, token]
            best = int(values.argmax())
            gains.append(values[best] - value)
            order.append(int(left[best]))
            value, chosen[order[-1]] = values[best], True
        positive = torch.stack(gains).clamp_min(0)
        rank = torch.arange(len(order), 0, -1) / len(order)
        result[token, order] = positive.flip(0).cumsum(0).flip(0) + 1e-6 * rank
    return result


@dataclass(kw_only=True)
class GreedySearch(_Explainer):
    r"""
    Greedy search over the cells of a grid for those that make a token most probable when they alone are shown, and
    least when they are removed (:func:`greedy_inclusion`). With R cells up to R (R + 1) passes per token: an expensive
    upper mark for insertion and deletion.

    Args:

        cells (int, optional): Cells along the longer side.
                    Default: 6
        steps (int, optional): Cells that are added.
                    Default: None, all
        imputation (str, optional): What stands in the place of removed cells, see
                    :class:`~captum_intramodal.metrics.Imputer`: ``'blur'``, ``'mean'`` or ``'noisy_linear'``.
                    Default: ``'blur'``
        batch_size (int, optional): Prompts that run together; changes no result.
                    Default: 16
        seed (int, optional): Of the imputation's noise.
                    Default: 0
    """

    name: ClassVar[str] = "greedy"

    cells: int = 6
    steps: int | None = None
    imputation: Imputation = "blur"
    batch_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        _check_positive("cells", self.cells)
        _check_positive("batch_size", self.batch_size)
        check_imputation(self.imputation)

    def explain(
        self, adapter: ModelAdapter, images: list[Image.Image], prompt: Prompt, answer_ids: list[int]
    ) -> list[Tensor]:
        scorer = AnswerScorer(adapter, prompt, answer_ids, self.batch_size)
        imputers = [Imputer(image, self.imputation, self.seed) for image in images]
        grids = [_grid(image, self.cells) for image in images]
        counts = [rows * columns for rows, columns in grids]

        def score(kept: Tensor) -> Tensor:
            results = []
            for part in kept.split(self.batch_size):  # So many images exist at a time.
                shown = [
                    imputer(_stretched(cells.reshape(-1, *grid), image.size))
                    for imputer, image, cells, grid in zip(
                        imputers, images, part.split(counts, dim=1), grids, strict=True
                    )
                ]
                results.append(scorer.log_probability(list(zip(*shown, strict=True))).exp())
            return torch.cat(results)

        values = greedy_inclusion(score, sum(counts), self.steps).split(counts, dim=1)
        return [value.reshape(-1, *grid) for value, grid in zip(values, grids, strict=True)]


def _stretched(cells: Tensor, size: tuple[int, int]) -> np.ndarray:
    """Cells (N, rows, columns) at the pixels of an image, bool (N, height, width)."""
    pixels: np.ndarray = F.interpolate(cells[:, None].float(), size[::-1], mode="nearest-exact")[:, 0].bool().numpy()
    return pixels


@dataclass(kw_only=True)
class RandomMaps(_Explainer):
    r"""
    Uniform noise, another one for each image, token and seed: a lower mark.

    Args:

        cells (int, optional): Cells along the longer side.
                    Default: 16
        seed (int, optional): Of the noise.
                    Default: 0
    """

    name: ClassVar[str] = "random"

    cells: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        _check_positive("cells", self.cells)

    def explain(
        self, adapter: ModelAdapter, images: list[Image.Image], prompt: Prompt, answer_ids: list[int]
    ) -> list[Tensor]:
        maps = []
        for index, image in enumerate(images):
            seen = zlib.crc32(image.tobytes())
            generator = np.random.default_rng([self.seed, index, seen])
            noise = generator.random((len(answer_ids), *_grid(image, self.cells)), np.float32)
            maps.append(torch.from_numpy(noise))
        return maps

    def explain_text(
        self, adapter: ModelAdapter, images: Sequence[Image.Image], prompt: Prompt, answer_ids: Sequence[int]
    ) -> TextMaps:
        encoding = adapter.encode(adapter.prepare(list(images), prompt), list(answer_ids))
        positions = text_positions(adapter, encoding)
        generator = np.random.default_rng([self.seed, *answer_ids])
        noise = torch.from_numpy(generator.random((len(answer_ids), len(positions)), np.float32))
        return TextMaps(positions, noise * (positions < positions[-len(answer_ids) :, None]))


@dataclass(kw_only=True)
class CenterGaussian(_Explainer):
    r"""
    A Gaussian in the middle of the image, whatever the token: the lower mark for images with their objects there.

    Args:

        sigma (float, optional): Standard deviation, as a fraction of each side.
                    Default: 0.25
        cells (int, optional): Cells along the longer side.
                    Default: 32
    """

    name: ClassVar[str] = "centre_gaussian"

    sigma: float = 0.25
    cells: int = 32

    def __post_init__(self) -> None:
        _check_positive("sigma", self.sigma)
        _check_positive("cells", self.cells)

    def explain(
        self, adapter: ModelAdapter, images: list[Image.Image], prompt: Prompt, answer_ids: list[int]
    ) -> list[Tensor]:
        maps = []
        for image in images:
            y, x = (
                torch.exp(-(((torch.arange(n) + 0.5) / n - 0.5) ** 2) / (2 * self.sigma**2))
                for n in _grid(image, self.cells)
            )
            maps.append((y[:, None] * x).expand(len(answer_ids), -1, -1))
        return maps


def _grid(image: Image.Image, cells: int) -> tuple[int, int]:
    """Rows and columns of about square cells, so many along the longer side, and no smaller than a pixel."""
    side = max(max(image.size) / cells, 1.0)
    return max(1, round(image.height / side)), max(1, round(image.width / side))


def _check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} must be positive, got {value}.")


def _single(explainer: Explainer, images: Sequence[Image.Image]) -> Image.Image:
    if len(images) != 1:
        raise NotApplicableError(f"{explainer.name} explains answers about one image, got {len(images)}.")
    return images[0]


# --- By name ---------------------------------------------------------------------------------------------------------

EXPLAINERS: dict[str, Callable[..., Explainer]] = {
    explainer.name: explainer
    for explainer in (
        LogitLensMaps, MSEAMaps, ARCMaps, MSEAAndARCMaps, TAM, AttentionMaps, AttentionRollout, AttentionXGradient,
        GradCAM, LLaVACAM, InputXGradientMaps, IntegratedGradientsMaps, OcclusionMaps, GreedySearch, RandomMaps,
        CenterGaussian,
    )
}  # fmt: skip
_AROUND: dict[str, Callable[..., Explainer]] = {"msea": MSEAAround, "arc": ARCAround}


def make_explainer(spec: str) -> Explainer:
    r"""
    An explainer from its name and options.

    Args:

        spec (str): A name in :data:`EXPLAINERS`, with ``msea+`` or ``arc+`` or both before it to put it inside these;
                    after a colon options ``name=value``, separated by commas. Values are JSON; text needs no quotes.

    Returns:
        Explainer: options that the spec leaves out have their defaults.

    Raises:
        ValueError: an unknown explainer, an option that it does not have, or a value that it does not take.

    Examples::

        >>> make_explainer("msea+arc:scales=[1,1.5,2],k=20,weighting=uniform").settings["k"]
        20
        >>> make_explainer("msea+arc+grad_cam:layer=-3").name
        'msea+arc+grad_cam'
    """
    name, options = parse_spec(spec)
    if name in EXPLAINERS:
        return build(spec, EXPLAINERS[name], options)
    around, _, base = name.rpartition("+")
    wrappers = around.split("+")
    if base not in EXPLAINERS or base in (*_AROUND, LogitLensMaps.name) or around not in ("msea", "arc", "msea+arc"):
        raise ValueError(
            f"There is no explainer {name!r}. There are {', '.join(EXPLAINERS)}; and those other than the lens inside "
            "msea+, arc+ or msea+arc+."
        )
    own = {wrapper: _options_of(_AROUND[wrapper]) - {"base"} for wrapper in wrappers}
    inner = {key: value for key, value in options.items() if not any(key in names for names in own.values())}
    explainer = build(spec, EXPLAINERS[base], inner)
    for wrapper in wrappers:  # ARC is around MSEA.
        outer = {key: value for key, value in options.items() if key in own[wrapper]}
        explainer = build(spec, _AROUND[wrapper], outer | {"base": explainer})
    return explainer


def _options_of(explainer: Any) -> set[str]:
    return {f.name for f in fields(explainer)}
