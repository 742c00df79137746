r"""The options of an explanation, checked once for ``explain``, ``explain_batch``, explainers and command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from captum_intramodal.errors import InvalidOptionError
from captum_intramodal.functional.aggregation import AGGREGATIONS, Aggregation, check_scales, normalized_weights
from captum_intramodal.models.logit_lens import LOGIT_NORMALIZATIONS, LogitNormalization

__all__ = ["CHANGED_DECISIONS", "LENS_METHODS", "METHODS", "ChangedDecisions", "ExplainOptions", "Method", "Scales"]

Method = Literal[
    "auto",
    "logit_lens",
    "direct_contribution",
    "lens_x_contribution",
    "layer_gradient_x_activation",
    "input_x_gradient",
]
METHODS: tuple[Method, ...] = get_args(Method)
# Methods that apply the logit lens at visual tokens in the decoder's sequence.
LENS_METHODS: tuple[Method, ...] = ("logit_lens", "lens_x_contribution")
ChangedDecisions = Literal["keep", "drop", "weigh"]
CHANGED_DECISIONS: tuple[ChangedDecisions, ...] = get_args(ChangedDecisions)
Scales = Sequence[float] | Literal["auto"]


@dataclass(frozen=True, kw_only=True)
class ExplainOptions:
    r"""
    Options of an explanation, checked when they are made. :func:`captum_intramodal.explain` documents each.

    Raises:
        InvalidOptionError: an option has a value that it does not take, or two options exclude each other.
        TypeError: scales are not a sequence.

    Examples::

        >>> from captum_intramodal.explanation.options import ExplainOptions
        >>> ExplainOptions(scales=(1, 2), scale_weights=(3, 1)).weight_of
        {1.0: 0.75, 2.0: 0.25}
        >>> ExplainOptions(arc={"k": 20}).arc_options, ExplainOptions(arc=None).arc_options
        ({'k': 20}, None)
    """

    scales: Scales = "auto"
    scale_weights: Sequence[float] | None = None
    aggregation: Aggregation = "mean"
    changed_decisions: ChangedDecisions = "keep"
    arc: bool | Mapping[str, Any] | None = True
    crops: bool = False
    interpolate_pos_encoding: bool = False
    method: Method = "auto"
    layer: int | None = None
    logit_normalization: LogitNormalization = "raw"
    max_new_tokens: int = 128

    def __post_init__(self) -> None:
        for name, known in (
            ("method", METHODS),
            ("aggregation", AGGREGATIONS),
            ("changed_decisions", CHANGED_DECISIONS),
            ("logit_normalization", LOGIT_NORMALIZATIONS),
        ):
            if getattr(self, name) not in known:
                raise InvalidOptionError(f"{name} must be one of {known}, got {getattr(self, name)!r}.")
        if self.crops and self.interpolate_pos_encoding:
            raise InvalidOptionError(
                "crops and interpolate_pos_encoding are two ways to show a model more of an image; choose one."
            )
        if isinstance(self.scales, str):
            if self.scales != "auto":
                raise InvalidOptionError(
                    f"scales must be 'auto' or a sequence of factors such as (1, 1.5, 2), got {self.scales!r}."
                )
            if self.scale_weights is not None:
                raise InvalidOptionError(f"scale_weights need the scales that they weight; scales is {self.scales!r}.")
        else:
            object.__setattr__(self, "scales", check_scales(self.scales))
            normalized_weights(self.scales, self.scale_weights)

    @property
    def weight_of(self) -> dict[float, float]:
        """Normalized weight of each given scale; empty for ``'auto'``, whose scales weigh the same."""
        if isinstance(self.scales, str):
            return {}
        weights = normalized_weights(self.scales, self.scale_weights).tolist()
        return dict(zip(self.scales, weights, strict=True))

    @property
    def arc_options(self) -> dict[str, Any] | None:
        """Keyword arguments of ARC; None for an explanation without it."""
        if isinstance(self.arc, Mapping):
            return dict(self.arc)
        return {} if self.arc else None
