r"""What does the logit lens find at the visual tokens, with or without MSEA and ARC? One class, four explainers."""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from captum_intramodal.errors import InvalidOptionError
from captum_intramodal.explainers.base import BaseExplainer, Example, TextMaps
from captum_intramodal.explainers.options import RankingOptions, ScaleOptions
from captum_intramodal.explainers.pass_sharing import PassRequest, collect
from captum_intramodal.explainers.registry import EXPLAINERS
from captum_intramodal.explanation.activations import Activations
from captum_intramodal.explanation.options import CHANGED_DECISIONS, ChangedDecisions, ExplainOptions, Method
from captum_intramodal.functional.aggregation import normalized_weights
from captum_intramodal.models.logit_lens import LogitLens, LogitNormalization

__all__ = ["LogitLensMaps", "context_activation"]


@dataclass(kw_only=True)
class LogitLensMaps(RankingOptions, ScaleOptions, BaseExplainer):
    r"""
    The logit lens at the visual tokens, clipped at 0; at several scales (MSEA, arXiv 2509.22415, Eq. 4), without the
    interference of irrelevant context (ARC, Eq. 7), or both, as :func:`captum_intramodal.explain` computes it.

    It is registered as ``logit_lens``, ``msea``, ``arc`` and ``msea+arc``, each with the options that apply.

    Args:

        msea (bool, optional): Aggregate the maps of several scales; otherwise ``scales``, ``scale_weights``,
                    ``aggregation`` and ``changed_decisions`` are not used.
                    Default: False
        arc (bool, optional): Suppress interference; otherwise the options of ARC are not used.
                    Default: False
        layer (int, optional): Decoder layer whose output the lens is applied to.
                    Default: None, the last
        method (str, optional): See :func:`captum_intramodal.explain`, for models that the lens does not support.
                    Default: ``'logit_lens'``
        crops, interpolate_pos_encoding (bool, optional): See :func:`captum_intramodal.explain`, for scales of models
                    with a fixed input size.
                    Default: False
        logit_normalization (str, optional): ``'raw'``, ``'centered'`` or ``'zscore'``, see
                    :class:`captum_intramodal.LogitLens`.
                    Default: ``'raw'``
        scales, scale_weights, aggregation, changed_decisions (optional): See :func:`captum_intramodal.explain`.
        layers, k, p, normalization, weighting, ranking_position, least_squares, strength (optional): See
                    :class:`captum_intramodal.ActivationRankingCorrelation`.

    Examples::

        >>> from captum_intramodal.explainers import make_explainer
        >>> make_explainer("msea+arc:logit_normalization=centered,k=20").settings["logit_normalization"]
        'centered'
    """

    msea: bool = False
    arc: bool = False
    layer: int | None = None
    method: Method = "logit_lens"
    crops: bool = False
    interpolate_pos_encoding: bool = False
    logit_normalization: LogitNormalization = "raw"
    changed_decisions: ChangedDecisions = "keep"

    def __post_init__(self) -> None:
        ScaleOptions.__post_init__(self)
        RankingOptions.__post_init__(self)
        if self.changed_decisions not in CHANGED_DECISIONS:
            raise InvalidOptionError(
                f"changed_decisions must be one of {CHANGED_DECISIONS}, got {self.changed_decisions!r}."
            )
        self._pass_options()  # Checks the others.

    @property
    def name(self) -> str:  # type: ignore[override]
        return _name(self.msea, self.arc)

    @property
    def settings(self) -> dict[str, Any]:
        """The name and the options that apply, JSON-able."""
        options = {name: getattr(self, name) for name in _option_names(self.msea, self.arc)}
        settings: dict[str, Any] = json.loads(json.dumps({"name": self.name} | options))
        return settings

    @property
    def pass_request(self) -> PassRequest:
        return PassRequest(
            self._pass_options(),
            ranking_layers=tuple(self.layers) if self.arc else (),
            decisions=self.msea and self.changed_decisions != "keep",
        )

    def _pass_options(self) -> ExplainOptions:
        return ExplainOptions(
            scales=self.scales if self.msea else (1.0,),
            layer=self.layer,
            method=self.method,
            crops=self.crops,
            interpolate_pos_encoding=self.interpolate_pos_encoding,
            logit_normalization=self.logit_normalization,
        )

    def explain(self, example: Example) -> list[Tensor]:
        activations = collect(example, self.pass_request)
        if self.msea:
            weights = self.weights_for(activations.scales)
            maps = activations.maps(weights, self.aggregation, self.changed_decisions)
        else:
            maps = activations.maps(normalized_weights(activations.scales, None))
        if self.arc:
            maps = self.suppress(self._lens(example), maps, activations)
        return [m[-len(example.answer_ids) :] for m in maps]

    def _lens(self, example: Example) -> LogitLens:
        return example.adapter.lens.with_normalization(self.logit_normalization)

    def relate_text(self, example: Example) -> TextMaps:
        """Return the text activation; with ARC times the rank-biased overlap, which irrelevant context lacks."""
        activations = collect(example, self.pass_request)
        if self.arc:
            _, context = self.relate(self._lens(example), activations)
            values = context.weights("relevance*text_activation")
        else:
            values = context_activation(self._lens(example), activations)
        return TextMaps(activations.text.positions, values[-len(example.answer_ids) :])


def context_activation(lens: LogitLens, activations: Activations) -> Tensor:
    """Compute the clipped logits of the T text tokens at their context, float32 (T, T); 0 elsewhere. Nothing is
    ranked."""
    ids = activations.text.ids
    activation = lens.activation(activations.last[: len(ids)], ids).clamp_min(0).cpu().T
    return activation * (ids[:, None] != ids[None, :]).tril(-1)


def _name(msea: bool, arc: bool) -> str:
    return "+".join(["msea"] * msea + ["arc"] * arc) or "logit_lens"


def _option_names(msea: bool, arc: bool) -> list[str]:
    """Return the names of the options that apply, in the order of settings."""
    names = ["layer", "method", "crops", "interpolate_pos_encoding", "logit_normalization"]
    if msea:
        names += [*(f.name for f in fields(ScaleOptions)), "changed_decisions"]
    return names + [f.name for f in fields(RankingOptions)] * arc


def _register(msea: bool, arc: bool) -> None:
    """Register the lens with or without MSEA and ARC; other options than those that apply are refused."""
    parameters = inspect.signature(LogitLensMaps).parameters
    signature = inspect.Signature([parameters[name] for name in _option_names(msea, arc)])

    def make(**options: Any) -> LogitLensMaps:
        signature.bind(**options)
        return LogitLensMaps(msea=msea, arc=arc, **options)

    row: Any = make
    row.__signature__ = signature
    EXPLAINERS.register(_name(msea, arc))(row)


for _msea, _arc in ((False, False), (True, False), (False, True), (True, True)):
    _register(_msea, _arc)
