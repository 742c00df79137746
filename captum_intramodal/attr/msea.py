r"""Multi-Scale Explanation Aggregation: one explanation from the explanations at several input scales."""

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
from captum_intramodal.functional.aggregation import (
    AGGREGATIONS,
    DEFAULT_SCALES,
    Aggregation,
    aggregate,
    check_scales,
    normalized_weights,
)
from captum_intramodal.models.hooks import requires_grad_given_back

__all__ = ["MSEA", "MultiScaleExplanationAggregation"]


class MultiScaleExplanationAggregation(WrapperAttribution):
    r"""
    Multi-Scale Explanation Aggregation (arXiv 2509.22415, Eq. 4 and 5) around any Captum attribution method: the
    method explains the input at several scales, its attributions are brought back to the size of the original input,
    and are aggregated there:

    .. math::
        \mathrm{MSEA}(x) = \sum_s w_s \; U_s(\mathrm{attribute}(D_s(x)))

    with :math:`D_s` the input resized by the factor :math:`s` and :math:`U_s` the way back. With ``scales=(1.0,)`` the
    mean is what the inner method returns, exactly.

    How the input goes to a scale, what follows it there (baselines, masks, windows, forward arguments), and how
    attributions come back is up to the ``pyramid``: :class:`~captum_intramodal.pyramid.Resize` for models of any input
    size, :class:`~captum_intramodal.pyramid.LowPass` for a fixed one, :class:`~captum_intramodal.pyramid.Reprocess` for
    a processor's own tensors, or one that you write (:class:`~captum_intramodal.pyramid.Pyramid`).

    Methods that multiply by the inputs (IntegratedGradients, InputXGradient) distribute a mass over the pixels; on the
    way back each value is multiplied by the ratio of pixel counts, so that this mass stays the same. Gradient-like
    methods keep their values, and so do perturbations of groups of pixels (``feature_mask``, Occlusion's windows), in
    which each pixel has the value of its group, however many there are.

    Of a layer's attributions, spatial ones are aligned; others, (N, D), are aggregated as they are. ``layer_mask``,
    ``layer_baselines`` and the place in ``neuron_selector`` follow the layer's size, which is measured. A ``target``
    stays as it is: a model with spatial outputs needs a forward function that returns one value per class.

    Args:

        attribution_method (Attribution): Any Captum method on inputs with spatial dimensions (N, C, ...), such as
                    ``IntegratedGradients(forward_func)``; a NoiseTunnel or another wrapper too.
        scales (Sequence[float], optional): Factors of the input's size.
                    Default: ``(1.0, 1.5, 2.0)``
        weights (Sequence[float], optional): Weight of each scale; normalized to sum 1.
                    Default: None, equal weights.
        aggregation (str, optional): ``'mean'``, ``'max'`` or ``'geometric_mean'``, see :func:`aggregate`.
                    Default: ``'mean'``
        pyramid (Pyramid, optional): The way to a scale and back.
                    Default: None, ``Resize()``.
        preserve_sum (bool, optional): Whether attributions keep their total mass on the way back.
                    Default: None, what ``multiplies_by_inputs`` of the inner method says, but no for groups of pixels.

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
        pyramid: Pyramid | None = None,
        preserve_sum: bool | None = None,
    ) -> None:
        if not isinstance(attribution_method, Attribution):
            raise TypeError(
                f"attribution_method must be a Captum Attribution, got {type(attribution_method).__name__}; pass an "
                "instance such as IntegratedGradients(forward_func)."
            )
        if aggregation not in AGGREGATIONS:
            raise ValueError(f"aggregation must be one of {AGGREGATIONS}, got {aggregation!r}.")
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
        Args:

            inputs (Tensor or tuple[Tensor, ...]): Inputs of the inner method, which are left as they are, also by
                        an exception. Those with one to three spatial dimensions, (N, C, ...), go to each scale; a tuple
                        may mix them with others, which stay as they are.
            *args, **kwargs (Any, optional): Arguments of the inner method's ``attribute``.

        Returns:
            *Tensor* or *tuple[Tensor, ...]* of **attributions**:
            - **attributions** (*Tensor* or *tuple[Tensor, ...]*):
                Same shapes as the inner method returns for ``inputs``, its dtype, and its tuples and lists. For a layer
                method that returns other spatial sizes at other scales, those of the scale closest to 1.

        Raises:
            ValueError: ``return_convergence_delta=True`` with other scales than ``(1.0,)``; an input that the pyramid
                has no other scales of; the inner method returns something else than tensors.
        """
        with requires_grad_given_back(*format_tensor_into_tuples(inputs)):
            return self._attribute(inputs, _by_name(self.attribution_method.attribute, inputs, args, kwargs))

    def _attribute(self, inputs: Tensor | tuple[Tensor, ...], kwargs: dict[str, Any]) -> Any:
        if kwargs.get("return_convergence_delta") and self.scales != (1.0,):
            raise ValueError(
                "return_convergence_delta: completeness does not survive rescaling, so MSEA has no delta; ask the "
                "inner method itself, or use scales=(1.0,)."
            )
        tensors = format_tensor_into_tuples(inputs)
        preserve_sum = self._preserves_sum(kwargs)
        # The scale closest to 1 comes first: its attributions set the size that other scales' are brought back to.
        order = sorted(range(len(self.scales)), key=lambda i: abs(math.log(self.scales[i])))
        levels: list[tuple[Tensor, ...]] = []
        for index in order:
            scale = self.scales[index]
            scaled, arguments = self.pyramid.down(tensors, kwargs, scale)
            at_scale = format_output(is_tuple(inputs), scaled)
            arguments = layer_arguments(self.attribution_method, (inputs, kwargs), (at_scale, arguments))
            leaves, structure = tree_flatten(self.attribution_method.attribute(at_scale, **arguments))
            if not all(isinstance(leaf, Tensor) for leaf in leaves):
                raise ValueError(
                    f"The inner method returned {[type(leaf).__name__ for leaf in leaves]}; MSEA aggregates tensors."
                )
            parts = tuple(leaf.detach() for leaf in leaves)
            like = levels[0] if levels else parts
            if len(parts) == len(tensors):
                like = tuple(
                    tensor if part.shape[1:] == small.shape[1:] else other
                    for part, other, small, tensor in zip(parts, like, scaled, tensors, strict=True)
                )
            levels.append(self.pyramid.back(parts, like, scale, preserve_sum))
        weights = self.weights[order]
        combined = [aggregate(maps, weights, self.aggregation).to(maps[0].dtype) for maps in zip(*levels, strict=True)]
        return tree_unflatten(combined, structure)

    def _preserves_sum(self, kwargs: dict[str, Any]) -> bool:
        if self.preserve_sum is not None:
            return self.preserve_sum
        grouped = any(kwargs.get(name) is not None for name in ("feature_mask", "layer_mask", "sliding_window_shapes"))
        return self.multiplies_by_inputs and not grouped


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
