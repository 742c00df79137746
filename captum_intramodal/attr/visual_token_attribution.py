r"""From values at a decoder's positions to maps over the image."""

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
from captum_intramodal.functional.rasterize import raster_grid, rasterize

__all__ = ["VisualTokenAttribution", "draw_positions"]


def draw_positions(
    values: Tensor, adapter: ModelAdapter, input_ids: Tensor, image_sizes: Sequence[tuple[int, int]]
) -> list[Tensor]:
    r"""
    Draws values at the positions of a decoder's sequence over the images: those at visual tokens, each where it looks
    at, interpolated linearly between the tokens' centers. Parts that no token sees are 0.

    Args:

        values (Tensor): (..., positions), such as what ARC around a layer method returns.
        adapter (ModelAdapter): The model and its processor.
        input_ids (Tensor): The sequence, int64 (positions,) or (1, positions).
        image_sizes (Sequence[tuple[int, int]]): (width, height) of each image in the sequence.

    Returns:
        *list[Tensor]*: for each image float32 (..., height, width).

    Raises:
        ValueError: as many values as the sequence has no positions; images of other sizes than those in the sequence;
            a model whose visual tokens have no place in the image.

    Examples::

        >>> values = ARC(LayerIntegratedGradients(forward, layer)).attribute_all(image)  # (tokens, positions)
        >>> (maps,) = draw_positions(values, adapter, forward.inputs(image[0])["input_ids"], [(256, 192)])
        >>> maps.shape
        torch.Size([tokens, 192, 256])
    """
    ids = input_ids.flatten()
    if values.shape[-1] != len(ids):
        raise ValueError(f"{values.shape[-1]} values for a sequence of {len(ids)} positions.")
    geometry = adapter.geometry(image_sizes)
    at_visual = values[..., adapter.visual_positions(ids).to(values.device)].flatten(0, -2).float()
    if at_visual.shape[-1] != len(geometry.boxes):
        raise ValueError(
            f"The sequence has {at_visual.shape[-1]} visual tokens, but images of {list(image_sizes)} (width, "
            f"height) have {len(geometry.boxes)}; pass the sizes of the images that the sequence was made from."
        )
    maps = []
    for image, (width, height) in enumerate(image_sizes):
        sees = geometry.sees(image)
        boxes = geometry.boxes[sees].to(values.device)
        drawn = rasterize(at_visual[:, sees], boxes, (width, height), raster_grid(boxes, (width, height)))
        full = F.interpolate(drawn[None], size=(height, width), mode="bilinear")[0]
        maps.append(full.reshape(*values.shape[:-1], height, width))
    return maps


class VisualTokenAttribution(WrapperAttribution):
    r"""
    A layer method at a decoder layer as an attribution over the image: the values at visual tokens, drawn where each
    token looks at. Whatever composes around attributions of images composes around it: MSEA, ARC, NoiseTunnel.

    Where the layer method multiplies by inputs (integrated gradients, gradient x activation, ...), maps are densities:
    a token's value is spread over its part of the image, so that the sum over the image's pixels is the sum over
    visual tokens, however many the image has at some scale. Other methods' maps have the tokens' own values.

    Args:

        attribution_method (Attribution): A layer method whose layer is a module of the decoder, such as
                    ``LayerIntegratedGradients(forward, model.get_decoder().layers[0])``, or ``NoiseTunnel`` around one,
                    with a ``PixelForward`` as forward function.
        reduce (str or Callable, optional): How a position's hidden features become one value: ``'sum'``; ``'norm'``,
                    for methods without a target's sign such as ``LayerActivation``; or a function from the method's
                    attribution to (B, positions).
                    Default: ``'sum'``

    Examples::

        >>> method = VisualTokenAttribution(LayerGradCam(forward, model.get_decoder().layers[-2]))
        >>> method.attribute(image, target=(4, token_id)).shape     # image: 1x3x192x256
        torch.Size([1, 1, 192, 256])
        >>> MSEA(method, scales=(1.0, 1.5)).attribute(image, target=(4, token_id)).shape
        torch.Size([1, 1, 192, 256])
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
                "The layer method's forward function must be a PixelForward, which knows what the image becomes, "
                f"got {type(self.forward_func).__name__}; for others, draw the values yourself with draw_positions."
            )

    @log_usage(part_of_slo=True)
    def attribute(
        self, inputs: Tensor | tuple[Tensor, ...], target: Any = None, **kwargs: Any
    ) -> Tensor | tuple[Tensor, ...]:
        r"""
        Args:

            inputs (Tensor): Images, float (N, 3, height, width) in [0, 1].
            target (int, tuple, list or Tensor, optional): As the layer method takes it.
                        Default: None, for methods without a target.
            **kwargs (Any, optional): Further arguments of the layer method: ``n_steps``, ``attribute_to_layer_input``,
                        ...

        Returns:
            *Tensor* float32 (N, 1, height, width); (N, n, height, width) for methods that take n targets at once, as
            ``LayerLogitLens`` does. In a tuple of one if ``inputs`` are.

        Raises:
            ValueError: several inputs; the layer method gives no values at positions of the decoder's sequence; the
                model's visual tokens have no place in the image.
        """
        images, *others = format_tensor_into_tuples(inputs)
        if others:
            raise ValueError(f"VisualTokenAttribution takes one tensor of images, got {1 + len(others)} inputs.")
        forward: Any = self.forward_func
        if target is not None:
            kwargs["target"] = target
        values = attribute_positions(self.attribution_method, images, self.reduce, **kwargs)
        ids = forward.inputs(images[0].detach())["input_ids"]
        count, _, height, width = images.shape
        if values.ndim not in (2, 3) or values.shape[0] != count or values.shape[-1] != ids.shape[1]:
            raise ValueError(
                f"{type(self.attribution_method).__name__} gave {tuple(values.shape)} for {count} images and a "
                f"sequence of {ids.shape[1]} positions; its layer must be a module of the decoder, and reduce must "
                "leave one value per position."
            )
        values = values.reshape(count, -1, ids.shape[1])
        (maps,) = draw_positions(values, forward.adapter, ids, [(width, height)])
        if self.multiplies_by_inputs:
            (seen,) = draw_positions(torch.ones_like(values[:1, :1]), forward.adapter, ids, [(width, height)])
            tokens = forward.adapter.geometry([(width, height)]).is_local.sum()
            maps = maps * (tokens / seen.sum())
        return (maps,) if isinstance(inputs, tuple) else maps
