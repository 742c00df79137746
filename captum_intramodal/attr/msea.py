r"""Multi-Scale Explanation Aggregation (MSEA): one attribution from attributions at several input scales."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

from captum.attr import Attribution, GradientAttribution
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from captum_intramodal._utils.captum import (
    WrapperAttribution,
    format_output,
    format_tensor_into_tuples,
    is_tuple,
    log_usage,
)
from captum_intramodal.attr.pyramids.base import Pyramid
from captum_intramodal.attr.pyramids.layer_arguments import layer_arguments
from captum_intramodal.attr.pyramids.resize import Resize
from captum_intramodal.errors import InvalidInputError, InvalidOptionError
from captum_intramodal.functional.aggregation import (
    AGGREGATIONS,
    DEFAULT_SCALES,
    Aggregation,
    aggregate,
    check_scales,
    normalized_weights,
)
from captum_intramodal.models.hooks import preserve_requires_grad

__all__ = ["MSEA", "MultiScaleExplanationAggregation"]


class MultiScaleExplanationAggregation(WrapperAttribution):
    r"""
    Multi-Scale Explanation Aggregation (arXiv 2509.22415, Eq. 4 and 5) wraps any Captum attribution method: the method
    attributes the input at several scales, and its attributions are mapped back to the size of the original input and
    aggregated:

    .. math::
        \mathrm{MSEA}(x) = \sum_s w_s \; U_s(\mathrm{attribute}(D_s(x)))

    with :math:`D_s` the map of the input to scale :math:`s` and :math:`U_s` the map back. With ``scales=(1.0,)`` the
    mean is exactly what the inner method returns.

    The ``pyramid`` defines how an input gets to a scale, which arguments follow it there (baselines, masks, windows,
    forward arguments), and how attributions come back: :class:`~captum_intramodal.Resize` for models of any input size,
    :class:`~captum_intramodal.LowPass` for models of a fixed input size, :class:`~captum_intramodal.Reprocess` for the
    tensors of a processor, or your own :class:`~captum_intramodal.Pyramid`.

    Methods that multiply by the inputs (IntegratedGradients, InputXGradient) distribute a total over the pixels; on
    the way back each value is multiplied by the ratio of pixel counts, which preserves this total. Gradient-like
    methods keep their values, and so do perturbations of groups of pixels (``feature_mask``, Occlusion's windows), in
    which every pixel has the value of its group, whatever the group's size.

    Spatial attributions of a layer are aligned; others, (N, D), are aggregated unchanged. ``layer_mask``,
    ``layer_baselines`` and the position in ``neuron_selector`` follow the layer's size, which is measured. ``target``
    does not change: a model with spatial outputs needs a forward function that returns one value per class.

    Args:

        attribution_method (Attribution): Any Captum method on inputs with spatial dimensions (N, C, ...), such as
                    ``IntegratedGradients(forward_func)``, a NoiseTunnel or another wrapper.
        scales (Sequence[float], optional): Factors of the input's size.
                    Default: ``(1.0, 1.5, 2.0)``
        weights (Sequence[float], optional): Weight of each scale; normalized to sum to 1.
                    Default: None, equal weights
        aggregation (str, optional): ``'mean'``, ``'max'`` or ``'geometric_mean'``, see
                    :func:`~captum_intramodal.functional.aggregation.aggregate`.
                    Default: ``'mean'``
        pyramid (Pyramid, optional): The way to a scale and back.
                    Default: None, ``Resize()``
        preserve_sum (bool, optional): Whether attributions keep their total on the way back.
                    Default: None, the inner method's ``multiplies_by_inputs``, but False for groups of pixels

    Raises:
        InvalidOptionError: if scales, weights or aggregation are out of range.
        TypeError: if ``attribution_method`` is not a Captum method, or ``pyramid`` lacks the methods of a Pyramid.

    Examples::

        >>> from captum.attr import IntegratedGradients
        >>> from captum_intramodal import MSEA
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
        >>> msea = MSEA(IntegratedGradients(net), scales=(0.5, 1.0, 1.5))
        >>> msea.attribute(torch.rand(2, 3, 32, 32), target=3, n_steps=5).shape
        torch.Size([2, 3, 32, 32])
    """

    def __init__(
        self,
        attribution_method: Attribution,
        scales: Sequence[float] = DEFAULT_SCALES,
        weights: Sequence[float] | None = None,
        aggregation: Aggregation = "mean",
        pyramid: Pyramid | None = None,
        preserve_sum: bool | None = None,
    ) -> None:
        if not isinstance(attribution_method, Attribution):
            raise TypeError(
                f"attribution_method must be a Captum Attribution, got {type(attribution_method).__name__}; pass an "
                "instance such as IntegratedGradients(forward_func)."
            )
        if aggregation not in AGGREGATIONS:
            raise InvalidOptionError(f"aggregation must be one of {AGGREGATIONS}, got {aggregation!r}.")
        if pyramid is not None and not (hasattr(pyramid, "down") and hasattr(pyramid, "back")):
            raise TypeError(f"pyramid must have the methods of a Pyramid, such as Resize(); got {pyramid!r}.")
        self.attribution_method = attribution_method
        self.scales = check_scales(scales)
        self.weights = normalized_weights(self.scales, weights)
        self.aggregation = aggregation
        self.pyramid = Resize() if pyramid is None else pyramid
        self.preserve_sum = preserve_sum

    @property
    def is_gradient_method(self) -> bool:
        inner = self.attribution_method
        return bool(getattr(inner, "is_gradient_method", isinstance(inner, GradientAttribution)))

    @log_usage(part_of_slo=True)
    def attribute(self, inputs: Tensor | tuple[Tensor, ...], *args: Any, **kwargs: Any) -> Any:
        r"""
        Attribute at every scale with the inner method and aggregate.

        Args:

            inputs (Tensor or tuple[Tensor, ...]): Inputs of the inner method, restored even if it raises an exception.
                        Those with one to three spatial dimensions, (N, C, ...), are scaled; a tuple may also contain
                        others, which stay unchanged.
            *args, **kwargs (Any, optional): Arguments of the inner method's ``attribute``.

        Returns:
            **attributions** (*Tensor* or *tuple[Tensor, ...]*): of the shapes, dtype and structure (tuples, lists) that
            the inner method returns for ``inputs``. If a layer method returns other spatial sizes at other scales, the
            sizes are those of the scale closest to 1.

        Raises:
            InvalidOptionError: if ``return_convergence_delta=True`` and scales are not ``(1.0,)``.
            InvalidInputError: if the pyramid cannot scale an input, or the inner method returns anything but tensors.
        """
        with preserve_requires_grad(*format_tensor_into_tuples(inputs)):
            return self._attribute(inputs, _by_name(self.attribution_method.attribute, inputs, args, kwargs))

    def _attribute(self, inputs: Tensor | tuple[Tensor, ...], kwargs: dict[str, Any]) -> Any:
        """Attribute and aggregate, with all arguments by name."""
        if kwargs.get("return_convergence_delta") and self.scales != (1.0,):
            raise InvalidOptionError(
                "MSEA has no convergence delta, as completeness does not survive rescaling; call the inner method "
                "itself for it, or use scales=(1.0,)."
            )
        tensors = format_tensor_into_tuples(inputs)
        preserve_sum = self._preserves_sum(kwargs)
        # The scale closest to 1 comes first: its attributions define the size to which those of a layer are mapped.
        order = sorted(range(len(self.scales)), key=lambda i: abs(math.log(self.scales[i])))
        per_scale: list[tuple[Tensor, ...]] = []
        for index in order:
            scale = self.scales[index]
            scaled, arguments = self.pyramid.down(tensors, kwargs, scale)
            scaled_inputs = format_output(is_tuple(inputs), scaled)
            arguments = layer_arguments(self.attribution_method, (inputs, kwargs), (scaled_inputs, arguments))
            leaves, structure = tree_flatten(self.attribution_method.attribute(scaled_inputs, **arguments))
            if not all(isinstance(leaf, Tensor) for leaf in leaves):
                raise InvalidInputError(
                    f"MSEA aggregates tensors, but {type(self.attribution_method).__name__} returned "
                    f"{[type(leaf).__name__ for leaf in leaves]}."
                )
            parts = tuple(leaf.detach() for leaf in leaves)
            like = per_scale[0] if per_scale else parts
            if len(parts) == len(tensors):
                like = tuple(
                    tensor if part.shape[1:] == small.shape[1:] else other
                    for part, other, small, tensor in zip(parts, like, scaled, tensors, strict=True)
                )
            per_scale.append(self.pyramid.back(parts, like, scale, preserve_sum))
        weights = self.weights[order]
        combined = [
            aggregate(maps, weights, self.aggregation).to(maps[0].dtype) for maps in zip(*per_scale, strict=True)
        ]
        return tree_unflatten(combined, structure)

    def _preserves_sum(self, kwargs: dict[str, Any]) -> bool:
        """Return ``preserve_sum``, or the default for these arguments."""
        if self.preserve_sum is not None:
            return self.preserve_sum
        grouped = any(kwargs.get(name) is not None for name in ("feature_mask", "layer_mask", "sliding_window_shapes"))
        return self.multiplies_by_inputs and not grouped


MSEA = MultiScaleExplanationAggregation


def _by_name(
    attribute: Callable[..., Any], inputs: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Return the arguments after ``inputs`` by name, as a pyramid looks up those that depend on the scale by name."""
    call = inspect.signature(attribute)
    _, *rest = call.bind(inputs, *args, **kwargs).arguments.items()
    named: dict[str, Any] = {}
    for name, value in rest:
        kind = call.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            named.update(value)
        elif kind is inspect.Parameter.VAR_POSITIONAL:
            raise TypeError(
                f"Pass the arguments of {getattr(attribute, '__qualname__', attribute)} by name inside MSEA."
            )
        else:
            named[name] = value
    return named
