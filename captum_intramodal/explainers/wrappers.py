r"""How do MSEA and ARC apply to any explainer? They call it once per scale, or suppress interference in its maps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_intramodal._utils.image import resize_images
from captum_intramodal.explainers.base import BaseExplainer, Example, Explainer
from captum_intramodal.explainers.options import RankingOptions, ScaleOptions
from captum_intramodal.explainers.pass_sharing import PassRequest, collect
from captum_intramodal.explanation.options import ExplainOptions
from captum_intramodal.explanation.scale_views import select_views
from captum_intramodal.functional.aggregation import aggregate

__all__ = ["ARCAround", "MSEAAround"]


@dataclass(kw_only=True)
class MSEAAround(ScaleOptions, BaseExplainer):
    r"""
    MSEA around any explainer: it explains the images at each scale that gives the model something new. Its maps,
    interpolated to the finest of their grids, are aggregated without further processing.

    Args:

        base (Explainer): The explainer.
        scales, scale_weights, aggregation (optional): See :func:`captum_intramodal.explain`.

    Examples::

        >>> from captum_intramodal.explainers import make_explainer
        >>> explainer = make_explainer("msea+attention:scales=[1,1.5],layer=0")
        >>> explainer.scales, explainer.base.layer
        ((1.0, 1.5), 0)
    """

    base: Explainer

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"msea+{self.base.name}"

    def explain(self, example: Example) -> list[Tensor]:
        adapter, images, prompt, answer_ids = example
        with torch.no_grad():
            views, _ = select_views(adapter, images, self.scales, adapter.prepare(images, prompt))
        of_scales = []
        for scale in views:
            sizes = [(max(1, round(i.width * scale)), max(1, round(i.height * scale))) for i in images]
            of_scales.append(self.base(adapter, resize_images(images, sizes), prompt, answer_ids))
        weights = self.weights_for(list(views))
        result = []
        for maps in zip(*of_scales, strict=True):
            grid = max((m.shape[1:] for m in maps), key=torch.Size.numel)
            resized = [F.interpolate(m[None], grid, mode="bilinear", align_corners=False)[0] for m in maps]
            result.append(aggregate(resized, weights, self.aggregation))
        return result


@dataclass(kw_only=True)
class ARCAround(RankingOptions, BaseExplainer):
    r"""
    ARC around any explainer. As an explainer computes maps of the answer's tokens only, these are the context.

    Args:

        base (Explainer): The explainer.
        layers, k, p, normalization, weighting, ranking_position, least_squares, strength (optional): See
                    :class:`captum_intramodal.ActivationRankingCorrelation`.

    Examples::

        >>> from captum_intramodal.explainers import make_explainer
        >>> make_explainer("arc+grad_cam:k=20,layer=-3").settings["base"]
        {'name': 'grad_cam', 'layer': -3}
    """

    base: Explainer

    @property
    def name(self) -> str:  # type: ignore[override]
        if isinstance(self.base, MSEAAround):
            return f"msea+arc+{self.base.base.name}"
        return f"arc+{self.base.name}"

    @property
    def pass_request(self) -> PassRequest:
        return PassRequest(ExplainOptions(scales=(1.0,)), ranking_layers=tuple(self.layers))

    def explain(self, example: Example) -> list[Tensor]:
        return self.suppress(example.adapter.lens, self.base(*example), collect(example, self.pass_request))
