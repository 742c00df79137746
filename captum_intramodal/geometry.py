r"""Which box of the original picture each visual token stands for: measured on the model, not looked up per family.

Three experiments, none of which knows the model's architecture:

1. *Coordinate probe.* The model's own processor runs on synthetic pictures (black, white, a ramp and two waves per
   axis). What each element of its pixel tensors becomes tells which point of the picture that element samples, in
   whatever layout: flattened patches, tiles, thumbnails, channels first or last.
2. *Ownership.* Which visual tokens does each pixel element feed where the decoder reads them? That is at the input of
   its layer 0, or, where pictures do not enter its sequence, in the argument of its blocks that a change of the picture
   moves: the states of a cross-attention, or an encoder's output. The vision tower's attention blocks are replaced by
   the identity meanwhile; what remains (patch embedding, merging, pooling, projection) is local. Where every element
   feeds one token, a few backward passes name that token, see :meth:`_Sweep.owners`. Where elements are shared, or no
   gradient passes, a forward-only sweep changes the elements strip by strip and sees which tokens differ; a bisection
   finds the edges of all tokens at once, see :func:`_edges`.
3. *Oracle.* :func:`geometry_oracle` checks a geometry with small changes of the picture itself.
"""

from __future__ import annotations

import json
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.ao.nn.quantized.dynamic import Linear as DynamicQuantizedLinear
from transformers import PreTrainedModel

from captum_intramodal.coordinates import (
    NUMBERED_PATCHES,
    PixelMap,
    PixelMaps,
    Prepare,
    Size,
    check_sizes,
    measure_pixels,
)
from captum_intramodal.decoder import decoder_blocks, decoder_layers, input_device
from captum_intramodal.hooks import evaluation_mode, hidden_rows, named_arguments

__all__ = [
    "TokenGeometry",
    "cached_geometry",
    "cached_pixels",
    "expected_raster",
    "geometry_key",
    "geometry_oracle",
    "image_token_id",
    "measure_geometry",
    "state_rows",
    "visual_positions",
    "visual_rows",
]

IMAGE_TOKEN_ATTRIBUTES = ("image_token_id", "image_token_index", "image_patch_id")
VIDEO_TOKEN_ATTRIBUTES = ("video_token_id", "video_token_index")

# Edges are found to this many pixels of the original picture.
PRECISION = 0.5
# A token that spans this fraction of what its picture's tokens see, in both directions, may be a global one.
GLOBAL_SPAN = 0.95
CACHE_SIZE = 128

# Pictures of more pixels than this are measured on reduced ones where the processor shrinks them anyway.
LARGE = 1 << 20

# A small picture's tokens tell whether those of larger ones can be expected to form a raster as well; (width, height).
SAMPLE: Size = (192, 128)

# Model types whose visual tokens are codes: a raster over their pixel tensor, which no small change of pixels moves. To
# each row the processor appends so many tokens that end it.
CODE_RASTERS: dict[str, int] = {"chameleon": 0, "emu3": 1}

# Argument of the decoder's blocks for its own sequence.
_SEQUENCE = "hidden_states"
_CHUNKS = 32
# Ownership marks tokens by powers of two, so many bits of a token's number at once as the exponent's range allows.
_DIGIT_BITS = {torch.float16: 3}
_DIGIT_BITS_ELSE = 6


@dataclass(frozen=True)
class TokenGeometry:
    r"""Where the visual tokens of one model input lie in the original pictures.

    V is the number of visual tokens; every attribute lists them as they stand where the decoder reads them.

    Attributes:
        boxes (Tensor): x0, y0, x1, y1 in pixels of the original picture; a row of NaN where the token has no box.
            float32, shape: V x 4.
        kinds (tuple of str): ``'local'``: sees the part of the picture in its box, which may be all of it (a thumbnail
            of one token). ``'global'``: sees the picture as a whole, through pixels it shares with other tokens or
            through attention only. ``'padding'``: sees only what the processor padded. ``'separator'``: sees nothing.
        image_index (Tensor): the picture each token belongs to; tokens that see none belong to the picture of the
            nearest token that does. int64, shape: V.
        image_sizes (tuple): (width, height) of every picture in pixels.
        last_image_index (Tensor, optional): where the model merges successive frames of a video, the last one that each
            token sees; ``image_index`` is the first. int64, shape: V. None: each token sees one picture. :attr:`frames`
            has both.
        argument (str, optional): where the tokens are not placeholders in the decoder's sequence, the argument of its
            blocks that holds their states, such as ``'encoder_hidden_states'``; ``'hidden_states'`` where they stand
            before the sequence.

    Examples::

        >>> geometry = TokenGeometry(
        ...     torch.tensor([[0.0, 0, 32, 20], [32, 0, 64, 20]]), ("local",) * 2, torch.tensor([0, 0]), ((64, 20),)
        ... )
        >>> geometry.token_size
        (32.0, 20.0)
        >>> geometry.coverage()
        (0.0, 0.0, 64.0, 20.0)
    """

    boxes: Tensor
    kinds: tuple[str, ...]
    image_index: Tensor
    image_sizes: tuple[Size, ...]
    last_image_index: Tensor | None = None
    argument: str | None = None

    @property
    def frames(self) -> Tensor:
        """First and last picture, in a video the first and last frame, that each token belongs to; int64, shape: V x 2.

        They differ where the model merges successive frames, as the Qwen-VL and GLM-V types do with every two.
        """
        last = self.image_index if self.last_image_index is None else self.last_image_index
        return torch.stack([self.image_index, last], dim=1)

    def sees(self, image: int) -> Tensor:
        """Boolean, shape: V; true where the token belongs to a picture, or to a frame of the video."""
        first, last = self.frames.unbind(1)
        return (first <= image) & (image <= last)

    @property
    def is_local(self) -> Tensor:
        """Boolean, shape: V; true where the token has a box."""
        return torch.tensor([kind == "local" for kind in self.kinds], dtype=torch.bool)

    @property
    def token_size(self) -> tuple[float, float]:
        """Median width and height of the local tokens' boxes in pixels; NaN without local tokens."""
        boxes = self.boxes[self.is_local]
        if len(boxes) == 0:
            return math.nan, math.nan
        width, height = (boxes[:, 2:] - boxes[:, :2]).median(dim=0).values.tolist()
        return width, height

    def coverage(self, image: int = 0) -> tuple[float, float, float, float]:
        r"""The rectangle of a picture that its tokens see; what lies outside (a centre crop's margins) no token sees.

        Args:
            image (int): Index of the picture.
                        Default: 0

        Returns:
            **rectangle** (*tuple of float*):
                x0, y0, x1, y1 in pixels; all NaN if no local token belongs to the picture.
        """
        if not 0 <= image < len(self.image_sizes):
            raise ValueError(f"There is no picture {image}; the geometry has {len(self.image_sizes)}.")
        boxes = self.boxes[self.is_local & self.sees(image)]
        if len(boxes) == 0:
            return (math.nan,) * 4
        x0, y0 = boxes[:, :2].amin(dim=0).tolist()
        x1, y1 = boxes[:, 2:].amax(dim=0).tolist()
        return x0, y0, x1, y1

    def shows_same(self, other: object) -> bool:
        r"""
        Whether two sizes of the same pictures give the model the same tokens.

        Args:
            other (object): A geometry of the pictures at another size; anything else is not the same.

        Returns:
            **same** (*bool*):
                As many tokens, with boxes equal to 2 % of the picture.
        """
        if not isinstance(other, TokenGeometry) or len(self.boxes) != len(other.boxes):
            return False
        first, second = (
            g.boxes / torch.tensor(g.image_sizes, dtype=torch.float32)[g.image_index].repeat(1, 2)
            for g in (self, other)
        )
        return bool(torch.allclose(first, second, atol=0.02, rtol=0, equal_nan=True))


