r"""Named explainers, one call each: they turn an answer into one map per token over the original images.

:data:`EXPLAINERS` lists them; :func:`make_explainer` makes one from text, such as ``'logit_lens:layer=-2'``,
``'msea+arc:scales=[1,2],k=20'`` or ``'arc+grad_cam'``. Register a class of your own with
:func:`register_explainer` or by an entry point of the group ``captum_intramodal.explainers``, or give its dotted name.
"""

# These modules register their explainers.
from captum_intramodal.explainers import captum_methods, controls, logit_lens, tam  # noqa: F401
from captum_intramodal.explainers.attention import eager_attention
from captum_intramodal.explainers.base import BaseExplainer, Example, Explainer, TextMaps
from captum_intramodal.explainers.greedy import greedy_inclusion
from captum_intramodal.explainers.pass_sharing import shared_passes
from captum_intramodal.explainers.registry import EXPLAINERS, make_explainer, register_explainer

__all__ = [
    "EXPLAINERS",
    "BaseExplainer",
    "Example",
    "Explainer",
    "TextMaps",
    "eager_attention",
    "greedy_inclusion",
    "make_explainer",
    "register_explainer",
    "shared_passes",
    "shared_readings",
]

# Its name before 0.2.
shared_readings = shared_passes
