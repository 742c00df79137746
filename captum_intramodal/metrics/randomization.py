r"""Check sanity: does an explanation map change when the model's weights are randomized? If not, it does not explain
what the model learned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from captum_intramodal.errors import InvalidInputError, InvalidOptionError
from captum_intramodal.metrics.arrays import Array, Floats, finite_array
from captum_intramodal.models.decoder import decoder_layers

__all__ = ["RandomizationStep", "randomization_check"]


class RandomizationStep(NamedTuple):
    r"""Similarity of the original map to the map after a layer, and all layers above it, are randomized.

    Args:

        layer (str): Name of the layer in the model.
        rank_correlation (float): Spearman's correlation, from -1 to 1.
        correlation (float): Pearson's correlation, from -1 to 1, which the largest values dominate.
    """

    layer: str
    rank_correlation: float
    correlation: float


def randomization_check(
    model: nn.Module,
    explain: Callable[[], Array],
    layers: Sequence[nn.Module] | None = None,
    seed: int = 0,
) -> list[RandomizationStep]:
    r"""Compare a model's map with its maps while the model's weights are randomized layer by layer, from the top.

    Source: the cascading model parameter randomization test of Adebayo et al., "Sanity checks for saliency maps", 2018.
    The paper draws new weights as before training. Here each parameter's values are shuffled instead, which suits any
    model and dtype: it destroys what was learned, keeps the scale of the activations, and leaves quantized weights
    valid. A parameter of equal values, such as an untrained norm, does not change. At the end, also after an exception,
    all weights are restored bit for bit; gradients and random states are not touched.

    A head that shares its weights with the embeddings randomizes both. Residual connections carry features past
    randomized layers, so that logit lens maps can keep their shape until the head or the vision tower is randomized.

    A map of what the model learned must reach correlations near 0. A correlation that stays near 1 means that the map
    depends on the image, or on the architecture, alone. If a map becomes constant, both correlations are 0.

    Args:

        model (torch.nn.Module): The explained model.
        explain (Callable): Function that recomputes the map of the same target at every call: a tensor or array of real
                    numbers, any shape. Let it explain the original answer, not the changed model's.
        layers (Sequence[torch.nn.Module], optional): Modules of the model, in the order in which they are randomized.
                    Default: ``None``. For a transformers model: the head, the decoder's parts from the last layer to
                    the embeddings, and the modules that process images, such as the vision tower, each as a whole
                    (but no parameter outside of a module, such as an image newline). For any other model: all modules
                    with their own parameters, from the last to the first.
        seed (int): Seed for shuffling.
                    Default: ``0``

    Returns:
        **steps** (*list[RandomizationStep]*):
            One per layer, in the same order.

    Raises:
        InvalidOptionError: There is no layer, or a layer is not in the model, has no parameters, or has them on the
            meta device, as offloaded weights are.
        InvalidInputError: Maps differ in shape or are not finite, or the original map is constant.

    Examples::

        >>> from captum_intramodal.metrics import randomization_check
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1))
        >>> inputs = torch.randn(1, 4, requires_grad=True)
        >>> steps = randomization_check(net, lambda: torch.autograd.grad(net(inputs).sum(), inputs)[0] * inputs)
        >>> [step.layer for step in steps]
        ['2', '0']
    """
    order = _layers_from_the_top(model) if layers is None else list(layers)
    names = {module: name for name, module in model.named_modules()}
    _check_layers(order, names, type(model).__name__)
    original = finite_array(explain(), "map")
    if not np.ptp(original):
        raise InvalidInputError(
            f"The map of the original model has one value everywhere, {original.flat[0]}; pass one that varies."
        )
    steps = []
    with _restored_weights(parameter for layer in order for parameter in layer.parameters()):
        for step, layer in enumerate(order):
            _shuffle_weights(layer, seed + step)
            map = finite_array(explain(), "map")
            if map.shape != original.shape:
                raise InvalidInputError(
                    f"The original map has shape {original.shape}, but with {names[layer]!r} randomized {map.shape}; "
                    "explain must return maps of the same target and shape."
                )
            rank_correlation = _correlation(_average_ranks(original), _average_ranks(map))
            steps.append(RandomizationStep(names[layer], rank_correlation, _correlation(original, map)))
    return steps


def _check_layers(layers: Sequence[nn.Module], names: Mapping[nn.Module, str], model: str) -> None:
    """Check that there are layers, and that all belong to the model and have weights in memory."""
    if not layers:
        raise InvalidOptionError(f"There is no layer of {model} to randomize; pass a module with parameters.")
    for layer in layers:
        if layer not in names:
            raise InvalidOptionError(f"A {type(layer).__name__} in layers is not a module of {model}.")
        devices = {parameter.device.type for parameter in layer.parameters()}
        if not devices:
            raise InvalidOptionError(f"Layer {names[layer]!r} has no weights to randomize; leave it out.")
        if "meta" in devices:
            raise InvalidOptionError(
                f"Layer {names[layer]!r} has weights on the meta device: they are offloaded; load the model in memory."
            )


def _layers_from_the_top(model: Any) -> list[nn.Module]:
    """List a model's layers from the output to the input: the head, the decoder, and what processes images."""
    if not hasattr(model, "get_decoder"):
        return [module for module in model.modules() if any(True for _ in module.parameters(recurse=False))][::-1]
    layers, decoder = set(decoder_layers(model)), set(model.get_decoder().modules())
    head = model.get_output_embeddings()

    def parts(module: nn.Module) -> list[nn.Module]:
        """List the decoder's layers and the largest modules that contain none of them."""
        if module in layers or layers.isdisjoint(module.modules()):
            return [module] if any(True for _ in module.parameters()) else []
        return [part for child in module.children() for part in parts(child)]

    from_the_top = parts(model)[::-1]
    # Not every model registers its vision tower before its decoder.
    return sorted(from_the_top, key=lambda part: 0 if head in part.modules() else 1 if part in decoder else 2)


@contextmanager
def _restored_weights(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Restore parameters at exit."""
    # Copies are on the CPU because a large model may not fit on its devices twice.
    saved = {parameter: parameter.detach().to("cpu", copy=True) for parameter in parameters}
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, values in saved.items():
                parameter.copy_(values)


@torch.no_grad()
def _shuffle_weights(layer: nn.Module, seed: int) -> None:
    """Shuffle the values of each parameter in place."""
    generators: dict[torch.device, torch.Generator] = {}
    for parameter in layer.parameters():
        device = parameter.device
        generator = generators.setdefault(device, torch.Generator(device).manual_seed(seed))
        order = torch.randperm(parameter.numel(), generator=generator, device=device)
        parameter.copy_(parameter.flatten()[order].view_as(parameter))


def _average_ranks(map: Floats) -> Floats:
    """Rank all values; equal values share their mean rank."""
    _, inverse, counts = np.unique(map, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[inverse.ravel()]


def _correlation(a: Floats, b: Floats) -> float:
    """Compute Pearson's correlation; return 0 if an array is constant."""
    if not np.ptp(a) or not np.ptp(b):
        return 0.0
    # Values are scaled to [0, 1] because squares of very small or large ones would vanish or overflow.
    return float(np.corrcoef(*((map.ravel() - map.min()) / np.ptp(map) for map in (a, b)))[0, 1])
