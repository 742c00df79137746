r"""Sanity check of explanations: a map that explains a model must change when the model's weights do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from captum_intramodal.metrics.statistics import Array, Floats, finite
from captum_intramodal.models.decoder import decoder_layers

__all__ = ["RandomizationStep", "randomization_check"]


class RandomizationStep(NamedTuple):
    r"""How much of the map is left once a layer, after all layers above it, has lost its weights.

    Args:

        layer (str): The layer's name in the model.
        rank_correlation (float): Spearman's, of the map with that of the whole model, from -1 to 1.
        correlation (float): Pearson's, likewise, which the largest values decide.
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
    r"""Compares the map of a model with its maps while the model loses its weights layer by layer, from the top.

    Source: the cascading model parameter randomization test of Adebayo et al., "Sanity checks for saliency maps", 2018.
    There weights are drawn anew as before training. Here, where any model and any type of number may come, each
    parameter keeps its values in a random order: what was learnt is gone, the scale of the activations is not, and
    quantized weights stay valid. A parameter of equal values, such as an untrained norm's, stays as it is. In the end,
    also after an exception, every weight is what it was, bit for bit; gradients and random states are not touched.

    A head that shares its weights with the embeddings takes them along. Residual connections carry features past layers
    without weights: maps of a logit lens can keep their form until the head or the vision tower has lost its own.

    Correlations near 0 are what a map of what the model learnt must reach. One that stays near 1 shows the image, or
    the shape of the network. A map that becomes constant has lost its order: both correlations are 0.

    Args:

        model (torch.nn.Module): The model that ``explain`` explains.
        explain (Callable): Makes the map anew, of the same target at every call: a tensor or array of real numbers,
                    any shape. Give it the original's answer: what the changed model would say is another question.
        layers (Sequence[torch.nn.Module], optional): Modules of the model in the order in which they lose their
                    weights.
                    Default: ``None``, of a transformers model its head, the decoder's parts from the last layer to
                    the embeddings, and what reads the images, such as the vision tower, each as a whole (not the few
                    parameters that stand alone, as that of a newline in an image); of another model all modules with
                    parameters of their own, from the last to the first.
        seed (int): Of the random orders. Default: ``0``

    Returns:
        **steps** (*list[RandomizationStep]*):
            One for each layer, in that order.

    Raises:
        ValueError: no layer, one that is not in the model, has no parameters, or has them on the meta device, as
            offloaded weights are; maps of different shapes, with NaN or infinity, or a constant one to begin with.

    Examples::

        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> inputs = torch.randn(1, 4, requires_grad=True)
        >>> steps = randomization_check(net, lambda: torch.autograd.grad(net(inputs).sum(), inputs)[0] * inputs)
        >>> [step.layer for step in steps]
        ['2', '0']
    """
    order = _layers_from_the_top(model) if layers is None else list(layers)
    names = {module: name for name, module in model.named_modules()}
    if not order:
        raise ValueError(f"There is no layer of {type(model).__name__} to randomize.")
    for layer in order:
        if layer not in names:
            raise ValueError(f"A {type(layer).__name__} among the layers is not a module of {type(model).__name__}.")
        devices = {parameter.device.type for parameter in layer.parameters()}
        if not devices or "meta" in devices:
            raise ValueError(f"Layer {names[layer]!r} has no weights here{': they are offloaded' if devices else ''}.")

    original = finite(explain(), "map")
    if not np.ptp(original):
        raise ValueError(f"The map of the model as it is has one value everywhere, {original.flat[0]}.")
    steps = []
    with _weights_given_back(parameter for layer in order for parameter in layer.parameters()):
        for step, layer in enumerate(order):
            _shuffle(layer, seed + step)
            map = finite(explain(), "map")
            if map.shape != original.shape:
                raise ValueError(f"The map had shape {original.shape}, without {names[layer]!r} it has {map.shape}.")
            ranked = _correlation(_ranks(original), _ranks(map))
            steps.append(RandomizationStep(names[layer], ranked, _correlation(original, map)))
    return steps


def _layers_from_the_top(model: Any) -> list[nn.Module]:
    if not hasattr(model, "get_decoder"):
        return [module for module in model.modules() if any(True for _ in module.parameters(recurse=False))][::-1]
    layers, head, decoder = (
        set(decoder_layers(model)),
        model.get_output_embeddings(),
        set(model.get_decoder().modules()),
    )

    def parts(module: nn.Module) -> list[nn.Module]:
        """The largest modules that hold no layer of the decoder, and those layers."""
        if module in layers or layers.isdisjoint(module.modules()):
            return [module] if any(True for _ in module.parameters()) else []
        return [part for child in module.children() for part in parts(child)]

    downwards = parts(model)[::-1]
    # Not every model lists what reads its images before its decoder.
    return sorted(downwards, key=lambda part: 0 if head in part.modules() else 1 if part in decoder else 2)


@contextmanager
def _weights_given_back(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    # On the CPU: two copies of a large model need not fit into its devices.
    saved = {parameter: parameter.detach().to("cpu", copy=True) for parameter in parameters}
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, values in saved.items():
                parameter.copy_(values)


@torch.no_grad()
def _shuffle(layer: nn.Module, seed: int) -> None:
    generators: dict[torch.device, torch.Generator] = {}
    for parameter in layer.parameters():
        device = parameter.device
        generator = generators.setdefault(device, torch.Generator(device).manual_seed(seed))
        order = torch.randperm(parameter.numel(), generator=generator, device=device)
        parameter.copy_(parameter.flatten()[order].view_as(parameter))


def _ranks(map: Floats) -> Floats:
    """Ranks of all values; equal ones share the mean of theirs."""
    _, inverse, counts = np.unique(map, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[inverse.ravel()]


def _correlation(a: Floats, b: Floats) -> float:
    """Pearson's; 0 where one is constant."""
    if not np.ptp(a) or not np.ptp(b):
        return 0.0
    # Of values from 0 to 1: the squares of very small or large ones would vanish or overflow.
    return float(np.corrcoef(*((map.ravel() - map.min()) / np.ptp(map) for map in (a, b)))[0, 1])
