r"""Multi-Scale Explanation Aggregation: one explanation from the explanations at several input scales."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from captum.attr import Attribution, GradientAttribution
from torch import Tensor

from captum_intramodal._captum import format_output, format_tensor_into_tuples, is_tuple, log_usage

__all__ = ["DEFAULT_SCALES", "MSEA", "MultiScaleExplanationAggregation", "aggregate"]

# What the first benchmark picks (benchmarks/localisation.py --sweep).
DEFAULT_SCALES: tuple[float, ...] = (1.0, 1.5, 2.0)

Aggregation = Literal["mean", "max", "geometric_mean"]
AGGREGATIONS: tuple[str, ...] = get_args(Aggregation)


def check_scales(scales: Sequence[float]) -> tuple[float, ...]:
    """Scales as a tuple of positive finite numbers, each once."""
    if not isinstance(scales, Iterable):
        raise TypeError(f"scales must be a sequence of factors such as (1, 1.5, 2), got {scales!r}.")
    result = tuple(float(scale) for scale in scales)
    if not result:
        raise ValueError("scales is empty; pass at least one, such as (1.0,).")
    if bad := [scale for scale in result if not (math.isfinite(scale) and scale > 0)]:
        raise ValueError(f"Scales must be positive and finite, got {bad}.")
    if len(set(result)) < len(result):
        raise ValueError(f"Scales must be different from each other, got {result}.")
    return result


def normalized_weights(scales: Sequence[float], weights: Sequence[float] | None) -> Tensor:
    """Weights of the scales, float32, non-negative and of sum 1; equal ones for None."""
    if weights is None:
        return torch.full((len(scales),), 1 / len(scales))
    result = torch.as_tensor(list(weights), dtype=torch.float32)
    if result.shape != (len(scales),):
        raise ValueError(f"{result.numel()} weights for {len(scales)} scales.")
    if not bool(result.isfinite().all()) or bool((result < 0).any()) or float(result.sum()) <= 0:
        raise ValueError(f"Weights must be non-negative, finite and not all zero, got {list(weights)}.")
    return result / result.sum()


def aggregate(maps: Sequence[Tensor], weights: Tensor, aggregation: Aggregation = "mean") -> Tensor:
    r"""
    Combines maps of the same shape, one per scale (paper, Eq. 4).

    Args:

        maps (Sequence[Tensor]): One map per scale, all of the same shape, in the frame of the original input.
        weights (Tensor): float32 (scales,), of sum 1.
        aggregation (str, optional): ``'mean'``: the weighted mean. ``'max'``: the largest weighted value, times the
                    number of scales. ``'geometric_mean'``: of non-negative maps, what all scales agree on; negative
                    values count as 0.
                    Default: ``'mean'``

    Returns:
        *Tensor* of the shape of one map, float32.
    """
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"aggregation must be one of {AGGREGATIONS}, got {aggregation!r}.")
    if aggregation == "mean":
        total = torch.zeros_like(maps[0], dtype=torch.float32)
        for weight, values in zip(weights.tolist(), maps, strict=True):
            total.add_(values, alpha=weight)
        return total
    stack = torch.stack([values.float() for values in maps])
    column = weights.to(stack.device).reshape(-1, *[1] * (stack.ndim - 1))
    if aggregation == "max":
        return (stack * column).amax(0) * len(maps)
    return (stack.clamp_min(1e-12).log() * column).sum(0).exp() * (stack > 0).all(0)


class MultiScaleExplanationAggregation(Attribution):
    r"""
    Multi-Scale Explanation Aggregation (arXiv 2509.22415, Eq. 4 and 5) around any Captum attribution method: the
    method explains the input at several scales, its attributions are brought back to the size of the original input,
    and are aggregated there:

    .. math::
        \mathrm{MSEA}(x) = \sum_s w_s \; U_s(\mathrm{attribute}(D_s(x)))

    with :math:`D_s` the input resized by the factor :math:`s` and :math:`U_s` the way back. With ``scales=(1.0,)`` the
    result is the inner method's, exactly.

    Methods that multiply by the inputs (IntegratedGradients, InputXGradient) distribute a mass over the pixels; on the
    way back each value is multiplied by the ratio of pixel counts, so that this mass stays the same. Gradient-like
    methods keep their values.

    What depends on the scale follows it: ``baselines`` that are tensors of the input's spatial size are resized with
    the input, ``feature_mask`` by nearest neighbour, ``sliding_window_shapes`` and ``strides`` are multiplied and
    rounded.

    Args:

        attribution_method (Attribution): Any Captum method on inputs with spatial dimensions (N, C, ...), such as
                    ``IntegratedGradients(forward_func)``; a NoiseTunnel or another wrapper too.
        scales (Sequence[float], optional): Factors of the input's size.
                    Default: ``(1.0, 1.5, 2.0)``
        weights (Sequence[float], optional): Weight of each scale; normalised to sum 1.
                    Default: None, equal weights.
        aggregation (str, optional): ``'mean'``, ``'max'`` or ``'geometric_mean'``, see :func:`aggregate`.
                    Default: ``'mean'``
        interpolate_mode (str, optional): ``'linear'`` (bilinear or trilinear as the input has 2 or 3 spatial
                    dimensions) or ``'nearest'``, for the way down and back; shrinking is antialiased where torch can.
                    Default: ``'linear'``
        preserve_sum (bool, optional): Whether attributions keep their total mass on the way back.
                    Default: None, what ``multiplies_by_inputs`` of the inner method says.

    Examples::

        >>> msea = MultiScaleExplanationAggregation(IntegratedGradients(net), scales=(0.5, 1.0, 1.5))
        >>> # input: Nx3x32x32, attribution of the same size
        >>> attribution = msea.attribute(input, target=3)
    """

    def __init__(
        self,
        attribution_method: Attribution,
        scales: Sequence[float] = DEFAULT_SCALES,
        weights: Sequence[float] | None = None,
        aggregation: Aggregation = "mean",
        interpolate_mode: Literal["linear", "nearest"] = "linear",
        preserve_sum: bool | None = None,
    ) -> None:
        if not isinstance(attribution_method, Attribution):
            raise TypeError(
                f"attribution_method must be a Captum Attribution, got {type(attribution_method).__name__}; pass an "
                "instance such as IntegratedGradients(forward_func)."
            )
        if aggregation not in AGGREGATIONS:
            raise ValueError(f"aggregation must be one of {AGGREGATIONS}, got {aggregation!r}.")
        if interpolate_mode not in ("linear", "nearest"):
            raise ValueError(f"interpolate_mode must be 'linear' or 'nearest', got {interpolate_mode!r}.")
        self.attribution_method = attribution_method
        self.scales = check_scales(scales)
        self.weights = normalized_weights(self.scales, weights)
        self.aggregation = aggregation
        self.interpolate_mode = interpolate_mode
        self.preserve_sum = preserve_sum

    # What Captum asks of a method follows the inner one, also when that is changed later.
    @property
    def forward_func(self) -> Callable[..., Any]:
        return self.attribution_method.forward_func

    @forward_func.setter
    def forward_func(self, value: Callable[..., Any]) -> None:
        self.attribution_method.forward_func = value

    @property
    def multiplies_by_inputs(self) -> bool:
        return bool(self.attribution_method.multiplies_by_inputs)

    @property
    def is_gradient_method(self) -> bool:
        inner = self.attribution_method
        return bool(getattr(inner, "is_gradient_method", isinstance(inner, GradientAttribution)))

    def has_convergence_delta(self) -> bool:
        """False: the sum over rescaled attributions is not the sum that completeness speaks of."""
        return False

    @log_usage(part_of_slo=True)
    def attribute(self, inputs: Tensor | tuple[Tensor, ...], *args: Any, **kwargs: Any) -> Any:
        r"""
        Args:

            inputs (Tensor or tuple[Tensor, ...]): Inputs of the inner method. Those with at least one spatial
                        dimension, (N, C, ...), are resized; a tuple may mix them with others, which stay as they are.
            *args, **kwargs (Any, optional): Arguments of the inner method's ``attribute``.

        Returns:
            *Tensor* or *tuple[Tensor, ...]* of **attributions**:
            - **attributions** (*Tensor* or *tuple[Tensor, ...]*):
                Same shapes as the inner method returns for ``inputs``, and its dtype. For a layer method that returns
                other spatial sizes at other scales, those of the scale closest to 1.

        Raises:
            ValueError: ``return_convergence_delta=True`` with other scales than ``(1.0,)``; no input with spatial
                dimensions; the inner method returns something that is not a map.
        """
        if self.scales == (1.0,):
            return self.attribution_method.attribute(inputs, *args, **kwargs)
        kwargs = _by_name(self.attribution_method.attribute, inputs, args, kwargs)
        if kwargs.get("return_convergence_delta"):
            raise ValueError(
                "return_convergence_delta: completeness does not survive rescaling, so MSEA has no delta; ask the "
                "inner method itself, or use scales=(1.0,)."
            )
        tensors = format_tensor_into_tuples(inputs)
        if not any(_is_spatial(tensor) for tensor in tensors):
            raise ValueError(
                f"MSEA resizes inputs with spatial dimensions (N, C, ...), got shapes "
                f"{[tuple(tensor.shape) for tensor in tensors]}; use scales=(1.0,) for inputs that have none."
            )
        # The scale closest to 1 comes first: its attributions set the size that the others are brought back to.
        order = sorted(range(len(self.scales)), key=lambda i: abs(math.log(self.scales[i])))
        per_scale: list[list[Tensor]] = []
        single = True
        for index in order:
            scale = self.scales[index]
            scaled = tuple(self._resize(t, _scaled_size(t, scale)) if _is_spatial(t) else t for t in tensors)
            result = self.attribution_method.attribute(
                format_output(is_tuple(inputs), scaled), **_scaled_kwargs(kwargs, tensors, scale, self._resize)
            )
            single = isinstance(result, Tensor)
            parts = [result] if single else list(result)
            if not all(isinstance(part, Tensor) for part in parts):
                raise ValueError(
                    f"The inner method returned {[type(p).__name__ for p in parts]}; MSEA aggregates tensors."
                )
            targets = per_scale[0] if per_scale else parts
            per_scale.append([self._back(part, like) for part, like in zip(parts, targets, strict=True)])
        weights = self.weights[order]
        combined = tuple(
            aggregate([maps[i].detach() for maps in per_scale], weights, self.aggregation).to(per_scale[0][i].dtype)
            for i in range(len(per_scale[0]))
        )
        return combined[0] if single else combined

    def attribute_future(self) -> None:
        """This method is not implemented for MultiScaleExplanationAggregation."""
        raise NotImplementedError("attribute_future is not implemented for MultiScaleExplanationAggregation")

    def _resize(self, tensor: Tensor, size: Sequence[int]) -> Tensor:
        if tuple(tensor.shape[2:]) == tuple(size):
            return tensor
        if self.interpolate_mode == "nearest" or not tensor.is_floating_point():
            values = tensor if tensor.is_floating_point() else tensor.double()
            return F.interpolate(values, size=tuple(size), mode="nearest-exact").to(tensor.dtype)
        mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(size)]
        antialias = mode == "bilinear" and any(new < old for new, old in zip(size, tensor.shape[2:], strict=True))
        return F.interpolate(tensor, size=tuple(size), mode=mode, align_corners=False, antialias=antialias)

    def _back(self, part: Tensor, like: Tensor) -> Tensor:
        if part.shape == like.shape:
            return part
        if part.shape[:2] != like.shape[:2] or part.ndim != like.ndim or part.ndim < 3:
            raise ValueError(
                f"Attributions of shape {tuple(part.shape)} at one scale and {tuple(like.shape)} at another cannot be "
                "aligned; only spatial dimensions may differ."
            )
        back = self._resize(part, like.shape[2:])
        preserve = self.multiplies_by_inputs if self.preserve_sum is None else self.preserve_sum
        return back * (math.prod(part.shape[2:]) / math.prod(like.shape[2:])) if preserve else back


MSEA = MultiScaleExplanationAggregation


def _by_name(
    attribute: Callable[..., Any], inputs: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """The call's arguments after ``inputs``, by name: those that depend on the scale may come by position."""
    arguments = inspect.signature(attribute).bind(inputs, *args, **kwargs).arguments
    _, *rest = arguments.items()
    named: dict[str, Any] = {}
    for name, value in rest:
        parameter = inspect.signature(attribute).parameters[name]
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            named.update(value)
        elif parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            raise TypeError(
                f"Pass the arguments of {getattr(attribute, '__qualname__', attribute)} by name inside MSEA."
            )
        else:
            named[name] = value
    return named


