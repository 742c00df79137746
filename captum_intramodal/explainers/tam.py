r"""What does Token Activation Map (TAM) assign to each token? The lens's maps without the context's part, denoised."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from captum_intramodal.errors import NotApplicableError, UnsupportedModelError
from captum_intramodal.explainers.base import BaseExplainer, Example, TextMaps, single_image
from captum_intramodal.explainers.logit_lens import context_activation
from captum_intramodal.explainers.pass_sharing import PassRequest, collect
from captum_intramodal.explainers.registry import register_explainer
from captum_intramodal.explanation.options import ExplainOptions
from captum_intramodal.explanation.scale_maps import TokenScaleMaps
from captum_intramodal.functional.rasterize import rasterize
from captum_intramodal.functional.tam import token_activation_map
from captum_intramodal.models.logit_lens import LogitLens, LogitNormalization, check_logit_normalization

__all__ = ["TAM"]


@register_explainer("tam")
@dataclass(kw_only=True)
class TAM(BaseExplainer):
    r"""
    Token Activation Map from its definition (:mod:`captum_intramodal.functional.tam`), for one image whose visual
    tokens form one raster.

    Source: Li et al., "Token Activation Map to Visually Explain Multimodal LLMs", ICCV 2025.

    Args:

        filter (bool, optional): Whether to apply the second step, the rank Gaussian filter.
                    Default: True
        layer (int, optional): Decoder layer whose output the lens is applied to.
                    Default: None, the last
        logit_normalization (str, optional): ``'raw'``, ``'centered'`` or ``'zscore'``, see
                    :class:`captum_intramodal.LogitLens`.
                    Default: ``'raw'``, as published
    """

    filter: bool = True
    layer: int | None = None
    logit_normalization: LogitNormalization = "raw"

    def __post_init__(self) -> None:
        check_logit_normalization(self.logit_normalization)

    @property
    def pass_request(self) -> PassRequest:
        return PassRequest(
            ExplainOptions(
                scales=(1.0,), method="logit_lens", layer=self.layer, logit_normalization=self.logit_normalization
            )
        )

    def explain(self, example: Example) -> list[Tensor]:
        image = single_image(self, example)
        activations = collect(example, self.pass_request)
        (scale_maps,) = activations.scale_maps
        if not isinstance(scale_maps, TokenScaleMaps):
            raise UnsupportedModelError(
                f"TAM needs a map per visual token, which {type(example.adapter.model).__name__} does not have."
            )
        placed = scale_maps.geometry.is_local
        boxes = scale_maps.boxes(0, image.size)[placed]
        rows, columns = len(boxes[:, 1].round().unique()), len(boxes[:, 0].round().unique())
        if rows * columns != len(boxes):
            raise NotApplicableError(
                f"TAM needs one raster of visual tokens, but the {len(boxes)} of this image start at {rows} different "
                f"heights and {columns} different widths, as tiles and thumbnails do."
            )
        ids = activations.text.ids
        maps = token_activation_map(
            scale_maps.activation[:, placed],
            context_activation(self._lens(example), activations),
            ids[:, None] == ids,
            grid=(rows, columns),
            filter=self.filter,
        )
        return [rasterize(maps, boxes, image.size, (2 * rows, 2 * columns))[-len(example.answer_ids) :]]

    def _lens(self, example: Example) -> LogitLens:
        return example.adapter.lens.with_normalization(self.logit_normalization)

    def relate_text(self, example: Example) -> TextMaps:
        """Return the text activation, with which it weights its context."""
        activations = collect(example, self.pass_request)
        values = context_activation(self._lens(example), activations)
        return TextMaps(activations.text.positions, values[-len(example.answer_ids) :])
