r"""Borrowed state that is always given back: forward hooks and early exits from a model's forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "capture_outputs",
    "evaluation_mode",
    "first_tensor",
    "hidden_rows",
    "interpolated_positions",
    "named_arguments",
    "position_tables",
    "put_rows",
    "replace_first_tensor",
    "replaced_embeddings",
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


def hidden_rows(hidden: Tensor, row: int = 0, batch: int = 1) -> Tensor:
    """Hidden states of one example of a batch, one row per position: (B, T, D) -> (T, D).

    Some decoders have several residual streams, (S, B, T, D) in Gemma 3n and (B, T, S, D) in GLM-5; their features
    stand side by side: (T, S x D).
    """
    if hidden.ndim == 4:
        return (hidden[:, row].transpose(0, 1) if hidden.shape[1] == batch else hidden[row]).flatten(1)
    return hidden[row]


def named_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What a module is called with, by the names of its forward's parameters."""
    # That of the class: others may have put a forward of their own on the instance.
    own = signature(type(module).forward.__get__(module))
    named = own.bind(*args, **kwargs).arguments
    for name, parameter in own.parameters.items():
        if parameter.kind is Parameter.VAR_KEYWORD:
            named |= named.pop(name, {})
    return named


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
def evaluation_mode(model: nn.Module, gradients: bool = False) -> Iterator[None]:
    """Evaluation mode, without gradients, or with those of the inputs alone: the parameters need none meanwhile.

    Training flags, the parameters' ``requires_grad`` and the random state are given back.
    """
    training = [(module, module.training) for module in model.modules()]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad] if gradients else []
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    try:
        model.eval()
        for parameter in trained:
            parameter.requires_grad_(False)
        with torch.set_grad_enabled(gradients and torch.is_grad_enabled()), torch.random.fork_rng(list(devices)):
            yield
    finally:
        for module, flag in training:
            module.training = flag
        for parameter in trained:
            parameter.requires_grad_(True)


@contextmanager
def replaced_embeddings(embeddings: nn.Module, ids: Tensor, positions: Tensor, rows: Tensor) -> Iterator[None]:
    r"""
    Lets a model read other embeddings in the place of some tokens' own.

    Args:

        embeddings (Module): The model's input embeddings.
        ids (Tensor): The tokens, int64 (T,). Only calls of the module with these tokens in these places count, so that
                    the ids of images' placeholders may change on the way, and an encoder-decoder's other part, which
                    shares the module, reads its own.
        positions (Tensor): Their positions, int64 (T,).
        rows (Tensor): What stands there instead, (T, width); gradients pass through.

    Raises:
        ValueError: the module was not called with these tokens, so that nothing was replaced.
    """
    replaced = False

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        nonlocal replaced
        read = args[0] if args else next(iter(kwargs.values()), None)
        if (
            isinstance(read, Tensor)
            and read.ndim == 2
            and read.shape[1] > int(positions.max())
            and torch.equal(read[0, positions.to(read.device)], ids.to(read.device))
        ):
            replaced = True
            output = output.index_copy(1, positions.to(output.device), rows[None].to(output))
        return output

    with embeddings.register_forward_hook(hook, with_kwargs=True):
        yield
    if not replaced:
        raise ValueError(
            f"The model never looked up the {len(ids)} tokens of the prompt in its {type(embeddings).__name__}, so "
            "their embeddings cannot be replaced."
        )


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


def position_tables(model: nn.Module) -> list[nn.Module]:
    """Modules that embed an image's patches with a table of positions and can interpolate it for other sizes."""
    name = "interpolate_pos_encoding"
    return [m for m in model.modules() if hasattr(m, name) and isinstance(getattr(m, "patch_size", None), int)]


@contextmanager
def interpolated_positions(model: nn.Module) -> Iterator[None]:
    """Images may have another size than the vision tower's own: its position embeddings are interpolated."""

    def ask(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args[:1], {**kwargs, "interpolate_pos_encoding": True}

    # Others, such as DINOv2's, do it unasked.
    asked = [t for t in position_tables(model) if "interpolate_pos_encoding" in signature(t.forward).parameters]
    handles = [table.register_forward_pre_hook(ask, with_kwargs=True) for table in asked]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
