r"""Captum's layer methods at a decoder layer: hidden states as they expect them, one value per position."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import Any, Literal, get_args

import torch
from captum.attr import Attribution, LayerAttribution, LayerGradCam
from torch import Tensor, nn

from captum_intramodal.attr.layer_logit_lens import LayerLogitLens
from captum_intramodal.attr.pixel_forward import PixelForward
from captum_intramodal.errors import InvalidInputError, InvalidOptionError
from captum_intramodal.models.layer_io import first_tensor, replace_first_tensor

__all__ = ["HiddenStates", "Reduction", "attribute_positions", "check_reduction", "layer_method", "single_tensor"]

Reduction = Literal["sum", "norm"] | Callable[[Tensor], Tensor] | None


class HiddenStates(nn.Module):
    r"""
    A forward function that passes the hidden states of a decoder layer through a module, :attr:`layer`, at which any
    Captum layer method can capture and replace them.

    Captum calls layers with positional tensors, and expects only tensors in return, with channels in dimension 1.
    Decoder layers may be called by keyword and may return tuples that contain None, and ``LayerGradCam`` would take
    their positions for channels. Captum also expects all examples in one call. For a ``PixelForward`` that runs images
    one by one, the hidden states of all images are therefore captured first, passed through :attr:`layer` together,
    and put back one by one.

    Args:

        forward_func (Callable): The model, or any function that runs it.
        decoder_layer (torch.nn.Module): Module of the decoder whose output is, or begins with, hidden states
                    (B, positions, D).
        at_input (bool, optional): Use the module's input instead of its output.
                    Default: False
        channels_first (bool, optional): Pass the hidden states as (B, D, positions).
                    Default: False

    Attributes:
        layer (torch.nn.Module): The layer to give to a layer method.

    Raises:
        InvalidInputError: in the forward pass, if the hidden states are not (B, positions, D), if the layer does not
            run, or if ``forward_func``, unless a ``PixelForward``, runs the examples of a batch one by one, of which
            Captum would keep only the last.

    Examples::

        >>> from captum.attr import LayerGradCam
        >>> from captum_intramodal import HiddenStates, PixelForward
        >>> forward = PixelForward(adapter, "describe the picture.", "a dog.")
        >>> states = HiddenStates(forward, model.get_decoder().layers[-1], channels_first=True)
        >>> pixels = torch.rand(1, 3, 96, 128)
        >>> LayerGradCam(states, states.layer).attribute(pixels, target=forward.targets[1]).shape  # (1, 1, positions)
        torch.Size([1, 1, ...])
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
        # In a tuple, so that it is no submodule: methods that visit all modules would visit it twice.
        self._decoder_layer = (decoder_layer,)
        self.at_input = at_input
        self.channels_first = channels_first
        self.layer = nn.Identity()

    def forward(self, *args: Any) -> Any:
        """Run ``forward_func`` with the hidden states passed through :attr:`layer`."""
        count = len(args[0]) if args and isinstance(args[0], Tensor) else 1
        if count > 1 and isinstance(self.forward_func, PixelForward) and not self.forward_func.stacks:
            return self._run_one_by_one(args, count)
        batch_sizes = []

        def through_layer(hidden: Tensor) -> Tensor:
            batch_sizes.append(len(hidden))
            return self._through_layer(hidden)

        output = self._run(args, through_layer)
        if len(batch_sizes) > 1 and sum(batch_sizes) == count:
            raise InvalidInputError(
                f"The forward function runs its {count} examples one by one, of which Captum's layer methods would "
                "keep only the last. Pass one example and internal_batch_size=1, if the method has it, or a forward "
                "function that runs all examples in one pass."
            )
        return output

    def _run_one_by_one(self, args: tuple[Any, ...], count: int) -> Tensor:
        """Capture the hidden states of all examples, pass them through :attr:`layer` together, and run each example."""
        examples = [
            tuple(arg[i : i + 1] if isinstance(arg, Tensor) and len(arg) == count else arg for arg in args)
            for i in range(count)
        ]
        rows = self._through_layer(torch.cat([self._capture(example) for example in examples])).split(1)

        def replace_by(row: Tensor) -> Callable[[Tensor], Tensor]:
            return lambda hidden: row

        return torch.cat([self._run(example, replace_by(row)) for example, row in zip(examples, rows, strict=True)])

    def _through_layer(self, hidden: Tensor) -> Tensor:
        """Pass hidden states through :attr:`layer`, channels first if asked for."""
        if hidden.ndim != 3:
            raise InvalidInputError(
                f"{type(self._decoder_layer[0]).__name__} has hidden states of shape {tuple(hidden.shape)}; layer "
                "methods need (examples, positions, features)."
            )
        return self.layer(hidden.mT).mT if self.channels_first else self.layer(hidden)

    def _capture(self, example: tuple[Any, ...]) -> Tensor:
        """Run ``forward_func`` up to the hidden states and return them."""

        def stop(hidden: Tensor) -> Tensor:
            raise _Captured(hidden)

        try:
            self._run(example, stop)
        except _Captured as captured:
            return captured.hidden
        raise InvalidInputError(
            f"{type(self._decoder_layer[0]).__name__} did not run in the forward pass; pass a layer of the model that "
            "the forward function calls."
        )

    def _run(self, args: tuple[Any, ...], change: Callable[[Tensor], Tensor]) -> Any:
        """Run ``forward_func`` with changed hidden states."""

        def change_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                return (change(args[0]), *args[1:]), kwargs
            return args, kwargs | {"hidden_states": change(kwargs["hidden_states"])}

        def change_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            return replace_first_tensor(output, change(first_tensor(output)))

        (module,) = self._decoder_layer
        handle = (
            module.register_forward_pre_hook(change_input, with_kwargs=True)
            if self.at_input
            else module.register_forward_hook(change_output)
        )
        with handle:
            return self.forward_func(*args)


