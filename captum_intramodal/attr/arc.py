r"""Activation Ranking Correlation (ARC) around a Captum method: suppress the interference of irrelevant context."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any

import torch
from captum.attr import Attribution
from torch import Tensor
from transformers import PreTrainedModel

from captum_intramodal._utils.captum import (
    WrapperAttribution,
    format_additional_forward_args,
    format_tensor_into_tuples,
    log_usage,
)
from captum_intramodal.attr.hidden_states import (
    Reduction,
    attribute_positions,
    check_reduction,
    layer_method,
    single_tensor,
)
from captum_intramodal.attr.layer_logit_lens import LayerLogitLens, find_model
from captum_intramodal.attr.msea import MSEA
from captum_intramodal.attr.pixel_forward import PixelForward
from captum_intramodal.attr.relevance import RelevanceEstimator, check_positions
from captum_intramodal.attr.visual_token_attribution import VisualTokenAttribution
from captum_intramodal.errors import InvalidInputError, InvalidOptionError
from captum_intramodal.functional.context_relevance import (
    ContextRelevance,
    RankingPosition,
    Weighting,
    check_arc_options,
)
from captum_intramodal.functional.rank_overlap import Normalization
from captum_intramodal.functional.suppression import suppress_interference
from captum_intramodal.models.logit_lens import LogitLens
from captum_intramodal.models.ranking import DEFAULT_RANKING_LENGTH

__all__ = ["ARC", "ActivationRankingCorrelation"]

Target = int | tuple[int, ...]


class ActivationRankingCorrelation(RelevanceEstimator, WrapperAttribution):
    r"""
    Activation Ranking Correlation (arXiv 2509.22415) suppresses, in the map of a token, the activation that comes from
    irrelevant context, and keeps what agrees with relevant context.

    At each text position the logit lens ranks the ``k`` most likely next tokens. The rank-biased overlap between the
    rankings of a context token j and of the current token t measures the relevance of that context,
    :math:`\rho_{tj} \in [0, 1]` (Eq. 7; averaged over ``layers``). The interference subtracted from the map of t is
    the mean of the maps of its context (all earlier text tokens with another id) with weights :math:`\omega_{tj}`:

    ===============================  =============================================
    ``weighting``                    :math:`\omega_{tj}`
    ===============================  =============================================
    ``uniform``                      1, the control, which ignores the rankings
    ``irrelevance``                  :math:`1 - \rho_{tj}`
    ``relevance``                    :math:`\rho_{tj}`
    ``text_activation``              :math:`r_t(j) = \max(0, h_j \cdot w_t)` (TAM)
    ``irrelevance*text_activation``  :math:`(1 - \rho_{tj}) \, r_t(j)`
    ``relevance*text_activation``    :math:`\rho_{tj} \, r_t(j)`
    ===============================  =============================================

    With :math:`A_t` the map of token t,

    .. math::
        E_t = \frac{\sum_j \omega_{tj} A_j}{\sum_j \omega_{tj}}, \qquad
        s_t = \lambda \frac{\langle A_t, E_t \rangle}{\langle E_t, E_t \rangle}, \qquad
        A'_t = \max(0, A_t - s_t E_t)

    There are two ways to use it: as a post-processor of existing maps from any method (:meth:`context`,
    :meth:`suppress`), and as a wrapper around a Captum method that explains one target at a time (:meth:`attribute`).

    Around a layer method at a decoder layer, maps are values at the positions of the sequence, (T, positions): see
    ``reduce``, and :func:`~captum_intramodal.draw_positions` to draw them over the image. Around
    :class:`~captum_intramodal.VisualTokenAttribution` they are maps of the image. For ``LayerGradCam``, the value of a
    position is the sum over features of the hidden state times the mean gradient over all positions.
    ``LayerLogitLens`` attributes all targets in one pass.

    Args:

        attribution_method (Attribution, optional): The Captum method to wrap, such as
                    ``LayerIntegratedGradients(forward_func, layer)``.
                    Default: None, for use as a post-processor
        model (PreTrainedModel or LogitLens, optional): The model whose layers are ranked.
                    Default: None, the one found in the method's ``forward_func``
        layers (Sequence[int], optional): Decoder layers whose rankings are compared.
                    Default: ``(-1,)``
        k (int, optional): Length of the rankings; beyond the size of the vocabulary, they contain all of it.
                    Default: 50
        p (float, optional): Persistence of the rank-biased overlap, in (0, 1).
                    Default: 0.9
        normalization (str, optional): Normalization of the truncated overlap, see
                    :func:`~captum_intramodal.rank_biased_overlap`.
                    Default: ``'truncated'``
        weighting (str, optional): See the table.
                    Default: ``'irrelevance'``
        ranking_position (str, optional): Position whose ranking represents a token: ``'token'``, the token itself,
                    where the model predicts what follows; or ``'prediction'``, the position before it, where the model
                    predicted the token.
                    Default: ``'token'``
        least_squares (bool, optional): Fit the scale :math:`s_t` to each token; otherwise :math:`s_t = \lambda`.
                    Default: True
        strength (float, optional): :math:`\lambda`, factor of the interference that is subtracted.
                    Default: 1.0
        relu_attributions (bool, optional): Clip the result at 0; turn it off for signed attributions.
                    Default: True
        reduce (str or Callable, optional): How the features of a decoder layer's attributions, (1, positions, D),
                    become one value per position before suppression: ``'sum'`` or ``'norm'``; other attributions are
                    left unchanged. A function is applied to whatever the wrapped method returns. None keeps the
                    features.
                    Default: ``'sum'``

    Raises:
        InvalidOptionError: if an option is out of range, or if there is neither a method nor a model.
        TypeError: if ``attribution_method`` is not a Captum method.

    Examples::

        >>> from captum.attr import LayerGradientXActivation
        >>> from captum_intramodal import ARC, PixelForward
        >>> pixels = torch.rand(1, 3, 96, 128)
        >>> forward = PixelForward(adapter, "describe the picture.", "a dog.")

        >>> # As a post-processor of maps (answer tokens, height, width):
        >>> arc = ARC(model=model)
        >>> context = arc.context(forward.inputs(pixels[0]), forward.positions(pixels[0]))
        >>> arc.suppress(torch.rand(3, 24, 32), context).shape
        torch.Size([3, 24, 32])

        >>> # As a wrapper, whose maps here are values at positions, (answer tokens, positions):
        >>> method = LayerGradientXActivation(forward, model.get_decoder().layers[1])
        >>> ARC(method, relu_attributions=False).attribute_all(pixels).shape
        torch.Size([3, ...])
    """

    def __init__(
        self,
        attribution_method: Attribution | None = None,
        model: PreTrainedModel | LogitLens | None = None,
        layers: Sequence[int] = (-1,),
        k: int = DEFAULT_RANKING_LENGTH,
        p: float = 0.9,
        normalization: Normalization = "truncated",
        weighting: Weighting = "irrelevance",
        ranking_position: RankingPosition = "token",
        least_squares: bool = True,
        strength: float = 1.0,
        relu_attributions: bool = True,
        reduce: Reduction = "sum",
    ) -> None:
        if attribution_method is not None and not isinstance(attribution_method, Attribution):
            raise TypeError(
                f"attribution_method must be a Captum Attribution or None, got {type(attribution_method).__name__}; "
                "pass the model as model=."
            )
        check_arc_options(k, p, normalization, weighting, ranking_position, strength)
        check_reduction(reduce)
        self.attribution_method = attribution_method
        if model is None:
            if attribution_method is None:
                raise InvalidOptionError(
                    "Pass an attribution_method to wrap, or model= to use ARC as a post-processor of maps."
                )
            model = getattr(attribution_method, "lens", None) or find_model(attribution_method.forward_func)
        super().__init__(model, layers, k, p, normalization, ranking_position)
        self.weighting: Weighting = weighting
        self.least_squares = least_squares
        self.strength = strength
        self.relu_attributions = relu_attributions
        self.reduce = reduce

    @property
    def forward_func(self) -> Callable[..., Any]:
        return self._wrapped_method().forward_func

    @forward_func.setter
    def forward_func(self, value: Callable[..., Any]) -> None:
        if self.attribution_method is not None:
            self.attribution_method.forward_func = value

    @property
    def multiplies_by_inputs(self) -> bool:
        return self.attribution_method is not None and super().multiplies_by_inputs

    @property
    def settings(self) -> dict[str, Any]:
        """The options that define the result, as JSON values."""
        names = ("k", "p", "normalization", "weighting", "ranking_position", "least_squares", "strength")
        return {"layers": list(self.layers)} | {name: getattr(self, name) for name in names}

    def suppress(self, maps: Tensor, context: ContextRelevance) -> Tensor:
        r"""
        Suppress interference in existing maps.

        Args:

            maps (Tensor): One map per text token, (T, ...), in the order of the positions given to :meth:`context`.
            context (ContextRelevance): From :meth:`context` or :meth:`compare`.

        Returns:
            **maps** (*Tensor*): of the shape of ``maps``, float32.

        Raises:
            InvalidInputError: if the number of maps differs from the number of tokens.
        """
        return suppress_interference(
            maps.float(),
            context.weights(self.weighting),
            self.least_squares,
            self.strength,
            self.relu_attributions,
            self.lens.working_memory,
        )

    def forward_context(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        targets: Sequence[Target] | None = None,
        arc_positions: Tensor | None = None,
        additional_forward_args: Any = None,
    ) -> ContextRelevance:
        r"""
        Compute what :meth:`context` does by running the wrapped method's forward function. The result can be passed to
        several methods as ``arc_relevance``, so that it is computed once.

        Args:

            inputs, targets, arc_positions, additional_forward_args: See :meth:`attribute_all`.

        Returns:
            **relevance** (*ContextRelevance*): of the targets' tokens.
        """
        targets = self._answer_targets() if targets is None else targets
        positions = self._target_positions(inputs, targets, arc_positions)
        forward_args = format_tensor_into_tuples(inputs) + (
            format_additional_forward_args(additional_forward_args) or ()
        )
        (result,) = self._relevance_of_pass(
            lambda: self.forward_func(*forward_args), [positions], [self._token_ids(targets)]
        )
        return result

    @log_usage(part_of_slo=True)
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Target,
        arc_context: Sequence[Target] | None = None,
        arc_positions: Tensor | None = None,
        additional_forward_args: Any = None,
        arc_relevance: ContextRelevance | None = None,
        **kwargs: Any,
    ) -> Tensor:
        r"""
        Attribute one target with the wrapped method and suppress the interference of its context. To explain all tokens
        of an answer, :meth:`attribute_all` does this work only once.

        Args:

            inputs (Tensor or tuple[Tensor, ...]): Inputs of the wrapped method; one example.
            target (int or tuple): Captum target of the token to explain: one of the ``targets`` of a
                        ``PixelForward``; for other forward functions, its (last) entry is the token's id.
            arc_context (Sequence, optional): Captum targets of its context tokens, in the order of the sequence.
                        Default: None, all earlier tokens of the answer, if the forward function is a ``PixelForward``
            arc_positions (Tensor, optional): Positions in the sequence of the context tokens and, last, of the token
                        itself, int64 (len(arc_context) + 1,).
                        Default: None, found by the ``PixelForward``
            additional_forward_args (Any, optional): Further arguments of the forward function.
                        Default: None
            arc_relevance (ContextRelevance, optional): Relevance of the same tokens, from :meth:`forward_context`;
                        without ``arc_context``, that of the whole answer works too.
                        Default: None, computed
            **kwargs (Any, optional): Further arguments of the wrapped method.

        Returns:
            **attributions** (*Tensor*): (1, ...), of the shape of the wrapped method's attributions after ``reduce``,
            float32.

        Raises:
            InvalidInputError: if ``target`` is not a target of the answer, and as in :meth:`attribute_all`.
        """
        if arc_context is None:
            answer = self._answer_targets()
            if target not in answer:
                raise InvalidInputError(f"target must be one of the answer's targets, {answer}, got {target!r}.")
            arc_context = answer[: answer.index(target)]
            if arc_relevance is not None:
                arc_relevance = arc_relevance.first(len(arc_context) + 1)
        targets = [*arc_context, target]
        return self.attribute_all(
            inputs, targets, arc_positions, additional_forward_args, arc_relevance=arc_relevance, **kwargs
        )[-1:]

    def attribute_all(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        targets: Sequence[Target] | None = None,
        arc_positions: Tensor | None = None,
        additional_forward_args: Any = None,
        arc_relevance: ContextRelevance | None = None,
        **kwargs: Any,
    ) -> Tensor:
        r"""
        Attribute every target with the wrapped method, with the targets before it as its context.

        Args:

            inputs, additional_forward_args, kwargs: See :meth:`attribute`.
            targets (Sequence, optional): Captum targets in the order of the sequence; the (last) entry of each is a
                        token id.
                        Default: None, the whole answer, if the forward function is a ``PixelForward``
            arc_positions (Tensor, optional): Position in the sequence of each target's token, int64 (T,).
                        Default: None, found by the ``PixelForward``
            arc_relevance (ContextRelevance, optional): Relevance of the targets' tokens, from :meth:`forward_context`
                        of this or another ARC with the same forward function; positions are then not needed.
                        Default: None, computed

        Returns:
            **attributions** (*Tensor*): one suppressed attribution per target, (T, ...), float32.

        Raises:
            InvalidOptionError: if no method is wrapped.
            InvalidInputError: if there is more than one example, the method returns several tensors, the number of
                tokens in ``arc_relevance`` differs from the number of targets, or targets or positions are needed.
        """
        self._wrapped_method()
        targets = self._answer_targets() if targets is None else targets
        if arc_relevance is None:
            arc_relevance = self.forward_context(inputs, targets, arc_positions, additional_forward_args)
        if len(arc_relevance.context) != len(targets):
            raise InvalidInputError(
                f"arc_relevance is for {len(arc_relevance.context)} tokens, but there are {len(targets)} targets."
            )
        if additional_forward_args is not None:
            kwargs["additional_forward_args"] = additional_forward_args
        return self.suppress(self._attribute_targets(inputs, targets, kwargs), arc_relevance)

    def _wrapped_method(self) -> Attribution:
        """Return the wrapped method, or raise if there is none."""
        if self.attribution_method is None:
            raise InvalidOptionError(
                "This ARC wraps no attribution method; use it as a post-processor, through context and suppress."
            )
        return self.attribution_method

    def _answer_targets(self) -> Sequence[Target]:
        """Return the targets of the whole answer, which only a PixelForward knows."""
        forward = self.forward_func
        if not isinstance(forward, PixelForward):
            raise InvalidInputError(
                f"The context tokens are known only for a PixelForward, not for {type(forward).__name__}; pass "
                "arc_context or targets."
            )
        return forward.targets

    def _target_positions(self, inputs: Any, targets: Sequence[Target], positions: Tensor | None) -> Tensor:
        """Return the position of each target's token in the sequence."""
        forward = self.forward_func
        if positions is None:
            if not isinstance(forward, PixelForward) or any(target not in forward.targets for target in targets):
                raise InvalidInputError(
                    "Pass arc_positions, the position of each token in the sequence; only a PixelForward knows them, "
                    "and only for its own targets."
                )
            answer: Sequence[Target] = forward.targets
            indices = [answer.index(target) for target in targets]
            positions = forward.positions(format_tensor_into_tuples(inputs)[0][0])[indices]
        if len(targets) != len(positions):
            raise InvalidInputError(
                f"Got {len(targets)} targets but {len(positions)} positions; pass one position per target."
            )
        return check_positions(positions, None)

    def _token_ids(self, targets: Sequence[Target]) -> Tensor:
        """Return the token id of each target."""
        forward = self.forward_func
        answer: Sequence[Target] = forward.targets if isinstance(forward, PixelForward) else ()
        if isinstance(forward, PixelForward) and all(target in answer for target in targets):
            return torch.tensor([forward.answer_ids[answer.index(target)] for target in targets])
        return torch.tensor([int(target[-1]) if isinstance(target, tuple) else int(target) for target in targets])

    def _attribute_targets(self, inputs: Any, targets: Sequence[Target], kwargs: dict[str, Any]) -> Tensor:
        """Attribute every target with the wrapped method, (T, ...)."""
        methods: list[Any] = [self.attribution_method]
        while (inner := getattr(methods[-1], "attribution_method", None)) is not None:
            methods.append(inner)
        *wrappers, innermost = methods
        if "target" not in signature(innermost.attribute).parameters:
            warnings.warn(
                f"{type(innermost).__name__} takes no target, so all tokens have the same map, and ARC subtracts from "
                "it what their context shares with it.",
                stacklevel=3,
            )
            maps = self._attribute_once(inputs, **kwargs)
            return maps.expand(len(targets), *maps.shape[1:])
        takes_all_targets = isinstance(innermost, LayerLogitLens) and not callable(self.reduce)
        if takes_all_targets and all(isinstance(wrapper, MSEA | VisualTokenAttribution) for wrapper in wrappers):
            maps = self._attribute_once(inputs, target=self._token_ids(targets)[None], **kwargs)
            return maps[0] if maps.ndim == 3 else maps.transpose(0, 1)
        return torch.cat([self._attribute_once(inputs, target=target, **kwargs) for target in targets])

    def _attribute_once(self, inputs: Any, **kwargs: Any) -> Tensor:
        """Call the wrapped method, with one value per position at a decoder layer."""
        method: Any = self.attribution_method
        inner = layer_method(method)
        if inner is not None and inner.layer in {*self.lens.layers.modules(), self.lens.norm}:
            result = attribute_positions(method, inputs, self.reduce, **kwargs)
        else:
            result = single_tensor(method.attribute(inputs, **kwargs))
            result = self.reduce(result) if callable(self.reduce) else result
        if result.shape[0] != 1:
            raise InvalidInputError(
                f"ARC attributes one example at a time, got attributions of shape {tuple(result.shape)}."
            )
        return result


ARC = ActivationRankingCorrelation
