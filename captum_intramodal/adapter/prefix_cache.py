r"""A pass that looks at the images: up to their last token, and from behind the text that another pass has read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from captum_intramodal.adapter.model_adapter import ModelAdapter
from captum_intramodal.adapter.trials import logits_gap
from captum_intramodal.models.decoder import decoder_layers
from captum_intramodal.models.hooks import evaluation_mode, hidden_rows, run_layers

__all__ = ["TextPrefix", "shares_prefix", "visual_states"]

# Fewer tokens are read again in less time than it takes to find out whether a model can share them.
MIN_TOKENS = 256


# The dimension of a decoder's arguments that runs along its sequence.
SEQUENCE_DIMS: dict[str, int] = {
    "inputs_embeds": 1,
    "position_ids": -1,
    "cache_position": 0,
    "visual_pos_masks": 1,
    "vision_mask": 1,
    "moe_mm_token_type_ids": 1,
}


_SHARES: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


class TextPrefix:
    r"""
    Keys and values of the tokens before the first image, taken from one pass and used in others.

    The model runs as always, so that its images and positions come where they belong; its decoder alone begins behind
    the prefix. :func:`shares_prefix` says of which models the states are the same then.

    Args:

        adapter (ModelAdapter): The model.
        inputs (Mapping): What its processor makes of the prompt and its images; one example.

    Examples::

        >>> prefix = TextPrefix(adapter, inputs)
        >>> with prefix.captured():
        ...     _ = adapter.run(inputs)
        >>> with prefix.shared():
        ...     _ = adapter.run(larger)        # the decoder reads len(prefix.ids) tokens less
    """

    def __init__(self, adapter: ModelAdapter, inputs: Mapping[str, Any]) -> None:
        ids = inputs["input_ids"][0]
        positions = adapter.visual_positions(ids)
        self.ids: Tensor = ids[: int(positions.min()) if len(positions) else 0]
        self._decoder: nn.Module = adapter.model.get_decoder()
        self._depth = len(decoder_layers(adapter.model))
        self._states: list[tuple[Tensor, Tensor]] = []

    @classmethod
    def of(cls, adapter: ModelAdapter, inputs: Mapping[str, Any]) -> TextPrefix | None:
        """The prefix of a prompt, if the model can share it and that is worth it."""
        ids = inputs.get("input_ids")
        if ids is None or len(ids) > 1:
            return None
        prefix = cls(adapter, inputs)
        return prefix if len(prefix.ids) >= MIN_TOKENS and shares_prefix(adapter) else None

    def leads(self, inputs: Mapping[str, Any]) -> bool:
        """Whether other inputs begin with these tokens, and the keys and values of these are known at every layer."""
        count, ids = len(self.ids), inputs["input_ids"]
        return len(self._states) == self._depth and len(ids) == 1 and torch.equal(ids[0, :count], self.ids)

    @contextmanager
    def captured(self, generating: bool = False) -> Iterator[None]:
        """Takes the keys and values from the pass that the body of the ``with`` statement runs, or from the cache of
        the generation there: a model that generates without one gets none."""
        cache: Cache | None = None

        def give(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            nonlocal cache
            cache = kwargs.get("past_key_values")
            if cache is None and not generating:
                cache = Cache(layer_class_to_replicate=partial(_FirstTokens, len(self.ids)))
                kwargs = kwargs | {"past_key_values": cache}
            return args, kwargs

        with self._decoder.register_forward_pre_hook(give, with_kwargs=True):
            yield
        whole = 0 if cache is None else cache.get_seq_length()
        pairs = [
            (getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in getattr(cache, "layers", ())
        ]
        count = len(self.ids)
        self._states = [
            (keys[..., :count, :].clone(), values[..., :count, :].clone())
            for keys, values in pairs
            # What a sliding window left behind is not known any more.
            if isinstance(keys, Tensor) and isinstance(values, Tensor) and keys.shape[-2] == whole
        ]

    @contextmanager
    def shared(self) -> Iterator[None]:
        """In the body of the ``with`` statement the decoder begins behind the prefix, once."""
        count = len(self.ids)

        def skip(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            cache = DynamicCache()
            for index, (keys, values) in enumerate(self._states):
                cache.update(keys, values, index)
            return args, {name: _behind(name, value, count) for name, value in kwargs.items()} | {
                "past_key_values": cache
            }

        with self._decoder.register_forward_pre_hook(skip, with_kwargs=True):
            yield


class _FirstTokens(DynamicLayer):
    """A cache of the first tokens alone, for one pass."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        super().update(key_states[..., : self.count, :], value_states[..., : self.count, :])
        return key_states, value_states


