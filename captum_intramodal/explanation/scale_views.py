r"""What one scale of the images shows: the text tokens' maps at visual tokens, or over the pixels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from PIL import Image
from torch import Tensor

from captum_intramodal.adapter.model_adapter import ModelAdapter
from captum_intramodal.adapter.position_interpolation import ResizedInputView
from captum_intramodal.explanation.crops import CropView
from captum_intramodal.functional.aggregation import DEFAULT_SCALES, check_scales
from captum_intramodal.geometry.pixel_map import PixelMaps
from captum_intramodal.geometry.token_geometry import TokenGeometry

__all__ = ["METHODS", "Method", "ScaleView", "Scales", "explained_by", "select_views"]

Method = Literal["auto", "logit_lens", "layer_gradient_x_activation", "input_x_gradient"]


METHODS: tuple[Method, ...] = ("auto", "logit_lens", "layer_gradient_x_activation", "input_x_gradient")


Scales = Sequence[float] | Literal["auto"]


# What scales="auto" tries where the model sees nothing more of an enlarged image.
_REDUCTIONS = (0.75, 0.5)


ScaleView = TokenGeometry | PixelMaps | CropView | ResizedInputView


def select_views(
    adapter: ModelAdapter,
    images: Sequence[Image.Image],
    scales: Scales,
    inputs: Mapping[str, Any],
    method: Method = "auto",
    crops: bool = False,
    interpolate_pos_encoding: bool = False,
) -> tuple[dict[float, ScaleView], list[float]]:
    r"""
    What the model sees at each scale that shows it something of its own, and the scales that do not.

    Args:

        adapter (ModelAdapter): The model and its processor.
        images (Sequence[PIL.Image.Image]): The originals.
        scales (Sequence[float] or str): Factors of their size. ``'auto'``: the default ones, as far as the model sees
                    something of its own there, filled up with reductions that have a grid of tokens of their own.
        inputs (Mapping): What the processor makes of the originals.
        method (str, optional): ``'logit_lens'`` and ``'layer_gradient_x_activation'`` need a place per visual token
                    (:class:`TokenGeometry`), the lens one in the decoder's sequence; ``'input_x_gradient'`` one per
                    pixel element (:class:`PixelMaps`). ``'auto'``: the first that the model can do.
                    Default: ``'auto'``
        crops (bool, optional): Where the model sees nothing more of enlarged images, cut them (:class:`CropView`).
                    Default: False
        interpolate_pos_encoding (bool, optional): Where it sees nothing more of them, enlarge its own input size
                    (:class:`~captum_intramodal.enlarged.ResizedInputView`).
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
        raise ValueError("crops and interpolate_pos_encoding are two ways to see more of an image; choose one.")
    sizes = [image.size for image in images]
    original, see = _see(adapter, sizes, method)
    kept: dict[float, ScaleView] = {}
    dropped: list[float] = []
    shrinks = _shrinks(inputs, images)
    crops = crops and isinstance(original, TokenGeometry)
    auto = isinstance(scales, str)
    # Upwards from the original: an enlargement repeats whatever smaller one shows the same.
    for scale in _candidates(scales):
        if auto and scale < 1 and len(kept) >= len(DEFAULT_SCALES):
            break
        if shrinks and scale > 1:
            sight: TokenGeometry | PixelMaps | ResizedInputView = original
        else:
            resized = [(max(1, round(width * scale)), max(1, round(height * scale))) for width, height in sizes]
            sight = original if scale == 1.0 else see(resized)
        # A reduction to the same tokens shows the image without its high frequencies, which one may ask for.
        twins = [original, *kept.values()] if scale > 1 else [*kept.values()] if auto else []
        repeats = any(sight.shows_same(twin) for twin in twins)
        if repeats and interpolate_pos_encoding and scale > 1:
            more_tokens = isinstance(_see(adapter, sizes, "auto")[0], TokenGeometry)
            sight = ResizedInputView.of(adapter, sizes, scale, original, more_tokens)
            repeats = any(sight.shows_same(twin) for twin in twins)
        if not repeats:
            kept[scale] = sight
        elif crops and scale > 1:
            kept[scale] = CropView.of(adapter, sizes, scale)
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
                reason = f"none of its {len(geometry.kinds)} visual tokens stands for a region of the image."
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


def explained_by(method: Method, sight: ScaleView) -> Method:
    """The method that ``'auto'`` stands for, given what the model sees."""
    if method != "auto":
        return method
    if isinstance(sight, PixelMaps):
        return "input_x_gradient"
    if isinstance(sight, ResizedInputView):
        return explained_by(method, sight.sight)
    geometry = sight.geometry if isinstance(sight, CropView) else sight
    return "logit_lens" if geometry.argument is None else "layer_gradient_x_activation"


def _shrinks(inputs: Mapping[str, Any], images: Sequence[Image.Image]) -> bool:
    """Whether the processor at least halves the images' sides, so that nothing can come of enlarging them."""
    elements = sum(v.numel() for v in inputs.values() if isinstance(v, Tensor) and v.is_floating_point())
    return 4 * elements / 3 < sum(image.width * image.height for image in images)
