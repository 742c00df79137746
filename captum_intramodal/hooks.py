r"""Borrowed state that is always given back: forward hooks and early exits from a model's forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "capture_outputs",
    "evaluation_mode",
    "first_tensor",
    "hidden_rows",
    "put_rows",
    "replace_first_tensor",
    "requires_grad_given_back",
    "run_layers",
]


class _Finished(Exception):
    """Raised by a hook to leave a forward pass whose rest is not needed."""


def first_tensor(output: Any) -> Tensor:
    """The hidden states in a layer's output: the tensor itself, or the first element of a tuple or ModelOutput."""
    while not isinstance(output, Tensor):
        try:
            output = output[0]
        except (TypeError, IndexError, KeyError):
            raise TypeError(
                f"Expected a tensor, or a tuple that begins with one; got {type(output).__name__}."
            ) from None
    return output


def hidden_rows(hidden: Tensor) -> Tensor:
    """Hidden states of the only example, one row per position: (1, T, D) -> (T, D).

    Some decoders have several residual streams, (S, 1, T, D) in Gemma 3n and (1, T, S, D) in GLM-5; their features
    stand side by side: (T, S x D).
    """
    if hidden.ndim == 4:
        return (hidden[0] if hidden.shape[0] == 1 else hidden[:, 0].transpose(0, 1)).flatten(1)
    return hidden[0]


def put_rows(hidden: Tensor, rows: Tensor) -> Tensor:
    """A copy of hidden states whose last positions are ``rows``, as :func:`hidden_rows` gives them."""
    count = len(rows)
    result = hidden.clone()
    if hidden.ndim == 4 and hidden.shape[0] == 1:
        result[0, -count:] = rows.to(hidden).reshape(count, hidden.shape[2], -1)
    elif hidden.ndim == 4:
        result[:, 0, -count:] = rows.to(hidden).reshape(count, hidden.shape[0], -1).transpose(0, 1)
    else:
        result[0, -count:] = rows.to(hidden)
    return result


def replace_first_tensor(output: Any, value: Tensor) -> Any:
    """A layer's output with other hidden states in the place where :func:`first_tensor` finds them."""
    if isinstance(output, Tensor):
        return value
    if isinstance(output, tuple) and type(output) is tuple:
        return (replace_first_tensor(output[0], value), *output[1:])
    if isinstance(output, list):
        return [replace_first_tensor(output[0], value), *output[1:]]
    raise TypeError(f"The hidden states in a {type(output).__name__} cannot be replaced.")


@contextmanager
def capture_outputs(
    modules: Sequence[nn.Module],
    select: Callable[[Tensor], Tensor] | None = None,
    stop: bool = False,
) -> Iterator[dict[nn.Module, Tensor]]:
    r"""Collects what modules return while the body of the ``with`` statement runs a forward pass.

    Args:

        modules (Sequence[torch.nn.Module]): Modules to read; of a module that runs several times, the last call counts.
        select (Callable, optional): Applied to each output at once, so that only what is needed stays in memory.
                    Default: None, the whole output.
        stop (bool, optional): Leave the body as soon as every module has run; the rest of the forward pass (deeper
                    layers, the language-model head) is not computed.
                    Default: False

    Yields:
        dict: from module to its (selected) output, filled while the body runs.

    Examples::

        >>> net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
        >>> with capture_outputs([net[0]], stop=True) as outputs:
        ...     _ = net(torch.zeros(1, 4))
        >>> outputs[net[0]].shape
        torch.Size([1, 3])
    """
    captured: dict[nn.Module, Tensor] = {}

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        hidden = first_tensor(output)
        captured[module] = hidden if select is None else select(hidden)
        if stop and len(captured) == len(set(modules)):
            raise _Finished

    handles = [module.register_forward_hook(hook) for module in dict.fromkeys(modules)]
    try:
        yield captured
    except _Finished:
        pass
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; training flags and random state are given back."""
    training = [(module, module.training) for module in model.modules()]
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        for module, flag in training:
            module.training = flag


@contextmanager
def requires_grad_given_back(*tensors: Tensor) -> Iterator[None]:
    """The tensors' ``requires_grad`` is what it was, however the body ends: an exception in a forward pass keeps Captum
    from undoing what it asked of its inputs."""
    flags = [tensor.requires_grad for tensor in tensors]
    try:
        yield
    finally:
        for tensor, flag in zip(tensors, flags, strict=True):
            if tensor.requires_grad != flag:
                tensor.requires_grad_(flag)


def run_layers(
    forward: Callable[[], Any],
    layers: Sequence[nn.Module],
    select: Callable[[Tensor], Tensor] | None = None,
) -> list[Tensor]:
    """Outputs of ``layers`` in one forward pass without gradients that ends at the deepest of them."""
    with torch.no_grad(), capture_outputs(layers, select, stop=True) as outputs:
        forward()
    if missing := [type(layer).__name__ for layer in layers if layer not in outputs]:
        raise ValueError(
            f"{len(missing)} of {len(layers)} layers ({', '.join(missing)}) did not run in the forward pass; pass "
            "layers that belong to the model that the forward function calls."
        )
    return [outputs[layer] for layer in layers]