def _behind(name: str, value: Any, count: int) -> Any:
    """A decoder's argument without its first ``count`` tokens. A mask's columns are those of all that can be seen."""
    if isinstance(value, dict):
        return {key: _behind(name, part, count) for key, part in value.items()}
    if not isinstance(value, Tensor):
        return value
    if name == "attention_mask":
        return value if value.ndim == 2 else value[..., count:, :]
    if name in SEQUENCE_DIMS:
        dim = SEQUENCE_DIMS[name]
        return value.narrow(dim, count, value.shape[dim] - count)
    return value


def visual_states(
    adapter: ModelAdapter, inputs: Mapping[str, Any], layer: nn.Module, prefix: TextPrefix | None = None
) -> list[Tensor]:
    r"""
    Hidden states at the visual positions. What comes after them is left out, and what comes before them too where it is
    known.

    Args:

        adapter (ModelAdapter): The model.
        inputs (Mapping): What its processor makes of a batch of prompts and their images.
        layer (torch.nn.Module): The layer to read.
        prefix (TextPrefix, optional): What is known of the tokens before the images.
                    Default: None

    Returns:
        *list[Tensor]*: per prompt (V, D).
    """
    starts = adapter.starts(inputs)
    positions = [
        start + adapter.visual_positions(ids[start:]) for start, ids in zip(starts, inputs["input_ids"], strict=True)
    ]
    if prefix is not None and not prefix.leads(inputs):
        prefix = None
    skipped = 0 if prefix is None else len(prefix.ids)

    def select(hidden: Tensor) -> Tensor:
        each = [
            hidden_rows(hidden, row, len(positions))[p.to(hidden.device) - skipped] for row, p in enumerate(positions)
        ]
        return torch.cat(each)

    seen = adapter.visual_prefix(inputs)
    with nullcontext() if prefix is None else prefix.shared():
        (hidden,) = run_layers(lambda: adapter.run(seen), [layer], select)
    return list(hidden.split([len(p) for p in positions]))


def shares_prefix(adapter: ModelAdapter) -> bool:
    """Whether a model says the same behind a prefix that another pass has read: tried with two small images, once."""
    if adapter.model not in _SHARES:
        try:
            with evaluation_mode(adapter.model):
                _SHARES[adapter.model] = _try_sharing(adapter)
        except Exception:  # Whatever a model raises whose passes are not made for this.
            _SHARES[adapter.model] = False
    return _SHARES[adapter.model]


def _try_sharing(adapter: ModelAdapter) -> bool:
    shown = {"type": "video" if adapter.video else "image"}
    prompt = [{"role": "user", "content": [{"type": "text", "text": "describe describe describe"}, shown]}]
    first, second = (adapter.prepare(adapter.trial_images(size), prompt) for size in ((96, 64), (200, 136)))
    layer = adapter.lens.layers[-1]
    prefix = TextPrefix(adapter, first)
    with prefix.captured():
        (captured,) = visual_states(adapter, first, layer)
    if not len(prefix.ids) or not prefix.leads(second):
        return False
    (shared,) = visual_states(adapter, second, layer, prefix)
    return all(
        logits_gap(states, *visual_states(adapter, inputs, layer)) <= adapter.tolerance
        for states, inputs in ((captured, first), (shared, second))
    )
