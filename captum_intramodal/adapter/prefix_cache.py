r"""How do passes at several scales avoid repeating the text before the images, and stop after the last visual token?"""

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
from captum_intramodal.adapter.prompts import decoder_ids, has_entry_per_token, placeholder_ids
from captum_intramodal.adapter.trials import TRIAL_PROMPT, logits_gap, tolerance_of, trial_images, trial_succeeds
from captum_intramodal.models.decoder import decoder_layers
from captum_intramodal.models.early_exit import run_layers
from captum_intramodal.models.families import SEQUENCE_DIMS, family_of
from captum_intramodal.models.layer_io import hidden_rows

__all__ = ["TextPrefix", "can_reuse_prefix", "reusable_prefix", "truncate_after_images", "visual_states"]

# Fewer tokens take less time than trying whether a model can reuse them.
MIN_TOKENS = 256

_REUSES: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


class TextPrefix:
    r"""
    TextPrefix holds the decoder's keys and values for the tokens before the first image, captured in one pass and
    reused in others.

    The model processes the whole input, so that images and positions are right; only its decoder starts after the
    prefix. :func:`can_reuse_prefix` tells for which models that preserves the hidden states.

    Args:

        adapter (ModelAdapter): The model.
        inputs (Mapping): The processor's output for a prompt and its images; one example.

    Attributes:
        ids (Tensor): the tokens of the prefix, int64 (n,).

    Examples::

        >>> from captum_intramodal.adapter.prefix_cache import TextPrefix
        >>> content = [{"type": "text", "text": "describe the picture."}, {"type": "image"}]
        >>> prompt = [{"role": "user", "content": content}]
        >>> inputs = adapter.prepare([image], prompt)
        >>> larger = adapter.prepare([image.resize((2 * image.width, 2 * image.height))], prompt)
        >>> prefix = TextPrefix(adapter, inputs)
        >>> with prefix.captured():
        ...     whole = adapter.run(inputs).logits
        >>> prefix.is_prefix_of(larger)
        True
        >>> with prefix.reused():
        ...     rest = adapter.run(larger).logits
        >>> rest.shape[1] == larger["input_ids"].shape[1] - len(prefix.ids)
        True
    """

    def __init__(self, adapter: ModelAdapter, inputs: Mapping[str, Any]) -> None:
        ids = inputs["input_ids"][0]
        positions = adapter.visual_positions(ids)
        self.ids: Tensor = ids[: int(positions.min()) if len(positions) else 0]
        self._decoder: nn.Module = adapter.model.get_decoder()
        self._depth = len(decoder_layers(adapter.model))
        self._states: list[tuple[Tensor, Tensor]] = []

    def is_prefix_of(self, inputs: Mapping[str, Any]) -> bool:
        """Return whether inputs of one example begin with these tokens, and all layers' keys and values are known."""
        count, ids = len(self.ids), inputs["input_ids"]
        return len(self._states) == self._depth and len(ids) == 1 and torch.equal(ids[0, :count], self.ids)

    @contextmanager
    def captured(self, generating: bool = False) -> Iterator[None]:
        """Capture keys and values from the forward pass in the body of the ``with`` statement, or, if ``generating``,
        from the cache of the generation there. A model that generates without a cache is not given one."""
        cache: Cache | None = None

        def add_cache(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            nonlocal cache
            cache = kwargs.get("past_key_values")
            if cache is None and not generating:
                cache = Cache(layer_class_to_replicate=partial(_FirstTokens, len(self.ids)))
                kwargs = kwargs | {"past_key_values": cache}
            return args, kwargs

        with self._decoder.register_forward_pre_hook(add_cache, with_kwargs=True):
            yield
        whole = 0 if cache is None else cache.get_seq_length()
        pairs = [
            (getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in getattr(cache, "layers", ())
        ]
        count = len(self.ids)
        self._states = [
            (keys[..., :count, :].clone(), values[..., :count, :].clone())
            for keys, values in pairs
            # A sliding window drops its oldest keys and values.
            if isinstance(keys, Tensor) and isinstance(values, Tensor) and keys.shape[-2] == whole
        ]

    @contextmanager
    def reused(self) -> Iterator[None]:
        """Start the decoder after the prefix in the one forward pass in the body of the ``with`` statement."""
        count = len(self.ids)

        def skip(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            cache = DynamicCache()
            for index, (keys, values) in enumerate(self._states):
                cache.update(keys, values, index)
            rest = {name: _without_first(name, value, count) for name, value in kwargs.items()}
            return args, rest | {"past_key_values": cache}

        with self._decoder.register_forward_pre_hook(skip, with_kwargs=True):
            yield


class _FirstTokens(DynamicLayer):
    """A layer of a cache that keeps the first tokens only, for one pass."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        super().update(key_states[..., : self.count, :], value_states[..., : self.count, :])
        return key_states, value_states


def _without_first(name: str, value: Any, count: int) -> Any:
    """Remove the first ``count`` tokens from a decoder's argument; a mask keeps its columns, which are the keys'."""
    if isinstance(value, dict):
        return {key: _without_first(name, part, count) for key, part in value.items()}
    if not isinstance(value, Tensor):
        return value
    if name == "attention_mask":
        return value if value.ndim == 2 else value[..., count:, :]
    if name in SEQUENCE_DIMS:
        dim = SEQUENCE_DIMS[name]
        return value.narrow(dim, count, value.shape[dim] - count)
    return value


def reusable_prefix(adapter: ModelAdapter, inputs: Mapping[str, Any]) -> TextPrefix | None:
    """Return the prefix of one prompt's inputs, or None if it is too short to be worth it or cannot be reused."""
    ids = inputs.get("input_ids")
    if ids is None or len(ids) > 1:
        return None
    prefix = TextPrefix(adapter, inputs)
    return prefix if len(prefix.ids) >= MIN_TOKENS and can_reuse_prefix(adapter) else None


def truncate_after_images(adapter: ModelAdapter, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Cut inputs after the last visual token and the special tokens that close its image; the states of the visual
    tokens do not depend on the rest, unless the family attends ahead."""
    if family_of(adapter.model.config).attends_ahead:
        return dict(inputs)
    ids = decoder_ids(adapter.model, inputs)
    visual = torch.isin(ids, placeholder_ids(adapter.model, inputs)).any(0)
    special = torch.isin(ids, torch.tensor(adapter.tokenizer.all_special_ids, device=ids.device)).all(0) | visual
    last = int(visual.nonzero()[-1])
    end = last + int(special[last:].long().cumprod(0).sum())
    return {
        key: value[:, :end] if has_entry_per_token(adapter.processor, key, value, ids) else value
        for key, value in inputs.items()
    }


def visual_states(
    adapter: ModelAdapter, inputs: Mapping[str, Any], layer: nn.Module, prefix: TextPrefix | None = None
) -> list[Tensor]:
    r"""
    Compute the hidden states at the visual positions, without the tokens after them, and without the prefix if its keys
    and values are known.

    Args:

        adapter (ModelAdapter): The model.
        inputs (Mapping): The processor's output for a batch of prompts and their images.
        layer (torch.nn.Module): The layer whose output is returned.
        prefix (TextPrefix, optional): Keys and values of the tokens before the images; not used if the inputs begin
                    with other tokens.
                    Default: None

    Returns:
        **states** (*list[Tensor]*):
            Per prompt (V, D).
    """
    starts = adapter.starts(inputs)
    positions = [
        start + adapter.visual_positions(ids[start:]) for start, ids in zip(starts, inputs["input_ids"], strict=True)
    ]
    if prefix is not None and not prefix.is_prefix_of(inputs):
        prefix = None
    skipped = 0 if prefix is None else len(prefix.ids)

    def select(hidden: Tensor) -> Tensor:
        each = [
            hidden_rows(hidden, row, len(positions))[p.to(hidden.device) - skipped] for row, p in enumerate(positions)
        ]
        return torch.cat(each)

    needed = truncate_after_images(adapter, inputs)
    with nullcontext() if prefix is None else prefix.reused():
        (hidden,) = run_layers(lambda: adapter.run(needed), [layer], select)
    return list(hidden.split([len(p) for p in positions]))


def can_reuse_prefix(adapter: ModelAdapter) -> bool:
    """Return whether reusing a prefix preserves a model's hidden states; tried once, on two small images."""
    if adapter.model not in _REUSES:
        _REUSES[adapter.model] = trial_succeeds(adapter.model, partial(_prefix_preserves_states, adapter))
    return _REUSES[adapter.model]


def _prefix_preserves_states(adapter: ModelAdapter) -> bool:
    """Compare the visual states of two prompts with and without reuse."""
    text = {"type": "text", "text": " ".join([TRIAL_PROMPT] * 3)}
    prompt = [{"role": "user", "content": [text, {"type": "video" if adapter.video else "image"}]}]
    first, second = (adapter.prepare(trial_images(size, adapter.video), prompt) for size in ((96, 64), (200, 136)))
    layer = adapter.lens.layers[-1]
    prefix = TextPrefix(adapter, first)
    with prefix.captured():
        (captured,) = visual_states(adapter, first, layer)
    if not len(prefix.ids) or not prefix.is_prefix_of(second):
        return False
    (reused,) = visual_states(adapter, second, layer, prefix)
    return all(
        logits_gap(states, *visual_states(adapter, inputs, layer)) <= tolerance_of(adapter.model.dtype).passes
        for states, inputs in ((captured, first), (reused, second))
    )
