r"""Adapt the arguments that belong to a layer's output to the layer's size at another scale."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from captum.attr import Attribution, LayerActivation

from captum_intramodal._utils.captum import format_tensor_into_tuples
from captum_intramodal.attr.pyramids.arguments import ends_with, follow_inputs, move_index, spatial_sizes
from captum_intramodal.attr.pyramids.base import Arguments, Size
from captum_intramodal.attr.pyramids.interpolation import resize_linear, resize_nearest

__all__ = ["layer_arguments"]


def layer_arguments(
    method: Attribution,
    inputs: tuple[Any, Mapping[str, Any]],
    scaled: tuple[Any, Arguments],
) -> Arguments:
    r"""
    Return the arguments at a scale, with those of the method's layer adapted to the layer's size: ``layer_mask`` by
    nearest neighbor, ``layer_baselines`` by interpolation, and the position in ``neuron_selector``.

    Args:

        method (Attribution): The inner method.
        inputs (tuple): The original inputs, as the method takes them, and its arguments.
        scaled (tuple): The inputs and arguments at another scale.
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
        return spatial_sizes(format_tensor_into_tuples(output))

    original = layer_sizes(*inputs)
    scaled_size = dict(zip(original, layer_sizes(*scaled), strict=True))

    def resize_mask(value: Any, size: Size) -> Any:
        return resize_nearest(value, scaled_size[size]) if ends_with(value, size) else value

    def resize_baseline(value: Any, size: Size) -> Any:
        return resize_linear(value, scaled_size[size]) if ends_with(value, size) else value

    def move_selector(value: Any, size: Size) -> Any:
        if not isinstance(value, tuple) or len(value) != len(size) + 1:
            return value
        moved = (move_index(at, old, new) for at, old, new in zip(value[1:], size, scaled_size[size], strict=True))
        return (value[0], *moved)

    arguments = follow_inputs(scaled[1], original, {"layer_mask": resize_mask, "layer_baselines": resize_baseline})
    if "neuron_selector" in names and original[0]:
        arguments["neuron_selector"] = move_selector(arguments["neuron_selector"], original[0])
    return arguments
