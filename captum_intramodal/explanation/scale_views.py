r"""Which scales are used, and when is a scale dropped? It depends on what the model is given at each scale."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor

from captum_intramodal._utils.image import resize_images
from captum_intramodal.adapter.model_adapter import ModelAdapter
from captum_intramodal.adapter.position_interpolation import measure_resized_input
from captum_intramodal.errors import NoTokenGeometryError, UnsupportedModelError
from captum_intramodal.explanation.crops import Crop, crop_images, measure_crops
from captum_intramodal.explanation.options import LENS_METHODS, ExplainOptions, Method, Scales
from captum_intramodal.functional.aggregation import DEFAULT_SCALES
from captum_intramodal.geometry.pixel_map import PixelMaps
from captum_intramodal.geometry.token_geometry import TokenGeometry

__all__ = ["ScaleView", "select_views"]

# Reductions that scales="auto" adds if enlargements give the model nothing more.
_REDUCTIONS = (0.75, 0.5)

Layout = TokenGeometry | PixelMaps


@dataclass(frozen=True)
class ScaleView:
    r"""
    The input that a model is given at one scale of the images.

    Attributes:
        adapter (ModelAdapter): the model; at another input size if position embeddings are interpolated.
        layout (TokenGeometry or PixelMaps): what the visual tokens, or the elements of the pixel tensors, cover.
        crops (tuple): cut-outs that are processed one after the other; empty if the images are processed whole.
    """

    adapter: ModelAdapter
    layout: Layout
    crops: tuple[Crop, ...] = ()

    def shows_same(self, other: ScaleView) -> bool:
        """Return whether both views give the model the same tokens, or the same pixels."""
        return self.layout.shows_same(other.layout)

    def passes(self, images: Sequence[Image.Image]) -> list[list[Image.Image]]:
        """Return the images of each forward pass that the view takes."""
        if self.crops:
            return list(crop_images(images, self.crops))
        return [resize_images(images, self.layout.image_sizes)]

    def method(self, requested: Method) -> Method:
        """Return the method that ``'auto'`` stands for with this view; any other as it is."""
        if requested != "auto":
            return requested
        if isinstance(self.layout, PixelMaps):
            return "input_x_gradient"
        return "logit_lens" if self.layout.argument is None else "layer_gradient_x_activation"


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
    Select the scales at which the model processes something it does not process at another scale.

    Args:

        adapter (ModelAdapter): The model and its processor.
        images (Sequence[PIL.Image.Image]): The original images.
        scales (Sequence[float] or str): Factors of their size. ``'auto'``: the default factors that give the model a
                    token grid of their own, then reductions that do, up to three scales.
        inputs (Mapping): The processor's output for the original images.
        method (str, optional): every method but ``'input_x_gradient'`` needs visual tokens that cover known regions
                    (:class:`TokenGeometry`), the lens tokens in the decoder's sequence; ``'input_x_gradient'``
                    needs to know which pixels an element samples (:class:`PixelMaps`).
                    ``'auto'``: the first one that the model supports.
                    Default: ``'auto'``
        crops (bool, optional): If enlarging gives the model nothing more, process cut-outs
                    (:func:`~captum_intramodal.explanation.crops.measure_crops`).
                    Default: False
        interpolate_pos_encoding (bool, optional): If enlarging gives it nothing more, enlarge its input size
                    (:mod:`~captum_intramodal.adapter.position_interpolation`).
                    Default: False

    Returns:
        **views, dropped** (*tuple*):
            The views by scale, in ascending order, and the given scales that were dropped.

    Raises:
        InvalidOptionError: an option has a value that it does not take.
        UnsupportedModelError: the model does not support the method, or its input size cannot be enlarged.
    """
    options = ExplainOptions(
        scales=scales, method=method, crops=crops, interpolate_pos_encoding=interpolate_pos_encoding
    )
    sizes = [image.size for image in images]
    original, measure = _measure_original(adapter, sizes, method)
    kept: dict[float, ScaleView] = {}
    dropped: list[float] = []
    shrinks = _processor_shrinks(inputs, images)
    automatic = isinstance(scales, str)
    # Upwards from the original: an enlargement repeats any smaller one that gives the model the same.
    for scale in _candidates(options.scales):
        if automatic and scale < 1 and len(kept) >= len(DEFAULT_SCALES):
            break
        view = original
        if scale != 1 and not (shrinks and scale > 1):
            resized = [(max(1, round(width * scale)), max(1, round(height * scale))) for width, height in sizes]
            view = ScaleView(adapter, measure(resized))
        # A reduction to the same tokens removes high frequencies, which a user may ask for.
        others = [original, *kept.values()] if scale > 1 else [*kept.values()] if automatic else []
        repeats = any(view.shows_same(other) for other in others)
        if repeats and interpolate_pos_encoding and scale > 1:
            view = _resized_input(adapter, sizes, scale, original)
            repeats = any(view.shows_same(other) for other in others)
        if not repeats:
            kept[scale] = view
        elif crops and scale > 1 and isinstance(original.layout, TokenGeometry):
            boxes, geometry = measure_crops(adapter, sizes, scale)
            kept[scale] = ScaleView(adapter, geometry, boxes)
        else:
            dropped.append(scale)
    # If only enlargements were given and all of them repeat the original, the original is what they give the model.
    return dict(sorted(kept.items())) or {1.0: original}, [] if automatic else dropped


