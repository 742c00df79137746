r"""How much does each position contribute directly to a token's logit, through the attention of every layer?"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from captum_intramodal._utils.memory import WORKING_MEMORY
from captum_intramodal.errors import InvalidInputError, InvalidOptionError, UnsupportedModelError
from captum_intramodal.models.attention_rows import AttentionCall, intercept_attention, select_rows, tolerance
from captum_intramodal.models.block_replay import (
    BlockGraph,
    BlockReplay,
    Terms,
    find_hidden,
    map_tensors,
    rows_selector,
)
from captum_intramodal.models.decoder import decoder_blocks, decoder_layers, final_norm
from captum_intramodal.models.frozen_norm import FrozenNorm, is_norm
from captum_intramodal.models.hooks import evaluation_mode, register_hooks
from captum_intramodal.models.layer_io import first_tensor
from captum_intramodal.models.logit_lens import LogitLens

__all__ = ["Detail", "DirectContribution", "direct_contribution"]

Detail = Literal["sum", "layer", "head"]

# Attention to other states than those of the decoder's own sequence, by the names of its modules.
_CROSS = re.compile(r"cross|encoder_attn|encdec", re.IGNORECASE)


@dataclass(frozen=True)
class DirectContribution:
    r"""
    The terms of T logits.

    Attributes:
        positions (Tensor): contributions of the decoder's S positions through attention, float32 (T, S); by layer
            (L, T, S), or by layer and head (L, H, T, S).
        states (Tensor): those of the states that cross-attention reads, (T, C), (L, T, C) or (L, H, T, C); C is 0
            without cross-attention.
        embedding (Tensor): contributions of the states that enter the first layer, float32 (T,).
        attention (Tensor): sums over positions and states, by block in the order of the model, float32 (B, T).
        other (Tensor): contributions of MLPs and other branches, float32 (B, T).
        bias (Tensor): contributions of biases, the final norm's included, float32 (T,).
        logits (Tensor): the model's logits before a soft cap, float32 (T,).
        blocks (tuple[torch.nn.Module, ...]): the blocks, in the order of the model.
        unattributed (tuple[int, ...]): indices of blocks without softmax attention, such as MLPs, convolutions or
            linear attention; what they write, from whatever positions, is contained in ``other``.
    """

    positions: Tensor
    states: Tensor
    embedding: Tensor
    attention: Tensor
    other: Tensor
    bias: Tensor
    logits: Tensor
    blocks: tuple[nn.Module, ...]
    unattributed: tuple[int, ...]

    @property
    def total(self) -> Tensor:
        """The sum of all terms, float32 (T,): ``logits`` up to rounding."""
        return self.embedding + self.attention.sum(0) + self.other.sum(0) + self.bias

    def scaled(self, factors: Tensor) -> DirectContribution:
        """Return all terms on the CPU, each logit's times its factor (T,)."""
        column = factors[:, None]
        return replace(
            self,
            positions=self.positions.cpu() * column,
            states=self.states.cpu() * column,
            embedding=self.embedding.cpu() * factors,
            attention=self.attention.cpu() * factors,
            other=self.other.cpu() * factors,
            bias=self.bias.cpu() * factors,
            logits=self.logits.cpu() * factors,
        )


