r"""Early exit: run a model only as far as the deepest layer that is needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from captum_intramodal.errors import InvalidInputError
from captum_intramodal.models.hooks import capture_outputs

__all__ = ["run_layers"]


def run_layers(
    forward: Callable[[], Any],
    layers: Sequence[nn.Module],
    select: Callable[[Tensor], Tensor] | None = None,
) -> list[Tensor]:
    r"""
    Compute the outputs of layers, without gradients.

    Args:

        forward (Callable): Runs a forward pass of a model; left as soon as all layers have run.
        layers (Sequence[torch.nn.Module]): Layers of that model.
        select (Callable, optional): Applied to each output at once.
                    Default: None, the whole output.

    Returns:
        **outputs** (*list[Tensor]*): the (selected) hidden states of each layer.

    Raises:
        InvalidInputError: a layer did not run.

    Examples::

        >>> from captum_intramodal.models.early_exit import run_layers
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
        >>> [output.shape for output in run_layers(lambda: net(torch.zeros(1, 4)), [net[0]])]
        [torch.Size([1, 3])]
    """
    with torch.no_grad(), capture_outputs(layers, select, stop=True) as outputs:
        forward()
    if missing := [type(layer).__name__ for layer in layers if layer not in outputs]:
        raise InvalidInputError(
            f"{len(missing)} of {len(layers)} layers ({', '.join(missing)}) did not run in the forward pass; pass "
            "layers of the model that the forward function calls."
        )
    return [outputs[layer] for layer in layers]
