r"""How does the output of a decoder's block depend on what its attention reads? The block, run again on a few rows.

A block adds to the residual stream what its attention, its MLP and its biases write. Run again on the rows of a few
queries, with its attention's outputs given, norms frozen and every other branch cut off, it is an affine function of
the residual stream, of the attention's outputs and of the other branches' outputs. Output projections, gates, norms
after the attention, layer scales and residual multipliers are parts of that function, whatever their names are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from captum_intramodal.errors import UnsupportedModelError
from captum_intramodal.models.attention_rows import AttentionCall, select_rows, tolerance
from captum_intramodal.models.frozen_norm import FrozenNorm, is_norm
from captum_intramodal.models.hooks import register_hooks
from captum_intramodal.models.layer_io import first_tensor

__all__ = ["BlockGraph", "BlockReplay", "Terms", "find_hidden", "map_tensors", "rows_selector"]


def map_tensors(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """Apply a function to every tensor in nested arguments; caches become None."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: map_tensors(item, function) for key, item in value.items()}
    if isinstance(value, list):
        return [map_tensors(item, function) for item in value]
    if isinstance(value, tuple):
        items = [map_tensors(item, function) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return None if "cache" in type(value).__name__.lower() else value


def find_hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return the hidden states among a block's arguments."""
    candidates = [*args[:1], *(kwargs.get(name) for name in ("hidden_states", "hidden_state", "x"))]
    return next((value for value in candidates if isinstance(value, Tensor)), None)


def rows_selector(hidden: Tensor, examples: Tensor, queries: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a function that selects T (example, query) pairs of what runs along a sequence: (B, S, ...) becomes
    (1, T, ...), and tensors without a dimension as long as the sequence stay as they are."""
    batch, length = hidden.shape[:2]

    def select(tensor: Tensor) -> Tensor:
        dims = [dim for dim in (1, 2, 0, 3) if dim < tensor.ndim and tensor.shape[dim] == length]
        if not dims:
            return tensor
        along = dims[0]
        if tensor.ndim == 4 and along == 2 and tensor.shape[3] == length:
            # A mask of queries and keys; in a replay the keys are those of the queries alone.
            tensor = tensor.index_select(-1, queries.to(tensor.device))
        of_examples = next((dim for dim in range(along) if tensor.shape[dim] == batch), None)
        if of_examples is None:
            return tensor.index_select(along, queries.to(tensor.device))
        first = tensor.movedim(of_examples, 0)
        rows = select_rows(first, examples, queries, along)
        return (
            rows[None].movedim((0, 1), (of_examples, along))
            if of_examples == 0
            else (rows[None].movedim(1, along).movedim(0, of_examples))
        )

    return select


@dataclass(frozen=True)
class Terms:
    r"""
    What a block adds to a linear function of its output, for T rows.

    Attributes:
        direction (Tensor): the function's gradient at the block's output, rounded to its dtype, float32 (T, D).
        hidden (Tensor): the function's gradient at the block's input, float32 (T, D).
        attention (list[Tensor]): its gradient at the output of each attention call, float32 (T, H, d).
        attended (Tensor): the sum over all attention calls, float32 (T,).
        other (Tensor): the sum over all other branches, float32 (T,).
        constant (Tensor): biases, float32 (T,).
    """

    direction: Tensor
    hidden: Tensor
    attention: list[Tensor]
    attended: Tensor
    other: Tensor
    constant: Tensor


@dataclass(frozen=True)
class BlockGraph:
    """An affine graph of a block at T rows: output, its input and branches as leaves, and the output at zero."""

    name: str
    hidden: Tensor
    attention: list[Tensor]
    other: list[Tensor]
    output: Tensor
    constant: Tensor

    def terms(self, direction: Tensor) -> Terms:
        r"""
        Compute the terms of ``direction . output``.

        Args:

            direction (Tensor): float32 (T, D).

        Raises:
            UnsupportedModelError: the output is not an affine function of the block's branches.
        """
        leaves = [self.hidden, *self.attention, *self.other]
        toward = direction[None].to(self.output)
        gradients = torch.autograd.grad(self.output, leaves, toward, retain_graph=True, allow_unused=True)
        filled = [torch.zeros_like(a) if g is None else g for a, g in zip(leaves, gradients, strict=True)]
        count = len(direction)

        def product(leaf: Tensor, gradient: Tensor) -> Tensor:
            values = leaf.detach().float() * gradient.float()
            if values.shape[0] == 1:
                values = values[0]
            if values.shape[0] != count:
                if bool(gradient.any()):
                    raise UnsupportedModelError(f"A branch of a {self.name} has no row per position.")
                return torch.zeros(count, device=values.device)
            return values.flatten(1).sum(1)

        products = [product(*each) for each in zip(leaves, filled, strict=True)]
        constant = (self.constant[0].float() * toward[0].float()).sum(-1)
        total = (self.output.detach()[0].float() * toward[0].float()).sum(-1)
        end = 1 + len(self.attention)
        size = torch.stack([p.abs() for p in [*products, constant, total]]).amax()
        if bool(((sum(products) + constant - total).abs() > 10 * tolerance(self.output.dtype) * size).any()):
            raise UnsupportedModelError(
                f"A {self.name} is not an affine function of what its attention writes, so no share of a logit belongs "
                "to a position."
            )
        zero = torch.zeros_like(total)
        return Terms(
            toward[0].float(),
            filled[0][0].float(),
            [gradient[0].float() for gradient in filled[1:end]],
            sum(products[1:end], zero),
            sum(products[end:], zero),
            constant,
        )


class BlockReplay:
    r"""
    Run a block again on T rows.

    Args:

        block (torch.nn.Module): The block.
        calls (Sequence[AttentionCall]): Its attention calls in the model's own pass.
        recorded (dict): Rows of what modules without attention returned in that pass, (1, T, ...), in order; of tuples
                    the first element.
        tuples (set): Modules that returned tuples.
        norms (dict): Norms that have been measured already, extended.
    """

    def __init__(
        self,
        block: nn.Module,
        calls: Sequence[AttentionCall],
        recorded: dict[nn.Module, list[Tensor]],
        tuples: set[nn.Module],
        norms: dict[tuple[nn.Module, int], FrozenNorm],
    ) -> None:
        self.block, self.calls, self.recorded, self.norms = block, calls, recorded, norms
        attending = {call.module for call in calls}
        ancestors = {m for m in block.modules() if any(child in attending for child in m.modules())}
        self.attending = attending
        self._norms = [m for m in block.modules() if is_norm(m) and m is not block]
        self._branches = [m for m in block.modules() if m not in ancestors and not is_norm(m) and m is not block]
        self._units = {m for m in self._branches if _is_unit(m)}
        # What these return is known, so that they need not run again.
        self._known = [m for m in self._units if m in recorded and m not in tuples]
        known = set(self._known)
        self._branches = [m for m in self._branches if m not in known]
        self._kinds: dict[int, str] = {}
        self._leaves: dict[str, list[Tensor]] = {"hidden": [], "attention": [], "other": []}
        self._zero = False
        self._steps: list[Any] = []
        self._turn = 0
        self._calls_made = 0
        self._made: dict[nn.Module, int] = {}

    def graph(self, args: tuple[Any, ...], kwargs: dict[str, Any], hidden: Tensor, expected: Tensor) -> BlockGraph:
        r"""
        Return the block's graph.

        Args:

            args, kwargs: The block's arguments, reduced to the rows, with ``hidden`` among them.
            hidden (Tensor): Its input at the rows, (1, T, D).
            expected (Tensor): Its output at the rows, (1, T, D).

        Raises:
            UnsupportedModelError: the block does not give its own output on single rows.
        """
        name = type(self.block).__name__
        leaf = self._leaf(hidden, "hidden")
        try:
            with torch.enable_grad():
                output = self._run(args, kwargs, hidden, leaf.clone())
            self._zero = True
            with torch.no_grad():
                constant = self._run(args, kwargs, hidden, torch.zeros_like(hidden))
        except UnsupportedModelError:
            raise
        except (RuntimeError, IndexError, TypeError, ValueError, AttributeError, KeyError) as error:
            raise UnsupportedModelError(f"A {name} cannot run on single positions of its input.") from error
        gap = float((output.detach() - expected).abs().max()) if output.shape == expected.shape else torch.inf
        if not gap <= 10 * tolerance(expected.dtype) * float(expected.abs().max().clamp_min(1e-6)):
            raise UnsupportedModelError(
                f"A {name} computes another output on single positions than on the whole sequence (gap {gap:.2g}), so "
                "something other than attention rows mixes positions in it."
            )
        leaves = self._leaves
        return BlockGraph(name, leaf, leaves["attention"], leaves["other"], output, constant)

    def attention(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """Answer an attention call of the replay by the output of the model's own pass."""
        if self._calls_made >= len(self.calls) or self.calls[self._calls_made].module is not module:
            raise UnsupportedModelError(f"A {type(self.block).__name__} attends in another order on single positions.")
        call = self.calls[self._calls_made]
        self._calls_made += 1
        if self._zero:
            return torch.zeros_like(call.output)[None], None
        return self._leaf(call.output[None], "attention").clone(), None

    def _leaf(self, value: Tensor, kind: str) -> Tensor:
        leaf = value.detach().clone().requires_grad_()
        self._kinds[id(leaf)] = kind
        self._leaves[kind].append(leaf)
        return leaf

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any], old: Tensor, new: Tensor) -> Tensor:
        """Run the block with ``new`` in place of ``old`` among its arguments."""
        self._turn = self._calls_made = 0
        self._made = {}
        swap = lambda value: new if value is old else value  # noqa: E731
        with ExitStack() as stack:
            stack.enter_context(register_hooks(self.attending, _detach_arguments, before=True, with_kwargs=True))
            stack.enter_context(register_hooks(self._norms, self._freeze))
            stack.enter_context(register_hooks(self._branches, self._cut, with_kwargs=True))
            stack.enter_context(_replace_forwards(self._known, self._stand_in))
            output = self.block.forward(*map(swap, args), **{key: swap(value) for key, value in kwargs.items()})
        return first_tensor(output)

    def _step(self, make: Callable[[], Any]) -> Any:
        """Return this step's decision: made in the first run, repeated in the run at zero."""
        if not self._zero:
            self._steps.append(make())
        step = self._steps[self._turn]
        self._turn += 1
        return step

    def _freeze(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Replace a norm of a differentiable input by the linear map with the norm's statistic at these rows."""
        # A norm of two arguments is gated; it is part of a branch that is cut off.
        x = args[0] if len(args) == 1 else None
        if not isinstance(x, Tensor) or not isinstance(output, Tensor):
            return None

        def measure() -> tuple[FrozenNorm, Tensor] | None:
            if not self._sources([x]):
                return None
            key = (module, x.shape[-1])
            if key not in self.norms:
                self.norms[key] = FrozenNorm.from_module(module, x.shape[-1], x.dtype, x.device)
            norm = self.norms[key]
            statistic = norm.statistic(x.detach(), output.detach())
            gap = (norm.apply(x.detach(), statistic) - output.detach()).abs().max()
            if not bool(gap <= 10 * tolerance(x.dtype) * output.detach().abs().max().clamp_min(1e-6)):
                raise UnsupportedModelError(f"The {type(module).__name__} of a block is not linear for each row.")
            return norm, statistic

        with torch.no_grad():
            step = self._step(measure)
        return None if step is None else step[0].apply(x, step[1]).to(output.dtype)

    def _stand_in(self, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Answer a call of a branch by the rows that it returned in the model's own pass, as a leaf; or run it, if it
        projects nothing but an attention's output."""
        made: list[Any] = []

        def decide() -> tuple[str, Tensor | None]:
            index = self._made.get(module, 0)
            self._made[module] = index + 1
            own = self.recorded[module][index] if index < len(self.recorded[module]) else None
            inputs = _tensors((args, kwargs))
            sources = self._sources(inputs)
            if own is not None and not _joins(inputs) and sources != {"attention"}:
                return ("cut" if sources else "constant"), own
            made.append(forward(*args, **kwargs))
            # If it differs, something in this module mixes positions.
            return ("cut", own) if own is not None and _differs(_first(made[0]), own) else ("run", None)

        kind, value = self._step(decide)
        if value is None:
            return made[0] if made else forward(*args, **kwargs)
        if kind == "constant":
            return value
        return torch.zeros_like(value) if self._zero else self._leaf(value, "other").clone()

    def _cut(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Cut a branch off: what it returns becomes a leaf, unless it projects nothing but an attention's output."""

        def decide() -> tuple[bool, Tensor | None]:
            index = self._made.get(module, 0)
            self._made[module] = index + 1
            own = self.recorded.get(module, [])
            replaced = own[index] if index < len(own) and _differs(_first(output), own[index]) else None
            inputs = _tensors((args, kwargs))
            cut = module in self._units and bool(self._sources(inputs) - {"attention"}) and not _joins(inputs)
            return cut or replaced is not None, replaced

        cut, replaced = self._step(decide)
        if not cut:
            return None
        if self._zero:
            return map_tensors(output, torch.zeros_like)
        if replaced is not None:
            # Something in this module mixes positions: its output is the one that the model computed.
            value = self._leaf(replaced, "other").clone()
            return value if isinstance(output, Tensor) else (value, *output[1:])
        return map_tensors(output, lambda t: self._leaf(t, "other").clone() if t.is_floating_point() else t)

    def _sources(self, tensors: Iterable[Tensor]) -> set[str]:
        """Return the kinds of leaves that tensors depend on."""
        kinds: set[str] = set()
        waiting: list[Any] = []
        for tensor in tensors:
            if tensor.grad_fn is not None:
                waiting.append(tensor.grad_fn)
            elif id(tensor) in self._kinds:
                kinds.add(self._kinds[id(tensor)])
        seen = set(waiting)
        while waiting:
            node = waiting.pop()
            if (variable := getattr(node, "variable", None)) is not None:
                kinds.update([self._kinds[id(variable)]] if id(variable) in self._kinds else [])
            for parent, _ in node.next_functions:
                if parent is not None and parent not in seen:
                    seen.add(parent)
                    waiting.append(parent)
        return kinds


@contextmanager
def _replace_forwards(modules: Sequence[nn.Module], stand_in: Callable[..., Any]) -> Iterator[None]:
    """Let ``stand_in`` answer the calls of modules, given the module and its forward before the arguments."""
    before = [(module, module.__dict__.get("forward")) for module in modules]
    try:
        for module in modules:
            module.__dict__["forward"] = partial(stand_in, module, module.forward)
        yield
    finally:
        for module, forward in before:
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = forward


def _is_unit(module: nn.Module) -> bool:
    """Return whether a module is cut off as a whole: it has parameters, and no norm that may follow a residual sum."""
    has_weights = next(module.parameters(), next(module.buffers(), None)) is not None
    return has_weights and not any(is_norm(child) for child in module.modules())


def _joins(inputs: Sequence[Tensor]) -> bool:
    """Return whether a module gets two tensors of one shape, as those do that add a branch to the residual stream."""
    return len(inputs) == 2 and inputs[0].shape == inputs[1].shape and inputs[0] is not inputs[1]


def _first(output: Any) -> Tensor | None:
    if isinstance(output, tuple | list) and output:
        output = output[0]
    return output if isinstance(output, Tensor) else None


def _differs(value: Tensor | None, recorded: Tensor) -> bool:
    if value is None or value.shape != recorded.shape:
        return False
    gap = (value.detach() - recorded).abs().max()
    return not bool(gap <= 10 * tolerance(value.dtype) * recorded.abs().max().clamp_min(1e-6))


def _tensors(value: Any) -> list[Tensor]:
    found: list[Tensor] = []
    map_tensors(value, found.append)
    return found


def _detach_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    detach = lambda tensor: tensor.detach()  # noqa: E731
    return map_tensors(args, detach), map_tensors(kwargs, detach)
