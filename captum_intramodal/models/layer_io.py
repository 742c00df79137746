r"""Hidden states in the arguments and outputs of a model's layers, whatever layout the model uses."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import Parameter, signature
from typing import Any

from torch import Tensor, nn

__all__ = ["first_tensor", "hidden_rows", "named_arguments", "replace_first_tensor", "replace_last_rows"]


def first_tensor(output: Any) -> Tensor:
    """Return the hidden states in a layer's output: a tensor itself, or the first element of a tuple or ModelOutput.

    Raises:
        TypeError: the output does not begin with a tensor.
    """
    while not isinstance(output, Tensor):
        try:
            output = output[0]
        except (TypeError, IndexError, KeyError):
            raise TypeError(
                f"Expected a tensor, or a tuple that begins with one; got {type(output).__name__}."
            ) from None
    return output


def replace_first_tensor(output: Any, value: Tensor) -> Any:
    """Return a layer's output with ``value`` instead of what :func:`first_tensor` returns.

    Raises:
        TypeError: the output is neither a tensor nor a tuple or list.
    """
    if isinstance(output, Tensor):
        return value
    if isinstance(output, tuple) and type(output) is tuple:
        return (replace_first_tensor(output[0], value), *output[1:])
    if isinstance(output, list):
        return [replace_first_tensor(output[0], value), *output[1:]]
    raise TypeError(f"Cannot replace the hidden states in a {type(output).__name__}; expected a tensor, tuple or list.")


def hidden_rows(hidden: Tensor, row: int = 0, batch: int = 1) -> Tensor:
    """Return the hidden states of one example of a batch, one row per position: (B, T, D) -> (T, D).

    Some decoders have several residual streams, (S, B, T, D) in Gemma 3n and (B, T, S, D) in GLM-5; their features
    are concatenated: (T, S x D).
    """
    if hidden.ndim == 4:
        return (hidden[:, row].transpose(0, 1) if hidden.shape[1] == batch else hidden[row]).flatten(1)
    return hidden[row]


def replace_last_rows(hidden: Tensor, rows: Tensor) -> Tensor:
    """Return a copy of one example's hidden states with ``rows`` (see :func:`hidden_rows`) at the last positions."""
    count = len(rows)
    result = hidden.clone()
    if hidden.ndim == 4 and hidden.shape[0] == 1:
        result[0, -count:] = rows.to(hidden).reshape(count, hidden.shape[2], -1)
    elif hidden.ndim == 4:
        result[:, 0, -count:] = rows.to(hidden).reshape(count, hidden.shape[0], -1).transpose(0, 1)
    else:
        result[0, -count:] = rows.to(hidden)
    return result


def named_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a module's call by the names of its forward's parameters."""
    # The class's forward: libraries replace the instance's by one with another signature.
    own = signature(type(module).forward.__get__(module))
    named = own.bind(*args, **kwargs).arguments
    for name, parameter in own.parameters.items():
        if parameter.kind is Parameter.VAR_KEYWORD:
            named |= named.pop(name, {})
    return named
