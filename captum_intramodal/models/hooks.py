r"""Context managers that change a model for a while: hooks, modes and replaced inputs, all undone at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from captum_intramodal.errors import UnsupportedModelError
from captum_intramodal.models.decoder import position_embedding_modules
from captum_intramodal.models.layer_io import first_tensor

__all__ = [
    "capture_outputs",
    "evaluation_mode",
    "interpolate_position_embeddings",
    "preserve_requires_grad",
    "register_hooks",
    "replace_embeddings",
]


class _AllCaptured(Exception):
    """Raised by a hook to leave a forward pass whose rest is not needed."""


@contextmanager
def register_hooks(
    modules: Iterable[nn.Module], hook: Callable[..., Any], before: bool = False, with_kwargs: bool = False
) -> Iterator[None]:
    r"""
    Register a forward hook on modules, and remove it at the end of the ``with`` block, however that ends.

    Args:

        modules (Iterable[torch.nn.Module]): The modules.
        hook (Callable): As ``register_forward_hook`` of :class:`torch.nn.Module` takes it.
        before (bool, optional): Whether to call it before each forward, as ``register_forward_pre_hook`` does.
                    Default: False
        with_kwargs (bool, optional): Whether it takes the keyword arguments of the call as well.
                    Default: False

    Examples::

        >>> from captum_intramodal.models.hooks import register_hooks
        >>> layer, calls = torch.nn.Linear(2, 2), []
        >>> with register_hooks([layer], lambda module, args, output: calls.append(output.shape)):
        ...     _ = layer(torch.zeros(1, 2))
        >>> _ = layer(torch.zeros(1, 2))
        >>> calls
        [torch.Size([1, 2])]
    """
    handles = []
    try:
        for module in modules:
            register = module.register_forward_pre_hook if before else module.register_forward_hook
            handles.append(register(hook, with_kwargs=with_kwargs))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def capture_outputs(
    modules: Sequence[nn.Module],
    select: Callable[[Tensor], Tensor] | None = None,
    stop: bool = False,
) -> Iterator[dict[nn.Module, Tensor]]:
    r"""
    Capture the outputs of modules during a forward pass in the ``with`` block.

    Args:

        modules (Sequence[torch.nn.Module]): Modules to capture. If one runs several times, its last output counts.
        select (Callable, optional): Applied to each output at once, so that only what is needed stays in memory.
                    Default: None, the whole output.
        stop (bool, optional): Whether to leave the block as soon as every module has run; the rest of the forward pass
                    (deeper layers, the language-model head) is not computed.
                    Default: False

    Yields:
        **outputs** (*dict[torch.nn.Module, Tensor]*): the (selected) hidden states of each module that has run.

    Examples::

        >>> from captum_intramodal.models.hooks import capture_outputs
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
        >>> with capture_outputs([net[0]], stop=True) as outputs:
        ...     _ = net(torch.zeros(1, 4))
        >>> outputs[net[0]].shape
        torch.Size([1, 3])
    """
    unique = list(dict.fromkeys(modules))
    captured: dict[nn.Module, Tensor] = {}

    def capture(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        hidden = first_tensor(output)
        captured[module] = hidden if select is None else select(hidden)
        if stop and len(captured) == len(unique):
            raise _AllCaptured

    with register_hooks(unique, capture), suppress(_AllCaptured):
        yield captured


@contextmanager
def evaluation_mode(model: nn.Module, gradients: bool = False) -> Iterator[None]:
    r"""
    Put a model into evaluation mode, without gradients.

    The training flags of its modules, the ``requires_grad`` of its parameters and the random state are restored.

    Args:

        model (torch.nn.Module): The model.
        gradients (bool, optional): Whether to keep gradients of the inputs. Parameters need none meanwhile.
                    Default: False
    """
    training = [(module, module.training) for module in model.modules()]
    frozen = [parameter for parameter in model.parameters() if parameter.requires_grad] if gradients else []
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    try:
        model.eval()
        for parameter in frozen:
            parameter.requires_grad_(False)
        with torch.set_grad_enabled(gradients and torch.is_grad_enabled()), torch.random.fork_rng(list(devices)):
            yield
    finally:
        for module, flag in training:
            module.training = flag
        for parameter in frozen:
            parameter.requires_grad_(True)


@contextmanager
def replace_embeddings(embeddings: nn.Module, ids: Tensor, positions: Tensor, rows: Tensor) -> Iterator[None]:
    r"""
    Replace the input embeddings of some tokens.

    Args:

        embeddings (torch.nn.Module): The model's input embeddings. Only calls with ``ids`` at ``positions`` are
                    changed: the ids of image placeholders may change on the way, and the other half of an
                    encoder-decoder, which shares the module, embeds a sequence of its own.
        ids (Tensor): The tokens, int64 (N,).
        positions (Tensor): Their positions, int64 (N,).
        rows (Tensor): Their new embeddings, (N, width); gradients flow to them.

    Raises:
        UnsupportedModelError: the module was not called with these tokens, so nothing was replaced.
    """
    replaced = False

    def replace(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        nonlocal replaced
        sequence = args[0] if args else next(iter(kwargs.values()), None)
        if (
            isinstance(sequence, Tensor)
            and sequence.ndim == 2
            and sequence.shape[1] > int(positions.max())
            and torch.equal(sequence[0, positions.to(sequence.device)], ids.to(sequence.device))
        ):
            replaced = True
            output = output.index_copy(1, positions.to(output.device), rows[None].to(output))
        return output

    with register_hooks([embeddings], replace, with_kwargs=True):
        yield
    if not replaced:
        raise UnsupportedModelError(
            f"The model did not embed the {len(ids)} tokens of the prompt with its {type(embeddings).__name__}, so "
            "their embeddings cannot be replaced; attribute to the image alone."
        )


@contextmanager
def preserve_requires_grad(*tensors: Tensor) -> Iterator[None]:
    """Restore the tensors' ``requires_grad`` at the end: after an exception in a forward pass, Captum does not."""
    flags = [tensor.requires_grad for tensor in tensors]
    try:
        yield
    finally:
        for tensor, flag in zip(tensors, flags, strict=True):
            if tensor.requires_grad != flag:
                tensor.requires_grad_(flag)


@contextmanager
def interpolate_position_embeddings(model: nn.Module) -> Iterator[None]:
    """Let a vision tower take images of other sizes than its own, by interpolating its position embeddings."""
    option = "interpolate_pos_encoding"

    def switch_on(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args[:1], {**kwargs, option: True}

    # Modules without the option, such as DINOv2's, always interpolate.
    optional = [m for m in position_embedding_modules(model) if option in signature(m.forward).parameters]
    with register_hooks(optional, switch_on, before=True, with_kwargs=True):
        yield
