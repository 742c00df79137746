r"""How an input goes to a scale, what follows it there, and how attributions come back: the pyramids of MSEA."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from captum.attr import Attribution, LayerActivation
from PIL import Image
from torch import Tensor

from captum_intramodal._captum import format_additional_forward_args, format_tensor_into_tuples
from captum_intramodal.coordinates import PixelMap, Prepare, measure_pixels

__all__ = ["LowPass", "Pyramid", "Reprocess", "Resize"]

Arguments = dict[str, Any]
Size = tuple[int, ...]


class Pyramid(Protocol):
    r"""
    What :class:`~captum_intramodal.MSEA` asks of the way to a scale and back. Any object with these two methods is one.

    Arguments that belong to a layer's output (``layer_mask``, ``layer_baselines``, ``neuron_selector``) are no concern
    of a pyramid: MSEA measures the layer at both scales.
    """

    def down(
        self, inputs: tuple[Tensor, ...], kwargs: Mapping[str, Any], scale: float
    ) -> tuple[tuple[Tensor, ...], Arguments]:
        r"""
        Args:

            inputs (tuple[Tensor, ...]): The originals, dimension 0 the examples.
            kwargs (Mapping): The other arguments of the inner method's ``attribute``, by name.
            scale (float): Factor of the size.

        Returns:
            *tuple*: inputs and arguments at this scale.
        """

    def back(
        self, attributions: tuple[Tensor, ...], like: tuple[Tensor, ...], scale: float, preserve_sum: bool
    ) -> tuple[Tensor, ...]:
        r"""
        Args:

            attributions (tuple[Tensor, ...]): What the inner method returned at this scale.
            like (tuple[Tensor, ...]): For each of them a tensor of the size to come back to: the original input where
                        the attribution has the size of the scaled one, else (a layer's) the attribution at the scale
                        closest to 1.
            scale (float): Factor of the size.
            preserve_sum (bool): Whether the attributions' total stays the same, else their values do.

        Returns:
            *tuple[Tensor, ...]*: attributions of the size of ``like``.
        """


class Resize:
    r"""
    The input itself has another size: for models that take any.

    What follows, where it has the spatial size of its input: ``baselines`` (tensors of any number of rows, also a
    distribution's; what a callable returns), by interpolation; ``feature_mask``, by nearest neighbour;
    ``additional_forward_args``, floating-point ones by interpolation, others by nearest neighbour.
    ``sliding_window_shapes`` and ``strides`` are multiplied, rounded and kept within 1 and the input's size; the
    channel dimension is left alone. Inputs without spatial dimensions, and numbers, stay as they are.

    Args:

        interpolate_mode (str, optional): ``'linear'`` (bilinear or trilinear as the input has 2 or 3 spatial
                    dimensions) or ``'nearest'``, for the way down and back; shrinking is antialiased where torch can.
                    Default: ``'linear'``
        inputs (Sequence[int], optional): Which inputs go to a scale, counted from 0; (0,) for a picture and embeddings
                    (N, tokens, width), whose width is no size.
                    Default: None, those with one to three spatial dimensions.
        forward_args (Sequence[int], optional): Which of ``additional_forward_args`` follow, counted from 0.
                    Default: None, tensors of at least a batch dimension that end with the spatial size of an input.

    Examples::

        >>> msea = MSEA(IntegratedGradients(net), scales=(0.5, 1.0), pyramid=Resize("nearest"))
    """

    def __init__(
        self,
        interpolate_mode: Literal["linear", "nearest"] = "linear",
        inputs: Sequence[int] | None = None,
        forward_args: Sequence[int] | None = None,
    ) -> None:
        if interpolate_mode not in ("linear", "nearest"):
            raise ValueError(f"interpolate_mode must be 'linear' or 'nearest', got {interpolate_mode!r}.")
        self.interpolate_mode = interpolate_mode
        self.inputs = inputs
        self.forward_args = forward_args

    def down(
        self, inputs: tuple[Tensor, ...], kwargs: Mapping[str, Any], scale: float
    ) -> tuple[tuple[Tensor, ...], Arguments]:
        """The inputs resized, but at scale 1, and what follows them; see :meth:`Pyramid.down`.

        Raises:
            ValueError: no input with spatial dimensions.
        """
        if scale == 1:
            return inputs, dict(kwargs)
        sizes = _input_sizes(inputs, self.inputs)
        scaled = {size: tuple(max(1, round(side * scale)) for side in size) for size in sizes if size}

        def image(value: Any, size: Size) -> Any:
            return self._resize(value, scaled[size]) if _ends_with(value, size) else value

        def mask(value: Any, size: Size) -> Any:
            return _nearest(value, scaled[size]) if _ends_with(value, size) else value

        def window(value: int | Size, size: Size) -> Size:
            channel, *sides = (value,) * (len(size) + 1) if isinstance(value, int) else value
            moved = zip(sides, size, scaled[size], strict=True)
            return (channel, *(min(max(1, round(side * new / old)), new) for side, old, new in moved))

        changes = {"baselines": image, "feature_mask": mask, "sliding_window_shapes": window, "strides": window}
        arguments = _follow_forward_args(_follow(kwargs, sizes, changes), sizes, image, self.forward_args)
        return tuple(image(t, size) if size else t for t, size in zip(inputs, sizes, strict=True)), arguments

    def back(
        self, attributions: tuple[Tensor, ...], like: tuple[Tensor, ...], scale: float, preserve_sum: bool
    ) -> tuple[Tensor, ...]:
        """Attributions resized; see :meth:`Pyramid.back`.

        Raises:
            ValueError: they differ from ``like`` in other than spatial dimensions.
        """
        return tuple(self._back(part, other, preserve_sum) for part, other in zip(attributions, like, strict=True))

    def _back(self, part: Tensor, like: Tensor, preserve_sum: bool) -> Tensor:
        if part.shape[1:] == like.shape[1:]:
            return part
        if part.ndim != like.ndim or part.ndim < 3 or part.shape[1] != like.shape[1]:
            raise ValueError(
                f"Attributions of shape {tuple(part.shape)} at one scale and {tuple(like.shape)} at another cannot be "
                "aligned, as other than spatial dimensions differ; pyramid=LowPass() keeps all sizes."
            )
        back = self._resize(part, like.shape[2:])
        return back * (math.prod(part.shape[2:]) / math.prod(like.shape[2:])) if preserve_sum else back

    def _resize(self, value: Tensor, size: Sequence[int]) -> Tensor:
        """The last dimensions brought to a size."""
        if tuple(value.shape[-len(size) :]) == tuple(size):
            return value
        if self.interpolate_mode == "nearest" or not value.is_floating_point():
            return _nearest(value, size)
        return _interpolate(value, size)


class LowPass:
    r"""
    The input loses what a smaller one could not show, and keeps its size: for models of a fixed input size.

    Inputs are shrunk (antialiased where torch can) and enlarged again; ``baselines`` of their spatial size and
    floating-point ``additional_forward_args`` alike. Everything else stays as it is, attributions too. A picture has
    nothing that an enlarged one would show and it does not: at scales above 1 it is left as it is.

    Args:

        inputs (Sequence[int], optional): Which inputs go to a scale, counted from 0; (0,) for a picture and embeddings
                    (N, tokens, width), whose width is no size.
                    Default: None, those with one to three spatial dimensions.
        forward_args (Sequence[int], optional): Which of ``additional_forward_args`` follow, counted from 0.
                    Default: None, tensors of at least a batch dimension that end with the spatial size of an input.

    Examples::

        >>> msea = MSEA(IntegratedGradients(vit), scales=(0.25, 0.5, 1.0), pyramid=LowPass())
    """

    def __init__(self, inputs: Sequence[int] | None = None, forward_args: Sequence[int] | None = None) -> None:
        self.inputs = inputs
        self.forward_args = forward_args

    def down(
        self, inputs: tuple[Tensor, ...], kwargs: Mapping[str, Any], scale: float
    ) -> tuple[tuple[Tensor, ...], Arguments]:
        """The inputs without their high frequencies; see :meth:`Pyramid.down`.

        Raises:
            ValueError: no input with spatial dimensions.
        """
        if scale >= 1:
            return inputs, dict(kwargs)
        sizes = _input_sizes(inputs, self.inputs)

        def image(value: Any, size: Size) -> Any:
            if not _ends_with(value, size) or not value.is_floating_point():
                return value
            return _interpolate(_interpolate(value, [max(1, round(side * scale)) for side in size]), size)

        arguments = _follow_forward_args(_follow(kwargs, sizes, {"baselines": image}), sizes, image, self.forward_args)
        return tuple(image(t, size) if size else t for t, size in zip(inputs, sizes, strict=True)), arguments

    def back(
        self, attributions: tuple[Tensor, ...], like: tuple[Tensor, ...], scale: float, preserve_sum: bool
    ) -> tuple[Tensor, ...]:
        """The attributions, which have the size of the original; see :meth:`Pyramid.back`."""
        return attributions


class Reprocess:
    r"""
    The pictures have another size, and go through the model's own processor: its pixel tensors are the inputs.

    For models whose processor is not differentiable, or whose pixel tensors (packed patches, tiles and thumbnail) have
    no spatial dimensions that could be resized. What each element of the tensors samples is measured at every scale
    (:func:`~captum_intramodal.coordinates.measure_pixels`). Attributions come back in the shape of the original tensor:
    each of its elements takes what was attributed around its place in the picture, in whichever tile. Colours share it
    equally; padding gets 0.

    The inputs must be what the processor makes of the pictures, by themselves or behind a batch dimension of 1 (which
    packed patches need, so that Captum does not take patches for examples). Noise belongs inside:
    ``MSEA(NoiseTunnel(method), pyramid=Reprocess(...))``.

    What follows, given in the frame of the pictures: ``baselines``, a PIL picture, or one for each picture (or a
    number); ``feature_mask``, int64 (height, width) segments, or one such tensor for each picture. The first of
    ``additional_forward_args`` are replaced by the processor's other tensors.

    Args:

        prepare (Callable): From a list of PIL pictures to the model's inputs by name, such as
                    ``lambda images: processor(images=images, text=[text], return_tensors="pt")``.
        images (Sequence[PIL.Image.Image]): The pictures.
        inputs (Sequence[str], optional): Names of the pixel tensors that are the inputs, in their order.
                    Default: ``("pixel_values",)``
        forward_args (Sequence[str], optional): Names of the first ``additional_forward_args``, in their order; those
                    that depend on the pictures' size, such as ``("input_ids", "image_grid_thw")``.
                    Default: ``()``

    Examples::

        >>> def forward(pixel_values, input_ids, grid):  # one example after the other
        ...     return torch.cat([model(pixel_values=p, input_ids=i[None], image_grid_thw=g[None]).logits[:, -1]
        ...                       for p, i, g in zip(pixel_values, input_ids, grid)])
        >>> inputs = prepare([picture])
        >>> pyramid = Reprocess(prepare, [picture], forward_args=("input_ids", "image_grid_thw"))
        >>> msea = MSEA(InputXGradient(forward), scales=(0.5, 1.0), pyramid=pyramid)
        >>> attribution = msea.attribute(inputs["pixel_values"][None], target=7,
        ...                              additional_forward_args=(inputs["input_ids"], inputs["image_grid_thw"]))
    """

    def __init__(
        self,
        prepare: Prepare,
        images: Sequence[Image.Image],
        inputs: Sequence[str] = ("pixel_values",),
        forward_args: Sequence[str] = (),
    ) -> None:
        if isinstance(inputs, str) or isinstance(forward_args, str):
            raise TypeError('inputs and forward_args are sequences of names, such as ("pixel_values",).')
        self.prepare = prepare
        self.images = [image.convert("RGB") for image in images]
        self.inputs = tuple(inputs)
        self.forward_args = tuple(forward_args)
        self._maps: dict[float, list[PixelMap]] = {}

    def down(
        self, inputs: tuple[Tensor, ...], kwargs: Mapping[str, Any], scale: float
    ) -> tuple[tuple[Tensor, ...], Arguments]:
        """The processor's tensors of the resized pictures; see :meth:`Pyramid.down`.

        Raises:
            ValueError: the inputs are not what the processor makes of the pictures, or an argument is not given in the
                frame of the pictures.
        """
        self._check_inputs(inputs)
        prepared = self.prepare(self._resized(self.images, scale))
        arguments = dict(kwargs)
        if self.forward_args:
            given = format_additional_forward_args(kwargs.get("additional_forward_args")) or ()
            names = self.forward_args
            arguments["additional_forward_args"] = (*(prepared[name] for name in names), *given[len(names) :])
        if bad := [name for name in ("sliding_window_shapes", "strides") if kwargs.get(name) is not None]:
            raise ValueError(
                f"{', '.join(bad)}: no window slides over the processor's elements; pass windows as segments of the "
                "picture, feature_mask (height, width), to FeatureAblation."
            )
        single = len(inputs) == 1
        if kwargs.get("feature_mask") is not None:
            masks = self._feature_masks(kwargs["feature_mask"], inputs, scale)
            arguments["feature_mask"] = masks[0] if single else masks
        if (baselines := kwargs.get("baselines")) is not None:
            if isinstance(baselines, Image.Image):
                baselines = [baselines] * len(self.images)
            if isinstance(baselines, Sequence) and all(isinstance(picture, Image.Image) for picture in baselines):
                rows = self._like(self.prepare(self._resized(baselines, scale)), inputs)
                arguments["baselines"] = rows[0] if single else rows
            elif not all(isinstance(value, (int, float)) for value in _as_tuple(baselines)):
                raise ValueError(
                    "baselines must be numbers, or a PIL picture for each picture, which goes through the processor at "
                    f"every scale; got {type(baselines).__name__}."
                )
        return self._like(prepared, inputs), arguments

    def back(
        self, attributions: tuple[Tensor, ...], like: tuple[Tensor, ...], scale: float, preserve_sum: bool
    ) -> tuple[Tensor, ...]:
        """Attributions at the elements of the original tensors; see :meth:`Pyramid.back`.

        Raises:
            ValueError: attributions that are not of the pixel tensors.
        """
        if scale == 1:
            return attributions
        sources, targets = self._pixels(scale), self._pixels(1.0)
        shapes = [tuple(part.shape) for part in attributions]
        expected = [tuple(source.shape) for source in sources]
        if len(shapes) != len(expected) or any(s[-len(e) :] != e for s, e in zip(shapes, expected, strict=True)):
            raise ValueError(
                f"Reprocess brings back attributions of pixel tensors {self.inputs}, here of shapes {expected}; got "
                f"{shapes}. A layer's attributions need a model and pyramid with the same layer at all scales."
            )
        return tuple(
            _resample(part, source, target, preserve_sum)
            for part, source, target in zip(attributions, sources, targets, strict=True)
        )

    def _resized(self, pictures: Sequence[Image.Image], scale: float) -> list[Image.Image]:
        sizes = [(max(1, round(i.width * scale)), max(1, round(i.height * scale))) for i in self.images]
        return [
            picture if picture.size == size else picture.resize(size, Image.Resampling.BICUBIC)
            for picture, size in zip((p.convert("RGB") for p in pictures), sizes, strict=True)
        ]

    def _pixels(self, scale: float) -> list[PixelMap]:
        """What the elements of each pixel tensor sample."""
        if scale not in self._maps:
            measured = measure_pixels(self.prepare, [picture.size for picture in self._resized(self.images, scale)])
            if missing := [name for name in self.inputs if name not in measured]:
                raise ValueError(
                    f"The processor's tensors that follow the pictures are {list(measured)}, not {missing}."
                )
            self._maps[scale] = [measured[name] for name in self.inputs]
        return self._maps[scale]

    def _like(self, prepared: Mapping[str, Any], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The processor's tensors with the leading dimensions, dtype and device of the inputs."""
        return tuple(
            prepared[name].reshape(*[1] * (tensor.ndim - prepared[name].ndim), *prepared[name].shape).to(tensor)
            for name, tensor in zip(self.inputs, inputs, strict=True)
        )

    def _check_inputs(self, inputs: tuple[Tensor, ...]) -> None:
        if len(inputs) != len(self.inputs):
            raise ValueError(f"{len(inputs)} inputs for the pixel tensors {self.inputs}.")
        expected = self._like(self.prepare(self.images), inputs)
        for name, given, made in zip(self.inputs, inputs, expected, strict=True):
            if given.shape != made.shape or not torch.allclose(given, made, atol=1e-3, equal_nan=True):
                raise ValueError(
                    f"The input of shape {tuple(given.shape)} is not {name!r}, of shape {tuple(made.shape)}, that the "
                    "processor makes of the pictures. What changes inputs, such as NoiseTunnel, belongs inside MSEA."
                )

    def _feature_masks(
        self, segmentations: Tensor | Sequence[Tensor], inputs: tuple[Tensor, ...], scale: float
    ) -> tuple[Tensor, ...]:
        segments = [segmentations] if isinstance(segmentations, Tensor) else list(segmentations)
        sizes = [(picture.height, picture.width) for picture in self.images]
        if [tuple(s.shape) for s in segments] != sizes:
            raise ValueError(
                f"feature_mask must be one (height, width) segmentation per picture, {sizes}; got "
                f"{[tuple(s.shape) for s in segments]}."
            )
        resized = [
            _nearest(s, (picture.height, picture.width))
            for s, picture in zip(segments, self._resized(self.images, scale), strict=True)
        ]
        return tuple(
            mask.reshape(*[1] * (tensor.ndim - mask.ndim), *mask.shape).to(tensor.device)
            for mask, tensor in zip(
                (pixels.feature_mask(resized) for pixels in self._pixels(scale)), inputs, strict=True
            )
        )


def layer_arguments(
    method: Attribution,
    inputs: tuple[Any, Mapping[str, Any]],
    scaled: tuple[Any, Arguments],
) -> Arguments:
    r"""
    The arguments at a scale, with those in the frame of the method's layer brought to the layer's size there:
    ``layer_mask`` by nearest neighbour, ``layer_baselines`` by interpolation, and the place in ``neuron_selector``.

    Args:

        method (Attribution): The inner method.
        inputs (tuple): Original inputs, as the method takes them, and its arguments.
        scaled (tuple): The same at another scale.
    """
    names = [name for name in ("layer_mask", "layer_baselines", "neuron_selector") if scaled[1].get(name) is not None]
    while hasattr(method, "attribution_method"):
        method = method.attribution_method
    layer = getattr(method, "layer", None)
    shapes = [[tensor.shape for tensor in format_tensor_into_tuples(tensors)] for tensors, _ in (inputs, scaled)]
    if not names or not isinstance(layer, torch.nn.Module) or shapes[0] == shapes[1]:
        return scaled[1]

    def layer_sizes(tensors: Any, kwargs: Mapping[str, Any]) -> list[Size]:
        at_input = kwargs.get("attribute_to_layer_input", kwargs.get("attribute_to_neuron_input", False))
        output = LayerActivation(method.forward_func, layer).attribute(
            tensors, kwargs.get("additional_forward_args"), attribute_to_layer_input=at_input
        )
        return _spatial_sizes(format_tensor_into_tuples(output))

    before, after = layer_sizes(*inputs), layer_sizes(*scaled)
    scaled_size = dict(zip(before, after, strict=True))

    def mask(value: Any, size: Size) -> Any:
        return _nearest(value, scaled_size[size]) if _ends_with(value, size) else value

    def image(value: Any, size: Size) -> Any:
        return _interpolate(value, scaled_size[size]) if _ends_with(value, size) else value

    def place(value: Any, size: Size) -> Any:
        if not isinstance(value, tuple) or len(value) != len(size) + 1:
            return value
        moved = (_moved(at, old, new) for at, old, new in zip(value[1:], size, scaled_size[size], strict=True))
        return (value[0], *moved)

    arguments = _follow(scaled[1], before, {"layer_mask": mask, "layer_baselines": image})
    if "neuron_selector" in names and before[0]:
        arguments["neuron_selector"] = place(arguments["neuron_selector"], before[0])
    return arguments


def _moved(at: int | slice, old: int, new: int) -> int | slice:
    """The index, or the range of indices, of the same place along a dimension of another length."""
    if isinstance(at, int):
        return int((at % old + 0.5) * new / old)
    start, stop, _ = at.indices(old)
    first = min(int(start * new / old), new - 1)
    return slice(first, max(first + 1, math.ceil(stop * new / old)))


def _spatial_sizes(tensors: Sequence[Tensor]) -> list[Size]:
    """The sizes after examples and channels, of up to three dimensions; empty for tensors that have none."""
    return [tuple(tensor.shape[2:]) if 3 <= tensor.ndim <= 5 else () for tensor in tensors]


def _input_sizes(inputs: Sequence[Tensor], chosen: Sequence[int] | None) -> list[Size]:
    """Spatial sizes of the inputs that go to a scale, empty for the others."""
    sizes = _spatial_sizes(inputs)
    if chosen is not None:
        sizes = [size if index in chosen else () for index, size in enumerate(sizes)]
    if not any(sizes):
        raise ValueError(
            f"MSEA resizes inputs with spatial dimensions (N, C, ...), got shapes "
            f"{[tuple(tensor.shape) for tensor in inputs]}; use scales=(1.0,) for inputs that have none."
        )
    return sizes


def _ends_with(value: Any, size: Size) -> bool:
    return isinstance(value, Tensor) and tuple(value.shape[-len(size) :]) == size


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _nearest(value: Tensor, size: Sequence[int]) -> Tensor:
    """The last dimensions brought to a size by nearest neighbour, in any dtype."""
    for dim, new in zip(range(-len(size), 0), size, strict=True):
        index = (torch.arange(new, device=value.device) + 0.5) * (value.shape[dim] / new)
        value = value.index_select(dim, index.long())
    return value


def _interpolate(value: Tensor, size: Sequence[int]) -> Tensor:
    """The last dimensions brought to a size linearly, at least in float32."""
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(size)]
    old = value.shape[-len(size) :]
    antialias = mode == "bilinear" and any(n < o for n, o in zip(size, old, strict=True))
    stack = value.reshape(-1, 1, *old).to(torch.promote_types(value.dtype, torch.float32))
    resized = F.interpolate(stack, size=tuple(size), mode=mode, align_corners=False, antialias=antialias)
    return resized.to(value.dtype).reshape(*value.shape[: -len(size)], *size)


def _follow(
    kwargs: Mapping[str, Any], sizes: Sequence[Size], changes: Mapping[str, Callable[[Any, Size], Any]]
) -> Arguments:
    """Arguments that Captum takes one of per input, or bare for a single input, changed with their input's size."""

    def change(name: str, value: Any) -> Any:
        if callable(value):
            # Captum calls baselines with the inputs, or without, as they are written.
            takes_inputs = bool(inspect.signature(value).parameters)
            return (lambda inputs: change(name, value(inputs))) if takes_inputs else (lambda: change(name, value()))
        each = value if isinstance(value, tuple) and len(value) == len(sizes) else (value,)
        if len(each) != len(sizes):
            return value
        changed = tuple(changes[name](v, size) if size else v for v, size in zip(each, sizes, strict=True))
        return changed if each is value else changed[0]

    return {
        name: change(name, value) if name in changes and value is not None else value for name, value in kwargs.items()
    }


def _follow_forward_args(
    kwargs: Arguments, sizes: Sequence[Size], change: Callable[[Any, Size], Any], which: Sequence[int] | None
) -> Arguments:
    """``additional_forward_args`` changed where they look like one of the inputs, or those that were asked for."""
    given = format_additional_forward_args(kwargs.get("additional_forward_args"))
    if given is None:
        return kwargs

    def changed(index: int, value: Any) -> Any:
        if not isinstance(value, Tensor) or (which is not None and index not in which):
            return value
        size = next((s for s in sizes if s and value.ndim > len(s) and _ends_with(value, s)), None)
        return value if size is None else change(value, size)

    return kwargs | {"additional_forward_args": tuple(changed(index, value) for index, value in enumerate(given))}


def _resample(values: Tensor, source: PixelMap, target: PixelMap, preserve_sum: bool) -> Tensor:
    """Values at a pixel tensor's elements, interpolated at another's of the same pictures."""
    leading = values.shape[: values.ndim - len(source.shape)]
    flat = values.reshape(-1, *source.shape)
    result = torch.zeros(len(flat), len(target.gain), device=values.device)
    for image, ((width, height), size) in enumerate(zip(source.image_sizes, target.image_sizes, strict=True)):
        seen = (source.gain != 0) & (source.image_index == image)
        shown = ((target.gain != 0) & (target.image_index == image)).nonzero().flatten()
        pitch = (source.upper - source.lower)[:, seen].median(1).values.tolist()
        grid = (max(1, round(height / pitch[1])), max(1, round(width / pitch[0])))
        # Sums and counts are interpolated alike, so that their ratio is a mean and empty cells count for nothing.
        cells = torch.cat([source.fold(flat, grid, image), source.fold(torch.ones_like(flat[:1]), grid, image)])
        centre = (target.lower + target.upper)[:, shown] / torch.tensor(size)[:, None] - 1
        points = centre.T.to(cells)[None, None]
        sampled = F.grid_sample(cells[None], points, mode="bilinear", padding_mode="border", align_corners=False)[
            0, :, 0
        ]
        means = sampled[:-1] / sampled[-1:].clamp_min(1e-6)
        result[:, shown.to(result.device)] = means * (float(seen.sum()) / len(shown)) if preserve_sum else means
    return result.reshape(*leading, *target.shape).to(values.dtype)
