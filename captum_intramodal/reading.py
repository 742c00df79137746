r"""What the model says: one teacher-forced pass over prompt and answer, and one look at the pictures per scale."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from captum_intramodal.adapter import Encoding, ModelAdapter, Prompt
from captum_intramodal.canvas import canvas_grid, draw_on_canvas
from captum_intramodal.geometry import TokenGeometry, visual_positions
from captum_intramodal.hooks import hidden_rows, run_layers
from captum_intramodal.logit_lens import select_layers
from captum_intramodal.msea import Aggregation, aggregate
from captum_intramodal.text import decode_pieces, find_spans

__all__ = ["Level", "Reading", "TextTokens", "read_answer"]


@dataclass(frozen=True)
class TextTokens:
    """The sequence's text tokens in order: all may be context; those of the user's prompt and the answer are shown."""

    positions: Tensor
    ids: Tensor
    spans: Tensor
    shown: Tensor
    prompt: str
    answer: str

    @classmethod
    def of(cls, adapter: ModelAdapter, encoding: Encoding, prompt: str) -> TextTokens:
        ids = encoding.input_ids
        is_text = ~torch.isin(ids, torch.tensor(adapter.tokenizer.all_special_ids))
        is_text[encoding.visual_positions] = False
        is_text[encoding.prompt_length :] = True
        positions = is_text.nonzero().flatten()
        context = ids[positions[positions < encoding.prompt_length]].tolist()
        rendered, rendered_spans = decode_pieces(adapter.tokenizer, context)
        answer, answer_spans = decode_pieces(adapter.tokenizer, encoding.answer_ids)
        prompt_spans = find_spans(rendered, rendered_spans, prompt)
        if prompt_spans is None:  # The template or tokenizer changed its letters: show all that was read.
            prompt, prompt_spans = rendered, list(rendered_spans)
        return cls(
            positions=positions,
            ids=ids[positions],
            spans=torch.tensor([*(span or (0, 0) for span in prompt_spans), *answer_spans]).reshape(-1, 2),
            shown=torch.tensor([*(span is not None for span in prompt_spans), *(True for _ in answer_spans)]),
            prompt=prompt,
            answer=answer,
        )


@dataclass(frozen=True)
class Level:
    """One scale: what the text tokens' logit lens is at each visual token, and where those lie in the originals.

    Attributes:
        scale (float): factor of the pictures' size.
        activation (Tensor): float32 (T, V), clipped at 0.
        geometry (TokenGeometry): of the resized pictures.
    """

    scale: float
    activation: Tensor
    geometry: TokenGeometry

    def boxes(self, image: int, size: tuple[int, int]) -> Tensor:
        """Boxes in pixels of the original picture; NaN for tokens of other pictures."""
        width, height = self.geometry.image_sizes[image]
        boxes = self.geometry.boxes * torch.tensor([size[0] / width, size[1] / height] * 2)
        return boxes.masked_fill((self.geometry.image_index != image)[:, None], torch.nan)

    def token_size(self, size: tuple[int, int]) -> list[float]:
        """Median width and height of the tokens in pixels of the first picture."""
        boxes = self.boxes(0, size)
        boxes = boxes[~boxes.isnan().any(1)]
        return [round(float((boxes[:, 2 + axis] - boxes[:, axis]).median()), 2) for axis in (0, 1)]


@dataclass(frozen=True)
class Reading:
    """All that an explanation is made of, before scales are aggregated and context is suppressed.

    Attributes:
        pictures (list[PIL.Image.Image]): the originals.
        text (TextTokens): the T text tokens.
        levels (list[Level]): one per scale.
        dropped (list[float]): scales that show the model nothing new.
        ranking_states (dict[int, Tensor]): by decoder layer the hidden states (2T, D) at the text tokens and at the
            positions before them.
        last (Tensor): likewise of the last layer.
        probabilities (Tensor): of the answer's tokens, float32.
    """

    pictures: list[Image.Image]
    text: TextTokens
    levels: list[Level]
    dropped: list[float]
    ranking_states: dict[int, Tensor]
    last: Tensor
    probabilities: Tensor

    def maps(self, weights: Tensor, aggregation: Aggregation = "mean") -> list[Tensor]:
        """Per picture the maps of all text tokens over its frame, float32 (T, rows, columns), aggregated over the
        levels with their weights. The canvas is as fine as the level with the smallest tokens."""
        result = []
        for image, picture in enumerate(self.pictures):
            boxes = [level.boxes(image, picture.size) for level in self.levels]
            grid = max((canvas_grid(b, picture.size) for b in boxes), key=lambda grid: grid[0] * grid[1])
            drawn = [
                draw_on_canvas(level.activation, b, picture.size, grid)
                for level, b in zip(self.levels, boxes, strict=True)
            ]
            result.append(aggregate(drawn, weights, aggregation))
        return result


def read_answer(
    adapter: ModelAdapter,
    pictures: list[Image.Image],
    prompt: Prompt,
    answer: str | Sequence[int] | None,
    scales: Sequence[float],
    layer: int = -1,
    ranking_layers: Sequence[int] = (-1,),
    max_new_tokens: int = 128,
    report: Callable[[str], None] = lambda line: None,
) -> Reading:
    """Runs the model: generation where no answer is given, one teacher-forced pass, one pass per other scale."""
    report("Reading the prompt")
    prompt_inputs = adapter.prepare(pictures, prompt)
    if answer is None:
        report("Generating the answer")
        answer_ids = adapter.generate(prompt_inputs, max_new_tokens)
        if not answer_ids:
            raise ValueError("The model answered nothing; there is no word to explain. Pass an answer.")
    else:
        answer_ids = adapter.tokenize_answer(answer)
    encoding = adapter.encode(prompt_inputs, answer_ids)
    text = TextTokens.of(adapter, encoding, _shown_prompt(prompt))

    report("Finding out what each visual token sees")
    geometries, dropped = _levels(adapter, pictures, scales, _shrinks(prompt_inputs, pictures))

    report(f"Reading the answer ({len(answer_ids)} tokens)")
    (lens_layer,) = select_layers(adapter.lens, [layer])
    before = (text.positions - 1).clamp_min(0)
    rows = torch.cat([encoding.visual_positions, text.positions, before])
    visual, *states, last = run_layers(
        lambda: adapter.run(encoding.inputs),
        [lens_layer, *select_layers(adapter.lens, ranking_layers), adapter.lens.layers[-1]],
        lambda hidden: hidden_rows(hidden)[rows.to(hidden.device)],
    )
    seen, n_answer = len(encoding.visual_positions), len(answer_ids)
    log_probability = adapter.lens.log_probability(last[-n_answer:], text.ids[-n_answer:].to(last.device))

    levels = []
    for scale, geometry in geometries.items():
        if scale == 1.0:
            hidden = visual[:seen]
        else:
            report(f"Looking at scale {scale:g}")
            sizes = geometry.image_sizes
            resized = [p.resize(size, Image.Resampling.BICUBIC) for p, size in zip(pictures, sizes, strict=True)]
            hidden = _visual_states(adapter, resized, prompt, lens_layer)
        activation = adapter.lens.activation(hidden, text.ids).clamp_min(0).T.cpu()
        levels.append(Level(scale, activation, geometry))
    return Reading(
        pictures=pictures,
        text=text,
        levels=levels,
        dropped=dropped,
        ranking_states={index: h[seen:] for index, h in zip(ranking_layers, states, strict=True)},
        last=last[seen:],
        probabilities=log_probability.exp().cpu(),
    )


def _visual_states(
    adapter: ModelAdapter, pictures: list[Image.Image], prompt: Prompt, layer: torch.nn.Module
) -> Tensor:
    """Hidden states (V, D) at the visual positions. They come before the answer, which is therefore left out."""
    inputs = adapter.prepare(pictures, prompt)
    positions = visual_positions(adapter.model, inputs["input_ids"])
    (hidden,) = run_layers(
        lambda: adapter.run(inputs), [layer], lambda hidden: hidden_rows(hidden)[positions.to(hidden.device)]
    )
    return hidden


def _shrinks(inputs: Mapping[str, Any], pictures: list[Image.Image]) -> bool:
    """Whether the processor at least halves the pictures' sides, so that nothing can come of enlarging them."""
    elements = sum(v.numel() for v in inputs.values() if isinstance(v, Tensor) and v.is_floating_point())
    return 4 * elements / 3 < sum(picture.width * picture.height for picture in pictures)


