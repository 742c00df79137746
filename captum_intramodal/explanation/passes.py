r"""TODO."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor, nn

from captum_intramodal.adapter.encoding import Encoding
from captum_intramodal.adapter.gradients import layer_gradient_x_activation
from captum_intramodal.adapter.model_adapter import ModelAdapter
from captum_intramodal.adapter.position_interpolation import ResizedInputView
from captum_intramodal.adapter.prefix_cache import TextPrefix, visual_states
from captum_intramodal.adapter.prompts import Prompt
from captum_intramodal.adapter.text_tokens import TextTokens, text_positions
from captum_intramodal.explanation.crops import CropView
from captum_intramodal.explanation.scale_maps import PixelScaleMaps, ScaleMaps, TokenScaleMaps, resize_images
from captum_intramodal.explanation.scale_views import Method, ScaleView, explained_by
from captum_intramodal.geometry.pixel_map import PixelMaps, Size
from captum_intramodal.geometry.token_geometry import TokenGeometry
from captum_intramodal.models.ranking import Rankings

__all__ = []


@dataclass(frozen=True)
class Example:
    """A prompt with its images and answer, and what was read of it: the states of each layer at the visual tokens,
    the text tokens and before these."""

    images: list[Image.Image]
    prompt: Prompt
    encoding: Encoding
    text: TextTokens
    states: list[Tensor]
    answer_rankings: Rankings | None
    prefix: TextPrefix | None

    @property
    def sizes(self) -> tuple[Size, ...]:
        return tuple(image.size for image in self.images)


def compute_scale_maps(
    adapter: ModelAdapter,
    scale: float,
    sights: Mapping[int, ScaleView],
    examples: Sequence[Example],
    method: Method,
    layer: int | None,
    lens_layer: nn.Module,
) -> dict[int, ScaleMaps]:
    """What a scale shows of each example that it shows something to."""
    viewers = {i: sight.adapter if isinstance(sight, ResizedInputView) else adapter for i, sight in sights.items()}
    bare = {i: sight.sight if isinstance(sight, ResizedInputView) else sight for i, sight in sights.items()}
    by_lens = [i for i, sight in bare.items() if explained_by(method, sight) == "logit_lens"]
    # The pass over the answer has shown the originals.
    passes = {i: _passes(bare[i], examples[i]) for i in by_lens if scale != 1.0 or viewers[i] is not adapter}
    states = _visual_states(viewers, passes, examples, lens_layer)
    levels: dict[int, ScaleMaps] = {}
    for i, sight in bare.items():
        example, viewer = examples[i], viewers[i]
        if isinstance(sight, PixelMaps):
            (encoding,) = _encode_passes(viewer, sight, example)
            levels[i] = PixelScaleMaps.of(viewer, scale, sight, encoding, text_positions(viewer, encoding))
            continue
        geometry = sight.geometry if isinstance(sight, CropView) else sight
        if i in by_lens:
            visual = states[i] if i in states else example.states[0][: len(example.encoding.visual_positions)]
            activation = adapter.lens.activation(visual, example.text.ids).T
        else:
            parts = [
                layer_gradient_x_activation(
                    viewer, encoding, text_positions(viewer, encoding), geometry.argument, layer
                )
                for encoding in _encode_passes(viewer, sight, example)
            ]
            activation = torch.cat(parts, dim=1)
        levels[i] = TokenScaleMaps(scale, activation.clamp_min(0).cpu(), geometry)
    return levels


def _passes(sight: TokenGeometry | PixelMaps | CropView, example: Example) -> list[list[Image.Image]]:
    """The images of each pass that it takes to see them."""
    if isinstance(sight, CropView):
        return list(sight.show(example.images))
    return [resize_images(example.images, sight.image_sizes)]


def _encode_passes(
    viewer: ModelAdapter, sight: TokenGeometry | PixelMaps | CropView, example: Example
) -> Iterator[Encoding]:
    for shown in _passes(sight, example):
        yield viewer.encode(viewer.prepare(shown, example.prompt), example.encoding.answer_ids)


def _visual_states(
    viewers: Mapping[int, ModelAdapter],
    passes: Mapping[int, list[list[Image.Image]]],
    examples: Sequence[Example],
    layer: nn.Module,
) -> dict[int, Tensor]:
    """Per example the hidden states at the visual positions in all of its passes; examples run together."""
    states: dict[int, list[Tensor]] = {i: [] for i in passes}
    for turn in range(max(map(len, passes.values()), default=0)):
        waiting = [i for i, shown in passes.items() if turn < len(shown)]
        for viewer in dict.fromkeys(viewers[i] for i in waiting):
            group = [i for i in waiting if viewers[i] is viewer]
            shown = [passes[i][turn] for i in group]
            for rows, inputs in viewer.prepare_together(shown, [examples[i].prompt for i in group]):
                prefix = examples[group[rows[0]]].prefix if len(rows) == 1 else None
                for row, hidden in zip(rows, visual_states(viewer, inputs, layer, prefix), strict=True):
                    states[group[row]].append(hidden)
    return {i: torch.cat(parts) for i, parts in states.items()}
