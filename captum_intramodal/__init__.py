r"""Explain multimodal LLMs word by word, with Captum: multi-scale aggregation (MSEA) and ranking correlation (ARC)."""

from captum_intramodal._version import __version__
from captum_intramodal.adapter import ModelAdapter
from captum_intramodal.arc import ARC, ActivationRankingCorrelation
from captum_intramodal.check import CheckReport, check
from captum_intramodal.explain import explain
from captum_intramodal.explanation import Explanation
from captum_intramodal.logit_lens import LayerLogitLens, LogitLens
from captum_intramodal.msea import DEFAULT_SCALES, MSEA, MultiScaleExplanationAggregation
from captum_intramodal.pixels import PixelForward
from captum_intramodal.pyramid import LowPass, Pyramid, Reprocess, Resize
from captum_intramodal.rankings import pairwise_rank_biased_overlap, rank_biased_overlap
from captum_intramodal.text import Word

__all__ = [
    "ARC",
    "DEFAULT_SCALES",
    "MSEA",
    "ActivationRankingCorrelation",
    "CheckReport",
    "Explanation",
    "LayerLogitLens",
    "LogitLens",
    "LowPass",
    "ModelAdapter",
    "MultiScaleExplanationAggregation",
    "PixelForward",
    "Pyramid",
    "Reprocess",
    "Resize",
    "Word",
    "__version__",
    "check",
    "explain",
    "pairwise_rank_biased_overlap",
    "rank_biased_overlap",
]