def _is_spatial(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and 3 <= tensor.ndim <= 5


def _scaled_size(tensor: Tensor, scale: float) -> tuple[int, ...]:
    return tuple(max(1, round(side * scale)) for side in tensor.shape[2:])


def _scaled_kwargs(
    kwargs: dict[str, Any],
    inputs: tuple[Tensor, ...],
    scale: float,
    resize: Callable[[Tensor, Sequence[int]], Tensor],
) -> dict[str, Any]:
    """The arguments of the inner method that depend on the input's size, at another scale."""

    def per_input(value: Any, change: Callable[[Any, Tensor], Any]) -> Any:
        if len(inputs) > 1:
            several = isinstance(value, tuple) and len(value) == len(inputs)
            return tuple(change(v, tensor) for v, tensor in zip(value, inputs, strict=True)) if several else value
        if isinstance(value, tuple) and len(value) == 1 and not isinstance(value[0], int):
            return (change(value[0], inputs[0]),)
        return change(value, inputs[0])

    def baseline(value: Any, tensor: Tensor) -> Any:
        same_size = isinstance(value, Tensor) and _is_spatial(tensor) and value.shape[2:] == tensor.shape[2:]
        return resize(value, _scaled_size(tensor, scale)) if same_size else value

    def mask(value: Any, tensor: Tensor) -> Any:
        if not (
            isinstance(value, Tensor) and _is_spatial(tensor) and value.shape[-(tensor.ndim - 2) :] == tensor.shape[2:]
        ):
            return value
        size = _scaled_size(tensor, scale)
        lead = value.reshape(1, -1, *tensor.shape[2:]).double()
        return (
            F.interpolate(lead, size=size, mode="nearest-exact")
            .to(value.dtype)
            .reshape(*value.shape[: -len(size)], *size)
        )

    def window(value: Any, tensor: Tensor) -> Any:
        if not _is_spatial(tensor):
            return value
        if isinstance(value, int):
            return max(1, round(value * scale))
        channels, *sides = value
        limits = _scaled_size(tensor, scale)
        return (channels, *(min(max(1, round(side * scale)), limit) for side, limit in zip(sides, limits, strict=True)))

    changes = {"baselines": baseline, "feature_mask": mask, "sliding_window_shapes": window, "strides": window}
    return {
        name: per_input(value, changes[name]) if name in changes and value is not None else value
        for name, value in kwargs.items()
    }
