"""The private Captum helpers this package relies on, and what our wrappers owe Captum, in one place."""

from collections.abc import Callable
from typing import Any

from captum._utils.common import (
    _format_additional_forward_args as format_additional_forward_args,
)
from captum._utils.common import (
    _format_output as format_output,
)
from captum._utils.common import (
    _format_tensor_into_tuples as format_tensor_into_tuples,
)
from captum._utils.common import (
    _is_tuple as is_tuple,
)
from captum.attr import Attribution
from captum.log import log_usage

__all__ = [
    "WrapperAttribution",
    "format_additional_forward_args",
    "format_output",
    "format_tensor_into_tuples",
    "is_tuple",
    "log_usage",
]


class WrapperAttribution(Attribution):
    """An attribution around another one, ``attribution_method``: what Captum asks of it follows the inner one, also
    when that is changed later."""

    attribution_method: Any

    @property
    def forward_func(self) -> Callable[..., Any]:
        return self.attribution_method.forward_func

    @forward_func.setter
    def forward_func(self, value: Callable[..., Any]) -> None:
        self.attribution_method.forward_func = value

    @property
    def multiplies_by_inputs(self) -> bool:
        return bool(self.attribution_method.multiplies_by_inputs)

    def has_convergence_delta(self) -> bool:
        """False: what a wrapper changes is missing from the sum that completeness speaks of."""
        return False

    def attribute_future(self) -> None:
        """Not implemented."""
        raise NotImplementedError(f"attribute_future is not implemented for {type(self).__name__}")