def image_token_id(model: PreTrainedModel) -> int | None:
    """Id of the token that the processor repeats for every visual token; None where pictures enter another way."""
    return _config_id(model, IMAGE_TOKEN_ATTRIBUTES)


def _config_id(model: PreTrainedModel, names: Sequence[str]) -> int | None:
    ids = (getattr(model.config, name, None) for name in names)
    return next((i for i in ids if isinstance(i, int)), None)


def visual_positions(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    r"""Positions of the decoder sequence that hold visual tokens.

    Args:

        model (PreTrainedModel): An image-text-to-text model whose config names its image placeholder token.
        input_ids (Tensor): Token ids of one example, with the placeholders expanded by the processor. Shape: T or
                    1 x T.

    Returns:
        **positions** (*Tensor*):
            int64, shape: V, on the device of ``input_ids``.

    Raises:
        ValueError: several examples, a config without placeholder id, or a sequence without placeholders.
    """
    if input_ids.ndim == 2 and input_ids.shape[0] == 1:
        input_ids = input_ids[0]
    if input_ids.ndim != 1:
        raise ValueError(f"Expected the token ids of one example, got shape {tuple(input_ids.shape)}.")
    token_id = image_token_id(model)
    if token_id is None:
        raise ValueError(
            f"The config of {type(model).__name__} names no image placeholder ({', '.join(IMAGE_TOKEN_ATTRIBUTES)}); "
            "set model.config.image_token_id to the id that the processor repeats for every visual token."
        )
    is_visual = input_ids == token_id
    if (video_token_id := _config_id(model, VIDEO_TOKEN_ATTRIBUTES)) is not None:
        is_visual |= input_ids == video_token_id
    positions = is_visual.nonzero().flatten()
    if len(positions) == 0:
        raise ValueError(
            f"No image placeholder (id {token_id}) among the {len(input_ids)} input ids; the prompt needs one for "
            "every picture, and config and processor must agree on its id."
        )
    return positions


# --------------------------------------------------------------------------------------------- borrowing the model


class _LayerReached(Exception):
    """Leaves a forward pass at the input of decoder layer 0."""


def _hidden_argument(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return args[0] if args else kwargs.get("hidden_states", kwargs.get("hidden_state"))


def _run(model: PreTrainedModel, inputs: Mapping[str, Any]) -> None:
    """A pass that draws the same random numbers every time: some models begin with noise. Callers give the random state
    back."""
    torch.manual_seed(0)
    model(**inputs, use_cache=False)


def _layer0_input(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Tensor:
    """Hidden states that enter decoder layer 0, shape T x D; nothing after that point is computed."""
    captured: list[Tensor] = []

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        captured.append(_hidden_argument(args, kwargs))
        raise _LayerReached

    with (
        suppress(_LayerReached),
        decoder_layers(model)[0].register_forward_pre_hook(stop, with_kwargs=True),
    ):
        _run(model, inputs)
    if not captured:
        raise TypeError(f"The forward pass of {type(model).__name__} never reached its first decoder layer.")
    return hidden_rows(captured[0])


def visual_rows(model: PreTrainedModel, inputs: Mapping[str, Any], argument: str | None, count: int) -> Tensor:
    r"""Which of the states that the decoder's blocks are given stand for visual tokens.

    Args:

        model (PreTrainedModel): The model.
        inputs (Mapping): Its inputs, with placeholders for the visual tokens where it has any.
        argument (str, optional): Where the visual tokens are, as in :class:`TokenGeometry`.
        count (int): Number of states.

    Returns:
        **rows** (*Tensor*):
            int64, shape: V.

    Raises:
        ValueError: as :func:`visual_positions`.
    """
    ids = inputs.get("input_ids")
    length = 0 if ids is None else int(ids.shape[1])
    # An encoder of pictures and words has placeholders of its own.
    if argument is None or (model.config.is_encoder_decoder and count == length):
        if ids is None:
            raise ValueError(f"Nothing that the decoder of {type(model).__name__} reads follows the picture locally.")
        return visual_positions(model, ids)
    return torch.arange(count - length if argument == _SEQUENCE else count)


def state_rows(states: Tensor, argument: str | None) -> Tensor:
    """States that a decoder's block is given, of one example, one row each: (N, D)."""
    # Cross-attention may have an example's tiles in the place of the batch.
    return hidden_rows(states) if argument in (None, _SEQUENCE) else states.flatten(0, -2)


def _read_states(model: PreTrainedModel, inputs: Mapping[str, Any], argument: str | None) -> Tensor:
    """The states of the decoder's sequence, or those in the named argument of its blocks, shape N x D."""
    if argument in (None, _SEQUENCE):
        return _layer0_input(model, inputs)
    return state_rows(_arguments(model, inputs)[argument], argument)


def _arguments(model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Sequences of states that the decoder's first blocks are given, by the arguments' names."""
    states: dict[str, Tensor] = {}
    first = decoder_layers(model)[0]

    def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for name, value in named_arguments(module, args, kwargs).items():
            # Some models hand their own inputs on to every layer.
            if isinstance(value, Tensor) and value.is_floating_point() and value.ndim == 3 and name not in inputs:
                states.setdefault(name, value)
        if module is first:
            raise _LayerReached

    # Cross-attention blocks of their own may come before the first layer.
    handles = [block.register_forward_pre_hook(watch, with_kwargs=True) for block in decoder_blocks(model)]
    try:
        _run(model, inputs)
    except _LayerReached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return states


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
    """Dynamic quantisation couples all positions by their common scale; the geometry is that of its float weights."""
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
def _bypassed_attention(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Iterator[None]:
    """Turns every shape-preserving attention block outside the decoder's layers into the identity.

    The blocks' forward is replaced, as a hook would still pay for the block, and transformers' recorder of hidden
    states would not see what a later hook returns.
    """
    rest: dict[nn.Module, tuple[Any, ...] | None] = {}

    def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        hidden = _hidden_argument(args, kwargs)
        result = output[0] if isinstance(output, tuple) else output
        if isinstance(hidden, Tensor) and isinstance(result, Tensor) and hidden.shape == result.shape:
            rest[module] = tuple(map(sizes, output[1:])) if isinstance(output, tuple) else None

    def sizes(value: Any) -> Any:
        """Stages of a Swin tower also return their height and width."""
        return value if isinstance(value, tuple) and all(isinstance(n, int) for n in value) else None

    def identity(others: tuple[Any, ...] | None, *args: Any, **kwargs: Any) -> Any:
        hidden = _hidden_argument(args, kwargs)
        return hidden if others is None else (hidden, *others)

    handles = [block.register_forward_hook(watch, with_kwargs=True) for block in _attention_blocks(model)]
    try:
        _layer0_input(model, inputs)
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


# ----------------------------------------------------------------------------------------------------------- sweep


class _Sweep:
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
        """The argument of the decoder's blocks that a change of the picture moves, None for the sequence with its
        placeholders; and its states in two equal passes."""
        runs = self.inputs, self.inputs, {**self.inputs, **self.changed}

        def moves(base: Tensor, same: Tensor, changed: Tensor) -> bool:
            return bool((changed - base).abs().amax() > 4 * (same - base).abs().amax())

        sequence = [_layer0_input(self.model, inputs) for inputs in runs]
        if moves(*sequence):
            ids = self.inputs.get("input_ids")
            before = image_token_id(self.model) is None and ids is not None and len(sequence[0]) > ids.shape[1]
            return _SEQUENCE if before else None, sequence[0], sequence[1]
        found = [_arguments(self.model, inputs) for inputs in runs]
        for name in found[0]:
            if moves(*(states[name] for states in found)):
                return name, state_rows(found[0][name], name), state_rows(found[1][name], name)
        return None, sequence[0], sequence[1]

    def _visual(self, states: Tensor) -> Tensor:
        return states[self.positions.to(states.device)].float()

    def _hidden(self, inputs: Mapping[str, Any]) -> Tensor:
        return self._visual(_read_states(self.model, inputs, self.argument))

    def owners(self) -> dict[str, Tensor] | None:
        r"""The one visual token that each pixel element feeds, by backward passes.

        If the read-out of token v is multiplied by :math:`2^{d_v}`, the gradient of an element that feeds v alone grows
        by exactly that factor, bit for bit, and that of an element which feeds several tokens by no power of two. The
        tokens' numbers are thus read digit by digit. Forward passes confirm the result.

        Returns:
            By pixel tensor the token's number, flat int64, -1 for elements that feed none; None where elements are
            shared between tokens, or where no gradient passes (quantised or frozen towers, hard decisions).
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
            hidden = _read_states(self.model, leaf_inputs, self.argument)
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


def _disjoint_cells(cell: Tensor, first: Tensor, last: Tensor) -> list[int]:
    """Cells of as many tokens as possible whose spans [first, last] are disjoint: greedily by the end of the span."""
    chosen: list[int] = []
    end = -1
    for stop, start, own in sorted(set(zip(last.tolist(), first.tolist(), cell.tolist(), strict=True))):
        if start > end:
            chosen.append(own)
            end = stop
    return chosen


def _edges(
    reacts: Callable[[Mapping[str, Tensor]], Tensor],
    lower: Mapping[str, Tensor],
    upper: Mapping[str, Tensor],
    tokens: Tensor,
    levels: int,
) -> tuple[Tensor, Tensor]:
    r"""First and last of :math:`2^{levels}` bins along an axis that each token sees.

    A bisection of all edges at once. At every level the axis is cut into cells, and the first and the last cell that a
    token sees are known. Changing the elements in the left half of a token's first cell tells in which half it begins,
    as long as no other changed cell lies inside the token's span; so one forward pass serves all tokens with disjoint
    spans, and neighbours take turns. Where all elements of a cell lie in the same half, no pass is needed. The number
    of passes thus grows with the logarithm of the resolution, not with the number of tokens in a row.

    Args:
        reacts: From masks of elements to the tokens that react.
        lower, upper: Bins of the elements' left and right ends, flat int tensors; bin 2**levels for elements to leave
            alone.
        tokens: Boolean, shape: V; tokens that see anything at all.
        levels: Logarithm of the number of bins.

    Returns:
        first, last: int64, shape: V; meaningless where tokens is false.
    """
    first = torch.zeros(len(tokens), dtype=torch.int64)
    last = torch.zeros(len(tokens), dtype=torch.int64)

    def sees_half(bins: Mapping[str, Tensor], shift: int, cell: Tensor, half: int) -> Tensor:
        """Whether each token sees elements in the given half (0 left, 1 right) of its cell."""
        children = {key: values >> shift for key, values in bins.items()}
        filled = torch.zeros((1 << (levels - shift)) + 1, dtype=torch.bool)
        for child in children.values():
            filled[child] = True
        own, sibling = filled[2 * cell + half], filled[2 * cell + 1 - half]
        seen = own & ~sibling
        pending = tokens & own & sibling
        while bool(pending.any()):
            chosen = torch.tensor(_disjoint_cells(cell[pending], first[pending], last[pending]))
            change = torch.zeros_like(filled)
            change[2 * chosen + half] = True
            hit = reacts({key: change[child] for key, child in children.items()})
            count = torch.zeros(len(filled) // 2 + 1, dtype=torch.int64)
            count[chosen + 1] = 1
            count = count.cumsum(0)
            resolved = pending & (count[cell + 1] > count[cell]) & (count[last + 1] - count[first] == 1)
            seen = torch.where(resolved, hit, seen)
            pending &= ~resolved
        return seen

    for shift in reversed(range(levels)):
        begins_left = sees_half(lower, shift, first, 0)
        ends_right = sees_half(upper, shift, last, 1)
        first, last = 2 * first + ~begins_left, 2 * last + ends_right
    return first, last


def _boxes_by_owner(
    owners: Mapping[str, Tensor], pixels: Mapping[str, PixelMap], n_tokens: int, n_images: int
) -> tuple[Tensor, Tensor, Tensor]:
    """From the token that each element feeds: pictures x V that see, V that see padding only, and boxes, V x 4."""
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


def _boxes_by_bisection(
    sweep: _Sweep, pixels: Mapping[str, PixelMap], sizes: Sequence[Size]
) -> tuple[Tensor, Tensor, Tensor]:
    """The same from forward passes alone, also where tokens share elements."""
    per_image = torch.stack(
        [
            sweep.reacts({key: (map_.gain != 0) & (map_.image_index == i) for key, map_ in pixels.items()})
            for i in range(len(sizes))
        ]
    )
    seen = per_image.any(dim=0)
    padding = torch.zeros_like(seen)
    if not bool(seen.all()) and any(bool((map_.gain == 0).any()) for map_ in pixels.values()):
        padding = ~seen & sweep.reacts({key: map_.gain == 0 for key, map_ in pixels.items()})
    axes = [_measure_axis(sweep, pixels, axis, max(size[axis] for size in sizes), seen) for axis in (0, 1)]
    return per_image, padding, torch.stack([axes[0][:, 0], axes[1][:, 0], axes[0][:, 1], axes[1][:, 1]], dim=1)


def _measure_axis(sweep: _Sweep, pixels: Mapping[str, PixelMap], axis: int, length: int, tokens: Tensor) -> Tensor:
    """Both ends of every token along an axis in pixels, shape: V x 2."""
    levels = max(1, math.ceil(math.log2(length / PRECISION)))
    end = 1 << levels
    lower, upper = {}, {}
    # Where within a bin the elements really begin and end.
    start_at, stop_at = PRECISION * torch.arange(end + 1.0), PRECISION * torch.arange(1, end + 2.0)
    for key, map_ in pixels.items():
        padding = map_.gain == 0
        left, right = map_.lower[axis] / PRECISION, map_.upper[axis] / PRECISION
        lower[key] = left.floor().long().clamp(0, end - 1).masked_fill(padding, end)
        upper[key] = (right.ceil().long() - 1).clamp(0, end - 1).masked_fill(padding, end)
    starts = torch.cat([map_.lower[axis] for map_ in pixels.values()])
    stops = torch.cat([map_.upper[axis] for map_ in pixels.values()])
    start_at.scatter_reduce_(0, torch.cat([*lower.values()]), starts, "amin", include_self=False)
    stop_at.scatter_reduce_(0, torch.cat([*upper.values()]), stops, "amax", include_self=False)
    first, last = _edges(sweep.reacts, lower, upper, tokens, levels)
    return torch.stack([start_at[first], stop_at[last]], dim=1)


def _shared(sweep: _Sweep, pixels: Mapping[str, PixelMap], suspects: Tensor) -> Tensor:
    """Which of the suspects have no pixels of their own: wherever they react, another token reacts as well."""
    if not bool(suspects.any()):
        return suspects
    alone = torch.zeros_like(suspects)
    nothing = {key: torch.zeros(len(map_.gain), dtype=torch.bool) for key, map_ in pixels.items()}
    for key, map_ in pixels.items():
        for chunk in map_.gain.nonzero().flatten().tensor_split(_CHUNKS):
            if len(chunk):
                mask = nothing[key].clone()
                mask[chunk] = True
                hit = sweep.reacts({**nothing, key: mask})
                if int(hit.sum()) == 1:
                    alone |= hit
    return suspects & ~alone


def _span_all(boxes: Tensor, seen: Tensor, image_index: Tensor, n_images: int) -> Tensor:
    """Which tokens span nearly all that is seen of their picture, in both directions."""
    covered = torch.full((n_images, 2), math.nan)
    for i in range(n_images):
        if bool((mine := boxes[seen & (image_index == i)]).numel()):
            covered[i] = mine[:, 2:].amax(dim=0) - mine[:, :2].amin(dim=0)
    return ((boxes[:, 2:] - boxes[:, :2]) / covered[image_index] >= GLOBAL_SPAN).all(dim=1)


def _fill_image_index(index: Tensor, positions: Tensor, seen: Tensor) -> Tensor:
    """Gives tokens that see no picture the index of the nearest that does, first of all within their own run."""
    if not bool(seen.any()):
        return torch.zeros_like(index)
    run = torch.cat([torch.zeros(1, dtype=torch.int64), (positions.diff() > 1).long().cumsum(0)])
    distance = (positions[:, None] - positions[None, seen]).abs()
    distance = distance + (run[:, None] != run[None, seen]) * (int(positions.max()) + 1)
    return torch.where(seen, index, index[seen][distance.argmin(dim=1)])


def _model_inputs(model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs of one example on the model's device, floating point ones in its dtype."""
    ids = inputs.get("input_ids", inputs.get("decoder_input_ids"))
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.shape[0] != 1:
        found = tuple(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(
            "prepare must return the model inputs of one example, with 'input_ids' of shape (1, sequence length); got "
            f"{found} among {sorted(inputs)}."
        )
    device = input_device(model)
    # Contiguous, as what is changed will be: another memory layout is rounded differently everywhere.
    return {
        key: value.to(device, model.dtype if value.is_floating_point() else value.dtype).contiguous()
        if isinstance(value, Tensor)
        else value
        for key, value in inputs.items()
    }


def _code_raster(pixels: Mapping[str, PixelMap], sizes: tuple[Size, ...], n_tokens: int, ends: int) -> TokenGeometry:
    """Geometry of tokens that lie row by row over a pixel tensor (pictures, channels, height, width), whose pictures
    may be padded below and on the right."""
    (map_,) = pixels.values()
    shown = (map_.gain != 0).reshape(map_.shape)[:, 0]
    extents = [(int(s.any(1).sum()), int(s.any(0).sum())) for s in shown]

    def grids(cell: int) -> list[Size]:
        return [(height // cell, width // cell) for height, width in extents]

    cells = [
        cell
        for cell in range(1, min(map(min, extents)) + 1)
        if not any(height % cell or width % cell for height, width in extents)
        and sum(rows * (columns + ends) for rows, columns in grids(cell)) == n_tokens
    ]
    if len(shown) != len(sizes) or not cells:
        raise ValueError(f"{n_tokens} codes are no raster over pictures of (height, width) {extents}.")
    cell = cells[0]
    lower, upper = (e.reshape(2, *map_.shape)[:, :, 0] for e in (map_.lower, map_.upper))
    boxes, image_index = [], []
    kinds: list[str] = []
    for image, (rows, columns) in enumerate(grids(cell)):
        low = lower[:, image, ::cell, ::cell][:, :rows, :columns]
        high = upper[:, image, cell - 1 :: cell, cell - 1 :: cell][:, :rows, :columns]
        grid = F.pad(torch.cat([low, high]), (0, ends), value=math.nan)
        boxes.append(grid.flatten(1).T)
        image_index.append(torch.full((len(boxes[-1]),), image))
        kinds += (["local"] * columns + ["separator"] * ends) * rows
    return TokenGeometry(torch.cat(boxes).contiguous(), tuple(kinds), torch.cat(image_index), sizes)


def _reduced_sizes(prepare: Prepare, sizes: tuple[Size, ...]) -> tuple[Size, ...]:
    """Smaller sizes with the same geometry: the processor makes tensors of the same shapes, and still shrinks them."""
    n_pixels = sum(width * height for width, height in sizes)
    if n_pixels <= LARGE:
        return sizes

    def shapes(sizes: tuple[Size, ...]) -> dict[str, torch.Size]:
        inputs = prepare([Image.new("RGB", size) for size in sizes])
        return {k: v.shape for k, v in inputs.items() if isinstance(v, Tensor) and v.is_floating_point()}

    original = shapes(sizes)
    if any(key in NUMBERED_PATCHES for key in original):  # As many patches of another picture may lie otherwise.
        return sizes
    # What the model sees, at least: more where the processor repeats pixels (frames, a thumbnail).
    kept = sum(shape.numel() for shape in original.values()) / 3
    factor = math.floor(math.sqrt(n_pixels / (4 * max(kept, 1))))
    smaller = tuple(
        (max(1, round(width / factor)), max(1, round(height / factor))) for width, height in sizes if factor
    )
    return smaller if factor > 1 and shapes(smaller) == original else sizes


def _noise_picture(size: Size, generator: torch.Generator) -> Image.Image:
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def measure_geometry(model: PreTrainedModel, prepare: Prepare, image_sizes: Sequence[Size]) -> TokenGeometry:
    r"""Measures which box of which picture every visual token stands for.

    The boxes depend on the picture sizes, the processor's settings and the model's structure, not on the weights, the
    text or what the pictures show. See the module's description for the method. Decoder layers never run, and the
    vision tower's attention hardly ever; what runs about 10 times, or 50 to 150 times where tokens share pixels, is the
    patch embedding and the projector. Pictures of more than a megapixel that the processor shrinks to less than half of
    their sides are measured on smaller ones, whose boxes are scaled up.

    A box is all that a token sees without the tower's attention. Where a convolutional tower gives tokens overlapping
    receptive fields (got_ocr2, fast_vlm), their boxes overlap as well.

    A token that spans nearly all that is seen of its picture (95 % of both sides) counts as global unless some pixels
    feed it and no other token; so a thumbnail of a single token is local, and a pooled summary of the picture is not.

    Args:

        model (PreTrainedModel): An image-text-to-text model in any floating point dtype, on any device. Hooks,
                    forwards, training flags and the random state are left as they were, after an exception as well.
        prepare (Callable): From a list of RGB pictures of the given sizes to the model's inputs (one example, batch
                    dimension 1), through the model's own processor, always with the same text.
        image_sizes (Sequence[tuple[int, int]]): (width, height) of each picture of the prompt, in order.

    Returns:
        **geometry** (*TokenGeometry*):
            Boxes in pixels of the original pictures, on the CPU.

    Raises:
        ValueError: prepare does not return one example, its pixel tensors do not follow the pictures, or the sequence
            has no visual positions.
        TypeError: the model has no decoder layers to read.

    Examples::

        >>> text = processor.apply_chat_template(
        ...     [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is this ?"}]}]
        ... )
        >>> prepare = lambda images: processor(images=images, text=[text], return_tensors="pt")
        >>> geometry = measure_geometry(model, prepare, [(640, 400)])
        >>> geometry.boxes.shape, geometry.coverage()
        (torch.Size([322, 4]), (0.0, 0.0, 640.0, 400.0))
    """
    sizes = check_sizes(image_sizes)
    smaller = _reduced_sizes(prepare, sizes)
    if smaller != sizes:
        geometry = measure_geometry(model, prepare, smaller)
        factors = torch.tensor([[w / v, h / u] * 2 for (w, h), (v, u) in zip(sizes, smaller, strict=True)])
        return replace(geometry, boxes=geometry.boxes * factors[geometry.image_index], image_sizes=sizes)
    generator = torch.Generator().manual_seed(0)
    with evaluation_mode(model):
        inputs = _model_inputs(model, prepare([_noise_picture(size, generator) for size in sizes]))
        pixels = measure_pixels(prepare, sizes)
        for key, map_ in pixels.items():
            if inputs[key].shape != map_.shape:
                raise ValueError(
                    f"The processor returns {key!r} of shape {tuple(inputs[key].shape)} for noise and "
                    f"{tuple(map_.shape)} for black pictures of the same sizes {list(sizes)}; it crops by content, so "
                    "its tokens have no fixed boxes."
                )
        if model.config.model_type in CODE_RASTERS:
            n_tokens = len(visual_positions(model, inputs["input_ids"]))
            return _code_raster(pixels, sizes, n_tokens, CODE_RASTERS[model.config.model_type])
        with _bypassed_attention(model, inputs):
            sweep = _Sweep(model, inputs, pixels)
            owners = sweep.owners()
            if owners is not None:
                per_image, padding, boxes = _boxes_by_owner(owners, pixels, len(sweep.positions), len(sizes))
            else:
                per_image, padding, boxes = _boxes_by_bisection(sweep, pixels, sizes)
            seen = per_image.any(dim=0)
            boxes[~seen] = math.nan
            image_index = _fill_image_index(per_image.long().argmax(dim=0), sweep.positions, seen)
            last_index = image_index + (per_image.sum(dim=0) - 1).clamp_min(0)
            # Successive frames of a video may share tokens; what sees other pictures at once has no place.
            successive = per_image[last_index.clamp_max(len(sizes) - 1), torch.arange(len(seen))]
            overall = (last_index > image_index) & ~(successive & (len(set(sizes)) == 1))
            if owners is None and int(seen.sum()) > 1:
                overall |= _shared(sweep, pixels, seen & _span_all(boxes, seen, image_index, len(sizes)))
        unknown = ~seen & ~padding
        if bool(unknown.any()):
            sweep.rebase()
            overall |= unknown & sweep.reacts({key: map_.gain != 0 for key, map_ in pixels.items()})

    boxes[overall] = math.nan
    kinds = tuple(
        "global" if is_global else "local" if is_seen else "padding" if is_padding else "separator"
        for is_global, is_seen, is_padding in zip(overall.tolist(), seen.tolist(), padding.tolist(), strict=True)
    )
    merged = bool((last_index > image_index).any())
    return TokenGeometry(boxes, kinds, image_index, sizes, last_index if merged else None, sweep.argument)


def _raster_shape(size: Size, count: int, aspect: float) -> tuple[int, int]:
    """Rows and columns of so many cells over a picture, of a width that is about ``aspect`` times their height."""
    shapes = [(count // columns, columns) for columns in range(1, count + 1) if count % columns == 0]
    return min(shapes, key=lambda shape: abs(math.log(size[0] * shape[0] / (size[1] * shape[1] * aspect))))


def _raster_boxes(size: Size, shape: tuple[int, int]) -> Tensor:
    """Boxes of equal cells that cover a picture, row by row."""
    (width, height), (rows, columns) = size, shape
    row, column = (t.flatten() for t in torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"))
    corners = torch.stack([column, row, column + 1, row + 1], dim=1)
    return corners * torch.tensor([width / columns, height / rows] * 2)


def _change_cells(picture: Image.Image, cells: Tensor) -> Image.Image:
    """A picture with other values inside some of the cells of a raster, bool (rows, columns); the cells' rims stay."""
    chosen, inside = cells, []
    for axis, length in enumerate((picture.height, picture.width)):
        place = (torch.arange(length) + 0.5) * (cells.shape[axis] / length)
        chosen = chosen.index_select(axis, place.long())
        inside.append((place.frac() - 0.5).abs() < 0.375)
    values = np.array(picture)
    values[(chosen & inside[0][:, None] & inside[1]).numpy()] += 128
    return Image.fromarray(values)


def expected_raster(
    model: PreTrainedModel, prepare: Prepare, sample: TokenGeometry, image_sizes: Sequence[Size]
) -> TokenGeometry | None:
    r"""What :func:`measure_geometry` would find where a model puts a raster of equal tokens over pictures of any size,
    in a tenth of the time.

    If the tokens of a small picture are such a raster, the number of tokens tells the raster of another picture. A
    trial confirms it: noise changes inside the boxes of a random half of the tokens, then of the others, and exactly
    these tokens must react where the decoder reads them. The changes leave out an eighth of each box on every side, for
    the processor's resampling; so boxes are right to about that.

    Args:
        model (PreTrainedModel): See :func:`measure_geometry`.
        prepare (Callable): See there.
        sample (TokenGeometry): Measured on one small picture.
        image_sizes (Sequence[tuple[int, int]]): (width, height) of each picture of the prompt, in order.

    Returns:
        **geometry** (*TokenGeometry or None*):
            None where the tokens are not known to form a raster, and must be measured.
    """
    sizes = check_sizes(image_sizes)
    shape = _raster_shape(sample.image_sizes[0], len(sample.kinds), 1.0)
    raster = _raster_boxes(sample.image_sizes[0], shape)
    if sample.argument is not None or min(shape) < 2 or not bool(((sample.boxes - raster).abs() < 1).all()):
        return None
    generator = torch.Generator().manual_seed(0)
    pictures = [_noise_picture(size, generator) for size in sizes]
    with evaluation_mode(model):
        inputs = _model_inputs(model, prepare(pictures))
        positions = visual_positions(model, inputs["input_ids"])
        starts = [0, *((positions.diff() > 1).nonzero().flatten() + 1).tolist()] if len(sizes) > 1 else [0]
        counts = [b - a for a, b in zip(starts, [*starts[1:], len(positions)], strict=True)]
        if len(counts) != len(sizes):
            return None
        width, height = raster[0, 2:].tolist()
        shapes = [_raster_shape(size, n, width / height) for size, n in zip(sizes, counts, strict=True)]
        # What attention is does not depend on the picture's size.
        with _bypassed_attention(model, _model_inputs(model, prepare([_noise_picture(SAMPLE, generator)]))):
            base, same = (_layer0_input(model, inputs)[positions].float() for _ in range(2))
            half = torch.rand(len(positions), generator=generator) < 0.5
            for group in (half, ~half):
                parts = zip(pictures, group.split(counts), shapes, strict=True)
                changed = _model_inputs(model, prepare([_change_cells(p, g.reshape(s)) for p, g, s in parts]))
                if not torch.equal(changed["input_ids"], inputs["input_ids"]):
                    return None
                moved = (_layer0_input(model, changed)[positions].float() - base).abs().amax(dim=1)
                if not torch.equal((moved > 4 * (same - base).abs().amax(dim=1)).cpu(), group):
                    return None
    boxes = torch.cat([_raster_boxes(*each) for each in zip(sizes, shapes, strict=True)])
    index = torch.arange(len(sizes)).repeat_interleave(torch.tensor(counts))
    return TokenGeometry(boxes, ("local",) * len(boxes), index, sizes)


# ----------------------------------------------------------------------------------------------------------- cache

_cache: OrderedDict[Hashable, TokenGeometry | PixelMaps] = OrderedDict()
_cache_lock = threading.Lock()


def _settings(value: Any) -> Any:
    return value.to_dict() if hasattr(value, "to_dict") else repr(value)


def geometry_key(model: PreTrainedModel, processor: Any, image_sizes: Sequence[Size], video: bool = False) -> Hashable:
    r"""What a measured geometry depends on: the processor's settings, the picture sizes, the vision configuration.

    Settings given to the processor at call time are not part of it; change the processor's own instead.

    Args:

        model (PreTrainedModel): The model; its config without the language model's part counts.
        processor: The model's processor; its settings and those of its image processor count.
        image_sizes (Sequence[tuple[int, int]]): (width, height) of each picture.
        video (bool, optional): Whether they are the frames of a video.
                    Default: False

    Returns:
        **key** (*Hashable*):
            A JSON text.
    """
    config = {key: value for key, value in model.config.to_dict().items() if key != "text_config"}
    simple = (str, int, float, bool, type(None))
    own = {
        key: value
        for key, value in sorted(vars(processor).items())
        if isinstance(value, simple) and key != "chat_template"
    }
    image_processor = _settings(getattr(processor, "image_processor", None))
    parts = [type(model).__qualname__, config, type(processor).__qualname__, own, image_processor]
    parts.append(_settings(getattr(processor, "video_processor", None)) if video else None)
    return json.dumps([*parts, check_sizes(image_sizes)], sort_keys=True, default=repr)


def cached_geometry(
    model: PreTrainedModel, processor: Any, prepare: Prepare, image_sizes: Sequence[Size], video: bool = False
) -> TokenGeometry:
    r"""As :func:`measure_geometry`, measured once for every :func:`geometry_key`; the last 128 are kept. A picture's
    raster of equal tokens is expected after that of a small one, see :func:`expected_raster`.

    Args:

        model (PreTrainedModel): The model.
        processor: The processor that ``prepare`` uses.
        prepare (Callable): From pictures of these sizes to the model's inputs.
        image_sizes (Sequence[tuple[int, int]]): (width, height) of each picture.
        video (bool, optional): Whether they are the frames of a video.
                    Default: False

    Returns:
        **geometry** (*TokenGeometry*):
            The same object for the same key.
    """
    sizes = check_sizes(image_sizes)

    def measure() -> TokenGeometry:
        expected = None
        if not video and min(map(prod, sizes)) > prod(SAMPLE):
            try:
                sample = cached_geometry(model, processor, prepare, (SAMPLE,))
            except ValueError:  # Some pictures are too small for a processor.
                pass
            else:
                expected = expected_raster(model, prepare, sample, sizes)
        return measure_geometry(model, prepare, sizes) if expected is None else expected

    return cast(TokenGeometry, _cached(("tokens", geometry_key(model, processor, sizes, video)), measure))


def cached_pixels(
    model: PreTrainedModel, processor: Any, prepare: Prepare, image_sizes: Sequence[Size], video: bool = False
) -> PixelMaps:
    """As :func:`~captum_intramodal.coordinates.measure_pixels`, measured once for every :func:`geometry_key`.

    Pictures of more than a megapixel that the processor shrinks are measured on smaller ones, as by
    :func:`measure_geometry`.
    """
    sizes = check_sizes(image_sizes)

    def measure() -> PixelMaps:
        maps = measure_pixels(prepare, _reduced_sizes(prepare, sizes))
        return PixelMaps({name: map_.in_frame_of(sizes) for name, map_ in maps.items()}, sizes)

    return cast(PixelMaps, _cached(("pixels", geometry_key(model, processor, sizes, video)), measure))


def _cached(key: Hashable, make: Callable[[], TokenGeometry | PixelMaps]) -> TokenGeometry | PixelMaps:
    with _cache_lock:
        if key in _cache:
            _cache.move_to_end(key)
            return _cache[key]
    measured = make()
    with _cache_lock:
        measured = _cache.setdefault(key, measured)
        _cache.move_to_end(key)
        while len(_cache) > CACHE_SIZE:
            _cache.popitem(last=False)
    return measured


# ---------------------------------------------------------------------------------------------------------- oracle


def geometry_oracle(
    model: PreTrainedModel,
    prepare: Prepare,
    images: Sequence[Image.Image],
    geometry: TokenGeometry,
    blocks: int = 40,
    seed: int = 0,
    bypass: bool = True,
) -> float:
    r"""How often the token that reacts most to a small change of the picture has a box around that change.

    Independent of how the geometry was measured: it changes the original picture, at random places of the seen
    rectangle, by blocks of an eighth of a token's size, and lets the processor run again. A hit is a box that contains
    the block's centre, give or take half a block: a change across the border of two tokens may show in either. Right
    boxes score 0.97 to 1 with ``bypass``, transposed or shuffled ones hardly ever.

    Args:

        model (PreTrainedModel): The model.
        prepare (Callable): As in :func:`measure_geometry`.
        images (Sequence[PIL.Image.Image]): Pictures of the geometry's sizes.
        geometry (TokenGeometry): The geometry to check.
        blocks (int): Number of changes, spread evenly over the pictures.
                    Default: 40
        seed (int): Seed of the places.
                    Default: 0
        bypass (bool): Whether to skip the vision tower's attention, which also carries a change to other tokens.
                    Default: ``True``

    Returns:
        **hit rate** (*float*):
            Between 0 and 1.

    Raises:
        ValueError: the pictures do not have the geometry's sizes, the number of visual positions differs, a picture has
            no local tokens, or ``blocks`` is not positive.
    """
    pictures = [image.convert("RGB") for image in images]
    sizes = tuple(image.size for image in pictures)
    if sizes != geometry.image_sizes:
        raise ValueError(f"The pictures have sizes {list(sizes)}, the geometry is for {list(geometry.image_sizes)}.")
    if blocks < 1:
        raise ValueError(f"blocks must be at least 1, got {blocks}.")
    local = geometry.is_local
    if missing := [i for i in range(len(sizes)) if not bool((local & geometry.sees(i)).any())]:
        raise ValueError(
            f"The geometry has no local tokens for picture {missing[0]} of {len(sizes)}; nothing to check."
        )
    generator = torch.Generator().manual_seed(seed)

    def hidden(changed: list[Image.Image]) -> Tensor:
        inputs = _model_inputs(model, prepare(changed))
        states = _read_states(model, inputs, geometry.argument)
        rows = visual_rows(model, inputs, geometry.argument, len(states))
        if len(rows) != len(geometry.kinds):
            raise ValueError(f"The model input has {len(rows)} visual positions, the geometry {len(geometry.kinds)}.")
        return states[rows.to(states.device)].float().cpu()

    def hits() -> int:
        base = hidden(pictures)
        count = 0
        for block in range(blocks):
            image = block % len(pictures)
            width, height = sizes[image]
            boxes = geometry.boxes[local & geometry.sees(image)]
            token = (boxes[:, 2:] - boxes[:, :2]).median(dim=0).values
            side = [max(2, round(float(t) / 8)) for t in token]
            x0, y0, x1, y1 = geometry.coverage(image)
            u, v = torch.rand(2, generator=generator).tolist()
            left = min(max(round(x0 + u * (x1 - x0) - side[0] / 2), math.ceil(x0)), max(width - side[0], 0))
            top = min(max(round(y0 + v * (y1 - y0) - side[1] / 2), math.ceil(y0)), max(height - side[1], 0))
            values = np.array(pictures[image])
            values[top : top + side[1], left : left + side[0]] += 128
            changed = [*pictures]
            changed[image] = Image.fromarray(values)
            change = (hidden(changed) - base).norm(dim=1).masked_fill(~local, -1.0)
            strongest = int(change.argmax())
            box = geometry.boxes[strongest]
            corner = torch.tensor([left, top])
            touches = bool(((box[:2] <= corner + torch.tensor(side)) & (corner <= box[2:])).all())
            count += touches and bool(geometry.sees(image)[strongest])
        return count

    with evaluation_mode(model):
        if not bypass:
            return hits() / blocks
        with _bypassed_attention(model, _model_inputs(model, prepare(pictures))):
            return hits() / blocks
