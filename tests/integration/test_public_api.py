"""Code and files written for version 0.1 still work: public names, the console script, and saved explanations."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import distribution
from pathlib import Path

import pytest
import torch

from captum_intramodal import Explanation

SAVED = Path(__file__).parents[1] / "data" / "explanation_0_1"

# What ``__all__`` of each public module was in version 0.1. Never shorten these lists.
PUBLIC_NAMES = {
    "captum_intramodal": [
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
    ],
    "captum_intramodal.adapter": ["Encoding", "ModelAdapter", "check_images", "logits_gap", "stack_inputs"],
    "captum_intramodal.geometry": [
        "TokenGeometry",
        "cached_geometry",
        "cached_pixels",
        "expected_raster",
        "geometry_key",
        "geometry_oracle",
        "image_token_id",
        "measure_geometry",
        "state_rows",
        "visual_positions",
        "visual_rows",
    ],
    "captum_intramodal.datasets": [
        "DATASETS",
        "CocoDataset",
        "EvaluationDataset",
        "FolderDataset",
        "Sample",
        "SceneDataset",
        "TAMDataset",
        "open_dataset",
    ],
    "captum_intramodal.explainers": [
        "EXPLAINERS",
        "Explainer",
        "TextMaps",
        "eager_attention",
        "greedy_inclusion",
        "make_explainer",
        "shared_readings",
    ],
    "captum_intramodal.metrics": [
        "FRACTIONS",
        "FUNCTION_WORD",
        "OTHER_NOUN",
        "OTHER_WORD",
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
    ],
    "captum_intramodal.evaluation": [
        "DEFAULT_EXPLAINERS",
        "DEFAULT_METRICS",
        "METRICS",
        "AnswerWord",
        "Case",
        "Column",
        "Leaderboard",
        "Measured",
        "Metric",
        "evaluate",
        "make_leaderboard",
        "make_metric",
    ],
    "captum_intramodal.demo": ["CHECKPOINT", "PICTURES", "Question", "Scene", "SceneObject", "compose"],
}


def test_the_lists_are_complete() -> None:
    assert {module: len(names) for module, names in PUBLIC_NAMES.items()} == {
        "captum_intramodal": 29,
        "captum_intramodal.adapter": 5,
        "captum_intramodal.geometry": 11,
        "captum_intramodal.datasets": 8,
        "captum_intramodal.explainers": 7,
        "captum_intramodal.metrics": 31,
        "captum_intramodal.evaluation": 12,
        "captum_intramodal.demo": 6,
    }


@pytest.mark.parametrize("module", PUBLIC_NAMES)
def test_every_public_name_is_importable(module: str) -> None:
    imported = import_module(module)
    missing = [name for name in PUBLIC_NAMES[module] if not hasattr(imported, name)]
    assert not missing


def test_the_functions_named_like_former_modules_are_functions() -> None:
    package = import_module("captum_intramodal")
    assert callable(package.explain) and callable(package.check)


def test_the_console_script_is_the_function_main_of_cli() -> None:
    (script,) = distribution("captum-intramodal").entry_points.select(group="console_scripts")
    assert (script.name, script.value) == ("captum-intramodal", "captum_intramodal.cli:main")
    assert script.load() is import_module("captum_intramodal.cli").main


def test_an_explanation_saved_by_version_0_1_loads() -> None:
    explanation = Explanation.load(SAVED)
    assert explanation.prompt == "describe the picture."
    assert explanation.answer == "the picture shows a pig, a bus and a yellow book."
    assert explanation.settings["versions"]["captum_intramodal"] == "0.1.0"
    assert [image.size for image in explanation.images] == [(320, 224)]
    assert [tuple(maps.shape) for maps in explanation.maps] == [(17, 14, 20)]
    assert tuple(explanation.relevance.shape) == (17, 17)
    assert tuple(explanation.probabilities.shape) == (13,)
    assert len(explanation.words) == 13 and explanation.words[4].text == "pig"
    heatmap = explanation.heatmap("pig")
    assert heatmap.shape == (224, 320) and heatmap.dtype == torch.float32
    assert float(heatmap[72, 40]) == pytest.approx(0.9965399, abs=1e-6)
    assert float(heatmap[100, 100]) == pytest.approx(0.1061251, abs=1e-6)


def test_an_explanation_saved_by_version_0_1_is_saved_again_unchanged(tmp_path: Path) -> None:
    old = Explanation.load(SAVED)
    new = Explanation.load(old.save(tmp_path / "again"))
    assert new.settings == old.settings and new.answer == old.answer
    assert torch.equal(new.maps[0], old.maps[0]) and torch.equal(new.relevance, old.relevance)
