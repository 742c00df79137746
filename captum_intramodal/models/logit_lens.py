r"""The logit lens: a model's hidden states, read with its own final norm and unembedding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from captum_intramodal._utils.memory import WORKING_MEMORY, items_within, run_in_chunks
from captum_intramodal.models.decoder import final_norm, input_device, readable_layers
from captum_intramodal.models.hooks import capture_outputs, hidden_rows
from captum_intramodal.models.ranking import Rankings, rank_all, rankings_from_keys, top_keys
from captum_intramodal.models.tail_replay import TailReplay

__all__ = ["LogitLens", "select_layers"]

T = TypeVar("T")


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
        self._replay: TailReplay | None = None
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
            self._replay = TailReplay(model, inputs, last, hidden, logits, gap)
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
        replay = cast(TailReplay, self._replay)
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

        # A state, and its copies in float32 while it is normalized.
        size = items_within(self.working_memory, 20 * self.hidden_size)
        parts = list(run_in_chunks(activations, len(flat), size)) or [activations(slice(0))]
        return torch.cat(parts).reshape(*hidden.shape[:-1], len(tokens))

    def _over_vocabulary(
        self, work: Callable[[slice], T], positions: int, block_size: int | None = None
    ) -> Iterator[T]:
        """Does some work on as many rows of the unembedding at a time as fit into the working memory."""
        # A row's copy in float32; and of each position its logit, its key in a ranking, and room to sort them.
        row = 32 * positions + (0 if self._weight.dtype == torch.float32 else 4 * self.hidden_size)
        return run_in_chunks(work, self.vocab_size, block_size or items_within(self.working_memory, row))

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
            parts = [rank_all(logits, k) for logits in self._replayed(hidden)]
            return Rankings(*map(torch.cat, zip(*parts, strict=True)))
        normed = self.normalize(hidden)

        def read(rows: slice) -> tuple[Tensor, Tensor]:
            logits = self._postprocess(self._product(normed, rows))
            return top_keys(logits, rows.start, k), logits.logsumexp(1)

        best = torch.empty(len(normed), 0, dtype=torch.int64, device=normed.device)
        normalizer = torch.full(normed.shape[:1], -torch.inf, device=normed.device)
        for keys, block in self._over_vocabulary(read, len(normed), block_size):
            best = torch.cat([best, keys], dim=1)
            best = best.topk(min(k, best.shape[1]), dim=1).values
            normalizer = torch.logaddexp(normalizer, block)
        return Rankings(rankings_from_keys(best, k), normalizer)

    def rank_logits(self, product: Tensor, k: int = 50) -> Rankings:
        """:meth:`rank` of the head's output, (N, vocabulary), before the model scales or caps it."""
        return rank_all(self._postprocess(product), k)

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


def select_layers(lens: LogitLens, indices: Sequence[int]) -> list[nn.Module]:
    """Decoder layers by index, negative ones from the end."""
    count = len(lens.layers)
    if bad := [index for index in indices if not -count <= index < count]:
        raise ValueError(f"Layer indices {bad} do not exist; the decoder has {count} layers.")
    if not indices:
        raise ValueError("At least one layer index is needed.")
    return [lens.layers[index] for index in indices]
