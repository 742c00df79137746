r"""Captum's layer methods at a decoder: hidden states as they expect them, and one value per position as the result."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import Any, Literal, get_args

import torch
from captum.attr import Attribution, LayerAttribution, LayerGradCam
from torch import Tensor, nn

from captum_intramodal.attr.layer_logit_lens import LayerLogitLens
from captum_intramodal.attr.pixel_forward import PixelForward
from captum_intramodal.models.hooks import first_tensor, replace_first_tensor

__all__ = ["HiddenStates", "Reduction", "attribute_positions", "check_reduction", "layer_method", "single_tensor"]

Reduction = Literal["sum", "norm"] | Callable[[Tensor], Tensor] | None


class HiddenStates(nn.Module):
    r"""
    A forward function in which the hidden states of a decoder layer pass through a module of their own, :attr:`layer`,
    so that any Captum layer method can read and replace them.

    Captum expects of a layer that it is called with positional tensors, returns tensors only, and has channels in
    dimension 1. Decoder layers may be called by keyword and may return tuples with None in them, and ``LayerGradCam``
    would take their positions for channels. And it expects to see all examples in one call: of a ``PixelForward`` that
    runs images one by one, the layer's states are collected first, shown together, and given back one by one.

    Args:

        forward_func (Callable): The model, or any function that runs it.
        decoder_layer (torch.nn.Module): Module of the decoder whose output is, or begins with, hidden states
                    (B, positions, D).
        at_input (bool, optional): Read the module's input instead of its output.
                    Default: False
        channels_first (bool, optional): Show the hidden states to Captum as (B, D, positions).
                    Default: False

    Attributes:
        layer (torch.nn.Module): What a layer method is given as its layer.

    Raises:
        ValueError: in the forward pass, if the layer's output is not (B, positions, D), or if another ``forward_func``
            runs the examples of a batch one by one, of which Captum would keep only the last.

    Examples::

        >>> states = HiddenStates(forward, model.get_decoder().layers[-1], channels_first=True)
        >>> LayerGradCam(states, states.layer).attribute(image, target=target)  # (1, 1, positions)
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        decoder_layer: nn.Module,
        at_input: bool = False,
        channels_first: bool = False,
    ) -> None:
        super().__init__()
        self.forward_func = forward_func
        # Not a submodule: it is one of forward_func's already, and methods that visit all modules would see it twice.
        self._hooked = (decoder_layer,)
        self.at_input = at_input
        self.channels_first = channels_first
        self.layer = nn.Identity()

    def forward(self, *args: Any) -> Any:
        """Runs ``forward_func``."""
        count = len(args[0]) if args and isinstance(args[0], Tensor) else 1
        if count > 1 and isinstance(self.forward_func, PixelForward) and not self.forward_func.stacks:
            return self._one_by_one(args, count)
        calls = []

        def show(hidden: Tensor) -> Tensor:
            calls.append(len(hidden))
            return self._show(hidden)

        output = self._run(args, show)
        if len(calls) > 1 and sum(calls) == count:
            raise ValueError(
                f"The forward function runs its {count} examples one by one, of which Captum's layer methods see only "
                "the last. Pass one example and internal_batch_size=1, if the method has it, or a forward function "
                "that runs all examples in one pass."
            )
        return output

    def _one_by_one(self, args: tuple[Any, ...], count: int) -> Tensor:
        """All examples' hidden states, then, from what :attr:`layer` makes of them together, all their outputs."""
        examples = [
            tuple(arg[i : i + 1] if isinstance(arg, Tensor) and len(arg) == count else arg for arg in args)
            for i in range(count)
        ]
        rows = self._show(torch.cat([self._read(example) for example in examples])).split(1)

        def put(row: Tensor) -> Callable[[Tensor], Tensor]:
            return lambda hidden: row

        return torch.cat([self._run(example, put(row)) for example, row in zip(examples, rows, strict=True)])

    def _show(self, hidden: Tensor) -> Tensor:
        if hidden.ndim != 3:
            raise ValueError(
                f"{type(self._hooked[0]).__name__} has hidden states of shape {tuple(hidden.shape)}; layer methods "
                "need (examples, positions, features)."
            )
        return self.layer(hidden.mT).mT if self.channels_first else self.layer(hidden)

    def _read(self, example: tuple[Any, ...]) -> Tensor:
        def leave(hidden: Tensor) -> Tensor:
            raise _Reached(hidden)

        try:
            self._run(example, leave)
        except _Reached as reached:
            return reached.hidden
        raise ValueError(f"{type(self._hooked[0]).__name__} did not run in the forward pass.")

    def _run(self, args: tuple[Any, ...], change: Callable[[Tensor], Tensor]) -> Any:
        """Runs ``forward_func`` with changed hidden states."""

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                return (change(args[0]), *args[1:]), kwargs
            return args, kwargs | {"hidden_states": change(kwargs["hidden_states"])}

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            return replace_first_tensor(output, change(first_tensor(output)))

        (module,) = self._hooked
        handle = (
            module.register_forward_pre_hook(before, with_kwargs=True)
            if self.at_input
            else module.register_forward_hook(after)
        )
        with handle:
            return self.forward_func(*args)