def _candidates(scales: Scales) -> list[float]:
    if isinstance(scales, str):
        return [*DEFAULT_SCALES, *_REDUCTIONS]
    return sorted(scales, key=lambda scale: (scale > 1, scale))


def _measure_original(
    adapter: ModelAdapter, sizes: Sequence[tuple[int, int]], method: Method
) -> tuple[ScaleView, Callable[[Sequence[tuple[int, int]]], Layout]]:
    """Return the view of the original images, and the function that measures the same at other sizes."""
    if method != "input_x_gradient":
        try:
            geometry = _usable_geometry(adapter, sizes, method)
        except NoTokenGeometryError as error:
            if method != "auto":
                raise NoTokenGeometryError(
                    f"method={method!r} needs visual tokens that cover known regions of the image, which "
                    f"{type(adapter.model).__name__} does not have; method='input_x_gradient' explains it by its "
                    "pixels."
                ) from error
        else:
            return ScaleView(adapter, geometry), adapter.geometry
    return ScaleView(adapter, adapter.pixel_maps(sizes)), adapter.pixel_maps


def _usable_geometry(adapter: ModelAdapter, sizes: Sequence[tuple[int, int]], method: Method) -> TokenGeometry:
    geometry = adapter.geometry(sizes)
    if not bool(geometry.is_local.any()):
        raise NoTokenGeometryError(f"None of the {len(geometry.kinds)} visual tokens covers a region of the image.")
    if method in LENS_METHODS and geometry.argument is not None:
        raise UnsupportedModelError(
            f"The visual tokens of {type(adapter.model).__name__} are in {geometry.argument}, not in the decoder's "
            "sequence; use method='layer_gradient_x_activation'."
        )
    return geometry


def _resized_input(
    adapter: ModelAdapter, sizes: Sequence[tuple[int, int]], scale: float, original: ScaleView
) -> ScaleView:
    more_tokens = isinstance(_measure_original(adapter, sizes, "auto")[0].layout, TokenGeometry)
    return ScaleView(*measure_resized_input(adapter, sizes, scale, original.layout, more_tokens))


def _processor_shrinks(inputs: Mapping[str, Any], images: Sequence[Image.Image]) -> bool:
    """Return whether the processor at least halves the images' sides, so that enlarging them changes nothing."""
    elements = sum(v.numel() for v in inputs.values() if isinstance(v, Tensor) and v.is_floating_point())
    return 4 * elements / 3 < sum(image.width * image.height for image in images)
