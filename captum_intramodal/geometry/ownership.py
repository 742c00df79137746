r"""Which visual tokens does each element of the pixel tensors feed? Perturbations and gradients, without attention.

:mod:`~captum_intramodal.geometry.measure` describes the method.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.ao.nn.quantized.dynamic import Linear as DynamicQuantizedLinear
from transformers import PreTrainedModel

from captum_intramodal.geometry.decoder_inputs import (
    SEQUENCE_ARGUMENT,
    decoder_states,
    hidden_argument,
    layer0_input,
    state_arguments,
    state_rows,
    visual_rows,
)
from captum_intramodal.geometry.pixel_map import PixelMap
from captum_intramodal.models.decoder import decoder_layers
from captum_intramodal.models.hooks import register_hooks
from captum_intramodal.models.placeholders import image_token_id

__all__ = []


def _attention_blocks(model: PreTrainedModel) -> list[nn.Module]:
    """Return the listed blocks outside the decoder's layers that contain an attention module."""
    decoder = set(decoder_layers(model).modules())
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and m not in decoder]
    return [
        block
        for block in dict.fromkeys(block for blocks in lists for block in blocks)
        if block not in decoder
        and any("attention" in (name := type(m).__name__.lower()) or "attn" in name for m in block.modules())
    ]


def _dequantized_linear(linear: DynamicQuantizedLinear, hidden: Tensor) -> Tensor:
    """Apply a linear layer with float weights; dynamic quantization couples all positions by their common scale."""
    bias = linear.bias()
    return F.linear(hidden, linear.weight().dequantize().to(hidden), None if bias is None else bias.to(hidden))


def _convolve_patches(convolution: nn.Conv2d | nn.Conv3d, hidden: Tensor) -> Tensor:
    """Apply a convolution to single patches as a matrix product, whose backward pass is much faster in half precision.

    Other inputs are convolved as usual.
    """
    single = hidden.shape[2:] == convolution.kernel_size and convolution.groups == 1
    if not single or convolution.padding not in ("valid", (0,) * len(convolution.kernel_size)):
        convolve: Callable[..., Tensor] = type(convolution).forward
        return convolve(convolution, hidden)
    product = F.linear(hidden.flatten(1), convolution.weight.flatten(1), convolution.bias)
    return product.reshape(len(hidden), -1, *[1] * len(convolution.kernel_size))


def _image_size(value: Any) -> tuple[int, ...] | None:
    """Return an output of a block if it is a height and width, as the stages of a Swin tower return, else None."""
    return value if isinstance(value, tuple) and all(isinstance(n, int) for n in value) else None


