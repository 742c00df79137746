r"""TODO."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.ao.nn.quantized.dynamic import Linear as DynamicQuantizedLinear
from transformers import PreTrainedModel

from captum_intramodal.geometry.decoder_inputs import (
    SEQUENCE_ARGUMENT,
    hidden_argument,
    layer0_input,
    read_states,
    state_arguments,
    state_rows,
    visual_rows,
)
from captum_intramodal.geometry.pixel_map import PixelMap
from captum_intramodal.models.decoder import decoder_layers
from captum_intramodal.models.placeholders import image_token_id

__all__ = []

# Ownership marks tokens by powers of two, so many bits of a token's number at once as the exponent's range allows.
_DIGIT_BITS = {torch.float16: 3}


_DIGIT_BITS_ELSE = 6


def _attention_blocks(model: PreTrainedModel) -> list[nn.Module]:
    decoder = set(decoder_layers(model).modules())
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and m not in decoder]
    return [
        block
        for block in dict.fromkeys(block for blocks in lists for block in blocks)
        if block not in decoder
        and any("attention" in (name := type(m).__name__.lower()) or "attn" in name for m in block.modules())
    ]


def _in_float(linear: DynamicQuantizedLinear, hidden: Tensor) -> Tensor:
    """Dynamic quantization couples all positions by their common scale; the geometry is that of its float weights."""
    bias = linear.bias()
    return F.linear(hidden, linear.weight().dequantize().to(hidden), None if bias is None else bias.to(hidden))


def _as_product(convolution: Any, hidden: Tensor) -> Tensor:
    """A convolution over single patches is a matrix product, whose backward pass is much faster in half precision."""
    single = hidden.shape[2:] == convolution.kernel_size and convolution.groups == 1
    if not single or convolution.padding not in ("valid", (0,) * len(convolution.kernel_size)):
        result: Tensor = type(convolution).forward(convolution, hidden)
        return result
    product = F.linear(hidden.flatten(1), convolution.weight.flatten(1), convolution.bias)
    return product.reshape(len(hidden), -1, *[1] * len(convolution.kernel_size))


@contextmanager
def bypassed_attention(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Iterator[None]:
    """Turns every shape-preserving attention block outside the decoder's layers into the identity.

    The blocks' forward is replaced, as a hook would still pay for the block, and transformers' recorder of hidden
    states would not see what a later hook returns.
    """
    rest: dict[nn.Module, tuple[Any, ...] | None] = {}

    def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        hidden = hidden_argument(args, kwargs)
        result = output[0] if isinstance(output, tuple) else output
        if isinstance(hidden, Tensor) and isinstance(result, Tensor) and hidden.shape == result.shape:
            rest[module] = tuple(map(sizes, output[1:])) if isinstance(output, tuple) else None

    def sizes(value: Any) -> Any:
        """Stages of a Swin tower also return their height and width."""
        return value if isinstance(value, tuple) and all(isinstance(n, int) for n in value) else None

    def identity(others: tuple[Any, ...] | None, *args: Any, **kwargs: Any) -> Any:
        hidden = hidden_argument(args, kwargs)
        return hidden if others is None else (hidden, *others)

    handles = [block.register_forward_hook(watch, with_kwargs=True) for block in _attention_blocks(model)]
    try:
        layer0_input(model, inputs)
    finally:
        for handle in handles:
            handle.remove()

    replaced: dict[nn.Module, Any] = {block: partial(identity, others) for block, others in rest.items()}
    replaced |= {m: partial(_in_float, m) for m in model.modules() if isinstance(m, DynamicQuantizedLinear)}
    # A forward on the instance, as accelerate's, brings offloaded weights.
    convolutions = (m for m in model.modules() if type(m) in (nn.Conv2d, nn.Conv3d) and "forward" not in vars(m))
    replaced |= {m: partial(_as_product, m) for m in convolutions}
    # accelerate and others keep a forward of their own on the instance, which must come back as it was.
    own = {block: vars(block).get("forward") for block in replaced}
    try:
        for block, forward in replaced.items():
            vars(block)["forward"] = forward
        yield
    finally:
        for block, forward in own.items():
            if forward is None:
                vars(block).pop("forward", None)
            else:
                vars(block)["forward"] = forward


class PerturbationSweep:
    """Which visual tokens react when some of the pixel elements change."""

    def __init__(self, model: PreTrainedModel, inputs: Mapping[str, Any], pixels: Mapping[str, PixelMap]) -> None:
        self.model = model
        self.inputs = inputs
        generator = torch.Generator().manual_seed(0)
        self.changed = {}
        for key, map_ in pixels.items():
            base = inputs[key]
            # Random signs and sizes: no linear map of a strip of elements cancels them.
            noise = 0.25 + 0.5 * torch.rand(len(map_.gain), generator=generator)
            noise *= torch.randint(0, 2, noise.shape, generator=generator) * 2 - 1
            # Padding has no gain of its own.
            noise *= torch.where(map_.gain != 0, map_.gain, map_.gain.abs().max())
            self.changed[key] = base + noise.view(map_.shape).to(base)
        self.argument, base, same = self._find_argument()
        self.positions = visual_rows(model, inputs, self.argument, len(base)).cpu()
        self._set_base(self._visual(base), self._visual(same))

    def rebase(self) -> None:
        """Reads the reference; again whenever the model changes (attention bypassed or not)."""
        self._set_base(self._hidden(self.inputs), self._hidden(self.inputs))

    def _set_base(self, base: Tensor, same: Tensor) -> None:
        """Takes two equal passes for the reference."""
        self.base = base
        # Zero on any backend that repeats itself bit for bit.
        self.noise = 4 * (same - base).abs().amax(dim=1)

    def _find_argument(self) -> tuple[str | None, Tensor, Tensor]:
        """The argument of the decoder's blocks that a change of the image moves, None for the sequence with its
        placeholders; and its states in two equal passes."""
        runs = self.inputs, self.inputs, {**self.inputs, **self.changed}

        def moves(base: Tensor, same: Tensor, changed: Tensor) -> bool:
            return bool((changed - base).abs().amax() > 4 * (same - base).abs().amax())

        sequence = [layer0_input(self.model, inputs) for inputs in runs]
        if moves(*sequence):
            ids = self.inputs.get("input_ids")
            before = image_token_id(self.model) is None and ids is not None and len(sequence[0]) > ids.shape[1]
            return SEQUENCE_ARGUMENT if before else None, sequence[0], sequence[1]
        found = [state_arguments(self.model, inputs) for inputs in runs]
        for name in found[0]:
            if moves(*(states[name] for states in found)):
                return name, state_rows(found[0][name], name), state_rows(found[1][name], name)
        return None, sequence[0], sequence[1]

    def _visual(self, states: Tensor) -> Tensor:
        return states[self.positions.to(states.device)].float()

    def _hidden(self, inputs: Mapping[str, Any]) -> Tensor:
        return self._visual(read_states(self.model, inputs, self.argument))

    def owners(self) -> dict[str, Tensor] | None:
        r"""The one visual token that each pixel element feeds, by backward passes.

        If the read-out of token v is multiplied by :math:`2^{d_v}`, the gradient of an element that feeds v alone grows
        by exactly that factor, bit for bit, and that of an element which feeds several tokens by no power of two. The
        tokens' numbers are thus read digit by digit. Forward passes confirm the result.

        Returns:
            By pixel tensor the token's number, flat int64, -1 for elements that feed none; None where elements are
            shared between tokens, or where no gradient passes (quantized or frozen towers, hard decisions).
        """
        owners = {key: torch.full((changed.numel(),), -1) for key, changed in self.changed.items()}
        for seed in range(3):
            try:
                found = self._owners(seed)
            except (RuntimeError, NotImplementedError):  # Not every operation has a backward pass.
                return None
            if found is None:
                return None
            owners = {key: torch.where(owner < 0, found[key], owner) for key, owner in owners.items()}
            # An element without gradient may still matter: by chance, or as one that loses in a max pooling.
            unowned = {key: owner < 0 for key, owner in owners.items()}
            if not any(bool(mask.any()) for mask in unowned.values()) or not bool(self.reacts(unowned).any()):
                break
        else:
            return None
        count = len(self.positions)
        fed = torch.zeros(count, dtype=torch.bool)
        for owner in owners.values():
            fed[owner[owner >= 0]] = True
        half = torch.rand(count, generator=torch.Generator().manual_seed(1)) < 0.5
        for group in (half, ~half):
            hit = self.reacts({key: (owner >= 0) & group[owner.clamp_min(0)] for key, owner in owners.items()})
            if not torch.equal(hit, group & fed):
                return None
        return owners

    def _owners(self, seed: int) -> dict[str, Tensor] | None:
        keys = list(self.changed)
        leaves = [self.inputs[key].detach().clone().requires_grad_() for key in keys]
        with torch.enable_grad():
            leaf_inputs = {**self.inputs, **dict(zip(keys, leaves, strict=True))}
            hidden = read_states(self.model, leaf_inputs, self.argument)
            hidden = hidden[self.positions.to(hidden.device)]
            direction = torch.randn(hidden.shape[1], generator=torch.Generator().manual_seed(seed)).to(hidden)
            readout = (hidden * direction).sum(dim=1)

        bits = _DIGIT_BITS.get(readout.dtype, _DIGIT_BITS_ELSE)
        base = 1 << bits

        def gradient(exponents: Tensor) -> list[Tensor]:
            factors = torch.exp2(exponents.float() - base // 2).to(readout)
            grads = torch.autograd.grad(readout, leaves, factors, retain_graph=True, allow_unused=True)
            return [
                torch.zeros(leaf.numel()) if grad is None else grad.flatten().float().cpu()
                for leaf, grad in zip(leaves, grads, strict=True)
            ]

        number = torch.arange(len(readout))
        reference = gradient(torch.zeros_like(number))
        found = [torch.zeros(len(grad), dtype=torch.int64) for grad in reference]
        for shift in range(0, max(1, int(number[-1]).bit_length()), bits):
            marked = gradient((number >> shift) & (base - 1))
            for digits, grad, unit in zip(found, marked, reference, strict=True):
                mantissa, exponent = torch.frexp(torch.where(unit != 0, grad / unit, 1.0))
                digit = exponent.long() - 1
                if bool(((mantissa != 0.5) | (digit < 0) | (digit >= base)).any()):
                    return None
                digits += digit << shift
        if any(bool((digits >= len(readout)).any()) for digits in found):
            return None
        return {
            key: digits.masked_fill(unit == 0, -1) for key, digits, unit in zip(keys, found, reference, strict=True)
        }

    def reacts(self, masks: Mapping[str, Tensor]) -> Tensor:
        """Boolean, shape: V, on the CPU; masks are boolean and flat, one per pixel tensor."""
        inputs = dict(self.inputs)
        for key, mask in masks.items():
            base = self.inputs[key]
            inputs[key] = torch.where(mask.view(base.shape).to(base.device), self.changed[key], base)
        return ((self._hidden(inputs) - self.base).abs().amax(dim=1) > self.noise).cpu()


def disjoint_cells(cell: Tensor, first: Tensor, last: Tensor) -> list[int]:
    """Cells of as many tokens as possible whose spans [first, last] are disjoint: greedily by the end of the span."""
    chosen: list[int] = []
    end = -1
    for stop, start, own in sorted(set(zip(last.tolist(), first.tolist(), cell.tolist(), strict=True))):
        if start > end:
            chosen.append(own)
            end = stop
    return chosen


def boxes_by_owner(
    owners: Mapping[str, Tensor], pixels: Mapping[str, PixelMap], n_tokens: int, n_images: int
) -> tuple[Tensor, Tensor, Tensor]:
    """From the token that each element feeds: images x V that see, V that see padding only, and boxes, V x 4."""
    per_image = torch.zeros(n_images, n_tokens, dtype=torch.bool)
    fed = torch.zeros(n_tokens, dtype=torch.bool)
    low, high = torch.full((2, n_tokens), math.inf), torch.full((2, n_tokens), -math.inf)
    for key, map_ in pixels.items():
        owner = owners[key]
        fed[owner[owner >= 0]] = True
        shows = (owner >= 0) & (map_.gain != 0)
        token = owner[shows]
        per_image[map_.image_index[shows], token] = True
        for axis in (0, 1):
            low[axis].scatter_reduce_(0, token, map_.lower[axis, shows], "amin")
            high[axis].scatter_reduce_(0, token, map_.upper[axis, shows], "amax")
    return per_image, fed & ~per_image.any(dim=0), torch.cat([low, high]).T.contiguous()
