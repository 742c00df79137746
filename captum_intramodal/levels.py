r"""What one scale of the pictures shows: the text tokens' maps at visual tokens, or over the pixels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from captum_intramodal.adapter import Encoding, ModelAdapter
from captum_intramodal.canvas import canvas_grid, draw_on_canvas
from captum_intramodal.chunks import WORKING_MEMORY
from captum_intramodal.coordinates import PixelMaps
from captum_intramodal.decoder import decoder_blocks, decoder_layers
from captum_intramodal.enlarged import Enlarged
from captum_intramodal.geometry import TokenGeometry, state_rows, visual_rows
from captum_intramodal.hooks import named_arguments
from captum_intramodal.msea import DEFAULT_SCALES, check_scales

__all__ = [
    "METHODS",
    "Level",
    "Method",
    "PixelLevel",
    "Scales",
    "Sight",
    "TokenLevel",
    "Windows",
    "explained_by",
    "find_sights",
    "input_x_gradient",
    "layer_gradient_x_activation",
    "resize_pictures",
]

Method = Literal["auto", "logit_lens", "layer_gradient_x_activation", "input_x_gradient"]
METHODS: tuple[Method, ...] = ("auto", "logit_lens", "layer_gradient_x_activation", "input_x_gradient")
Scales = Sequence[float] | Literal["auto"]

# What scales="auto" tries where the model sees nothing more of an enlarged picture.
_REDUCTIONS = (0.75, 0.5)

# Gradients at single pixels are noise; they are summed over cells, this many along the longer side.
_CELLS = 24


@dataclass(frozen=True)
class Windows:
    """Overlapping cut-outs of the pictures, each of which the model sees in the place of its picture.

    Attributes:
        boxes (tuple): (picture, x0, y0, x1, y1) of each cut-out in whole pixels.
        geometry (TokenGeometry): of the tokens of all cut-outs, one after another, in the frame of the originals;
            tokens of the pictures that stand beside a cut-out have no box.
    """

    boxes: tuple[tuple[int, int, int, int, int], ...]
    geometry: TokenGeometry

    @classmethod
    def of(cls, adapter: ModelAdapter, sizes: Sequence[tuple[int, int]], scale: float) -> Windows:
        """As many as it takes, of one ``scale``-th of a picture's sides, evenly spread."""
        steps = math.ceil(scale)
        boxes, parts, images = [], [], []
        for image, (width, height) in enumerate(sizes):
            w, h = max(1, round(width / scale)), max(1, round(height / scale))
            geometry = adapter.geometry([(w, h) if i == image else size for i, size in enumerate(sizes)])
            boxed = geometry.boxes.masked_fill(~(geometry.is_local & geometry.sees(image))[:, None], torch.nan)
            for row, column in np.ndindex(steps, steps):
                x, y = column * (width - w) // (steps - 1), row * (height - h) // (steps - 1)
                boxes.append((image, x, y, x + w, y + h))
                parts.append(boxed + torch.tensor([x, y, x, y]))
                images.append(torch.full((len(boxed),), image))
        placed = torch.cat(parts)
        kinds = tuple("separator" if nowhere else "local" for nowhere in placed.isnan().any(1).tolist())
        return cls(
            tuple(boxes), TokenGeometry(placed, kinds, torch.cat(images), tuple(sizes), argument=geometry.argument)
        )

    def show(self, pictures: Sequence[Image.Image]) -> Iterator[list[Image.Image]]:
        """The pictures of each pass, one of them cut."""
        for image, *box in self.boxes:
            yield [p.crop((box[0], box[1], box[2], box[3])) if i == image else p for i, p in enumerate(pictures)]


Sight = TokenGeometry | PixelMaps | Windows | Enlarged