def _shape_preserving_blocks(
    model: PreTrainedModel, inputs: Mapping[str, Any]
) -> dict[nn.Module, tuple[tuple[int, ...] | None, ...] | None]:
    """Return the attention blocks that preserve the shape of their states, with the outputs that follow the states.

    These are None for a block that returns the states alone, not in a tuple.
    """
    others: dict[nn.Module, tuple[tuple[int, ...] | None, ...] | None] = {}

    def compare(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        hidden = hidden_argument(args, kwargs)
        result = output[0] if isinstance(output, tuple) else output
        if isinstance(hidden, Tensor) and isinstance(result, Tensor) and hidden.shape == result.shape:
            others[module] = tuple(map(_image_size, output[1:])) if isinstance(output, tuple) else None

    with register_hooks(_attention_blocks(model), compare, with_kwargs=True):
        layer0_input(model, inputs)
    return others


def _identity(others: tuple[tuple[int, ...] | None, ...] | None, *args: Any, **kwargs: Any) -> Any:
    """Return a block's hidden states unchanged, with the other outputs of the block."""
    hidden = hidden_argument(args, kwargs)
    return hidden if others is None else (hidden, *others)


@contextmanager
def bypassed_attention(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Iterator[None]:
    """Replace every shape-preserving attention block outside the decoder's layers by the identity.

    The blocks' forwards are replaced: a hook would still pay for the block, and transformers' recorder of hidden states
    would miss the output of a hook that runs after its own.
    """
    replaced: dict[nn.Module, Callable[..., Any]] = {
        block: partial(_identity, others) for block, others in _shape_preserving_blocks(model, inputs).items()
    }
    replaced |= {m: partial(_dequantized_linear, m) for m in model.modules() if isinstance(m, DynamicQuantizedLinear)}
    # A forward on the instance, such as accelerate's, loads offloaded weights and must stay.
    replaced |= {
        m: partial(_convolve_patches, m)
        for m in model.modules()
        if type(m) in (nn.Conv2d, nn.Conv3d) and "forward" not in vars(m)
    }
    # Libraries such as accelerate keep a forward on the instance, which must be restored as it was.
    own: dict[nn.Module, Callable[..., Any] | None] = {module: vars(module).get("forward") for module in replaced}
    try:
        for module, forward in replaced.items():
            vars(module)["forward"] = forward
        yield
    finally:
        for module, own_forward in own.items():
            if own_forward is None:
                vars(module).pop("forward", None)
            else:
                vars(module)["forward"] = own_forward


@dataclass(frozen=True)
class ReceptiveFields:
    r"""
    Regions of the images that V visual tokens depend on.

    Attributes:
        per_image (Tensor): whether each image feeds each token, bool (images, V).
        padding (Tensor): true for tokens that depend on padding only, bool (V,).
        boxes (Tensor): x0, y0, x1, y1 in pixels of the token's image; meaningless for tokens that depend on no image.
            float32 (V, 4).
    """

    per_image: Tensor
    padding: Tensor
    boxes: Tensor


class PerturbationSweep:
    r"""
    PerturbationSweep tells which visual tokens change with some elements of the pixel tensors.

    Args:

        model (PreTrainedModel): The model, with its attention bypassed or not.
        inputs (Mapping): Its inputs for noise images.
        pixels (Mapping[str, PixelMap]): The maps of the pixel tensors among the inputs.

    Raises:
        NoTokenGeometryError: the decoder receives no visual tokens.
    """

    def __init__(self, model: PreTrainedModel, inputs: Mapping[str, Any], pixels: Mapping[str, PixelMap]) -> None:
        self.model = model
        self.inputs = inputs
        generator = torch.Generator().manual_seed(0)
        self.perturbed = {
            key: inputs[key] + _perturbation(map_, generator).to(inputs[key]) for key, map_ in pixels.items()
        }
        self.argument, base, repeated = self._find_argument()
        self.positions = visual_rows(model, inputs, self.argument, len(base)).cpu()
        self._set_base(self._select_visual(base), self._select_visual(repeated))

    def measure_base(self) -> None:
        """Compute the unperturbed states again, after the model has changed (attention bypassed or not)."""
        self._set_base(self._visual_states(self.inputs), self._visual_states(self.inputs))

    def _set_base(self, base: Tensor, repeated: Tensor) -> None:
        """Set the unperturbed states, and the noise between two equal passes."""
        self.base = base
        # Zero on any backend that is deterministic to the last bit.
        self.noise = 4 * (repeated - base).abs().amax(dim=1)

    def _find_argument(self) -> tuple[str | None, Tensor, Tensor]:
        """Return the argument of the decoder's blocks that changes with the image, and its states in two equal passes.

        The argument is None for the sequence with its placeholders.
        """
        runs = self.inputs, self.inputs, {**self.inputs, **self.perturbed}

        def changes(base: Tensor, repeated: Tensor, perturbed: Tensor) -> bool:
            return bool((perturbed - base).abs().amax() > 4 * (repeated - base).abs().amax())

        sequence = [layer0_input(self.model, inputs) for inputs in runs]
        if changes(*sequence):
            ids = self.inputs.get("input_ids")
            prepended = image_token_id(self.model) is None and ids is not None and len(sequence[0]) > ids.shape[1]
            return SEQUENCE_ARGUMENT if prepended else None, sequence[0], sequence[1]
        arguments = [state_arguments(self.model, inputs) for inputs in runs]
        for name in arguments[0]:
            if changes(*(states[name] for states in arguments)):
                return name, state_rows(arguments[0][name], name), state_rows(arguments[1][name], name)
        return None, sequence[0], sequence[1]

    def _select_visual(self, states: Tensor) -> Tensor:
        """Return the rows of the visual tokens, in float32."""
        return states[self.positions.to(states.device)].float()

    def _visual_states(self, inputs: Mapping[str, Any]) -> Tensor:
        """Compute the visual tokens' states at the decoder's input, float32 (V, D)."""
        return self._select_visual(decoder_states(self.model, inputs, self.argument))

    def changed_tokens(self, masks: Mapping[str, Tensor]) -> Tensor:
        """Return which tokens change if some elements are perturbed, bool (V,) on the CPU; masks are bool (N,)."""
        inputs = dict(self.inputs)
        for key, mask in masks.items():
            base = self.inputs[key]
            inputs[key] = torch.where(mask.view(base.shape).to(base.device), self.perturbed[key], base)
        return ((self._visual_states(inputs) - self.base).abs().amax(dim=1) > self.noise).cpu()

    def find_owners(self) -> dict[str, Tensor] | None:
        r"""
        Find the visual token that each pixel element feeds, from a few backward passes; forward passes confirm it.

        Returns:
            **owners** (*dict[str, Tensor] or None*):
                By pixel tensor the index of each element's token, int64 (N,), or -1 for elements that feed none. None
                if elements feed several tokens, or no gradient passes (quantized or frozen towers, hard decisions).
        """
        owners = {key: torch.full((perturbed.numel(),), -1) for key, perturbed in self.perturbed.items()}
        for seed in range(3):
            try:
                found = self._owners_by_gradient(seed)
            except (RuntimeError, NotImplementedError):  # Not every operation has a backward pass.
                return None
            if found is None:
                return None
            owners = {key: torch.where(owner < 0, found[key], owner) for key, owner in owners.items()}
            # An element's gradient may vanish by chance, or because another element is larger in a max pooling.
            unowned = {key: owner < 0 for key, owner in owners.items()}
            if not any(bool(mask.any()) for mask in unowned.values()) or not bool(self.changed_tokens(unowned).any()):
                return owners if self._confirms(owners) else None
        return None

    def _confirms(self, owners: Mapping[str, Tensor]) -> bool:
        """Return whether perturbing the elements of half of the tokens, then of the others, changes these tokens."""
        count = len(self.positions)
        fed = torch.zeros(count, dtype=torch.bool)
        for owner in owners.values():
            fed[owner[owner >= 0]] = True
        half = torch.rand(count, generator=torch.Generator().manual_seed(1)) < 0.5
        return all(
            torch.equal(
                self.changed_tokens({key: (owner >= 0) & group[owner.clamp_min(0)] for key, owner in owners.items()}),
                group & fed,
            )
            for group in (half, ~half)
        )

    def _owners_by_gradient(self, seed: int) -> dict[str, Tensor] | None:
        r"""Read each element's token from the powers of two by which the tokens' read-outs are scaled.

        The gradient of an element that feeds token v alone scales by exactly :math:`2^{d_v}`; that of an element that
        feeds several tokens scales by no power of two.
        """
        keys = list(self.perturbed)
        leaves = [self.inputs[key].detach().clone().requires_grad_() for key in keys]
        with torch.enable_grad():
            leaf_inputs = {**self.inputs, **dict(zip(keys, leaves, strict=True))}
            hidden = decoder_states(self.model, leaf_inputs, self.argument)
            hidden = hidden[self.positions.to(hidden.device)]
            direction = torch.randn(hidden.shape[1], generator=torch.Generator().manual_seed(seed)).to(hidden)
            readout = (hidden * direction).sum(dim=1)
        # Bits of a token's index that one pass reads; the exponents must stay in the dtype's range.
        bits = 3 if readout.dtype == torch.float16 else 6
        base = 1 << bits

        def gradients(exponents: Tensor) -> list[Tensor]:
            factors = torch.exp2(exponents.float() - base // 2).to(readout)
            grads = torch.autograd.grad(readout, leaves, factors, retain_graph=True, allow_unused=True)
            return [
                torch.zeros(leaf.numel()) if grad is None else grad.flatten().float().cpu()
                for leaf, grad in zip(leaves, grads, strict=True)
            ]

        token = torch.arange(len(readout))
        reference = gradients(torch.zeros_like(token))
        owners = [torch.zeros(len(grad), dtype=torch.int64) for grad in reference]
        for shift in range(0, max(1, int(token[-1]).bit_length()), bits):
            scaled = gradients((token >> shift) & (base - 1))
            for owner, grad, unscaled in zip(owners, scaled, reference, strict=True):
                mantissa, exponent = torch.frexp(torch.where(unscaled != 0, grad / unscaled, 1.0))
                digit = exponent.long() - 1
                if bool(((mantissa != 0.5) | (digit < 0) | (digit >= base)).any()):
                    return None
                owner += digit << shift
        if any(bool((owner >= len(readout)).any()) for owner in owners):
            return None
        return {
            key: owner.masked_fill(unscaled == 0, -1)
            for key, owner, unscaled in zip(keys, owners, reference, strict=True)
        }


def _perturbation(pixels: PixelMap, generator: torch.Generator) -> Tensor:
    """Draw a perturbation of a pixel tensor: signs and sizes are random, so that no linear map of a strip cancels."""
    noise = 0.25 + 0.5 * torch.rand(len(pixels.gain), generator=generator)
    noise *= torch.randint(0, 2, noise.shape, generator=generator) * 2 - 1
    # Padding has no gain.
    noise *= torch.where(pixels.gain != 0, pixels.gain, pixels.gain.abs().max())
    return noise.view(pixels.shape)


def fields_by_owner(
    owners: Mapping[str, Tensor], pixels: Mapping[str, PixelMap], n_tokens: int, n_images: int
) -> ReceptiveFields:
    """Compute receptive fields from the token that each element feeds: the box around all elements of a token."""
    per_image = torch.zeros(n_images, n_tokens, dtype=torch.bool)
    fed = torch.zeros(n_tokens, dtype=torch.bool)
    low, high = torch.full((2, n_tokens), math.inf), torch.full((2, n_tokens), -math.inf)
    for key, map_ in pixels.items():
        owner = owners[key]
        fed[owner[owner >= 0]] = True
        sampled = (owner >= 0) & (map_.gain != 0)
        token = owner[sampled]
        per_image[map_.image_index[sampled], token] = True
        for axis in (0, 1):
            low[axis].scatter_reduce_(0, token, map_.lower[axis, sampled], "amin")
            high[axis].scatter_reduce_(0, token, map_.upper[axis, sampled], "amax")
    return ReceptiveFields(per_image, fed & ~per_image.any(dim=0), torch.cat([low, high]).T.contiguous())
