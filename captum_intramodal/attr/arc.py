r"""Activation Ranking Correlation: suppress the activation that irrelevant context causes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from typing import Any, overload

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
from captum_intramodal.attr.visual_token_attribution import VisualTokenAttribution
from captum_intramodal.functional.rank_overlap import Normalization, pairwise_rank_biased_overlap
from captum_intramodal.functional.suppression import (
    ContextRelevance,
    RankingPosition,
    Weighting,
    check_arc_options,
    check_positions,
    suppress_interference,
)
from captum_intramodal.models.hooks import hidden_rows, run_layers
from captum_intramodal.models.logit_lens import LogitLens, select_layers

__all__ = ["ARC", "ActivationRankingCorrelation"]


class ActivationRankingCorrelation(WrapperAttribution):
    r"""
    Activation Ranking Correlation (arXiv 2509.22415): suppresses, in the map of a token, the activation that comes
    from irrelevant context, and keeps what is coherent with it.

    Forward hooks on the model's decoder layers read, through the logit lens, the ``k`` most likely next tokens at each
    text position. The rank-biased overlap of the rankings of a context token j and of the current token t says how
    relevant that context is, :math:`\rho_{tj} \in [0, 1]` (Eq. 7; averaged over ``layers``). The interference that is
    subtracted from the map of t is the mean of the maps of its context (all earlier text tokens that are not the same
    token) with weights :math:`\omega_{tj}`, see :func:`suppress_interference`:

    ===============================  =============================================
    ``weighting``                    :math:`\omega_{tj}`
    ===============================  =============================================
    ``uniform``                      1, the control: rankings play no part
    ``irrelevance``                  :math:`1 - \rho_{tj}`
    ``relevance``                    :math:`\rho_{tj}`
    ``text_activation``              :math:`r_t(j) = \max(0, h_j \cdot w_t)` (TAM)
    ``irrelevance*text_activation``  :math:`(1 - \rho_{tj}) \, r_t(j)`
    ``relevance*text_activation``    :math:`\rho_{tj} \, r_t(j)`
    ===============================  =============================================

    It is used in two ways: as a post-processor, :meth:`context` and :meth:`suppress`, on maps that exist already, from
    whatever method; and as a wrapper, :meth:`attribute`, around a Captum method that explains one target at a time.

    Around a layer method at a decoder layer the maps are values at positions of the sequence (T, positions): see
    ``reduce``, and :func:`~captum_intramodal.draw_positions` to see them on the image. Around
    :class:`~captum_intramodal.VisualTokenAttribution` they are maps of the image. Of ``LayerGradCam``, a position's
    value is the sum over features of hidden states times the gradients' means over all positions. ``LayerLogitLens``
    attributes all targets in one pass.

    Args:

        attribution_method (Attribution, optional): The Captum method to wrap, for instance
                    ``LayerIntegratedGradients(forward_func, layer)``.
                    Default: None, for use as a post-processor.
        model (PreTrainedModel or LogitLens, optional): The model whose layers are read.
                    Default: None, the one found in the method's ``forward_func``.
        layers (Sequence[int], optional): Decoder layers whose rankings are compared.
                    Default: ``(-1,)``
        k (int, optional): Length of the rankings; larger than the vocabulary means all of it.
                    Default: 50
        p (float, optional): Persistence of the rank-biased overlap, in (0, 1).
                    Default: 0.9
        normalization (str, optional): Of the truncated overlap, see
                    :func:`~captum_intramodal.rank_biased_overlap`.
                    Default: ``'truncated'``
        weighting (str, optional): See the table.
                    Default: ``'irrelevance'``
        ranking_position (str, optional): A token's ranking is read at the token itself (``'token'``: what may follow
                    it) or at the position before, which predicted it (``'prediction'``).
                    Default: ``'token'``
        least_squares (bool, optional): Fit the scale of the interference to each token.
                    Default: True
        strength (float, optional): Factor of the interference that is subtracted.
                    Default: 1.0
        relu_attributions (bool, optional): Clip the result at 0; turn it off for signed attributions.
                    Default: True
        reduce (str or Callable, optional): How attributions (1, positions, D) of a decoder layer's hidden states become
                    one value per position before suppression: ``'sum'`` or ``'norm'`` over the features; other
                    attributions stay as they are. A function is applied to whatever the wrapped method returns; None
                    leaves it.
                    Default: ``'sum'``

    Examples::

        >>> arc = ActivationRankingCorrelation(model=model)
        >>> # maps: (T, height, width) of the text tokens at ``positions`` (T,)
        >>> context = arc.context(inputs, positions)
        >>> suppressed = arc.suppress(maps, context)

        >>> arc = ActivationRankingCorrelation(LayerIntegratedGradients(forward, layer), relu_attributions=False)
        >>> arc.attribute_all(image, n_steps=20).shape        # forward: a PixelForward
        torch.Size([answer tokens, positions])
    """

    def __init__(
        self,
        attribution_method: Attribution | None = None,
        model: PreTrainedModel | LogitLens | None = None,
        layers: Sequence[int] = (-1,),
        k: int = 50,
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
        if attribution_method is None and model is None:
            raise ValueError("Pass an attribution_method to wrap, or model= to use ARC as a post-processor.")
        check_arc_options(k, p, normalization, weighting, ranking_position, strength)
        check_reduction(reduce)
        self.attribution_method = attribution_method
        if model is None and attribution_method is not None:
            model = getattr(attribution_method, "lens", None) or find_model(attribution_method.forward_func)
        self.lens = model if isinstance(model, LogitLens) else LogitLens(model)
        self.model = model if isinstance(model, PreTrainedModel) else None
        self.layers = tuple(layers)
        self.modules = select_layers(self.lens, self.layers)
        self.k = k
        self.p = p
        self.normalization: Normalization = normalization
        self.weighting: Weighting = weighting
        self.ranking_position: RankingPosition = ranking_position
        self.least_squares = least_squares
        self.strength = strength
        self.relu_attributions = relu_attributions
        self.reduce = reduce

    @property
    def forward_func(self) -> Callable[..., Any]:
        if self.attribution_method is None:
            raise ValueError("This ARC wraps no attribution method; it is a post-processor (context, suppress).")
        return self.attribution_method.forward_func

    @forward_func.setter
    def forward_func(self, value: Callable[..., Any]) -> None:
        if self.attribution_method is not None:
            self.attribution_method.forward_func = value

    @property
    def multiplies_by_inputs(self) -> bool:
        return self.attribution_method is not None and super().multiplies_by_inputs

    @property
    def settings(self) -> dict[str, Any]:
        """The options that define the result, JSON-able."""
        names = ("k", "p", "normalization", "weighting", "ranking_position", "least_squares", "strength")
        return {"layers": list(self.layers)} | {name: getattr(self, name) for name in names}

    @overload
    def context(self, inputs: Mapping[str, Any], positions: Tensor) -> ContextRelevance: ...

    @overload
    def context(self, inputs: Mapping[str, Any], positions: Sequence[Tensor]) -> list[ContextRelevance]: ...

    def context(
        self, inputs: Mapping[str, Any], positions: Tensor | Sequence[Tensor]
    ) -> ContextRelevance | list[ContextRelevance]:
        r"""
        Reads the rankings in one forward pass without gradients and compares them.

        Args:

            inputs (Mapping): Keyword arguments of the model's forward, as its processor returns them, with
                        ``input_ids`` (B, sequence); of several examples padded on the left, with ``attention_mask``.
            positions (Tensor or Sequence[Tensor]): Positions of the text tokens in the sequence, padding included,
                        increasing, int64 (T,); all that may be context, and those to explain. For one example a
                        tensor, for a batch a list of B tensors.

        Returns:
            *ContextRelevance* for any number of uses, or a list of B of them.

        Raises:
            ValueError: another number of positions than of examples; positions that are not increasing, outside the
                sequence or in its padding.
        """
        ids = inputs.get("input_ids")
        if self.model is None or not isinstance(ids, Tensor):
            raise ValueError("context needs a transformers model (model=) and inputs with 'input_ids'.")
        each = [positions] if isinstance(positions, Tensor) else list(positions)
        if ids.ndim != 2 or len(each) != len(ids):
            raise ValueError(
                f"context needs the positions of each example: {len(each)} for input_ids of shape {tuple(ids.shape)}; "
                "pass a list of tensors for a batch."
            )
        rows = [check_positions(p, ids.shape[1]) for p in each]
        mask = inputs.get("attention_mask")
        if not isinstance(mask, Tensor) or mask.shape != ids.shape:
            mask = torch.ones_like(ids)
        starts = mask.long().argmax(dim=1).tolist()
        if outside := [i for i, (row, start) in enumerate(zip(rows, starts, strict=True)) if int(row[0]) < start]:
            raise ValueError(f"Positions of examples {outside} lie in the padding; they count from its beginning on.")
        model = self.model
        tokens = [ids[i].cpu()[row] for i, row in enumerate(rows)]
        results = self._contexts(lambda: model(**inputs), rows, tokens, starts)
        return results[0] if isinstance(positions, Tensor) else results

    def _contexts(
        self,
        forward: Callable[[], Any],
        positions: Sequence[Tensor],
        tokens: Sequence[Tensor],
        starts: Sequence[int] = (0,),
    ) -> list[ContextRelevance]:
        # The position before each token too, for rankings at the prediction; the very first token has none.
        rows = [torch.cat([p, (p - 1).clamp_min(start)]) for p, start in zip(positions, starts, strict=True)]
        modules = [*self.modules, self.lens.layers[-1]]

        def select(hidden: Tensor) -> Tensor:
            if hidden.ndim == 3 and len(hidden) != len(rows):
                raise ValueError(f"ARC was given positions of {len(rows)} examples, and a batch of {len(hidden)}.")
            each = [hidden_rows(hidden, i, len(rows))[row.to(hidden.device)] for i, row in enumerate(rows)]
            return torch.cat(each)

        *states, last = (h.split([len(row) for row in rows]) for h in run_layers(forward, modules, select))
        return [self.compare([h[i] for h in states], last[i], tokens[i]) for i in range(len(rows))]

    def compare(self, states: Sequence[Tensor], last: Tensor, tokens: Tensor) -> ContextRelevance:
        r"""
        Relevance of context from hidden states that have been read already.

        Args:

            states (Sequence[Tensor]): For each of ``layers`` the hidden states (2T, D): at the T text tokens, then at
                        the positions before them.
            last (Tensor): The last layer's, likewise (2T, D).
            tokens (Tensor): Ids of the T tokens, int64 (T,).

        Returns:
            ContextRelevance: of the T tokens.
        """
        rankings = [self.lens.topk(self.ranked_states(hidden), self.k) for hidden in states]
        return self.relate(rankings, last, tokens)

    def ranked_states(self, hidden: Tensor) -> Tensor:
        """Those (T, D) of the states (2T, D) that :meth:`compare` takes whose predictions are ranked."""
        at_tokens, before = hidden.chunk(2)
        return at_tokens if self.ranking_position == "token" else before

    def relate(self, rankings: Sequence[Tensor], last: Tensor, tokens: Tensor) -> ContextRelevance:
        r"""
        As :meth:`compare`, from rankings that have been made already.

        Args:

            rankings (Sequence[Tensor]): For each of ``layers`` the T rankings, int64 (T, k), best first.
            last, tokens: See :meth:`compare`.
        """
        count = len(tokens)
        relevance = torch.zeros(count, count)
        for ranking in rankings:
            relevance += pairwise_rank_biased_overlap(
                ranking, ranking, self.p, self.normalization, self.lens.working_memory
            ).cpu()
        # activation[j, t]: what position j says for token t.
        activation = self.lens.activation(last[:count], tokens).clamp_min(0).cpu()
        earlier = torch.ones(count, count, dtype=torch.bool).tril(-1)
        return ContextRelevance(
            relevance=relevance / len(rankings),
            text_activation=activation.T.contiguous(),
            context=earlier & (tokens[:, None] != tokens[None, :]),
        )

    def suppress(self, maps: Tensor, context: ContextRelevance) -> Tensor:
        r"""
        Suppresses interference in maps that exist already.

        Args:

            maps (Tensor): One map per text token, (T, ...), in the order of the positions given to :meth:`context`.
            context (ContextRelevance): From :meth:`context` or :meth:`compare`.

        Returns:
            *Tensor* of the shape of ``maps``, float32.
        """
        weights = context.weights(self.weighting)
        return suppress_interference(
            maps, weights, self.least_squares, self.strength, self.relu_attributions, self.lens.working_memory
        )

    def forward_context(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        targets: Sequence[Any] | None = None,
        arc_positions: Tensor | None = None,
        additional_forward_args: Any = None,
    ) -> ContextRelevance:
        r"""
        What :meth:`context` returns, from a run of the wrapped method's forward function: to compute it once and give
        it, as ``arc_relevance``, to several methods.

        Args:

            inputs, targets, arc_positions, additional_forward_args: See :meth:`attribute_all`.

        Returns:
            ContextRelevance: of the targets' tokens.
        """
        targets, positions = self._locate(inputs, targets, arc_positions)
        forward_args = format_tensor_into_tuples(inputs) + (
            format_additional_forward_args(additional_forward_args) or ()
        )
        ids = self._token_ids(targets)
        (result,) = self._contexts(lambda: self.forward_func(*forward_args), [positions], [ids])
        return result

    def _locate(
        self, inputs: Any, targets: Sequence[Any] | None, positions: Tensor | None
    ) -> tuple[Sequence[Any], Tensor]:
        """Targets and their tokens' positions, which a PixelForward knows."""
        forward = self.forward_func
        if targets is None:
            targets = self._answer()
        if positions is None:
            if not isinstance(forward, PixelForward) or any(target not in forward.targets for target in targets):
                raise ValueError(
                    "Pass arc_positions, the position of each token in the sequence; only a PixelForward knows them, "
                    "and of its own targets."
                )
            indices = [forward.targets.index(target) for target in targets]
            positions = forward.positions(format_tensor_into_tuples(inputs)[0][0])[indices]
        if len(targets) != len(positions):
            raise ValueError(f"{len(targets)} targets but {len(positions)} positions; pass one position per target.")
        return targets, check_positions(positions, None)

    def _token_ids(self, targets: Sequence[Any]) -> Tensor:
        forward = self.forward_func
        if isinstance(forward, PixelForward) and all(target in forward.targets for target in targets):
            return torch.tensor([forward.answer_ids[forward.targets.index(target)] for target in targets])
        return torch.tensor([int(target[-1]) if isinstance(target, tuple) else int(target) for target in targets])

    def _answer(self) -> Sequence[Any]:
        forward = self.forward_func
        if not isinstance(forward, PixelForward):
            raise ValueError(
                f"Which tokens are context is known only of a PixelForward, not of {type(forward).__name__}; pass "
                "arc_context or targets."
            )
        return forward.targets

    @log_usage(part_of_slo=True)
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Any,
        arc_context: Sequence[Any] | None = None,
        arc_positions: Tensor | None = None,
        additional_forward_args: Any = None,
        arc_relevance: ContextRelevance | None = None,
        **kwargs: Any,
    ) -> Tensor:
        r"""
        Attributes one target with the wrapped method and suppresses what its context causes. To explain all tokens of
        an answer, :meth:`attribute_all` does the same work once.

        Args:

            inputs (Tensor or tuple[Tensor, ...]): As the wrapped method takes them; one example.
            target (int or tuple): Captum target of the token to explain: one of a ``PixelForward``'s ``targets``; of
                        other forward functions the (last) entry is the token's id.
            arc_context (Sequence, optional): Captum targets of its context tokens, in the order of the sequence.
                        Default: None, all earlier tokens of the answer, if the forward function is a ``PixelForward``.
            arc_positions (Tensor, optional): Positions in the sequence of the context tokens and, last, of the token
                        itself, int64 (len(arc_context) + 1,).
                        Default: None, found by the ``PixelForward``.
            additional_forward_args (Any, optional): Of the forward function.
                        Default: None
            arc_relevance (ContextRelevance, optional): Of the same tokens, from :meth:`forward_context`; without
                        ``arc_context``, that of the whole answer will do.
                        Default: None, computed.
            **kwargs (Any, optional): Further arguments of the wrapped method.

        Returns:
            *Tensor* of the shape of the wrapped method's attribution (after ``reduce``).
        """
        if arc_context is None:
            answer = self._answer()
            if target not in answer:
                raise ValueError(f"target must be one of the answer's, {answer}, got {target!r}.")
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
        targets: Sequence[Any] | None = None,
        arc_positions: Tensor | None = None,
        additional_forward_args: Any = None,
        arc_relevance: ContextRelevance | None = None,
        **kwargs: Any,
    ) -> Tensor:
        r"""
        Attributes every target with the wrapped method, each with the ones before it as context.

        Args:

            inputs, additional_forward_args, kwargs: See :meth:`attribute`.
            targets (Sequence, optional): Captum targets in the order of the sequence; the (last) entry of each is a
                        token id.
                        Default: None, the whole answer, if the forward function is a ``PixelForward``.
            arc_positions (Tensor, optional): Position in the sequence of each target's token, int64 (T,).
                        Default: None, found by the ``PixelForward``.
            arc_relevance (ContextRelevance, optional): Of the targets' tokens, from :meth:`forward_context` of this or
                        another ARC with the same forward function; positions are not needed then.
                        Default: None, computed.

        Returns:
            *Tensor* (T, ...): one suppressed attribution per target.

        Raises:
            ValueError: no wrapped method, more than one example, a method that returns several tensors, or a relevance
                of other tokens.
        """
        if self.attribution_method is None:
            raise ValueError("This ARC wraps no attribution method; use context and suppress.")
        targets = self._answer() if targets is None else targets
        if arc_relevance is None:
            arc_relevance = self.forward_context(inputs, targets, arc_positions, additional_forward_args)
        if len(arc_relevance.context) != len(targets):
            raise ValueError(f"arc_relevance is of {len(arc_relevance.context)} tokens, but there are {len(targets)}.")
        if additional_forward_args is not None:
            kwargs["additional_forward_args"] = additional_forward_args
        return self.suppress(self._maps(inputs, targets, kwargs), arc_relevance)

    def _maps(self, inputs: Any, targets: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
        """The wrapped method's attributions of all targets, (T, ...)."""
        chain: list[Any] = [self.attribution_method]
        while (inner := getattr(chain[-1], "attribution_method", None)) is not None:
            chain.append(inner)
        *wrappers, innermost = chain
        if "target" not in signature(innermost.attribute).parameters:
            warnings.warn(
                f"{type(innermost).__name__} knows no target: all tokens have the same map, and what their context has "
                "too is taken away.",
                stacklevel=3,
            )
            maps = self._map(inputs, **kwargs)
            return maps.expand(len(targets), *maps.shape[1:])
        at_once = isinstance(innermost, LayerLogitLens) and not callable(self.reduce)
        if at_once and all(isinstance(wrapper, MSEA | VisualTokenAttribution) for wrapper in wrappers):
            maps = self._map(inputs, target=self._token_ids(targets)[None], **kwargs)
            return maps[0] if maps.ndim == 3 else maps.transpose(0, 1)
        return torch.cat([self._map(inputs, target=target, **kwargs) for target in targets])

    def _map(self, inputs: Any, **kwargs: Any) -> Tensor:
        method: Any = self.attribution_method
        inner = layer_method(method)
        if inner is not None and inner.layer in {*self.lens.layers.modules(), self.lens.norm}:
            result = attribute_positions(method, inputs, self.reduce, **kwargs)
        else:
            result = single_tensor(method.attribute(inputs, **kwargs))
            result = self.reduce(result) if callable(self.reduce) else result
        if result.shape[0] != 1:
            raise ValueError(f"ARC attributes one example, got attributions of shape {tuple(result.shape)}.")
        return result


ARC = ActivationRankingCorrelation
