r"""When is a geometry measured, and when is an earlier result reused? A cache, keyed by all that it depends on."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from math import prod
from typing import Any, TypeVar, cast

from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from captum_intramodal.errors import NoPixelMapError, NoTokenGeometryError
from captum_intramodal.geometry.measure import measure_geometry
from captum_intramodal.geometry.pixel_map import PixelMaps, Prepare, Size, check_sizes
from captum_intramodal.geometry.pixel_probe import measure_pixels, reduced_sizes
from captum_intramodal.geometry.raster import SAMPLE, expected_raster
from captum_intramodal.geometry.token_geometry import TokenGeometry

__all__ = ["cached_geometry", "cached_pixels", "geometry_key"]

CACHE_SIZE = 128

_Measured = TypeVar("_Measured", TokenGeometry, PixelMaps)

# Least recently used first.
_cache: OrderedDict[Hashable, TokenGeometry | PixelMaps] = OrderedDict()
_cache_lock = threading.Lock()


class _SampleRejectedError(Exception):
    """Raised if the processor rejects the small image from which larger geometries are derived."""


def geometry_key(
    model: PreTrainedModel, processor: ProcessorMixin, image_sizes: Sequence[Size], video: bool = False
) -> Hashable:
    r"""
    Return the key of a geometry in the cache: the processor's settings, the image sizes and the vision configuration.

    Settings that are passed when the processor is called are not part of the key; change the processor's own instead.

    Args:

        model (PreTrainedModel): The model. Its config counts, without that of the language model.
        processor (ProcessorMixin): The model's processor. Its settings and those of its image processor count.
        image_sizes (Sequence[tuple[int, int]]): (width, height) of each image.
        video (bool, optional): Whether the images are the frames of a video.
                    Default: False

    Returns:
        **key** (*Hashable*): a JSON text.

    Raises:
        InvalidInputError: ``image_sizes`` does not hold the size of at least one image.

    Examples::

        >>> from captum_intramodal.geometry import geometry_key
        >>> geometry_key(model, processor, [(64, 48)]) == geometry_key(model, processor, [(48, 64)])
        False
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


def _settings(processor: object) -> object:
    """Return the settings of a part of a processor as they enter the key."""
    return processor.to_dict() if hasattr(processor, "to_dict") else repr(processor)


def cached_geometry(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    prepare: Prepare,
    image_sizes: Sequence[Size],
    video: bool = False,
) -> TokenGeometry:
    r"""
    Return the geometry of :func:`measure_geometry`, measured once for every :func:`geometry_key`.

    The last 128 geometries are kept. If a small image's tokens form a raster of equal boxes, those of larger images are
    derived and confirmed by :func:`expected_raster`, which is faster.

    Args:

        model (PreTrainedModel): The model.
        processor (ProcessorMixin): The processor that ``prepare`` uses.
        prepare (Callable): Computes the model's inputs from images of these sizes, as in :func:`measure_geometry`.
        image_sizes (Sequence[tuple[int, int]]): (width, height) of each image.
        video (bool, optional): Whether the images are the frames of a video.
                    Default: False

    Returns:
        **geometry** (*TokenGeometry*): the same object for the same key.

    Raises:
        InvalidInputError, NoPixelMapError, NoTokenGeometryError: see :func:`measure_geometry`.

    Examples::

        >>> from captum_intramodal.geometry import cached_geometry
        >>> prepare = lambda images: adapter.prepare(images, "describe the picture.")
        >>> geometry = cached_geometry(model, processor, prepare, [(320, 224)])
        >>> geometry is cached_geometry(model, processor, prepare, [(320, 224)])
        True
    """
    sizes = check_sizes(image_sizes)

    def measure() -> TokenGeometry:
        expected = None
        if not video and min(map(prod, sizes)) > prod(SAMPLE):
            sample = _sample_geometry(model, processor, prepare)
            expected = None if sample is None else expected_raster(model, prepare, sample, sizes)
        return measure_geometry(model, prepare, sizes) if expected is None else expected

    return _measure_once(("tokens", geometry_key(model, processor, sizes, video)), measure)


def _sample_geometry(model: PreTrainedModel, processor: ProcessorMixin, prepare: Prepare) -> TokenGeometry | None:
    """Return the geometry of a small image, or None if it has none; larger images may have one nevertheless."""
    try:
        return cached_geometry(model, processor, _prepare_sample(prepare), (SAMPLE,))
    except (_SampleRejectedError, NoTokenGeometryError, NoPixelMapError):
        return None


def _prepare_sample(prepare: Prepare) -> Prepare:
    """Return ``prepare`` with a class of its own for the error of a processor that rejects the sample image.

    Processors raise a plain :class:`ValueError`, and no narrower class, for one image in a prompt that was written for
    several, and for an image below their smallest size. Neither concerns the images that are to be measured: if their
    own preparation fails as well, its error reaches the caller.
    """

    def prepare_or_reject(images: list[Image.Image]) -> Mapping[str, Any]:
        try:
            return prepare(images)
        except ValueError as error:
            raise _SampleRejectedError from error

    return prepare_or_reject


def cached_pixels(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    prepare: Prepare,
    image_sizes: Sequence[Size],
    video: bool = False,
) -> PixelMaps:
    r"""
    Return the maps of :func:`measure_pixels`, measured once for every :func:`geometry_key`.

    Images of more than a megapixel that the processor shrinks are measured at a smaller size, as in
    :func:`measure_geometry`.

    Args:

        model (PreTrainedModel): The model.
        processor (ProcessorMixin): The processor that ``prepare`` uses.
        prepare (Callable): Computes the model's inputs from images of these sizes.
        image_sizes (Sequence[tuple[int, int]]): (width, height) of each image.
        video (bool, optional): Whether the images are the frames of a video.
                    Default: False

    Returns:
        **maps** (*PixelMaps*): the same object for the same key.

    Raises:
        InvalidInputError, NoPixelMapError: see :func:`measure_pixels`.

    Examples::

        >>> from captum_intramodal.geometry import cached_pixels
        >>> prepare = lambda images: adapter.prepare(images, "describe the picture.")
        >>> cached_pixels(model, processor, prepare, [(320, 224)]).image_sizes
        ((320, 224),)
    """
    sizes = check_sizes(image_sizes)

    def measure() -> PixelMaps:
        maps = measure_pixels(prepare, reduced_sizes(prepare, sizes))
        return PixelMaps({name: map_.in_frame_of(sizes) for name, map_ in maps.items()}, sizes)

    return _measure_once(("pixels", geometry_key(model, processor, sizes, video)), measure)


def _measure_once(key: Hashable, measure: Callable[[], _Measured]) -> _Measured:
    """Return what the cache holds under a key; if there is nothing, measure it."""
    with _cache_lock:
        if key in _cache:
            _cache.move_to_end(key)
            return cast(_Measured, _cache[key])
    measured = measure()  # Unlocked: it may measure a sample, and takes long.
    with _cache_lock:
        measured = cast(_Measured, _cache.setdefault(key, measured))
        _cache.move_to_end(key)
        while len(_cache) > CACHE_SIZE:
            _cache.popitem(last=False)
    return measured
