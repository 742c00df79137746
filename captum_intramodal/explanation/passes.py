r"""The forward passes at each scale, batched over examples, and the maps that follow from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor, nn

from captum_intramodal.adapter.contribution import direct_contribution
from captum_intramodal.adapter.encoding import Encoding
from captum_intramodal.adapter.gradients import layer_gradient_x_activation
from captum_intramodal.adapter.model_adapter import ModelAdapter
from captum_intramodal.adapter.prefix_cache import TextPrefix, visual_states
from captum_intramodal.adapter.prompts import Prompt
from captum_intramodal.adapter.text_tokens import TextTokens, text_positions
from captum_intramodal.explanation.options import LENS_METHODS, ExplainOptions, Method
from captum_intramodal.explanation.scale_maps import PixelScaleMaps, ScaleMaps, TokenScaleMaps
from captum_intramodal.explanation.scale_views import ScaleView
from captum_intramodal.geometry.pixel_map import PixelMaps, Size
from captum_intramodal.geometry.token_geometry import TokenGeometry
from captum_intramodal.models.ranking import Rankings

__all__ = ["Example", "compute_scale_maps"]


@dataclass(frozen=True)
class Example:
    """A prompt with its images and answer, and the activations captured at the original size.

    Attributes:
        images (list[PIL.Image.Image]): the original images.
        prompt (str or Sequence[Mapping]): the prompt.
        encoding (Encoding): prompt and answer as the model's input.
        text (TextTokens): the T text tokens.
        states (list[Tensor]): by layer the hidden states at the visual tokens, at the text tokens and at the positions
            before them, (V + 2T, D).
        answer_rankings (Rankings or None): captured while the answer was generated.
        prefix (TextPrefix or None): keys and values of the text before the first image.
    """

    images: list[Image.Image]
    prompt: Prompt
    encoding: Encoding
    text: TextTokens
    states: list[Tensor]
    answer_rankings: Rankings | None
    prefix: TextPrefix | None

    @property
    def sizes(self) -> tuple[Size, ...]:
        """(width, height) of each image."""
        return tuple(image.size for image in self.images)

    @property
    def visual_states(self) -> Tensor:
        """The first layer's hidden states at the visual tokens."""
        return self.states[0][: len(self.encoding.visual_positions)]


def compute_scale_maps(
    adapter: ModelAdapter,
    scale: float,
    views: Mapping[int, ScaleView],
    examples: Sequence[Example],
    options: ExplainOptions,
    lens_layer: nn.Module,
) -> dict[int, ScaleMaps]:
    r"""
    Compute one scale's maps for every example that has a view at that scale.

    Args:

        adapter (ModelAdapter): The model, whose lens reads the states.
        scale (float): The scale.
        views (Mapping[int, ScaleView]): By the number of the example.
        examples (Sequence[Example]): All examples.
        options (ExplainOptions): Method and layer.
        lens_layer (nn.Module): The decoder layer whose output the lens reads.

    Returns:
        **maps** (*dict[int, ScaleMaps]*):
            By the number of the example.
    """
    methods = {i: view.method(options.method) for i, view in views.items()}
    # The pass over the answer has processed the images at scale 1 already.
    waiting = {i: view for i, view in views.items() if methods[i] in LENS_METHODS and scale != 1.0}
    lens = adapter.lens.with_normalization(options.logit_normalization)
    states = _visual_states(waiting, examples, lens_layer)
    result: dict[int, ScaleMaps] = {}
    for i, view in views.items():
        example, layout = examples[i], view.layout
        if isinstance(layout, PixelMaps):
            (encoding,) = _encodings(view, example)
            positions = text_positions(view.adapter, encoding)
            result[i] = PixelScaleMaps.from_gradients(view.adapter, scale, layout, encoding, positions)
            continue
        factors = []
        if methods[i] in LENS_METHODS:
            factors.append(lens.activation(states.get(i, example.visual_states), example.text.ids).T)
        if methods[i] != "logit_lens":
            # The layer of a product is that of its lens.
            layer = None if methods[i] in LENS_METHODS else options.layer
            factors.append(_attribute_visual_tokens(view, example, _ATTRIBUTIONS[methods[i]], layer))
        result[i] = TokenScaleMaps(scale, _geometric_mean(factors), layout)
    return result


# Attributions to visual tokens from a pass of their own over prompt and answer, by method.
_ATTRIBUTIONS: Mapping[Method, Callable[..., Tensor]] = {
    "layer_gradient_x_activation": layer_gradient_x_activation,
    "direct_contribution": direct_contribution,
    "lens_x_contribution": direct_contribution,
}


def _attribute_visual_tokens(
    view: ScaleView, example: Example, attribute: Callable[..., Tensor], layer: int | None
) -> Tensor:
    """Attribute the text tokens to the visual tokens of all passes, (T, V)."""
    assert isinstance(view.layout, TokenGeometry)
    argument = view.layout.argument
    parts = [
        attribute(view.adapter, encoding, text_positions(view.adapter, encoding), argument, layer)
        for encoding in _encodings(view, example)
    ]
    return torch.cat(parts, dim=1)


def _geometric_mean(factors: Sequence[Tensor]) -> Tensor:
    """Return the geometric mean of one or two maps, clipped at 0, on the CPU."""
    first, *others = (factor.float().clamp_min(0).cpu() for factor in factors)
    # The product of the roots: that of the values could overflow.
    return first if not others else first.sqrt() * others[0].sqrt()


def _encodings(view: ScaleView, example: Example) -> Iterator[Encoding]:
    """Encode each pass with the example's answer."""
    for images in view.passes(example.images):
        yield view.adapter.encode(view.adapter.prepare(images, example.prompt), example.encoding.answer_ids)


def _visual_states(views: Mapping[int, ScaleView], examples: Sequence[Example], layer: nn.Module) -> dict[int, Tensor]:
    """Return each example's hidden states at the visual positions of all its passes, (V, D); examples run together."""
    passes = {i: view.passes(examples[i].images) for i, view in views.items()}
    states: dict[int, list[Tensor]] = {i: [] for i in passes}
    for turn in range(max(map(len, passes.values()), default=0)):
        waiting = [i for i, images in passes.items() if turn < len(images)]
        for adapter in dict.fromkeys(views[i].adapter for i in waiting):
            group = [i for i in waiting if views[i].adapter is adapter]
            images = [passes[i][turn] for i in group]
            for rows, inputs in adapter.prepare_together(images, [examples[i].prompt for i in group]):
                prefix = examples[group[rows[0]]].prefix if len(rows) == 1 else None
                for row, hidden in zip(rows, visual_states(adapter, inputs, layer, prefix), strict=True):
                    states[group[row]].append(hidden)
    return {i: torch.cat(parts) for i, parts in states.items()}
