r"""The logit lens: decode hidden states with the model's own final norm and unembedding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from typing import Any, Literal, TypeVar, cast, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from captum_intramodal._utils.memory import WORKING_MEMORY, items_within, run_in_chunks
from captum_intramodal.errors import InvalidOptionError, UnsupportedModelError
from captum_intramodal.models.decoder import final_norm, input_device, lens_layers
from captum_intramodal.models.hooks import capture_outputs
from captum_intramodal.models.layer_io import hidden_rows
from captum_intramodal.models.ranking import DEFAULT_RANKING_LENGTH, Rankings, rank_all, rankings_from_keys, top_keys
from captum_intramodal.models.tail_replay import TailReplay, lens_tolerance, unmasked

__all__ = ["LOGIT_NORMALIZATIONS", "LogitLens", "LogitNormalization", "check_logit_normalization", "select_layers"]

T = TypeVar("T")
LogitNormalization = Literal["raw", "centered", "zscore"]
LOGIT_NORMALIZATIONS: tuple[LogitNormalization, ...] = get_args(LogitNormalization)


def check_logit_normalization(value: str) -> None:
    """Raise an InvalidOptionError if ``value`` is not one of :data:`LOGIT_NORMALIZATIONS`."""
    if value not in LOGIT_NORMALIZATIONS:
        raise InvalidOptionError(f"logit_normalization must be one of {LOGIT_NORMALIZATIONS}, got {value!r}.")


class LogitLens:
    r"""
    The logit lens decodes hidden states of a transformers model's decoder as if they were its last ones: final norm,
    unembedding, and the scale or soft cap that the model applies to its logits.

    The activation of token :math:`c` at hidden state :math:`h` is :math:`g(\mathrm{norm}(h) \cdot w_c)`, with
    :math:`w_c` its row of the unembedding and :math:`g` the model's own post-processing: identity, a constant factor,
    or :math:`\kappa \tanh(\cdot / \kappa)`. Configurations are not reliable on :math:`g`, so it is measured once, by
    comparison with the model's logits for a few tokens. Only the requested rows of the unembedding are used, and
    rankings are streamed over blocks of the vocabulary: a (positions x vocabulary) tensor never exists. Products are
    accumulated in float32.

    If the model computes its logits in another way (masked tokens, several norms, a head of several layers), the model
    itself computes them from the given hidden states, a few positions at a time: *tail replay*. It is exact for any
    model, at the cost of a forward pass whose layer outputs are discarded.

    A raw logit is not a quantity of its own: adding one vector to every row of the unembedding shifts all logits of a
    position alike and changes no prediction, but it changes every map of raw logits. *Centered* activations,
    :math:`g(\mathrm{norm}(h) \cdot (w_c - \bar w))` with the mean row :math:`\bar w`, are invariant, at no further cost
    than the mean, which is computed once. *Z-scores* are centered products divided by their standard deviation over the
    vocabulary at each position, which takes one sweep over the vocabulary.

    Source: nostalgebraist, "interpreting GPT: the logit lens", 2020.

    Args:

        model (transformers.PreTrainedModel): A model with ``get_decoder()``.
        inputs (Mapping, optional): Keyword arguments of the forward pass to compare with, for models that cannot
                    process text alone.
                    Default: None, four text tokens.
        working_memory (int, optional): Bytes of one block of the vocabulary, or of hidden states.
                    Default: 16 MiB
        logit_normalization (str, optional): How activations are normalized. ``'raw'``: not. ``'centered'``: less the
                    mean over the vocabulary, before the model's soft cap (with tail replay after it, over the tokens
                    that are not masked). ``'zscore'``: centered, divided by the standard deviation over the vocabulary.
                    Rankings and probabilities do not depend on it.
                    Default: ``'raw'``, as in the paper

    Attributes:
        tail (str): ``'fast'`` for :math:`g(\mathrm{norm}(h) \cdot w_c)`, ``'replay'`` for tail replay.
        factor (float): The constant factor; 1.0 if there is none.
        cap (float or None): The soft cap :math:`\kappa`, if there is one.

    Raises:
        TypeError: ``model`` is not a transformers model.
        UnsupportedModelError: its decoder's layers cannot be found, or neither way gives the model's logits.

    Examples::

        >>> from captum_intramodal import LogitLens
        >>> lens = LogitLens(model)
        >>> lens.activation(torch.randn(10, lens.hidden_size), torch.tensor([5, 7])).shape
        torch.Size([10, 2])
    """

    def __init__(
        self,
        model: PreTrainedModel,
        inputs: Mapping[str, Any] | None = None,
        working_memory: int = WORKING_MEMORY,
        logit_normalization: LogitNormalization = "raw",
    ) -> None:
        check_logit_normalization(logit_normalization)
        if not hasattr(model, "get_output_embeddings"):
            raise TypeError(f"LogitLens needs a transformers model, got {type(model).__name__}.")
        self.layers: nn.ModuleList = lens_layers(model)
        self.norm: nn.Module = final_norm(model)
        self.head: nn.Module | None = model.get_output_embeddings()
        self.factor: float = 1.0
        self.cap: float | None = None
        self.working_memory = working_memory
        self.logit_normalization: LogitNormalization = logit_normalization
        self._replay: TailReplay | None = None
        self._head_is_last = False
        # Shared with the lens's copies.
        self._means: dict[tuple[Any, ...], tuple[Tensor, float]] = {}
        self._calibrate(model, inputs)

    def fits(self, model: PreTrainedModel) -> bool:
        """Return whether the model still has the layers, the norm and the head of this lens."""
        parts = [*lens_layers(model), final_norm(model), model.get_output_embeddings()]
        return parts == [*self.layers, self.norm, self.head]

    def with_normalization(self, logit_normalization: LogitNormalization) -> LogitLens:
        """Return a copy of the lens, which shares the model, with another ``logit_normalization``."""
        check_logit_normalization(logit_normalization)
        lens = copy(self)
        lens.logit_normalization = logit_normalization
        return lens

    @property
    def tail(self) -> str:
        """``'fast'`` or ``'replay'``."""
        return "fast" if self._replay is None else "replay"

    @property
    def hidden_size(self) -> int:
        """Number of features of a hidden state."""
        return int(self._weight.shape[1]) if self._replay is None else self._replay.hidden_size

    @property
    def vocab_size(self) -> int:
        """Number of tokens that the head scores."""
        return int(self._weight.shape[0]) if self._replay is None else self._replay.vocab_size

    @property
    def _weight(self) -> Tensor:
        return cast(Tensor, cast(nn.Module, self.head).weight)

    @torch.no_grad()
    def _calibrate(self, model: PreTrainedModel, inputs: Mapping[str, Any] | None) -> None:
        """Find the factor or cap between ``norm(h) . w`` and the model's logits; set up tail replay if none fits."""
        if inputs is None:
            inputs = {"input_ids": torch.tensor([[3, 1, 4, 2]], device=input_device(model))}
        last = self.layers[-1]
        with capture_outputs([last, *([] if self.head is None else [self.head])], hidden_rows) as captured:
            logits = model(**inputs).logits[0]
        if last not in captured:
            raise UnsupportedModelError(
                f"The last decoder layer of {type(model).__name__} did not run in its forward pass, so its hidden "
                "states cannot be captured; if it cannot process text alone, pass the inputs of one example as inputs=."
            )
        hidden = captured[last]
        misfit = self._fit_postprocessing(model, hidden[-1], logits[-1].float())
        if misfit is not None:
            self._replay = TailReplay(model, inputs, last, hidden, logits, misfit)
        elif self.head in captured:
            # In models that scale the head's input, its output already contains the factor.
            expected = logits[-1].float()
            actual = self._postprocess(captured[self.head][-1].to(expected))[..., : expected.numel()]
            self._head_is_last = actual.shape == expected.shape and torch.allclose(
                actual, expected, rtol=1e-3, atol=1e-3
            )

    @property
    def ranks_as_generated(self) -> bool:
        """Whether :meth:`rank_logits` of the head's output equals :meth:`rank` of its input.

        True if the lens is the model's own tail in float32. In lower precision, logits that differ here become equal.
        """
        return self._head_is_last and self._weight.dtype == torch.float32

    def _fit_postprocessing(self, model: PreTrainedModel, hidden: Tensor, logits: Tensor) -> str | None:
        """Set the factor and cap with which the lens gives the model's logits, or return why none does."""
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
        # A masked token ranks last in the model, whatever its product is.
        if not bool(unmasked(logits).all()):
            return "some tokens are masked"
        tolerance = lens_tolerance(self._weight.dtype) * float(logits.std())
        configured_cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
        least_squares = float((plain @ logits) / (plain @ plain).clamp_min(1e-12))
        candidates: list[tuple[float, float | None]] = [(1.0, None), (least_squares, None)]
        if configured_cap:
            candidates.insert(1, (1.0, float(configured_cap)))
        for factor, cap in candidates:
            self.factor, self.cap = factor, cap
            gap = float((self._postprocess(plain) - logits).abs().mean())
            if gap <= tolerance:
                return None
        return f"mean gap {gap:.3g} with logits of standard deviation {float(logits.std()):.3g}"

    def _postprocess(self, product: Tensor) -> Tensor:
        """Scale or cap products as the model does its logits."""
        if self.factor != 1.0:
            product = product * self.factor
        if self.cap is not None:
            product = self.cap * torch.tanh(product / self.cap)
        return product

    def _product(self, normed: Tensor, rows: Tensor | slice) -> Tensor:
        """Multiply normalized states (N, D) with rows of the unembedding, in float32."""
        weight = self._weight[rows].to(device=normed.device, dtype=torch.float32)
        product = normed.float() @ weight.T
        bias = getattr(self.head, "bias", None)
        return product if bias is None else product + bias[rows].to(product)

    def _mean_row(self) -> tuple[Tensor, float]:
        """Return the mean row of the unembedding, float32 (D,), and the mean bias; computed once for each weight."""
        weight, bias = self._weight, getattr(self.head, "bias", None)
        # Weights can be exchanged or changed in place, as the randomization check does.
        key = (weight.data_ptr(), weight._version, float(weight[0].float().sum()), float(weight[-1].float().sum()))
        if key not in self._means:
            total = sum(self._over_vocabulary(lambda rows: weight[rows].sum(0, dtype=torch.float32), self.hidden_size))
            self._means.clear()
            self._means[key] = (
                cast(Tensor, total) / self.vocab_size,
                0.0 if bias is None else float(bias.float().mean()),
            )
        return self._means[key]

    def _centered_product(self, normed: Tensor, tokens: Tensor, weight_mean: Tensor, bias_mean: float) -> Tensor:
        """Multiply normalized states (N, D) with rows of the unembedding less their mean, in float32."""
        rows = tokens.to(self._weight.device)
        weight = self._weight[rows].to(device=normed.device, dtype=torch.float32) - weight_mean.to(normed.device)
        product = normed.float() @ weight.T
        bias = getattr(self.head, "bias", None)
        return product if bias is None else product + (bias[rows].to(product) - bias_mean)

    def _spread(self, normed: Tensor, weight_mean: Tensor, bias_mean: float) -> Tensor:
        """Return the standard deviation of the products over the vocabulary at normalized states (N, D), (N,)."""

        def squares(rows: slice) -> Tensor:
            ids = torch.arange(rows.start, rows.stop, device=self._weight.device)
            return self._centered_product(normed, ids, weight_mean, bias_mean).square().sum(1)

        total = cast(Tensor, sum(self._over_vocabulary(squares, len(normed))))
        return (total / self.vocab_size).sqrt().clamp_min(torch.finfo(torch.float32).tiny)

    def _replayed(self, hidden: Tensor) -> Iterator[Tensor]:
        """Yield the model's own logits of hidden states (N, D), some rows at a time."""
        replay = cast(TailReplay, self._replay)
        for rows in hidden.split(replay.length):
            yield replay(rows)

    @torch.no_grad()
    def normalize(self, hidden: Tensor) -> Tensor:
        """Apply the final norm to the output of a decoder layer, (..., D) -> (..., D)."""
        parameter = next(self.norm.parameters(), None)
        if parameter is not None:
            hidden = hidden.to(device=parameter.device)
        return cast(Tensor, self.norm(hidden))

    @torch.no_grad()
    def activation(
        self,
        hidden: Tensor,
        tokens: Tensor,
        normed: bool = False,
    ) -> Tensor:
        r"""
        Compute logits of tokens at hidden states.

        Args:

            hidden (Tensor): Output of a decoder layer, (..., D).
            tokens (Tensor): Token ids, int64 (n,).
            normed (bool, optional): Whether the final norm has already been applied to ``hidden``, as it has been
                        to transformers' ``hidden_states[-1]``.
                        Default: False

        Returns:
            **activation** (*Tensor*): float32 (..., n), normalized as ``logit_normalization`` says.

        Raises:
            InvalidOptionError: ``normed`` with tail replay, which starts before the norm.
        """
        if self._replay is not None:
            if normed:
                raise InvalidOptionError(
                    "normed=True is not possible: this model's tail is replayed from the output of its last decoder "
                    "layer on; pass hidden states before the norm."
                )
            parts = [
                _normalize_logits(logits, tokens.to(logits.device), self.logit_normalization)
                for logits in self._replayed(hidden.flatten(0, -2))
            ]
            return torch.cat(parts).reshape(*hidden.shape[:-1], len(tokens))
        flat = hidden.flatten(0, -2)
        weight_mean, bias_mean = (None, 0.0) if self.logit_normalization == "raw" else self._mean_row()

        def activations(rows: slice) -> Tensor:
            part = flat[rows] if normed else self.normalize(flat[rows])
            if weight_mean is None:
                return self._postprocess(self._product(part, tokens.to(self._weight.device)))
            product = self._centered_product(part, tokens, weight_mean, bias_mean)
            if self.logit_normalization == "zscore":
                return product / self._spread(part, weight_mean, bias_mean)[:, None]
            return self._postprocess(product)

        # A state, and its copies in float32 while it is normalized.
        size = items_within(self.working_memory, 20 * self.hidden_size)
        parts = list(run_in_chunks(activations, len(flat), size)) or [activations(slice(0))]
        return torch.cat(parts).reshape(*hidden.shape[:-1], len(tokens))

    def _over_vocabulary(
        self, work: Callable[[slice], T], positions: int, block_size: int | None = None
    ) -> Iterator[T]:
        """Run ``work`` on as many rows of the unembedding at a time as fit into the working memory."""
        # A row's copy in float32, and each position's logit, its key in a ranking, and room to sort them.
        row = 32 * positions + (0 if self._weight.dtype == torch.float32 else 4 * self.hidden_size)
        return run_in_chunks(work, self.vocab_size, block_size or items_within(self.working_memory, row))

    @torch.no_grad()
    def rank(self, hidden: Tensor, k: int = DEFAULT_RANKING_LENGTH, block_size: int | None = None) -> Rankings:
        r"""
        Rank the most likely next tokens at each hidden state, streamed over blocks of the vocabulary: memory grows with
        N x (``k`` + block), whatever the size of the vocabulary. Equal logits rank by token id.

        Args:

            hidden (Tensor): Output of a decoder layer, (N, D).
            k (int, optional): Length of the ranking.
                        Default: 50
            block_size (int, optional): Rows of the unembedding used at a time.
                        Default: None, as many as fit into the working memory.

        Returns:
            **rankings** (*Rankings*): ``ids``, int64 (N, min(k, vocabulary)), best first; and ``log_normalizer``,
            float32 (N,), the logarithm of the sum that a softmax over the vocabulary divides by.

        Raises:
            InvalidOptionError: ``k`` is below 1.
        """
        if k < 1:
            raise InvalidOptionError(f"k must be at least 1, got {k}.")
        if self._replay is not None:
            parts = [rank_all(logits, k) for logits in self._replayed(hidden)]
            return Rankings(*map(torch.cat, zip(*parts, strict=True)))
        normed = self.normalize(hidden)

        def rank_block(rows: slice) -> tuple[Tensor, Tensor]:
            logits = self._postprocess(self._product(normed, rows))
            return top_keys(logits, rows.start, k), logits.logsumexp(1)

        best = torch.empty(len(normed), 0, dtype=torch.int64, device=normed.device)
        normalizer = torch.full(normed.shape[:1], -torch.inf, device=normed.device)
        for keys, block in self._over_vocabulary(rank_block, len(normed), block_size):
            best = torch.cat([best, keys], dim=1)
            best = best.topk(min(k, best.shape[1]), dim=1).values
            normalizer = torch.logaddexp(normalizer, block)
        return Rankings(rankings_from_keys(best, k), normalizer)

    def rank_logits(self, product: Tensor, k: int = DEFAULT_RANKING_LENGTH) -> Rankings:
        """Rank as :meth:`rank` does, given the head's output (N, vocabulary) before the model scales or caps it."""
        return rank_all(self._postprocess(product), k)

    def topk(self, hidden: Tensor, k: int = DEFAULT_RANKING_LENGTH, block_size: int | None = None) -> Tensor:
        """Return the ``ids`` of :meth:`rank`, int64 (N, min(k, vocabulary)), best first."""
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
        Compute the log-probability of one token per hidden state, streamed over blocks of the vocabulary.

        Args:

            hidden (Tensor): Output of the last decoder layer, (N, D).
            tokens (Tensor): Token ids, int64 (N,).
            block_size (int, optional): Rows of the unembedding used at a time.
                        Default: None, as many as fit into the working memory.
            log_normalizer (Tensor, optional): That of the same states from :meth:`rank`; no other rows of the
                        unembedding are used then.
                        Default: None, computed.

        Returns:
            **log_probability** (*Tensor*): float32 (N,), at most 0.
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


