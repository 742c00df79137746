r"""Explain multimodal LLMs word by word, with Captum: multi-scale aggregation (MSEA) and ranking correlation (ARC)."""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from captum_intramodal._version import __version__

if TYPE_CHECKING:
    from captum_intramodal.adapter import ModelAdapter
    from captum_intramodal.arc import ARC, ActivationRankingCorrelation
    from captum_intramodal.check import CheckReport, check
    from captum_intramodal.explain import explain, explain_batch
    from captum_intramodal.explanation import Explanation
    from captum_intramodal.hidden_states import HiddenStates
    from captum_intramodal.llm_attribution import (
        ImageTextInput,
        MultimodalLLMAttribution,
        MultimodalLLMAttributionResult,
    )
    from captum_intramodal.logit_lens import LayerLogitLens, LogitLens
    from captum_intramodal.msea import DEFAULT_SCALES, MSEA, MultiScaleExplanationAggregation
    from captum_intramodal.pixels import PixelForward, ProcessedPixelForward
    from captum_intramodal.pyramid import LowPass, Pyramid, Reprocess, Resize
    from captum_intramodal.rankings import pairwise_rank_biased_overlap, rank_biased_overlap
    from captum_intramodal.text import Word
    from captum_intramodal.visual_tokens import VisualTokenAttribution, draw_positions

__all__ = [
    "ARC",
    "DEFAULT_SCALES",
    "MSEA",
    "ActivationRankingCorrelation",
    "CheckReport",
    "Explanation",
    "HiddenStates",
    "ImageTextInput",
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

_MODULES = (
    "adapter", "arc", "check", "explain", "explanation", "hidden_states", "llm_attribution", "logit_lens", "msea",
    "pixels", "pyramid", "rankings", "text", "visual_tokens",
)  # fmt: skip


class _Package(ModuleType):
    """Imports torch and transformers with the first name that is asked for; ``captum-intramodal --help`` needs none."""

    def __getattr__(self, name: str) -> Any:
        if name in __all__:
            for module in (import_module(f"{__name__}.{each}") for each in _MODULES):
                if name in module.__all__:
                    return getattr(module, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        # The import system would let the submodules explain and check hide the functions of these names.
        if name not in __all__ or not isinstance(value, ModuleType):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