class _Reached(Exception):
    """Raised by a hook to leave a forward pass with what was looked for."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


def layer_method(method: Attribution) -> LayerAttribution | None:
    """The layer method inside Captum's own wrappers (NoiseTunnel), of one layer; None if there is none."""
    while type(method).__module__.startswith("captum.") and hasattr(method, "attribution_method"):
        method = method.attribution_method
    return method if isinstance(method, LayerAttribution) and isinstance(method.layer, nn.Module) else None


def attribute_positions(method: Attribution, inputs: Any, reduce: Reduction, **kwargs: Any) -> Tensor:
    r"""
    Attribution of a layer method at a decoder layer, run through :class:`HiddenStates`, with one value per position.

    Args:

        method (Attribution): A layer method whose layer is a module of a decoder, or ``NoiseTunnel`` around one.
        inputs (Tensor or tuple[Tensor, ...]): As the method takes them.
        reduce (str or Callable or None): What becomes of the features in an attribution (B, positions, D): ``'sum'`` in
                    float32, which keeps completeness; ``'norm'``, their Euclidean norm; a function of the attribution;
                    None leaves them.
        **kwargs (Any, optional): Further arguments of the method.

    Returns:
        *Tensor* (B, positions); (B, n, positions) of ``LayerLogitLens`` with n targets per example; otherwise what
        ``reduce`` makes of it.

    Raises:
        ValueError: the method does not return one tensor.
    """
    inner = layer_method(method)
    if inner is None:
        raise ValueError(f"{type(method).__name__} is no method of one layer.")
    channels_first = isinstance(inner, LayerGradCam)
    states = HiddenStates(
        inner.forward_func, inner.layer, kwargs.pop("attribute_to_layer_input", False), channels_first
    )
    result = single_tensor(_moved(method, inner, states).attribute(inputs, **kwargs))
    if channels_first:
        result = result.mT
        result = result[..., 0] if result.shape[-1] == 1 else result
    if callable(reduce):
        return reduce(result)
    if reduce is None or isinstance(inner, LayerLogitLens) or result.ndim < 3:
        return result
    return result.float().sum(-1) if reduce == "sum" else result.float().norm(dim=-1)


def _moved(method: Attribution, inner: LayerAttribution, states: HiddenStates) -> Attribution:
    """A copy of a method, and of the methods in it, with another forward function and layer."""
    moved = copy(method)
    for name, value in vars(method).items():
        if value is inner.forward_func:
            setattr(moved, name, states)
        elif value is inner.layer:
            setattr(moved, name, states.layer)
        elif isinstance(value, Attribution):
            setattr(moved, name, _moved(value, inner, states))
    return moved


def single_tensor(result: Any) -> Tensor:
    """What a method returns, out of its tuple of one and of its graph."""
    if isinstance(result, tuple) and len(result) == 1:
        result = result[0]
    if not isinstance(result, Tensor):
        kinds = [type(part).__name__ for part in result] if isinstance(result, tuple) else type(result).__name__
        raise ValueError(
            f"The wrapped method must return one attribution tensor, got {kinds}; give it one input and one layer, and "
            "no return_convergence_delta."
        )
    return result.detach()


def check_reduction(reduce: Any) -> None:
    if not (reduce is None or reduce in get_args(get_args(Reduction)[0]) or callable(reduce)):
        raise ValueError(f"reduce must be 'sum', 'norm', a function or None, got {reduce!r}.")
