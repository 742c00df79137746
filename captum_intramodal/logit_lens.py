r"""The logit lens: a model's hidden states, read with its own final norm and unembedding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar, cast

import torch
from captum.attr import LayerAttribution
from torch import Tensor, nn
from transformers import PreTrainedModel

from captum_intramodal._captum import format_additional_forward_args, format_tensor_into_tuples, log_usage
from captum_intramodal.chunks import WORKING_MEMORY, in_chunks, part_of
from captum_intramodal.decoder import final_norm, input_device, readable_layers
from captum_intramodal.hooks import (
    capture_outputs,
    first_tensor,
    hidden_rows,
    put_rows,
    replace_first_tensor,
    run_layers,
)

__all__ = ["LayerLogitLens", "LogitLens", "Rankings", "StepRankings"]

T = TypeVar("T")

# Hidden states that one pass of a tail replay takes, at (positions x vocabulary) floats of memory.
_REPLAYED = 32
# Neighbours among a row of logits whose largest is looked at first.
_PART = 128


class Rankings(NamedTuple):
    """What :meth:`LogitLens.rank` reads at N hidden states."""

    ids: Tensor
    log_normalizer: Tensor


class LogitLens:
    r"""
    Reads hidden states of a transformers model's decoder as if they were its last ones: final norm, unembedding, and
    the scale or soft cap that the model puts on its logits.

    The activation of token :math:`c` at hidden state :math:`h` is :math:`g(\mathrm{norm}(h) \cdot w_c)`, with
    :math:`w_c` its row of the unembedding and :math:`g` the model's own post-processing: identity, a constant factor,
    or :math:`\kappa \tanh(\cdot / \kappa)`. Which one is measured when the lens is made, by comparing with the model's
    logits on a few tokens, because configurations cannot be trusted on it. Only the rows of the unembedding that are
    asked for are used, and rankings are streamed over blocks of the vocabulary: a (positions x vocabulary) tensor never
    exists. Products are accumulated in float32.

    Where the model's logits are something else (masked tokens, several norms, a head of more than one layer), the model
    computes them itself from the given hidden states, a few positions at a time: *tail replay*. That is exact for any
    model, and costs a pass through the decoder's layers, whose results are replaced.

    Args:

        model (transformers.PreTrainedModel): A model with ``get_decoder()``.
        inputs (Mapping, optional): Keyword arguments of one forward pass to compare with, for models that cannot run
                    on text alone.
                    Default: None, four text tokens.
        working_memory (int, optional): Bytes that blocks of the vocabulary, or of hidden states, take at a time.
                    Default: 16 MiB

    Attributes:
        tail (str): ``'fast'`` or ``'replay'``.

    Raises:
        TypeError: ``model`` is not a transformers model, or its decoder's layers cannot be found.
        ValueError: neither ``g(head(norm(h)))`` nor the replay gives the model's logits.

    Examples::

        >>> lens = LogitLens(model)
        >>> lens.activation(torch.randn(10, lens.hidden_size), torch.tensor([5, 7])).shape
        torch.Size([10, 2])
    """

    def __init__(
        self, model: PreTrainedModel, inputs: Mapping[str, Any] | None = None, working_memory: int = WORKING_MEMORY
    ) -> None:
        if not hasattr(model, "get_output_embeddings"):
            raise TypeError(f"LogitLens needs a transformers model, got {type(model).__name__}.")
        self.layers: nn.ModuleList = readable_layers(model)
        self.norm: nn.Module = final_norm(model)
        self.head: nn.Module | None = model.get_output_embeddings()
        self.factor: float = 1.0
        self.cap: float | None = None
        self.working_memory = working_memory
        self._replay: _TailReplay | None = None
        self._head_is_last = False
        self._calibrate(model, inputs)

    def fits(self, model: PreTrainedModel) -> bool:
        """Whether the model still has the layers, the norm and the head that this lens reads with."""
        parts = [*readable_layers(model), final_norm(model), model.get_output_embeddings()]
        return parts == [*self.layers, self.norm, self.head]

    @property
    def tail(self) -> str:
        return "fast" if self._replay is None else "replay"

    @property
    def hidden_size(self) -> int:
        return int(self._weight.shape[1]) if self._replay is None else self._replay.hidden_size

    @property
    def vocab_size(self) -> int:
        return int(self._weight.shape[0]) if self._replay is None else self._replay.vocab_size

    @property
    def _weight(self) -> Tensor:
        return cast(Tensor, cast(nn.Module, self.head).weight)

    @torch.no_grad()
    def _calibrate(self, model: PreTrainedModel, inputs: Mapping[str, Any] | None) -> None:
        """Finds the factor or soft cap between ``norm(h) . w`` and the model's own logits; replays where none fits."""
        if inputs is None:
            inputs = {"input_ids": torch.tensor([[3, 1, 4, 2]], device=input_device(model))}
        last = self.layers[-1]
        with capture_outputs([last, *([] if self.head is None else [self.head])], hidden_rows) as captured:
            logits = model(**inputs).logits[0]
        if last not in captured:
            raise ValueError(f"The last decoder layer of {type(model).__name__} did not run in its forward pass.")
        hidden = captured[last]
        gap = self._fast_gap(model, hidden[-1], logits[-1].float())
        if gap is not None:
            self._replay = _TailReplay(model, inputs, last, hidden, logits, gap)
        elif self.head in captured:
            # Some scale what the head reads, instead of what it says.
            expected = logits[-1].float()
            said = self._postprocess(captured[self.head][-1].to(expected))[..., : expected.numel()]
            self._head_is_last = said.shape == expected.shape and torch.allclose(said, expected, rtol=1e-3, atol=1e-3)

    @property
    def ranks_as_generated(self) -> bool:
        """Whether :meth:`rank_logits` of what the head says while the model generates is :meth:`rank` of its states:
        the lens is the model's own tail, in float32; of lower precision many logits are equal that differ there."""
        return self._head_is_last and self._weight.dtype == torch.float32

    def _fast_gap(self, model: PreTrainedModel, hidden: Tensor, logits: Tensor) -> str | None:
        """Sets factor and cap so that the lens gives the model's logits; where that fails, says by how much."""
        weight = getattr(self.head, "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim != 2 or weight.shape[1] != hidden.shape[-1]:
            return "no unembedding of the hidden states' width"
        if weight.is_meta or any(parameter.is_meta for parameter in self.norm.parameters()):
            return "norm or unembedding are offloaded"
        normed = self.normalize(hidden[None])
        plain = torch.cat(list(self._over_vocabulary(lambda rows: self._product(normed, rows)[0], 1)))
        plain = plain.to(logits.device)
        if plain.numel() < logits.numel():
            return f"{logits.numel()} logits for {plain.numel()} rows of the unembedding"
        plain = plain[: logits.numel()]
        # Tokens that the model masks are ranked last by it, not by their product.
        if not bool((logits.isfinite() & (logits > torch.finfo(torch.float32).min / 4)).all()):
            return "some tokens are masked"
        tolerance = (1e-3 if self._weight.dtype in (torch.float32, torch.float64) else 3e-2) * float(logits.std())
        cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
        factor = float((plain @ logits) / (plain @ plain).clamp_min(1e-12))
        candidates: list[tuple[float, float | None]] = [(1.0, None), (factor, None)]
        if cap:
            candidates.insert(1, (1.0, float(cap)))
        for self.factor, self.cap in candidates:
            gap = float((self._postprocess(plain) - logits).abs().mean())
            if gap <= tolerance:
                return None
        return f"mean gap {gap:.3g} with logits of standard deviation {float(logits.std()):.3g}"

    def _postprocess(self, product: Tensor) -> Tensor:
        if self.factor != 1.0:
            product = product * self.factor
        if self.cap is not None:
            product = self.cap * torch.tanh(product / self.cap)
        return product

    def _product(self, normed: Tensor, rows: Tensor | slice) -> Tensor:
        weight = self._weight[rows].to(device=normed.device, dtype=torch.float32)
        product = normed.float() @ weight.T
        bias = getattr(self.head, "bias", None)
        return product if bias is None else product + bias[rows].to(product)

    def _replayed(self, hidden: Tensor) -> Iterator[Tensor]:
        """The model's own logits of hidden states (N, D), some rows at a time."""
        replay = cast(_TailReplay, self._replay)
        for rows in hidden.split(replay.length):
            yield replay(rows)

    @torch.no_grad()
    def normalize(self, hidden: Tensor) -> Tensor:
        """Applies the final norm to the output of a decoder layer, (..., D) -> (..., D)."""
        parameter = next(self.norm.parameters(), None)
        if parameter is not None:
            hidden = hidden.to(device=parameter.device)
        return cast(Tensor, self.norm(hidden))

    @torch.no_grad()
    def activation(self, hidden: Tensor, tokens: Tensor, normed: bool = False) -> Tensor:
        r"""
        Logits of some tokens at some hidden states.

        Args:

            hidden (Tensor): Output of a decoder layer, (..., D).
            tokens (Tensor): Token ids, int64 (n,).
            normed (bool, optional): Whether the final norm has been applied to ``hidden``, as to transformers'
                        ``hidden_states[-1]``.
                        Default: False

        Returns:
            *Tensor* (..., n) float32.
        """
        if self._replay is not None:
            if normed:
                raise ValueError("This model's tail is replayed, from the output of its last decoder layer on.")
            rows = [logits[:, tokens.to(logits.device)] for logits in self._replayed(hidden.flatten(0, -2))]
            return torch.cat(rows).reshape(*hidden.shape[:-1], len(tokens))
        flat = hidden.flatten(0, -2)

        def activations(rows: slice) -> Tensor:
            part = flat[rows] if normed else self.normalize(flat[rows])
            return self._postprocess(self._product(part, tokens.to(self._weight.device)))

        # A state, and its copies in float32 while it is normalised.
        size = part_of(self.working_memory, 20 * self.hidden_size)
        parts = list(in_chunks(activations, len(flat), size)) or [activations(slice(0))]
        return torch.cat(parts).reshape(*hidden.shape[:-1], len(tokens))

    def _over_vocabulary(
        self, work: Callable[[slice], T], positions: int, block_size: int | None = None
    ) -> Iterator[T]:
        """Does some work on as many rows of the unembedding at a time as fit into the working memory."""
        # A row's copy in float32; and of each position its logit, its key in a ranking, and room to sort them.
        row = 32 * positions + (0 if self._weight.dtype == torch.float32 else 4 * self.hidden_size)
        return in_chunks(work, self.vocab_size, block_size or part_of(self.working_memory, row))

    @torch.no_grad()
    def rank(self, hidden: Tensor, k: int = 50, block_size: int | None = None) -> Rankings:
        r"""
        Ranking of the most likely next tokens at each hidden state, and the logarithm of the sum that a softmax over
        the vocabulary divides by, streamed over blocks of the vocabulary: memory is positions x (``k`` + block),
        whatever the size of the vocabulary. Equal logits rank by token id.

        Args:

            hidden (Tensor): Output of a decoder layer, (N, D).
            k (int, optional): Length of the ranking; at most the size of the vocabulary.
                        Default: 50
            block_size (int, optional): Rows of the unembedding used at a time.
                        Default: None, as many as fit into the working memory.

        Returns:
            *Rankings*: ``ids`` (N, min(k, vocabulary)) int64, best first; ``log_normalizer`` (N,) float32.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}.")
        if self._replay is not None:
            parts = [_rank_all(logits, k) for logits in self._replayed(hidden)]
            return Rankings(*map(torch.cat, zip(*parts, strict=True)))
        normed = self.normalize(hidden)

        def read(rows: slice) -> tuple[Tensor, Tensor]:
            logits = self._postprocess(self._product(normed, rows))
            return _top_keys(logits, rows.start, k), logits.logsumexp(1)

        best = torch.empty(len(normed), 0, dtype=torch.int64, device=normed.device)
        normalizer = torch.full(normed.shape[:1], -torch.inf, device=normed.device)
        for keys, block in self._over_vocabulary(read, len(normed), block_size):
            best = torch.cat([best, keys], dim=1)
            best = best.topk(min(k, best.shape[1]), dim=1).values
            normalizer = torch.logaddexp(normalizer, block)
        return Rankings(_ranked(best, k), normalizer)

    def rank_logits(self, product: Tensor, k: int = 50) -> Rankings:
        """:meth:`rank` of the head's output, (N, vocabulary), before the model scales or caps it."""
        return _rank_all(self._postprocess(product), k)

    def topk(self, hidden: Tensor, k: int = 50, block_size: int | None = None) -> Tensor:
        """The ``ids`` of :meth:`rank`, int64 (N, min(k, vocabulary)), best first."""
        return self.rank(hidden, k, block_size).ids

    @torch.no_grad()
    def log_probability(
        self,
        hidden: Tensor,
        tokens: Tensor,
        block_size: int | None = None,
        log_normalizer: Tensor | None = None,
    ) -> Tensor:
        r"""
        Log-probability of one token per hidden state, streamed over blocks of the vocabulary.

        Args:

            hidden (Tensor): Output of the last decoder layer, (N, D).
            tokens (Tensor): Token ids, int64 (N,).
            block_size (int, optional): Rows of the unembedding used at a time.
                        Default: None, as many as fit into the working memory.
            log_normalizer (Tensor, optional): Of the same states, from :meth:`rank`; then no other row of the
                        unembedding is read.
                        Default: None, computed.

        Returns:
            *Tensor* (N,) float32, at most 0.
        """
        if self._replay is not None:
            all_logits = (logits.log_softmax(1) for logits in self._replayed(hidden))
            parts = tokens.to(hidden.device).split(self._replay.length)
            return torch.cat([rows.gather(1, ids[:, None])[:, 0] for rows, ids in zip(all_logits, parts, strict=True)])
        if log_normalizer is None:
            log_normalizer = self.rank(hidden, 1, block_size).log_normalizer
        normed = self.normalize(hidden)
        rows = self._weight[tokens.to(self._weight.device)].to(device=normed.device, dtype=torch.float32)
        product = (normed.float() * rows).sum(-1)
        bias = getattr(self.head, "bias", None)
        if bias is not None:
            product = product + bias[tokens.to(bias.device)].to(product)
        return self._postprocess(product) - log_normalizer


class StepRankings:
    r"""
    Rankings by the logits that a model computes anyway while it generates, so that the vocabulary need not be read
    again: at the prompts' last position, and at each generated token that is read afterwards, one in each pass.

    Args:

        lens (LogitLens): The model's lens, which must be able to: :attr:`LogitLens.ranks_as_generated`.
        k (int): Length of the rankings.

    Examples::

        >>> rankings = StepRankings(lens, 50)
        >>> with rankings.recorded():
        ...     output = model.generate(**inputs, return_dict_in_generate=True)
        >>> generated = output.sequences.shape[1] - inputs["input_ids"].shape[1]
        >>> rankings.complete(generated)
        True
        >>> rankings.of(0, generated - 1).ids.shape        # the last token is not read any more
        torch.Size([generated, 50])
    """

    def __init__(self, lens: LogitLens, k: int) -> None:
        self.lens, self.k = lens, k
        self._passes: list[Rankings] = []
        self._regular = True

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Collects the rankings while the body of the ``with`` statement generates."""
        with cast(nn.Module, self.lens.head).register_forward_hook(self._record):
            yield

    @torch.no_grad()
    def _record(self, head: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        # Under autocast it says something less precise.
        self._regular &= output.dtype == torch.float32 and output.ndim == 3
        if self._regular:
            self._passes.append(self.lens.rank_logits(output[:, -1], self.k))

    def complete(self, generated: int) -> bool:
        """Whether the head ran once for each of so many generated tokens."""
        return self._regular and len(self._passes) == generated

    def of(self, row: int, read: int) -> Rankings:
        """An example's rankings at its prompt's last position and at so many generated tokens."""
        ids, normalizers = zip(*((p.ids[row], p.log_normalizer[row]) for p in self._passes[: read + 1]), strict=True)
        return Rankings(torch.stack(ids), torch.stack(normalizers))


class _TailReplay:
    """The model's own way from the output of its last decoder layer to its logits.

    The model runs once more on the inputs it was calibrated with (repeated along the sequence where they are text
    alone), and a hook puts the given hidden states in the place of the last layer's output.

    Attributes:
        length (int): Number of hidden states that one pass takes.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        inputs: Mapping[str, Any],
        layer: nn.Module,
        hidden: Tensor,
        logits: Tensor,
        reason: str,
    ) -> None:
        self.model, self.layer = model, layer
        self.hidden_size, self.vocab_size = int(hidden.shape[-1]), int(logits.shape[-1])
        self.inputs = dict(inputs)
        if set(inputs) == {"input_ids"}:
            ids = inputs["input_ids"]
            self.inputs["input_ids"] = ids.repeat(1, -(-_REPLAYED // ids.shape[1]))[:, :_REPLAYED]
            self.length = _REPLAYED
        else:
            self.length = len(hidden)
        # Each position's logits must follow from its own hidden state alone.
        backwards = self(hidden.flip(0)).flip(0)[-len(logits) :]
        expected = logits.float()
        seen = expected.isfinite() & (expected > torch.finfo(torch.float32).min / 4)
        gap = float((backwards - expected)[seen].abs().mean())
        tolerance = 1e-3 if hidden.dtype in (torch.float32, torch.float64) else 3e-2
        if not gap <= tolerance * float(expected[seen].std()):
            raise ValueError(
                f"The logits of {type(model).__name__} do not follow from its last decoder layer's output: neither as "
                f"a scaled or soft-capped head(norm(h)) ({reason}), nor through the model's own tail (mean gap "
                f"{gap:.3g}). Its logit lens would be wrong."
            )

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits (n, vocabulary) in float32 of n hidden states, n at most ``length``."""

        def put(module: nn.Module, args: Any, output: Any) -> Any:
            return replace_first_tensor(output, put_rows(first_tensor(output), hidden))

        with self.layer.register_forward_hook(put):
            logits: Tensor = self.model(**self.inputs).logits[0]
        return logits[len(logits) - len(hidden) :].float()


def _rank_keys(logits: Tensor, start: int, ids: Tensor | None = None) -> Tensor:
    """int64 keys that order by (logit, smaller token id): the order of top-k is then the same on every machine. Ids
    count from ``start``; all in their order if they are not given."""
    # Adding 0.0 turns -0.0 into 0.0, which would otherwise rank below it.
    bits = (logits.float() + 0.0).view(torch.int32).long()
    ordered = torch.where(bits >= 0, bits, -(bits & 0x7FFFFFFF))
    if ids is None:
        ids = torch.arange(logits.shape[1], device=logits.device)
    return (ordered << 32) | (0xFFFFFFFF - start - ids)


def _top_keys(logits: Tensor, start: int, k: int) -> Tensor:
    """The k largest of :func:`_rank_keys`, in any order."""
    if k < logits.shape[1]:
        values, ids = _largest(logits, k + 1)
        # Of several that are as likely as the last of them, those with the smallest ids would count.
        if not bool((values[:, k] == values[:, k - 1]).any()):
            return _rank_keys(values[:, :k], start, ids[:, :k])
    return _rank_keys(logits, start)


def _largest(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """``logits.topk(count)``; of long rows from those parts alone whose own largest values are the largest."""
    parts = logits.shape[1] // _PART
    if parts < 4 * count:
        values, ids = logits.topk(count, dim=1)
        return values, ids
    split = logits[:, : parts * _PART].unflatten(1, (parts, _PART))
    best = split.amax(2).topk(count, dim=1).indices[:, :, None]
    candidates = split.gather(1, best.expand(-1, -1, _PART)).flatten(1)
    ids = (best * _PART + torch.arange(_PART, device=best.device)).flatten(1)
    if rest := logits.shape[1] - parts * _PART:
        candidates = torch.cat([candidates, logits[:, -rest:]], dim=1)
        last = torch.arange(logits.shape[1] - rest, logits.shape[1], device=ids.device)
        ids = torch.cat([ids, last.expand(len(ids), -1)], dim=1)
    values, places = candidates.topk(count, dim=1)
    return values, ids.gather(1, places)


def _rank_all(logits: Tensor, k: int) -> Rankings:
    return Rankings(_ranked(_top_keys(logits, 0, k), k), logits.logsumexp(1))


def _ranked(keys: Tensor, k: int) -> Tensor:
    """The token ids of the k largest keys, best first."""
    return 0xFFFFFFFF - (keys.topk(min(k, keys.shape[1]), dim=1).values & 0xFFFFFFFF)


class LayerLogitLens(LayerAttribution):
    r"""
    Logit-lens activation of target tokens at every position of the output of decoder layers: the base attribution
    of TAM and of *Explaining multimodal LLMs via intra-modal token interactions* (arXiv 2509.22415),

    .. math::
        A_c(v) = \max(0, \; g(\mathrm{norm}(h_v) \cdot w_c)).

    It needs one forward pass, no gradients, for any number of targets, and leaves the pass after the deepest layer
    that is read. The final norm is applied exactly once.

    Args:

        forward_func (Callable or torch.nn.Module): The model, or any function that runs it.
        layer (torch.nn.Module or list[torch.nn.Module]): Decoder layers whose output is read, such as
                    ``model.get_decoder().layers[-1]``.
        lens (LogitLens, optional): The lens of the model behind ``forward_func``.
                    Default: None, made from ``forward_func``, which must then be a transformers model or a module that
                    contains exactly one.

    Examples::

        >>> lens = LayerLogitLens(model, model.get_decoder().layers[-1])
        >>> # (1, number of positions): where the model would say token 42
        >>> lens.attribute(input_ids, target=42)
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: nn.Module | list[nn.Module],
        lens: LogitLens | None = None,
    ) -> None:
        super().__init__(forward_func, layer)
        self.lens = lens if lens is not None else LogitLens(find_model(forward_func))

    @property
    def multiplies_by_inputs(self) -> bool:
        return False

    @log_usage(part_of_slo=True)
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: int | tuple[int, ...] | list[int] | list[tuple[int, ...]] | Tensor,
        additional_forward_args: Any = None,
        relu_attributions: bool = True,
    ) -> Tensor | tuple[Tensor, ...]:
        r"""
        Args:

            inputs (Tensor or tuple[Tensor, ...]): Positional inputs of ``forward_func``; dimension 0 is the batch.
            target (int, tuple, list or Tensor): Token ids. An int is one token for all examples; a list of ints or a
                        1-D tensor holds one token per example; a 2-D tensor (B or 1, n) holds n tokens per example. Of
                        a tuple, which other methods use for (position, token) targets, the last entry is the token.
            additional_forward_args (Any, optional): Further positional arguments of ``forward_func``.
                        Default: None
            relu_attributions (bool, optional): Clip negative activations at 0, as the paper does.
                        Default: True

        Returns:
            *Tensor* or *tuple[Tensor, ...]* of **attributions**:
            - **attributions** (*Tensor* or *tuple[Tensor, ...]*):
                float32 (B, positions), or (B, n, positions) for a 2-D target; a tuple with one entry per layer where
                ``layer`` is a list.

        Raises:
            ValueError: a token id outside the vocabulary, or as many targets as neither 1 nor the batch size.
        """
        forward_args = format_tensor_into_tuples(inputs) + (
            format_additional_forward_args(additional_forward_args) or ()
        )
        layers = self.layer if isinstance(self.layer, list) else [self.layer]
        hidden = run_layers(lambda: self.forward_func(*forward_args), layers)
        tokens, several = self._tokens(target, hidden[0].shape[0])
        attributions = []
        for states in hidden:
            rows = [self.lens.activation(h, t).T for h, t in zip(states, tokens.expand(len(states), -1), strict=True)]
            activation = torch.stack(rows) if several else torch.cat(rows)
            attributions.append(activation.clamp_min(0) if relu_attributions else activation)
        return tuple(attributions) if isinstance(self.layer, list) else attributions[0]

    def _tokens(self, target: Any, batch: int) -> tuple[Tensor, bool]:
        """Token ids as (1 or B, n), and whether the caller asked for several per example."""
        if isinstance(target, tuple):
            target = target[-1]
        elif isinstance(target, list):
            target = [entry[-1] if isinstance(entry, tuple) else entry for entry in target]
        tokens = torch.as_tensor(target)
        if tokens.is_floating_point() or tokens.ndim > 2:
            raise ValueError(
                f"target must hold integer token ids in at most 2 dimensions, got {tokens.dtype} {tuple(tokens.shape)}."
            )
        several = tokens.ndim == 2
        tokens = tokens if several else tokens.reshape(-1, 1)
        if tokens.shape[0] not in (1, batch):
            raise ValueError(
                f"{tokens.shape[0]} targets for {batch} examples; pass one token, one per example, or a 2-D tensor "
                "(1 or examples, tokens)."
            )
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.lens.vocab_size:
            raise ValueError(
                f"Token ids {int(tokens.min())}..{int(tokens.max())} lie outside the vocabulary of "
                f"{self.lens.vocab_size}."
            )
        return tokens, several


def find_model(forward_func: Callable[..., Any]) -> PreTrainedModel:
    """The transformers model with a language-model head in ``forward_func``: itself, or the one module inside it."""
    if isinstance(forward_func, nn.Module):
        for module in forward_func.modules():
            if isinstance(module, PreTrainedModel) and module.get_output_embeddings() is not None:
                return module
    raise TypeError(
        f"No transformers model with output embeddings found in {type(forward_func).__name__}; pass "
        "lens=LogitLens(model)."
    )


def select_layers(lens: LogitLens, indices: Sequence[int]) -> list[nn.Module]:
    """Decoder layers by index, negative ones from the end."""
    count = len(lens.layers)
    if bad := [index for index in indices if not -count <= index < count]:
        raise ValueError(f"Layer indices {bad} do not exist; the decoder has {count} layers.")
    if not indices:
        raise ValueError("At least one layer index is needed.")
    return [lens.layers[index] for index in indices]
