r"""Explain multimodal LLMs word by word, with Captum: multi-scale aggregation (MSEA) and ranking correlation (ARC)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from captum_intramodal._version import __version__

if TYPE_CHECKING:
    from captum_intramodal.adapter.model_adapter import ModelAdapter
    from captum_intramodal.attr.arc import ARC, ActivationRankingCorrelation
    from captum_intramodal.attr.hidden_states import HiddenStates
    from captum_intramodal.attr.layer_direct_contribution import LayerDirectContribution
    from captum_intramodal.attr.layer_logit_lens import LayerLogitLens
    from captum_intramodal.attr.llm_attribution import MultimodalLLMAttribution
    from captum_intramodal.attr.llm_input import ImageTextInput
    from captum_intramodal.attr.llm_result import MultimodalLLMAttributionResult
    from captum_intramodal.attr.msea import MSEA, MultiScaleExplanationAggregation
    from captum_intramodal.attr.pixel_forward import PixelForward
    from captum_intramodal.attr.processed_pixel_forward import ProcessedPixelForward
    from captum_intramodal.attr.pyramids.base import Pyramid
    from captum_intramodal.attr.pyramids.low_pass import LowPass
    from captum_intramodal.attr.pyramids.reprocess import Reprocess
    from captum_intramodal.attr.pyramids.resize import Resize
    from captum_intramodal.attr.visual_token_attribution import VisualTokenAttribution, draw_positions
    from captum_intramodal.explanation.explain import explain, explain_batch
    from captum_intramodal.explanation.explanation import Explanation
    from captum_intramodal.explanation.model_check import CheckReport, check
    from captum_intramodal.functional.aggregation import DEFAULT_SCALES
    from captum_intramodal.functional.rank_overlap import pairwise_rank_biased_overlap, rank_biased_overlap
    from captum_intramodal.models.logit_lens import LogitLens
    from captum_intramodal.text.spans import Word

# Torch and transformers are imported with the first name that needs them; ``captum-intramodal --help`` needs none.
_MODULES = {
    "ARC": "attr.arc",
    "DEFAULT_SCALES": "functional.aggregation",
    "MSEA": "attr.msea",
    "ActivationRankingCorrelation": "attr.arc",
    "CheckReport": "explanation.model_check",
    "Explanation": "explanation.explanation",
    "HiddenStates": "attr.hidden_states",
    "ImageTextInput": "attr.llm_input",
    "LayerDirectContribution": "attr.layer_direct_contribution",
    "LayerLogitLens": "attr.layer_logit_lens",
    "LogitLens": "models.logit_lens",
    "LowPass": "attr.pyramids.low_pass",
    "ModelAdapter": "adapter.model_adapter",
    "MultiScaleExplanationAggregation": "attr.msea",
    "MultimodalLLMAttribution": "attr.llm_attribution",
    "MultimodalLLMAttributionResult": "attr.llm_result",
    "PixelForward": "attr.pixel_forward",
    "ProcessedPixelForward": "attr.processed_pixel_forward",
    "Pyramid": "attr.pyramids.base",
    "Reprocess": "attr.pyramids.reprocess",
    "Resize": "attr.pyramids.resize",
    "VisualTokenAttribution": "attr.visual_token_attribution",
    "Word": "text.spans",
    "check": "explanation.model_check",
    "draw_positions": "attr.visual_token_attribution",
    "explain": "explanation.explain",
    "explain_batch": "explanation.explain",
    "pairwise_rank_biased_overlap": "functional.rank_overlap",
    "rank_biased_overlap": "functional.rank_overlap",
}

__all__ = [
    "ARC",
    "DEFAULT_SCALES",
    "MSEA",
    "ActivationRankingCorrelation",
    "CheckReport",
    "Explanation",
    "HiddenStates",
    "ImageTextInput",
    "LayerDirectContribution",
    "LayerLogitLens",
    "LogitLens",
    "LowPass",
    "ModelAdapter",
    "MultiScaleExplanationAggregation",
    "MultimodalLLMAttribution",
    "MultimodalLLMAttributionResult",
    "PixelForward",
    "ProcessedPixelForward",
    "Pyramid",
    "Reprocess",
    "Resize",
    "VisualTokenAttribution",
    "Word",
    "__version__",
    "check",
    "draw_positions",
    "explain",
    "explain_batch",
    "pairwise_rank_biased_overlap",
    "rank_biased_overlap",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
