r"""Evaluate explanations: localization, faithfulness, sanity checks, and the uncertainty of all these figures."""

from captum_intramodal.functional.imputation import Imputer, noisy_linear_imputation
from captum_intramodal.metrics.curves import FRACTIONS, aopc, area_under_curve, deletion_curve, insertion_curve, road
from captum_intramodal.metrics.localization import (
    average_precision,
    energy_inside,
    f1_iou,
    function_iou,
    iou,
    object_iou,
    otsu_threshold,
    pointing_hit,
)
from captum_intramodal.metrics.randomization import RandomizationStep, randomization_check
from captum_intramodal.metrics.removal import ImageRemoval, TokenRemoval
from captum_intramodal.metrics.statistics import (
    Interval,
    bootstrap_interval,
    paired_bootstrap_difference,
    paired_permutation_test,
)
from captum_intramodal.metrics.tam_scores import FUNCTION_WORD, OTHER_NOUN, OTHER_WORD, TAMScores, tam_scores
from captum_intramodal.text.parts_of_speech import match_categories, word_types

__all__ = [
    "FRACTIONS",
    "FUNCTION_WORD",
    "OTHER_NOUN",
    "OTHER_WORD",
    "ImageRemoval",
    "Imputer",
    "Interval",
    "PictureRemoval",
    "RandomizationStep",
    "TAMScores",
    "TokenRemoval",
    "aopc",
    "area_under_curve",
    "average_precision",
    "bootstrap_interval",
    "deletion_curve",
    "energy_inside",
    "f1_iou",
    "function_iou",
    "insertion_curve",
    "iou",
    "match_categories",
    "noisy_linear_imputation",
    "object_iou",
    "otsu_threshold",
    "paired_bootstrap_difference",
    "paired_permutation_test",
    "pointing_hit",
    "randomization_check",
    "road",
    "tam_scores",
    "word_types",
]

# Its name before 0.2.
PictureRemoval = ImageRemoval
