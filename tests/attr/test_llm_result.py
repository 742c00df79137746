"""The result of an attribution, and the plots that Captum makes of it."""

from __future__ import annotations

import matplotlib
import numpy as np
import pytest
import torch
from captum.attr import (
    LLMAttributionResult,
    visualization,
)

from captum_intramodal import Explanation, ModelAdapter, explain
from tests.attr.llm_helpers import PROMPT
from tests.testing.tiny import random_image, tiny

matplotlib.use("Agg")


@pytest.fixture(scope="module")
def qwen() -> ModelAdapter:
    return ModelAdapter(*tiny("qwen2_vl"))


@pytest.fixture(scope="module")
def explanation(qwen: ModelAdapter) -> Explanation:
    images = [random_image(224, 168), random_image(112, 112, seed=1)]
    return explain(qwen.model, qwen.processor, images, PROMPT, "a red dog and a cat", scales=(1.0,))


def test_an_explanation_becomes_captums_result(explanation: Explanation) -> None:
    result = explanation.to_llm_attribution_result(grid=(3, 4))
    assert isinstance(result, LLMAttributionResult)
    assert bool((explanation.relevance[3:] > 0).any()) and bool(explanation.maps[0][3:].any())
    assert result.output_tokens == explanation.tokens
    assert result.input_tokens[12:24] == [f"image_1_feature_{i}" for i in range(12)]
    assert result.input_tokens[24:] == [*PROMPT.split(), "a", "red", "dog", "and", "a"]
    assert result.token_attr.shape == (6, 32)
    # The first image's map has a size that a 3 x 4 grid divides.
    maps = explanation.maps[0][3:]
    rows, columns = maps.shape[1] // 3, maps.shape[2] // 4
    for cell in range(12):
        top, left = cell // 4 * rows, cell % 4 * columns
        expected = maps[:, top : top + rows, left : left + columns].mean((1, 2))
        assert torch.allclose(result.token_attr[:, cell], expected, atol=1e-5)
    for token in range(6):
        relevance = result.token_attr[token, 24 : 24 + 3 + token]
        assert torch.allclose(relevance, relevance.max() * explanation.text_relevance(token))
        assert not result.token_attr[token, 24 + 3 + token :].any()
    assert torch.allclose(result.seq_attr, result.token_attr.sum(0))
    heat = result.heatmap(2, image=1)
    assert heat.shape == (112, 112)
    assert float(heat[-1, -1]) == pytest.approx(float(result.token_attr[2, 23]))


def test_captums_plots_show_the_attributions(explanation: Explanation) -> None:
    import matplotlib.pyplot as plt

    result = explanation.to_llm_attribution_result(grid=(2, 2))
    _, axes = result.plot_token_attr()
    assert np.array_equal(axes.images[0].get_array(), result.token_attr.numpy())
    assert [label.get_text() for label in axes.get_yticklabels()] == explanation.tokens
    _, axes = result.plot_seq_attr()
    heights = [bar.get_height() for bar in axes.patches[: len(result.seq_attr)]]
    assert heights == pytest.approx(result.seq_attr.tolist())
    assert result.seq_attr_dict["image_1_feature_3"] == pytest.approx(float(result.seq_attr[7]))
    _, axes = result.plot_image_heatmap(target_token_pos=2, image=1)
    assert np.array_equal(axes.images[1].get_array(), result.heatmap(2, image=1).numpy())
    plt.close("all")


def test_captums_visualizations_show_the_explanation(explanation: Explanation) -> None:
    pytest.importorskip("IPython")
    page = visualization.visualize_text([explanation.to_visualization_record("dog")]).data
    assert all(f"> {word} " in " ".join(page.split()) for word in (*PROMPT.split(), "red"))
    probability = float(explanation.probabilities[2])
    assert f"dog ({probability:.2f})" in page
    assert f"{float(explanation.text_relevance('dog').sum()):.2f}" in page
    heat = explanation.heatmap("dog").numpy()
    _, axes = visualization.visualize_image_attr(
        heat[..., None], np.asarray(explanation.images[0]), "heat_map", "positive", outlier_perc=0, use_pyplot=False
    )
    assert np.allclose(axes.images[0].get_array(), heat / heat.max(), atol=1e-5)
