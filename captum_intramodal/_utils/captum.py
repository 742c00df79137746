r"""All private Captum helpers that this package depends on, and the base class of wrappers around attributions."""

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
    """Base class of attributions that wrap another one, ``attribution_method``, and share its forward function."""

    attribution_method: Any

    @property
    def forward_func(self) -> Callable[..., Any]:
        """Forward function of the wrapped attribution; set it to change that one's."""
        return self.attribution_method.forward_func

    @forward_func.setter
    def forward_func(self, value: Callable[..., Any]) -> None:
        self.attribution_method.forward_func = value

    @property
    def multiplies_by_inputs(self) -> bool:
        """Whether the wrapped attribution multiplies by its inputs."""
        return bool(self.attribution_method.multiplies_by_inputs)

    def has_convergence_delta(self) -> bool:
        """Return False: a wrapper's attributions do not sum to the difference that completeness requires."""
        return False

    def attribute_future(self) -> None:
        """Raise NotImplementedError."""
        raise NotImplementedError(f"attribute_future is not implemented for {type(self).__name__}; use attribute.")