def direct_contribution(
    model: PreTrainedModel,
    run: Callable[[], Any],
    queries: Tensor,
    tokens: Tensor,
    examples: Tensor | None = None,
    lens: LogitLens | None = None,
    layers: Sequence[nn.Module] | None = None,
    detail: Detail = "sum",
    working_memory: int = WORKING_MEMORY,
) -> DirectContribution:
    r"""
    Compute direct contributions to tokens' logits, in one forward pass without gradients.

    The logit of token :math:`c` at position :math:`q` is a sum over all that is written to the residual stream at
    :math:`q`, since the final norm is linear once its statistic at :math:`q` is known. Head :math:`h` of a layer writes
    :math:`\sum_s A^h_{qs} W_O^h V^h_s`, so position :math:`s` contributes

    .. math::
        C_c(s) = \sum_{\mathrm{layers}} \sum_h A^h_{qs} \; u_h \cdot V^h_s, \qquad u_h = {W_O^h}^\top u,

    where :math:`u` is the unembedding row :math:`w_c` times the final norm's gain over its statistic, and times the
    constant factor that the model applies to its logits. Only the attention rows of the queries are computed, beside
    the model's own attention, whichever implementation that is. :math:`u_h` is the gradient of a replay of the layer on
    the queries alone, in which norms are frozen and MLPs cut off. Together with the other terms, contributions sum to
    the logit before a soft cap.

    Models with a norm on the residual stream itself (BERT, BART) need a second forward pass.

    Args:

        model (transformers.PreTrainedModel): The model.
        run (Callable): Runs a forward pass of the model without a cache.
        queries (Tensor): Positions that predict the tokens, negative ones from the end of the sequence, int64 (T,).
        tokens (Tensor): The tokens, int64 (T,).
        examples (Tensor, optional): The example of the batch that each query belongs to, int64 (T,).
                    Default: None, the first
        lens (LogitLens, optional): The model's lens.
                    Default: None, created
        layers (Sequence[torch.nn.Module], optional): Layers whose contributions are computed.
                    Default: None, all
        detail (str, optional): ``'sum'`` over layers and heads, ``'layer'`` for each layer, ``'head'`` for each head.
                    Default: ``'sum'``
        working_memory (int, optional): Bytes used at a time, besides the results.
                    Default: 16 MiB

    Returns:
        **contribution** (*DirectContribution*): the terms.

    Raises:
        InvalidOptionError: if ``detail`` is unknown.
        InvalidInputError: if the numbers of queries and tokens differ, a position does not exist, or a layer did not
            run.
        UnsupportedModelError: if the logits are not a sum of such terms; the message says why.

    Examples::

        >>> from captum_intramodal.models.direct_contribution import direct_contribution
        >>> ids = torch.tensor([[3, 1, 4, 1, 5]])
        >>> result = direct_contribution(model, lambda: model(input_ids=ids), torch.tensor([-1]), torch.tensor([9]))
        >>> result.positions.shape
        torch.Size([1, 5])
        >>> torch.allclose(result.total, result.logits, atol=1e-3)
        True
    """
    if detail not in get_args(Detail):
        raise InvalidOptionError(f"detail must be one of {get_args(Detail)}, got {detail!r}.")
    if queries.ndim != 1 or queries.shape != tokens.shape or not len(queries):
        raise InvalidInputError(
            f"Pass one query per token, at least one; got {tuple(queries.shape)} queries and {tuple(tokens.shape)} "
            "tokens."
        )
    examples = torch.zeros_like(queries) if examples is None else examples
    unembedding = _Unembedding(model, LogitLens(model) if lens is None else lens, tokens)
    trace = _Trace(model, unembedding, examples, queries, layers, detail, working_memory)
    with torch.inference_mode(False), evaluation_mode(model, gradients=True), torch.no_grad():
        while not trace.run(run):
            pass
    return trace.result()