def _normalize_logits(logits: Tensor, tokens: Tensor, logit_normalization: LogitNormalization) -> Tensor:
    """Select tokens (N, n) of logits (N, vocabulary), centered or as z-scores over the tokens that are not masked."""
    selected = logits[:, tokens]
    if logit_normalization == "raw":
        return selected
    kept = unmasked(logits)
    count = kept.sum(1, keepdim=True).clamp_min(1)
    mean = logits.where(kept, 0.0).sum(1, keepdim=True) / count
    if logit_normalization == "centered":
        return selected - mean
    spread = ((logits - mean).square().where(kept, 0.0).sum(1, keepdim=True) / count).sqrt()
    return (selected - mean) / spread.clamp_min(torch.finfo(torch.float32).tiny)


def select_layers(lens: LogitLens, indices: Sequence[int]) -> list[nn.Module]:
    r"""
    Return decoder layers by index.

    Args:

        lens (LogitLens): The lens whose layers to choose from.
        indices (Sequence[int]): Indices, negative ones from the end.

    Raises:
        InvalidOptionError: there is no index, or no layer of an index.

    Examples::

        >>> from captum_intramodal.models.logit_lens import select_layers
        >>> select_layers(adapter.lens, [-1])[0] is adapter.lens.layers[-1]
        True
    """
    count = len(lens.layers)
    if bad := [index for index in indices if not -count <= index < count]:
        raise InvalidOptionError(f"Layer indices {bad} do not exist; the decoder has {count} layers.")
    if not indices:
        raise InvalidOptionError("At least one layer index is needed, got none.")
    return [lens.layers[index] for index in indices]
