r"""TODO."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from math import prod
from typing import Any, cast

from transformers import PreTrainedModel

from captum_intramodal.geometry.measure import measure_geometry
from captum_intramodal.geometry.pixel_map import PixelMaps, Prepare, Size, check_sizes
from captum_intramodal.geometry.pixel_probe import measure_pixels, reduced_sizes
from captum_intramodal.geometry.raster import SAMPLE, expected_raster
from captum_intramodal.geometry.token_geometry import TokenGeometry

__all__ = ["cached_geometry", "cached_pixels", "geometry_key"]

CACHE_SIZE = 128


_cache: OrderedDict[Hashable, TokenGeometry | PixelMaps] = OrderedDict()


_cache_lock = threading.Lock()


def _settings(value: Any) -> Any:
    return value.to_dict() if hasattr(value, "to_dict") else repr(value)


def geometry_key(model: PreTrainedModel, processor: Any, image_sizes: Sequence[Size], video: bool = False) -> Hashable:
    r"""What a measured geometry depends on: the processor's settings, the image sizes, the vision configuration.

    Settings given to the processor at call time are not part of it; change the processor's own instead.

    Args:

        model (PreTrainedModel): The model; its config without the language model's part counts.
        processor: The model's processor; its settings and those of its image processor count.
        image_sizes (Sequence[tuple[int, int]]): (width, height) of each image.
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
    r"""As :func:`measure_geometry`, measured once for every :func:`geometry_key`; the last 128 are kept. An image's
    raster of equal tokens is expected after that of a small one, see :func:`expected_raster`.

    Args:

        model (PreTrainedModel): The model.
        processor: The processor that ``prepare`` uses.
        prepare (Callable): From images of these sizes to the model's inputs.
        image_sizes (Sequence[tuple[int, int]]): (width, height) of each image.
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
            except ValueError:  # Some images are too small for a processor.
                pass
            else:
                expected = expected_raster(model, prepare, sample, sizes)
        return measure_geometry(model, prepare, sizes) if expected is None else expected

    return cast(TokenGeometry, _cached(("tokens", geometry_key(model, processor, sizes, video)), measure))


def cached_pixels(
    model: PreTrainedModel, processor: Any, prepare: Prepare, image_sizes: Sequence[Size], video: bool = False
) -> PixelMaps:
    """As :func:`~captum_intramodal.coordinates.measure_pixels`, measured once for every :func:`geometry_key`.

    Images of more than a megapixel that the processor shrinks are measured on smaller ones, as by
    :func:`measure_geometry`.
    """
    sizes = check_sizes(image_sizes)

    def measure() -> PixelMaps:
        maps = measure_pixels(prepare, reduced_sizes(prepare, sizes))
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