class _Unembedding:
    """The final norm and the rows of the unembedding as a linear function of the last hidden state.

    Args:

        model (transformers.PreTrainedModel): The model.
        lens (LogitLens): Its lens.
        tokens (Tensor): Token ids, int64 (T,).
    """

    def __init__(self, model: PreTrainedModel, lens: LogitLens, tokens: Tensor) -> None:
        self.model, self.lens, self.tokens = model, lens, tokens
        decoder: Any = model.get_decoder()
        head = lens.head
        if head is None and hasattr(decoder, "get_output_embeddings"):
            head = decoder.get_output_embeddings()
        weight = getattr(head, "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim != 2 or weight.is_meta:
            raise UnsupportedModelError(
                f"{type(model).__name__} has no unembedding of one row per token in memory, so its logits are no known "
                "sums over the residual stream."
            )
        self.norm_module = _norm_beside_layers(model)
        self.factor = lens.factor if lens.tail == "fast" else 1.0
        self.rows = weight[tokens.to(weight.device)].float()
        bias = getattr(head, "bias", None)
        self.bias = torch.zeros(len(tokens)) if bias is None else bias[tokens.to(bias.device)].float()
        parameter = next(self.norm_module.parameters(), weight)
        self.norm = FrozenNorm.from_module(self.norm_module, weight.shape[1], parameter.dtype, parameter.device)
        # Without the statistic, which is known at the end only.
        self.direction = self.factor * self.norm.pull_back(self.rows)

    def finish(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the norm's statistic at the last hidden states (T, D), the bias and the logits, float32 (T,) each."""
        parameter = next(self.norm_module.parameters(), hidden)
        normed = self.norm_module.forward(hidden[None].to(parameter.device))[0]
        statistic = self.norm.statistic(hidden.to(normed.device), normed)[:, 0]
        rows, bias = self.rows.to(normed.device), self.bias.to(normed.device)
        logits = self.factor * ((normed.float() * rows).sum(-1) + bias)
        constant = self.factor * ((self.norm.bias.to(rows.device) * rows).sum(-1) + bias)
        if self.lens.tail == "replay":
            expected = self.lens.activation(hidden, self.tokens).diagonal().to(logits)
            if not bool(((expected - logits).abs() <= 30 * tolerance(hidden.dtype) * (1 + expected.abs())).all()):
                raise UnsupportedModelError(
                    f"{type(self.model).__name__} masks these tokens, or computes their logits otherwise than as the "
                    "product of its final norm and unembedding, so they are not sums over the residual stream."
                )
        return statistic, constant, logits


def _norm_beside_layers(model: PreTrainedModel) -> nn.Module:
    """Return the final norm, whatever its name is; the trace confirms that it receives the last layer's output."""
    norm = final_norm(model)
    if not isinstance(norm, nn.Identity):
        return norm
    layers = decoder_layers(model)
    owner = next(module for module in model.modules() if any(child is layers for child in module.children()))
    beside = [child for name, child in owner.named_children() if is_norm(child) and "emb" not in name]
    return beside[-1] if beside else norm


class _Trace:
    """One forward pass, or two, in which the contributions of T (example, query) pairs are collected."""

    def __init__(
        self,
        model: PreTrainedModel,
        unembedding: _Unembedding,
        examples: Tensor,
        queries: Tensor,
        layers: Sequence[nn.Module] | None,
        detail: Detail,
        working_memory: int,
    ) -> None:
        self.model, self.unembedding = model, unembedding
        self.examples, self.queries = examples, queries
        self.blocks = list(dict.fromkeys([*decoder_blocks(model), unembedding.lens.layers[-1]]))
        self.layers = list(decoder_layers(model))
        self.chosen = None if layers is None else list(layers)
        self.detail, self.working_memory = detail, working_memory
        self.names = {module: name for name, module in model.named_modules()}
        self.norms: dict[tuple[nn.Module, int], FrozenNorm] = {}
        self.chained = False
        self._graphs: list[BlockGraph] = []
        self._known: list[Terms] = []
        self._reset()

    def _reset(self) -> None:
        self.order: list[nn.Module] = []
        self.parts: list[dict[str, Tensor]] = []
        self.terms: list[Terms] = []
        self.first: Tensor | None = None
        self.last: Tensor | None = None
        self.normed_input: Tensor | None = None
        self.shape = torch.Size((0, 0))
        self._block: nn.Module | None = None
        self._replay: BlockReplay | None = None
        self._select: Callable[[Tensor], Tensor] = lambda tensor: tensor
        self._calls: list[AttentionCall] = []
        self._recorded: dict[nn.Module, list[Tensor]] = {}
        self._tuples: set[nn.Module] = set()

    def run(self, run: Callable[[], Any]) -> bool:
        """Run a forward pass and collect; return False if another pass is needed, for which this one found the
        directions."""
        final = bool(self._known)
        self._reset()
        inner = [m for block in self.blocks for m in block.modules() if m is not block]
        with ExitStack() as stack:
            stack.enter_context(register_hooks(self.blocks, self._enter, before=True, with_kwargs=True))
            if not final:
                stack.enter_context(register_hooks(inner, self._record))
            stack.enter_context(register_hooks(self.blocks, self._leave, with_kwargs=True))
            stack.enter_context(register_hooks([self.unembedding.norm_module], self._final, before=True))
            stack.enter_context(intercept_attention(self._attend))
            run()
        self._check()
        if self.chained and not final:
            self._chain()
        return final or not self.chained

    def _enter(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = find_hidden(args, kwargs)
        if hidden is None or self._replay is not None or self._block is not None:
            return
        if hidden.ndim != 3:
            raise UnsupportedModelError(
                f"A {type(block).__name__} has several residual streams, {tuple(hidden.shape)}; a logit is not a sum "
                "over one of them."
            )
        batch, length, _ = hidden.shape
        queries = torch.where(self.queries < 0, self.queries + length, self.queries)
        if not bool(((queries >= 0) & (queries < length) & (self.examples < batch)).all()):
            raise InvalidInputError(
                f"Queries {self.queries.tolist()} or examples do not exist in {batch} sequences of {length} positions."
            )
        self._block, self._positions, self.shape = block, queries, hidden.shape[:2]
        self._select = rows_selector(hidden, self.examples, queries)
        self._input, self._calls, self._recorded = self._rows(hidden), [], {}

    def _rows(self, states: Tensor) -> Tensor:
        """Return the pairs' rows of states (B, S, D), as a batch of one, (1, T, D)."""
        return select_rows(states, self.examples, self._positions, 1)[None]

    def _attend(self, function: Callable[..., Any], module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run the model's attention; keep what the queries' rows need, or answer a replay."""
        if self._replay is not None:
            return self._replay.attention(module)
        result = function(module, *args, **kwargs)
        if self._block is not None:
            if args[0].shape[2] != self.shape[1]:
                raise UnsupportedModelError(
                    f"{type(module).__name__} attends with {args[0].shape[2]} queries in a sequence of {self.shape[1]}."
                )
            output = result[0] if isinstance(result, tuple) else result
            self._calls.append(
                AttentionCall.from_arguments(self.examples, self._positions, output, module, *args, **kwargs)
            )
        return result

    def _record(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Keep the rows of what a part of a block returns."""
        if self._block is None or self._replay is not None:
            return
        value = output[0] if isinstance(output, tuple) and output else output
        if not isinstance(value, Tensor) or value.ndim < 3:
            return
        if value.shape[:2] == self.shape and value.is_floating_point():
            self._recorded.setdefault(module, []).append(self._rows(value))
            if value is not output:
                self._tuples.add(module)

    def _leave(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._block is not block or self._replay is not None:
            return
        output = first_tensor(output)
        calls, self._block = self._calls, None
        if block not in self.layers and not calls and block is not self.unembedding.lens.layers[-1]:
            return
        old = find_hidden(args, kwargs)
        select = lambda value: self._input if value is old else self._select(value)  # noqa: E731
        self._follow(self._input)
        if self.chained and self._known:
            terms = self._known[len(self.order)]
        else:
            terms = self._terms(block, map_tensors(args, select), map_tensors(kwargs, select), self._rows(output))
        self.last = self._rows(output)
        self.order.append(block)
        self.terms.append(terms)
        self._add(block, calls, terms)
        self._calls, self._recorded = [], {}

    def _follow(self, hidden: Tensor) -> None:
        """Check that a block, or the final norm, receives what the block before returned."""
        if self.last is None:
            self.first = hidden
        elif hidden.shape != self.last.shape or not bool(
            (hidden - self.last.to(hidden)).abs().max() <= tolerance(hidden.dtype) * hidden.abs().max().clamp_min(1e-6)
        ):
            raise UnsupportedModelError(
                f"{type(self.model).__name__} changes its residual stream between its blocks or before its final norm, "
                "so its logits are not the sum of what the blocks write."
            )

    def _terms(self, block: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Terms:
        """Replay a block, and compute its terms for the direction that no later block changes."""
        self._replay = BlockReplay(block, self._calls, self._recorded, self._tuples, self.norms)
        try:
            graph = self._replay.graph(args, kwargs, self._input, output)
        finally:
            self._replay = None
        direction = self.unembedding.direction.to(output.device)
        with torch.enable_grad():
            terms = graph.terms(direction)
        if not self.chained and not _is_multiple(terms.hidden, terms.direction, output.dtype):
            self.chained = True
        if self.chained:
            self._graphs.append(graph)
        return terms

    def _add(self, block: nn.Module, calls: Sequence[AttentionCall], terms: Terms) -> None:
        """Scale what was collected by what this block does to its input, and add the block's contributions."""
        if self.chained and not self._known:
            return
        if not self.chained:
            self._scale(_multiple(terms.hidden, terms.direction))
        if self.chosen is not None and block not in self.chosen:
            return
        part: dict[str, Tensor] = {}
        for call, direction in zip(calls, terms.attention, strict=True):
            toward = direction.reshape(len(direction), call.heads, -1)
            values = call.contributions(toward, self.working_memory, self.detail == "head")
            for key, own in self._split(call, values):
                part[key] = part[key] + own if key in part else own
        if self.detail == "sum" and self.parts:
            for key, own in part.items():
                known = self.parts[0].get(key)
                self.parts[0][key] = own if known is None else known + own.to(known.device)
        else:
            self.parts.append(part)

    def _split(self, call: AttentionCall, values: Tensor) -> list[tuple[str, Tensor]]:
        """Tell positions of the sequence from states that cross-attention reads."""
        name = f"{self.names.get(call.module, '')} {type(call.module).__name__}"
        count = values.shape[-1]
        if "merged" in name.lower():
            return [("positions", values[..., : self.shape[1]]), ("states", values[..., self.shape[1] :])]
        return [("states" if count != self.shape[1] or _CROSS.search(name) else "positions", values)]

    def _scale(self, factor: Tensor) -> None:
        """Multiply what was collected so far, where a block multiplies its residual stream."""
        if bool((factor - 1).abs().max() < 1e-6):
            return
        for part in self.parts:
            for key, value in part.items():
                part[key] = value * factor.to(value.device)[:, None]

    def _final(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self._replay is None and self._block is None and args and args[0].ndim == 3:
            self.normed_input = self._rows(args[0]) if args[0].shape[1] == self.shape[1] else None

    def _check(self) -> None:
        if self.last is None:
            raise UnsupportedModelError(f"No decoder layer of {type(self.model).__name__} ran in the forward pass.")
        if not any(len(terms.attention) for terms in self.terms):
            raise UnsupportedModelError(
                f"The attention of {type(self.model).__name__} does not use transformers' attention interface, so its "
                "rows cannot be computed beside it."
            )
        if not self.chained or self._known:
            self._check_paths()
        if self.chosen is not None and (missing := [m for m in self.chosen if m not in self.order]):
            raise InvalidInputError(
                f"{len(missing)} of {len(self.chosen)} layers did not run as layers of the decoder; pass decoder "
                "layers of the model that run calls."
            )
        if self.normed_input is not None:
            self._follow(self.normed_input)

    def _check_paths(self) -> None:
        """Raise unless the residual stream passes every block, and some attention reaches it."""
        if not all(bool(terms.hidden.any()) for terms in self.terms):
            raise UnsupportedModelError(
                f"A block of {type(self.model).__name__} has no residual stream, so nothing before it contributes "
                "directly to a logit."
            )
        if not any(_is_attributed(terms) for terms in self.terms):
            raise UnsupportedModelError(
                f"{type(self.model).__name__} mixes what its attention writes over positions, as by a convolution, "
                "before it enters the residual stream, so no share of a logit belongs to a position."
            )

    def _chain(self) -> None:
        """Compute all terms from the last block to the first, for the direction that the later blocks leave."""
        if len(self._graphs) < len(self.order):
            # Only a later block changes the direction: all graphs are needed.
            self._graphs = []
            return
        direction, known = self.unembedding.direction, []
        with torch.enable_grad():
            for graph in reversed(self._graphs):
                known.append(graph.terms(direction.to(graph.output.device)))
                direction = known[-1].hidden
        self._known, self._graphs = known[::-1], []

    def result(self) -> DirectContribution:
        """Return all terms, scaled by the final norm's statistic."""
        statistic, constant, logits = self.unembedding.finish(self.last[0])  # type: ignore[index]
        device = statistic.device
        # What the blocks after each block multiply the residual stream by.
        later = [statistic] * len(self.terms)
        if not self.chained:
            for index in range(len(self.terms) - 1, 0, -1):
                terms = self.terms[index]
                later[index - 1] = later[index] * _multiple(terms.hidden, terms.direction).to(device)
        scaled = lambda name: torch.stack(  # noqa: E731
            [getattr(terms, name).to(device) * factor for terms, factor in zip(self.terms, later, strict=True)]
        )
        entry = self.terms[0].hidden.to(device)
        embedding = (entry * self.first[0].to(device).float()).sum(-1) * later[0]  # type: ignore[index]
        result = DirectContribution(
            self._stack("positions", statistic),
            self._stack("states", statistic),
            embedding,
            scaled("attended"),
            scaled("other"),
            scaled("constant").sum(0) + constant,
            logits,
            tuple(self.order),
            tuple(index for index, terms in enumerate(self.terms) if not _is_attributed(terms)),
        )
        size = torch.stack(
            [embedding.abs().max(), result.attention.abs().max(), result.other.abs().max(), logits.abs().max()]
        )
        dtype = self.last.dtype  # type: ignore[union-attr]
        if bool(
            (result.total - logits).abs().max() > 10 * tolerance(dtype) * size.max() * max(1, len(self.terms)) ** 0.5
        ):
            raise UnsupportedModelError(
                f"The terms of {type(self.model).__name__} do not sum to its logits (gap "
                f"{float((result.total - logits).abs().max()):.2g})."
            )
        return result

    def _stack(self, key: str, statistic: Tensor) -> Tensor:
        """Return the contributions of one kind, of all layers that were asked for; zero where a layer has none."""
        device, pairs = statistic.device, len(self.queries)
        known = [part[key] for part in self.parts if key in part]
        count = max((value.shape[-1] for value in known), default=self.shape[1] if key == "positions" else 0)
        heads = max((value.shape[0] for value in known), default=1)
        shape = (heads, pairs, count) if self.detail == "head" else (pairs, count)
        rows = []
        for part in self.parts or [{}]:
            value = torch.zeros(shape, device=device)
            if key in part:
                own = part[key].to(device)
                value[tuple(slice(n) for n in own.shape)] = own
            rows.append(value * statistic[:, None])
        return rows[0] if self.detail == "sum" else torch.stack(rows)


def _is_attributed(terms: Terms) -> bool:
    """Return whether a block's output depends on attention rows."""
    return any(bool(gradient.any()) for gradient in terms.attention)


def _multiple(vectors: Tensor, of: Tensor) -> Tensor:
    """Return the factor (T,) by which vectors are multiples of others, least squares."""
    return (vectors * of).sum(-1) / of.square().sum(-1).clamp_min(1e-30)


def _is_multiple(vectors: Tensor, of: Tensor, dtype: torch.dtype) -> bool:
    """Return whether vectors (T, D) are multiples, other than zero, of others."""
    factor = _multiple(vectors, of)
    gap = (vectors - factor[:, None] * of).abs().max()
    return bool(gap <= tolerance(dtype) * vectors.abs().max()) and bool(factor.abs().min() > 0)