class _Captured(Exception):
    """Raised by a hook to leave a forward pass with the hidden states."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


def layer_method(method: Attribution) -> LayerAttribution | None:
    """Return the method of one layer inside Captum's own wrappers (NoiseTunnel), or None if there is none."""
    while type(method).__module__.startswith("captum.") and hasattr(method, "attribution_method"):
        method = method.attribution_method
    return method if isinstance(method, LayerAttribution) and isinstance(method.layer, nn.Module) else None


def attribute_positions(method: Attribution, inputs: Any, reduce: Reduction, **kwargs: Any) -> Tensor:
    r"""
    Attribute with a layer method at a decoder layer, through :class:`HiddenStates`, and reduce the features.

    Args:

        method (Attribution): A layer method whose layer is a module of a decoder, or ``NoiseTunnel`` around one.
        inputs (Tensor or tuple[Tensor, ...]): Inputs of the method.
        reduce (str or Callable or None): How the features in attributions (B, positions, D) become one value:
                    ``'sum'`` in float32, which preserves completeness; ``'norm'``, their Euclidean norm; or a function
                    of the attributions. None keeps the features.
        **kwargs (Any, optional): Further arguments of the method.

    Returns:
        **attributions** (*Tensor*): (B, positions); (B, n, positions) for ``LayerLogitLens`` with n targets per
        example; otherwise the output of the function ``reduce``, or (B, positions, D) for None.

    Raises:
        InvalidOptionError: if the method is not a method of one layer.
        InvalidInputError: if the method does not return exactly one tensor.
    """
    inner = layer_method(method)
    if inner is None:
        raise InvalidOptionError(
            f"method must be a Captum LayerAttribution of one layer, or NoiseTunnel around one, got "
            f"{type(method).__name__}."
        )
    channels_first = isinstance(inner, LayerGradCam)
    states = HiddenStates(
        inner.forward_func, inner.layer, kwargs.pop("attribute_to_layer_input", False), channels_first
    )
    result = single_tensor(_with_hidden_states(method, inner, states).attribute(inputs, **kwargs))
    if channels_first:
        result = result.mT
        result = result[..., 0] if result.shape[-1] == 1 else result
    if callable(reduce):
        return reduce(result)
    if reduce is None or isinstance(inner, LayerLogitLens) or result.ndim < 3:
        return result
    return result.float().sum(-1) if reduce == "sum" else result.float().norm(dim=-1)


def _with_hidden_states(method: Attribution, inner: LayerAttribution, states: HiddenStates) -> Attribution:
    """Copy a method, and the methods inside it, with ``states`` as forward function and its layer as layer."""
    copied = copy(method)
    for name, value in vars(method).items():
        if value is inner.forward_func:
            setattr(copied, name, states)
        elif value is inner.layer:
            setattr(copied, name, states.layer)
        elif isinstance(value, Attribution):
            setattr(copied, name, _with_hidden_states(value, inner, states))
    return copied


def single_tensor(result: Any) -> Tensor:
    """Return a method's only attribution tensor, detached; raise if it returned something else."""
    if isinstance(result, tuple) and len(result) == 1:
        result = result[0]
    if not isinstance(result, Tensor):
        kinds = [type(part).__name__ for part in result] if isinstance(result, tuple) else type(result).__name__
        raise InvalidInputError(
            f"The wrapped method must return one attribution tensor, got {kinds}; give it one input and one layer, and "
            "no return_convergence_delta."
        )
    return result.detach()


def check_reduction(reduce: Any) -> None:
    """Raise if ``reduce`` is not a :data:`Reduction`."""
    if not (reduce is None or reduce in get_args(get_args(Reduction)[0]) or callable(reduce)):
        raise InvalidOptionError(f"reduce must be 'sum', 'norm', a function or None, got {reduce!r}.")
