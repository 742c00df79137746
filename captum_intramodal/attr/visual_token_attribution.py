r"""Maps over the image from attributions of a decoder's positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from captum.attr import Attribution
from torch import Tensor

from captum_intramodal._utils.captum import WrapperAttribution, format_tensor_into_tuples, log_usage
from captum_intramodal.adapter.model_adapter import ModelAdapter
from captum_intramodal.attr.hidden_states import Reduction, attribute_positions, check_reduction, layer_method
from captum_intramodal.attr.pixel_forward import PixelForward
from captum_intramodal.errors import InvalidInputError
from captum_intramodal.functional.rasterize import raster_grid, rasterize

__all__ = ["VisualTokenAttribution", "draw_positions"]


def draw_positions(
    values: Tensor, adapter: ModelAdapter, input_ids: Tensor, image_sizes: Sequence[tuple[int, int]]
) -> list[Tensor]:
    r"""
    Draw values at the positions of a decoder's sequence over the images: those of visual tokens, each over the region
    that its token covers, interpolated linearly between the centers of the tokens. Pixels that no token covers are 0.

    Args:

        values (Tensor): (..., positions), such as the attributions of ARC around a layer method.
        adapter (ModelAdapter): The model and its processor.
        input_ids (Tensor): The sequence, int64 (positions,) or (1, positions).
        image_sizes (Sequence[tuple[int, int]]): (width, height) of each image in the sequence, in pixels.

    Returns:
        **maps** (*list[Tensor]*): for each image float32 (..., height, width).

    Raises:
        InvalidInputError: if the number of values differs from the sequence length, or the sizes are not those of the
            images in the sequence.
        NoTokenGeometryError: if the model's visual tokens do not cover known regions of the image.

    Examples::

        >>> from captum_intramodal import PixelForward, draw_positions
        >>> forward = PixelForward(adapter, "describe the picture.", "a dog.")
        >>> ids = forward.inputs(torch.rand(3, 96, 128))["input_ids"]
        >>> (maps,) = draw_positions(torch.rand(5, ids.shape[1]), adapter, ids, [(128, 96)])
        >>> maps.shape
        torch.Size([5, 96, 128])
    """
    ids = input_ids.flatten()
    if values.shape[-1] != len(ids):
        raise InvalidInputError(f"Got {values.shape[-1]} values for a sequence of {len(ids)} positions.")
    geometry = adapter.geometry(image_sizes)
    visual = values[..., adapter.visual_positions(ids).to(values.device)].flatten(0, -2).float()
    if visual.shape[-1] != len(geometry.boxes):
        raise InvalidInputError(
            f"The sequence has {visual.shape[-1]} visual tokens, but images of {list(image_sizes)} (width, height) "
            f"have {len(geometry.boxes)}; pass the sizes of the images in the sequence."
        )
    maps = []
    for image, (width, height) in enumerate(image_sizes):
        covers_image = geometry.sees(image)
        boxes = geometry.boxes[covers_image].to(values.device)
        coarse = rasterize(visual[:, covers_image], boxes, (width, height), raster_grid(boxes, (width, height)))
        full = F.interpolate(coarse[None], size=(height, width), mode="bilinear")[0]
        maps.append(full.reshape(*values.shape[:-1], height, width))
    return maps


class VisualTokenAttribution(WrapperAttribution):
    r"""
    Attribution over the image from a layer method at a decoder layer: the values of visual tokens, each drawn over the
    region of the image that its token covers. MSEA, ARC and NoiseTunnel can wrap it like any attribution of an image.

    If the layer method multiplies by inputs (integrated gradients, gradient x activation, ...), maps are densities: a
    token's value is spread over its region, so that the sum over the image's pixels equals the sum over visual tokens
    at any scale. Maps of other methods contain the tokens' own values.

    Args:

        attribution_method (Attribution): A layer method whose layer is a module of the decoder, such as
                    ``LayerIntegratedGradients(forward, model.get_decoder().layers[0])``, or a ``NoiseTunnel`` around
                    one, with a ``PixelForward`` as forward function.
        reduce (str or Callable, optional): How the features of a position become one value: ``'sum'``; ``'norm'``, for
                    methods without the sign of a target, such as ``LayerActivation``; or a function from the method's
                    attributions to (B, positions).
                    Default: ``'sum'``

    Raises:
        TypeError: if ``attribution_method`` is not a method of one layer, or its forward function not a PixelForward.
        InvalidOptionError: if ``reduce`` is unknown.

    Examples::

        >>> from captum.attr import LayerGradCam
        >>> from captum_intramodal import MSEA, PixelForward, VisualTokenAttribution
        >>> forward, pixels = PixelForward(adapter, "describe the picture.", "a dog."), torch.rand(1, 3, 96, 128)
        >>> method = VisualTokenAttribution(LayerGradCam(forward, model.get_decoder().layers[-2]))
        >>> method.attribute(pixels, target=forward.targets[1]).shape
        torch.Size([1, 1, 96, 128])
        >>> MSEA(method, scales=(1.0, 1.5)).attribute(pixels, target=forward.targets[1]).shape
        torch.Size([1, 1, 96, 128])
    """

    def __init__(self, attribution_method: Attribution, reduce: Reduction = "sum") -> None:
        if layer_method(attribution_method) is None:
            raise TypeError(
                "attribution_method must be a Captum LayerAttribution of one layer, got "
                f"{type(attribution_method).__name__}."
            )
        check_reduction(reduce)
        self.attribution_method = attribution_method
        self.reduce = reduce
        if not isinstance(self.forward_func, PixelForward):
            raise TypeError(
                "The layer method's forward function must be a PixelForward, which knows the inputs made from an "
                f"image, got {type(self.forward_func).__name__}; for others, call draw_positions on the values."
            )

    @log_usage(part_of_slo=True)
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: int | tuple[int, ...] | list[int] | list[tuple[int, ...]] | Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor | tuple[Tensor, ...]:
        r"""
        Attribute with the layer method and draw the values of visual tokens over the image.

        Args:

            inputs (Tensor): Images, float (N, 3, height, width) in [0, 1].
            target (int, tuple, list or Tensor, optional): Target of the layer method.
                        Default: None, for methods without a target
            **kwargs (Any, optional): Further arguments of the layer method, such as ``n_steps`` and
                        ``attribute_to_layer_input``.

        Returns:
            **attributions** (*Tensor*): float32 (N, 1, height, width); (N, n, height, width) for methods that take n
            targets at once, such as ``LayerLogitLens``. A tuple of one if ``inputs`` are a tuple.

        Raises:
            InvalidInputError: if there are several inputs, or the layer method returns no values at positions of the
                decoder's sequence.
            NoTokenGeometryError: if the model's visual tokens do not cover known regions of the image.
        """
        images, *others = format_tensor_into_tuples(inputs)
        if others:
            raise InvalidInputError(
                f"VisualTokenAttribution takes one tensor of images, got a tuple of {1 + len(others)} tensors."
            )
        forward: Any = self.forward_func
        if target is not None:
            kwargs["target"] = target
        values = attribute_positions(self.attribution_method, images, self.reduce, **kwargs)
        ids = forward.inputs(images[0].detach())["input_ids"]
        count, _, height, width = images.shape
        if values.ndim not in (2, 3) or values.shape[0] != count or values.shape[-1] != ids.shape[1]:
            raise InvalidInputError(
                f"{type(self.attribution_method).__name__} returned {tuple(values.shape)} for {count} images and a "
                f"sequence of {ids.shape[1]} positions; its layer must be a module of the decoder, and reduce must "
                "leave one value per position."
            )
        values = values.reshape(count, -1, ids.shape[1])
        (maps,) = draw_positions(values, forward.adapter, ids, [(width, height)])
        if self.multiplies_by_inputs:
            (coverage,) = draw_positions(torch.ones_like(values[:1, :1]), forward.adapter, ids, [(width, height)])
            tokens = forward.adapter.geometry([(width, height)]).is_local.sum()
            maps = maps * (tokens / coverage.sum())
        return (maps,) if isinstance(inputs, tuple) else maps