class Level(Protocol):
    """What one scale shows of the text tokens' maps.

    Attributes:
        scale (float): factor of the pictures' size.
        n_visual (int): number of values per map: visual tokens, or cells.
    """

    @property
    def scale(self) -> float: ...

    @property
    def n_visual(self) -> int: ...

    def cell_size(self, size: tuple[int, int]) -> list[float]:
        """Typical width and height, in pixels of the first picture, of what a value stands for."""

    def grid(self, image: int, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of a canvas over a picture of this (width, height) that keeps what the level shows."""

    def draw(self, image: int, size: tuple[int, int], grid: tuple[int, int], working_memory: int) -> Tensor:
        """Maps of the text tokens over a picture, float32 (T, rows, columns)."""


@dataclass(frozen=True)
class TokenLevel:
    """What each visual token says of the text tokens, and where the visual tokens lie in the originals.

    Attributes:
        scale (float): factor of the pictures' size.
        activation (Tensor): the text tokens' logit lens, or activation times gradient, at each visual token; float32
            (T, V), clipped at 0.
        geometry (TokenGeometry): of the resized pictures.
    """

    scale: float
    activation: Tensor
    geometry: TokenGeometry

    @property
    def n_visual(self) -> int:
        return self.activation.shape[1]

    def boxes(self, image: int, size: tuple[int, int]) -> Tensor:
        """Boxes in pixels of the original picture; NaN for tokens of other pictures."""
        width, height = self.geometry.image_sizes[image]
        boxes = self.geometry.boxes * torch.tensor([size[0] / width, size[1] / height] * 2)
        return boxes.masked_fill(~self.geometry.sees(image)[:, None], torch.nan)

    def cell_size(self, size: tuple[int, int]) -> list[float]:
        boxes = self.boxes(0, size)
        boxes = boxes[~boxes.isnan().any(1)]
        return [round(float((boxes[:, 2 + axis] - boxes[:, axis]).median()), 2) for axis in (0, 1)]

    def grid(self, image: int, size: tuple[int, int]) -> tuple[int, int]:
        return canvas_grid(self.boxes(image, size), size)

    def draw(
        self, image: int, size: tuple[int, int], grid: tuple[int, int], working_memory: int = WORKING_MEMORY
    ) -> Tensor:
        return draw_on_canvas(self.activation, self.boxes(image, size), size, grid, working_memory)


@dataclass(frozen=True)
class PixelLevel:
    """Input times gradient of the text tokens' log-probabilities, for models without a place per visual token.

    Attributes:
        scale (float): factor of the pictures' size.
        maps (list[Tensor]): per picture float32 (T, rows, columns), clipped at 0.
    """

    scale: float
    maps: list[Tensor]

    @classmethod
    def of(
        cls, adapter: ModelAdapter, scale: float, pixels: PixelMaps, encoding: Encoding, positions: Tensor
    ) -> PixelLevel:
        """From one pass over prompt and answer, and one backward pass per text token, at their positions."""
        grids = [_square_cells(size) for size in pixels.image_sizes]
        maps: list[list[Tensor]] = [[] for _ in grids]
        for attribution in input_x_gradient(adapter, encoding, list(pixels.maps), positions):
            for image, grid in enumerate(grids):
                folded = [pixels.maps[key].fold(value, grid, image) for key, value in attribution.items()]
                maps[image].append(torch.stack(folded).sum(0).clamp_min(0))
        return cls(scale, [torch.stack(m) for m in maps])

    @property
    def n_visual(self) -> int:
        return sum(m[0].numel() for m in self.maps)

    def cell_size(self, size: tuple[int, int]) -> list[float]:
        rows, columns = self.grid(0, size)
        return [round(size[0] / columns, 2), round(size[1] / rows, 2)]

    def grid(self, image: int, size: tuple[int, int]) -> tuple[int, int]:
        rows, columns = self.maps[image].shape[1:]
        return rows, columns

    def draw(
        self, image: int, size: tuple[int, int], grid: tuple[int, int], working_memory: int = WORKING_MEMORY
    ) -> Tensor:
        maps = self.maps[image]
        if grid == self.grid(image, size):
            return maps
        return F.interpolate(maps[:, None], grid, mode="bilinear", align_corners=False)[:, 0]


def _square_cells(size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns."""
    width, height = size
    cell = max(max(size) / _CELLS, 1.0)
    return max(1, round(height / cell)), max(1, round(width / cell))


def input_x_gradient(
    adapter: ModelAdapter, encoding: Encoding, keys: Sequence[str], positions: Tensor
) -> Iterator[dict[str, Tensor]]:
    r"""
    Input times gradient of text tokens' log-probabilities with respect to the processor's pixel tensors.

    Args:

        adapter (ModelAdapter): The model.
        encoding (Encoding): Prompt and answer; batch of 1.
        keys (Sequence[str]): Names of the pixel tensors among the inputs.
        positions (Tensor): Positions of the text tokens, int64 (T,). What stands at position 0 nothing predicts: its
                    gradient is 0.

    Yields:
        **attribution** (*dict*):
            Per text token, by name, a float32 tensor of the pixel tensor's shape, on the CPU.

    Raises:
        ValueError: no gradient reaches the pixels, as where a model quantises its pictures.
    """
    leaves = {key: encoding.inputs[key].to(adapter.model.dtype).detach().clone().requires_grad_() for key in keys}
    with torch.enable_grad():
        scores = _log_probabilities(adapter, encoding, leaves, positions)
    if not scores[0].requires_grad:
        raise ValueError(
            f"No gradient passes from the answer to the pixels of {type(adapter.model).__name__}; it has neither a "
            "place per visual token nor pixel attribution."
        )
    for score, position in zip(scores, positions.tolist(), strict=True):
        if position == 0:
            yield {key: torch.zeros(leaf.shape) for key, leaf in leaves.items()}
            continue
        grads = torch.autograd.grad(score, list(leaves.values()), retain_graph=True, allow_unused=True)
        yield {
            key: torch.zeros(leaf.shape) if grad is None else (leaf.detach() * grad).float().cpu()
            for (key, leaf), grad in zip(leaves.items(), grads, strict=True)
        }


def _log_probabilities(
    adapter: ModelAdapter, encoding: Encoding, changed: dict[str, Tensor], positions: Tensor
) -> tuple[Tensor, ...]:
    """Of the tokens at these positions, given all before them."""
    before = (positions - 1).clamp_min(0)
    logits = adapter.logits(encoding.inputs | changed, before - len(encoding.input_ids))[0]
    ids = encoding.input_ids[positions].to(logits.device)
    scores = logits.float().log_softmax(1).gather(1, ids[:, None])
    return scores[:, 0].unbind()


def layer_gradient_x_activation(
    adapter: ModelAdapter,
    encoding: Encoding,
    positions: Tensor,
    argument: str | None = None,
    layer: int | None = None,
) -> Tensor:
    r"""
    Activation times gradient at the visual tokens' states, summed over features: Captum's LayerGradientXActivation of
    text tokens' log-probabilities, of one pass forward and one backward per text token.

    Args:

        adapter (ModelAdapter): The model.
        encoding (Encoding): Prompt and answer; batch of 1.
        positions (Tensor): Positions of the text tokens, int64 (T,). What stands at position 0 nothing predicts: its
                    gradient is 0.
        argument (str, optional): Where the visual tokens are, as in
                    :class:`~captum_intramodal.geometry.TokenGeometry`. The gradient at the states of a cross-attention
                    is that of all layers which read them.
                    Default: None, placeholders in the decoder's sequence
        layer (int, optional): Decoder layer whose input is attributed to, of those states that change from layer to
                    layer.
                    Default: None, the first

    Returns:
        **attributions** (*Tensor*):
            float32 (T, V), of either sign, on the CPU.

    Raises:
        ValueError: a layer that does not exist, or one of states which all layers read; no gradient reaches the states.
    """
    model = adapter.model
    if argument in (None, "hidden_states"):
        layers = decoder_layers(model)
        index = 0 if layer is None else layer
        if not -len(layers) <= index < len(layers):
            raise ValueError(f"There is no layer {layer}; the decoder has {len(layers)}.")
        blocks: list[nn.Module] = [layers[index]]
    elif layer is not None:
        raise ValueError(f"All layers of {type(model).__name__} read the same visual states; leave layer out.")
    else:
        blocks = decoder_blocks(model)
    # What runs before the states needs no gradient: it begins with them.
    with torch.no_grad(), _differentiable(blocks, argument) as states:
        scores = _log_probabilities(adapter, encoding, {}, positions)
    if not states or not any(score.requires_grad for score in scores):
        raise ValueError(f"No gradient passes from the answer to the visual states of {type(model).__name__}.")
    (leaf,) = states
    count = len(state_rows(leaf, argument))
    rows = visual_rows(model, encoding.inputs, argument, count).to(leaf.device)
    attributions = torch.zeros(len(scores), len(rows))
    for index, (score, position) in enumerate(zip(scores, positions.tolist(), strict=True)):
        if position > 0:
            (gradient,) = torch.autograd.grad(score, leaf, retain_graph=True)
            product = state_rows((leaf.detach() * gradient).float(), argument)
            attributions[index] = product[rows].sum(-1).cpu()
    return attributions


@contextmanager
def _differentiable(blocks: Sequence[nn.Module], argument: str | None) -> Iterator[list[Tensor]]:
    """Gives blocks the same states as before, as a function of a leaf, which the list holds once one of them ran."""
    leaves: list[Tensor] = []
    given: list[Tensor] = []

    def replace(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not given:
            named = named_arguments(module, args, kwargs)
            value = next(iter(named.values())) if argument is None else named.get(argument)
            if not isinstance(value, Tensor):
                return None
            torch.set_grad_enabled(True)  # As long as the caller's torch.no_grad() lasts.
            leaves.append(value.detach().requires_grad_())
            # A leaf itself must not be changed in place.
            given.extend([value, leaves[0].clone()])
        old, new = given
        return tuple(new if a is old else a for a in args), {k: new if v is old else v for k, v in kwargs.items()}

    handles = [block.register_forward_pre_hook(replace, with_kwargs=True) for block in blocks]
    try:
        yield leaves
    finally:
        for handle in handles:
            handle.remove()


def resize_pictures(pictures: Sequence[Image.Image], sizes: Sequence[tuple[int, int]]) -> list[Image.Image]:
    """Pictures at other (width, height)s; a picture that has its size already stays as it is."""
    return [
        picture if picture.size == size else picture.resize(size, Image.Resampling.BICUBIC)
        for picture, size in zip(pictures, sizes, strict=True)
    ]


def find_sights(
    adapter: ModelAdapter,
    pictures: Sequence[Image.Image],
    scales: Scales,
    inputs: Mapping[str, Any],
    method: Method = "auto",
    crops: bool = False,
    interpolate_pos_encoding: bool = False,
) -> tuple[dict[float, Sight], list[float]]:
    r"""
    What the model sees at each scale that shows it something of its own, and the scales that do not.

    Args:

        adapter (ModelAdapter): The model and its processor.
        pictures (Sequence[PIL.Image.Image]): The originals.
        scales (Sequence[float] or str): Factors of their size. ``'auto'``: the default ones, as far as the model sees
                    something of its own there, filled up with reductions that have a grid of tokens of their own.
        inputs (Mapping): What the processor makes of the originals.
        method (str, optional): ``'logit_lens'`` and ``'layer_gradient_x_activation'`` need a place per visual token
                    (:class:`TokenGeometry`), the lens one in the decoder's sequence; ``'input_x_gradient'`` one per
                    pixel element (:class:`PixelMaps`). ``'auto'``: the first that the model can do.
                    Default: ``'auto'``
        crops (bool, optional): Where the model sees nothing more of enlarged pictures, cut them (:class:`Windows`).
                    Default: False
        interpolate_pos_encoding (bool, optional): Where it sees nothing more of them, enlarge its own input size
                    (:class:`~captum_intramodal.enlarged.Enlarged`).
                    Default: False

    Returns:
        tuple: sights by scale, and the scales that are left out.

    Raises:
        ValueError: an unknown method, or one that the model cannot do; an input size that cannot be enlarged; both
            ``crops`` and ``interpolate_pos_encoding``.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}.")
    if crops and interpolate_pos_encoding:
        raise ValueError("crops and interpolate_pos_encoding are two ways to see more of a picture; choose one.")
    sizes = [picture.size for picture in pictures]
    original, see = _see(adapter, sizes, method)
    kept: dict[float, Sight] = {}
    dropped: list[float] = []
    shrinks = _shrinks(inputs, pictures)
    crops = crops and isinstance(original, TokenGeometry)
    auto = isinstance(scales, str)
    # Upwards from the original: an enlargement repeats whatever smaller one shows the same.
    for scale in _candidates(scales):
        if auto and scale < 1 and len(kept) >= len(DEFAULT_SCALES):
            break
        if shrinks and scale > 1:
            sight: TokenGeometry | PixelMaps | Enlarged = original
        else:
            resized = [(max(1, round(width * scale)), max(1, round(height * scale))) for width, height in sizes]
            sight = original if scale == 1.0 else see(resized)
        # A reduction to the same tokens shows the picture without its high frequencies, which one may ask for.
        twins = [original, *kept.values()] if scale > 1 else [*kept.values()] if auto else []
        repeats = any(sight.shows_same(twin) for twin in twins)
        if repeats and interpolate_pos_encoding and scale > 1:
            more_tokens = isinstance(_see(adapter, sizes, "auto")[0], TokenGeometry)
            sight = Enlarged.of(adapter, sizes, scale, original, more_tokens)
            repeats = any(sight.shows_same(twin) for twin in twins)
        if not repeats:
            kept[scale] = sight
        elif crops and scale > 1:
            kept[scale] = Windows.of(adapter, sizes, scale)
        else:
            dropped.append(scale)
    # Where only enlargements were asked for and all repeat the original, that is what they show.
    return dict(sorted(kept.items())) or {1.0: original}, [] if auto else dropped


def _candidates(scales: Scales) -> list[float]:
    if not isinstance(scales, str):
        return sorted(check_scales(scales), key=lambda s: (s > 1, s))
    if scales != "auto":
        raise ValueError(f"scales must be 'auto' or a sequence of factors such as (1, 1.5, 2), got {scales!r}.")
    return [*DEFAULT_SCALES, *_REDUCTIONS]


def _see(
    adapter: ModelAdapter, sizes: Sequence[tuple[int, int]], method: Method
) -> tuple[TokenGeometry | PixelMaps, Callable[[Sequence[tuple[int, int]]], TokenGeometry | PixelMaps]]:
    """The sight of the originals, and the function that gives it at other sizes."""
    if method != "input_x_gradient":
        try:
            geometry = adapter.geometry(sizes)
        except ValueError as error:
            reason = str(error)
        else:
            if not bool(geometry.is_local.any()):
                reason = f"none of its {len(geometry.kinds)} visual tokens stands for a region of the picture."
            elif method == "logit_lens" and geometry.argument is not None:
                reason = (
                    "its visual tokens are no placeholders in its decoder's sequence; "
                    "method='layer_gradient_x_activation' explains it by them, and"
                )
            else:
                return geometry, adapter.geometry
        if method != "auto":
            raise ValueError(
                f"{type(adapter.model).__name__} has no map per visual token: {reason} method='input_x_gradient' "
                "explains it by its pixels."
            )
    return adapter.pixel_maps(sizes), adapter.pixel_maps


def explained_by(method: Method, sight: Sight) -> Method:
    """The method that ``'auto'`` stands for, given what the model sees."""
    if method != "auto":
        return method
    if isinstance(sight, PixelMaps):
        return "input_x_gradient"
    if isinstance(sight, Enlarged):
        return explained_by(method, sight.sight)
    geometry = sight.geometry if isinstance(sight, Windows) else sight
    return "logit_lens" if geometry.argument is None else "layer_gradient_x_activation"


def _shrinks(inputs: Mapping[str, Any], pictures: Sequence[Image.Image]) -> bool:
    """Whether the processor at least halves the pictures' sides, so that nothing can come of enlarging them."""
    elements = sum(v.numel() for v in inputs.values() if isinstance(v, Tensor) and v.is_floating_point())
    return 4 * elements / 3 < sum(picture.width * picture.height for picture in pictures)
