"""The private Captum helpers this package relies on, in one place."""

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
from captum.log import log_usage

__all__ = ["format_additional_forward_args", "format_output", "format_tensor_into_tuples", "is_tuple", "log_usage"]