def _levels(
    adapter: ModelAdapter, pictures: list[Image.Image], scales: Sequence[float], shrinks: bool
) -> tuple[dict[float, TokenGeometry], list[float]]:
    """Geometry at each scale that shows the model something of its own, and the scales that do not."""
    sizes = [picture.size for picture in pictures]
    original = adapter.geometry(sizes)
    kept: dict[float, TokenGeometry] = {}
    dropped: list[float] = []
    # Upwards from the original: an enlargement repeats whatever smaller one has the same tokens.
    for scale in sorted(scales, key=lambda s: (s > 1, s)):
        if shrinks and scale > 1:
            dropped.append(scale)
            continue
        resized = [(max(1, round(width * scale)), max(1, round(height * scale))) for width, height in sizes]
        geometry = original if scale == 1.0 else adapter.geometry(resized)
        twins = [original, *(g for s, g in kept.items() if s > 1)] if scale > 1 else []
        if any(geometry.same_tokens(twin) for twin in twins):
            dropped.append(scale)
        else:
            kept[scale] = geometry
    # Where only enlargements were asked for and all repeat the original, that is what they show.
    return kept or {1.0: original}, dropped


def _shown_prompt(prompt: Prompt) -> str:
    """What the user wrote: the prompt, or the text of the last message."""
    if isinstance(prompt, str):
        return prompt
    content = prompt[-1]["content"]
    return content if isinstance(content, str) else " ".join(part["text"] for part in content if part["type"] == "text")
