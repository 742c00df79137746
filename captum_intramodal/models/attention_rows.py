r"""Attention rows of a few queries, computed beside a model's own attention, whichever implementation it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from threading import RLock, get_ident
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from captum_intramodal._utils.memory import items_within, run_in_chunks
from captum_intramodal.errors import UnsupportedModelError

__all__ = ["AttentionCall", "intercept_attention", "select_rows", "tolerance"]

# Two threads that exit in another order than they entered would leave the interface wrapped for good.
_INTERCEPTING = RLock()


def tolerance(dtype: torch.dtype) -> float:
    """Return the relative error that rounding explains."""
    return 1e-4 if dtype in (torch.float32, torch.float64) else 3e-2


def select_rows(tensor: Tensor, examples: Tensor, queries: Tensor, dim: int) -> Tensor:
    """Return one slice per (example, query) pair, (T, ...), of a tensor whose batch is dimension 0."""
    tensor = tensor.movedim(dim, 1)
    examples, queries = examples.to(tensor.device), queries.to(tensor.device)
    return tensor[examples if len(tensor) > 1 else torch.zeros_like(examples), queries]


@contextmanager
def intercept_attention(handle: Callable[..., Any]) -> Iterator[None]:
    r"""
    Let ``handle`` answer every call of transformers' attention interface in the ``with`` block.

    The implementation that a model's configuration names is resolved as usual and passed on, the default of models
    without any other included. Configurations do not change, as some models choose their masks by them. Calls of other
    threads go to their implementation directly; a second thread that wants to intercept waits for the first.

    Args:

        handle (Callable): Called with the implementation, followed by the call's own arguments.

    Examples::

        >>> from captum_intramodal.models.attention_rows import intercept_attention
        >>> shapes = []
        >>> def record(function, module, query, *args, **kwargs):
        ...     shapes.append(query.shape)
        ...     return function(module, query, *args, **kwargs)
        >>> with torch.no_grad(), intercept_attention(record):
        ...     _ = model(input_ids=torch.tensor([[3, 1, 4]]))
        >>> len(shapes) == len(adapter.lens.layers)
        True
    """
    interface, owner = ALL_ATTENTION_FUNCTIONS, get_ident()
    with _INTERCEPTING:
        before = interface.__dict__.get("get_interface")
        resolve = interface.get_interface

        def get_interface(*args: Any, **kwargs: Any) -> Callable[..., Any]:
            function: Callable[..., Any] = resolve(*args, **kwargs)
            return partial(handle, function) if get_ident() == owner else function

        interface.__dict__["get_interface"] = get_interface
        try:
            yield
        finally:
            if before is None:
                del interface.__dict__["get_interface"]
            else:
                interface.__dict__["get_interface"] = before


@dataclass
class AttentionCall:
    r"""
    One call of an attention function, reduced to the rows of T (example, query) pairs.

    Attributes:
        module (torch.nn.Module): the attention module.
        examples (Tensor): the example of each pair, int64 (T,).
        query (Tensor): (T, H, d).
        key, value (Tensor): (B, KV, K, d).
        output (Tensor): the attention's output at the pairs, before the output projection, (T, H, d) or (T, H x d).
        bias (Tensor or None): added to the scores, float (T, 1 or H, K).
        allowed (Tensor or None): keys that a pair attends to, bool (T, 1 or H, K).
        scaling (float): factor of the scores.
        softcap (float or None): soft cap of the scores.
        sinks (Tensor or None): one more score per head that takes weight from the keys, (H,).
    """

    module: nn.Module
    examples: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    bias: Tensor | None
    allowed: Tensor | None
    scaling: float
    softcap: float | None
    sinks: Tensor | None

    @classmethod
    def from_arguments(
        cls,
        examples: Tensor,
        queries: Tensor,
        output: Tensor,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any = None,
        *unnamed: Any,
        **options: Any,
    ) -> AttentionCall:
        """Reduce a call to the rows of pairs, from the arguments that the interface passes."""
        if not isinstance(attention_mask, Tensor | None):
            raise UnsupportedModelError(
                f"{type(module).__name__} attends with a mask of type {type(attention_mask).__name__}, of which no "
                "single row can be taken; load the model with attn_implementation='sdpa'."
            )
        count = key.shape[2]
        bias, allowed = None, None
        if attention_mask is not None and attention_mask.ndim == 4:
            rows = select_rows(attention_mask, examples, queries, 2)[..., :count]
            bias, allowed = (None, rows) if rows.dtype == torch.bool else (rows.float(), None)
        else:
            allowed = _allowed_keys(module, examples, queries, query.shape[2], key, attention_mask, options)
        position_bias = options.get("position_bias")
        if position_bias is not None:
            rows = select_rows(position_bias, examples, queries, 2)[..., :count].float()
            bias = rows if bias is None else bias + rows
        sinks = options.get("s_aux")
        sinks = getattr(module, "sinks", None) if sinks is None else sinks
        scaling = options.get("scaling")
        return cls(
            module,
            examples,
            select_rows(query, examples, queries, 2),
            key,
            value,
            select_rows(output, examples, queries, 1),
            bias,
            allowed,
            float(query.shape[-1] ** -0.5 if scaling is None else scaling),
            options.get("softcap"),
            sinks.flatten() if isinstance(sinks, Tensor) else None,
        )

    @property
    def heads(self) -> int:
        """Number of query heads."""
        return self.query.shape[1]

    def contributions(self, direction: Tensor, working_memory: int, per_head: bool = False) -> Tensor:
        r"""
        Compute ``A[h, t, s] * (direction[t, h] . V[h, s])``, for the attention rows A in float32.

        Args:

            direction (Tensor): one vector per pair and head in the space of the values, (T, H, d).
            working_memory (int): Bytes used at a time.
            per_head (bool): Whether to keep the heads apart.
                        Default: False

        Returns:
            **contributions** (*Tensor*): float32 (T, K), or (H, T, K).

        Raises:
            UnsupportedModelError: attention rows times values do not give the attention's output.
        """
        total = torch.zeros((self.heads,) * per_head + (len(self.query), self.key.shape[2]), device=self.query.device)
        for example in self.examples.unique().tolist():
            rows = (self.examples == example).nonzero()[:, 0].to(self.query.device)
            self._add_example(total, example if len(self.key) > 1 else 0, rows, direction, working_memory)
        return total

    def _add_example(self, total: Tensor, example: int, rows: Tensor, direction: Tensor, working_memory: int) -> None:
        """Add the contributions of one example's pairs, a few heads and pairs at a time."""
        key, value = self.key[example], self.value[example]
        (groups, count, width), share = key.shape, self.heads // key.shape[0]
        output = self.output.reshape(len(self.query), self.heads, -1)

        def group(chunk: slice) -> tuple[slice, list[Tensor]]:
            keys, values = key[chunk].float(), value[chunk].float()
            heads = slice(chunk.start * share, chunk.stop * share)

            def products(part: slice) -> Tensor:
                own = rows[part]
                weights = self._weights(own, heads, keys, share)
                actual = torch.einsum("tghs,gsd->tghd", weights, values).flatten(1, 2)
                self._compare(actual, output[own, heads].float())
                toward = direction[own, heads].float().unflatten(1, (-1, share))
                product = torch.einsum("tghd,gsd->tghs", toward, values[..., : toward.shape[-1]]).mul_(weights)
                return product.flatten(1, 2).transpose(0, 1) if total.ndim == 3 else product.sum((1, 2))

            each = 16 * len(keys) * share * count
            return heads, list(run_in_chunks(products, len(rows), items_within(working_memory, each)))

        # The keys and values of a group of heads in float32, and what one pair needs.
        size = items_within(working_memory, 8 * count * width + 16 * share * count)
        for heads, parts in run_in_chunks(group, groups, size):
            if total.ndim == 3:
                total[heads, rows] = torch.cat(parts, dim=1)
            else:
                total[rows] += torch.cat(parts)

    def _weights(self, rows: Tensor, heads: slice, keys: Tensor, share: int) -> Tensor:
        """Compute attention rows, float32 (t, groups, heads per group, K)."""
        query = self.query[rows, heads].float().unflatten(1, (-1, share))
        scores = torch.einsum("tghd,gsd->tghs", query, keys) * self.scaling
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        for mask in (self.bias, self.allowed):
            if mask is None:
                continue
            mask = mask[rows]
            mask = mask[:, heads].unflatten(1, (-1, share)) if mask.shape[1] > 1 else mask[:, :, None]
            floor = torch.finfo(scores.dtype).min
            scores = scores.masked_fill(~mask, floor) if mask.dtype == torch.bool else scores + mask
        if self.sinks is None:
            return scores.softmax(-1)
        sinks = self.sinks[heads].float().unflatten(0, (-1, share))[None, ..., None].expand(*scores.shape[:-1], 1)
        return torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1]

    def _compare(self, actual: Tensor, expected: Tensor) -> None:
        """Raise unless rows times values give the attention's output."""
        if actual.shape[-1] != expected.shape[-1] or not bool(
            (actual - expected).abs().max() <= tolerance(self.query.dtype) * expected.abs().max().clamp_min(1e-6)
        ):
            raise UnsupportedModelError(
                f"The attention of {type(self.module).__name__} is not a softmax of scaled, soft-capped or masked "
                "products of queries and keys, so its rows cannot be computed."
            )


def _allowed_keys(
    module: nn.Module,
    examples: Tensor,
    queries: Tensor,
    length: int,
    key: Tensor,
    padding: Tensor | None,
    options: dict[str, Any],
) -> Tensor | None:
    """Return which keys pairs attend to, bool (T, 1, K), if the call has no mask of queries and keys."""
    count, device = key.shape[2], key.device
    queries = queries.to(device)
    allowed = None
    causal = options.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if causal and length > 1:
        last = queries[:, None] + max(0, count - length)
        positions = torch.arange(count, device=device)
        allowed = positions <= last
        if window := options.get("sliding_window"):
            allowed &= positions > last - window
    if padding is not None and padding.ndim == 2:
        kept = padding.to(device)[examples.to(device), -count:].bool()
        allowed = kept if allowed is None else allowed & kept
    return None if allowed is None else allowed[:, None]
