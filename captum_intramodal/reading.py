r"""What the model says: one teacher-forced pass over prompt and answer, and one look at the pictures per scale."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from captum_intramodal.adapter import Encoding, ModelAdapter, Prompt
from captum_intramodal.coordinates import PixelMaps
from captum_intramodal.hooks import hidden_rows, run_layers
from captum_intramodal.levels import (
    Level,
    Method,
    PixelLevel,
    Scales,
    TokenLevel,
    Windows,
    explained_by,
    find_sights,
    layer_gradient_x_activation,
    resize_pictures,
    visual_states,
)
from captum_intramodal.logit_lens import select_layers
from captum_intramodal.msea import Aggregation, aggregate
from captum_intramodal.text import decode_pieces, find_spans

__all__ = ["Reading", "TextTokens", "read_answer"]


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
        ids, positions = encoding.input_ids, text_positions(adapter, encoding)
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


def text_positions(adapter: ModelAdapter, encoding: Encoding) -> Tensor:
    """Positions of all that is neither visual nor special, and of the answer; int64 (T,)."""
    is_text = ~torch.isin(encoding.input_ids, torch.tensor(adapter.tokenizer.all_special_ids))
    is_text[encoding.visual_positions] = False
    is_text[encoding.prompt_length :] = True
    return is_text.nonzero().flatten()


@dataclass(frozen=True)
class Reading:
    """All that an explanation is made of, before scales are aggregated and context is suppressed.

    Attributes:
        pictures (list[PIL.Image.Image]): the originals.
        text (TextTokens): the T text tokens.
        levels (list[Level]): one per scale.
        method (str): whose maps they are.
        dropped (list[float]): scales that show the model nothing new.
        ranking_states (dict[int, Tensor]): by decoder layer the hidden states (2T, D) at the text tokens and at the
            positions before them.
        last (Tensor): likewise of the last layer.
        probabilities (Tensor): of the answer's tokens, float32.
    """

    pictures: list[Image.Image]
    text: TextTokens
    levels: list[Level]
    method: Method
    dropped: list[float]
    ranking_states: dict[int, Tensor]
    last: Tensor
    probabilities: Tensor

    def maps(self, weights: Tensor, aggregation: Aggregation = "mean") -> list[Tensor]:
        """Per picture the maps of all text tokens over its frame, float32 (T, rows, columns), aggregated over the
        levels with their weights. The canvas is as fine as the finest level."""
        result = []
        for image, picture in enumerate(self.pictures):
            grids = [level.grid(image, picture.size) for level in self.levels]
            grid = max(grids, key=lambda grid: grid[0] * grid[1])
            drawn = [level.draw(image, picture.size, grid) for level in self.levels]
            result.append(aggregate(drawn, weights, aggregation))
        return result


def read_answer(
    adapter: ModelAdapter,
    pictures: list[Image.Image],
    prompt: Prompt,
    answer: str | Sequence[int] | None,
    scales: Scales,
    layer: int | None = None,
    ranking_layers: Sequence[int] = (-1,),
    max_new_tokens: int = 128,
    method: Method = "auto",
    crops: bool = False,
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

    report("Finding out what the model sees of the pictures")
    sights, dropped = find_sights(adapter, pictures, scales, prompt_inputs, method, crops)

    report(f"Reading the answer ({len(answer_ids)} tokens)")
    by = explained_by(method, next(iter(sights.values())))
    read = layer if layer is not None and by == "logit_lens" else -1
    layers = select_layers(adapter.lens, [read, *ranking_layers, -1])
    before = (text.positions - 1).clamp_min(0)
    rows = torch.cat([encoding.visual_positions, text.positions, before])
    visual, *states, last = run_layers(
        lambda: adapter.run(encoding.inputs),
        layers,
        lambda hidden: encoding.rows(hidden_rows(hidden))[rows.to(hidden.device)],
    )
    seen, n_answer = len(encoding.visual_positions), len(answer_ids)
    log_probability = adapter.lens.log_probability(last[-n_answer:], text.ids[-n_answer:].to(last.device))

    levels: list[Level] = []
    for scale, sight in sights.items():
        if scale != 1.0 or by != "logit_lens":
            report(f"Looking at scale {scale:g}")
        if isinstance(sight, PixelMaps):
            resized = resize_pictures(pictures, sight.image_sizes)
            there = adapter.encode(adapter.prepare(resized, prompt), answer_ids)
            levels.append(PixelLevel.of(adapter, scale, sight, there, text_positions(adapter, there)))
            continue
        if isinstance(sight, Windows):
            geometry, shown = sight.geometry, sight.show(pictures)
        else:
            geometry, shown = sight, iter([resize_pictures(pictures, sight.image_sizes)])
        if by == "layer_gradient_x_activation":
            encodings = (adapter.encode(adapter.prepare(images, prompt), answer_ids) for images in shown)
            parts = [
                layer_gradient_x_activation(adapter, there, text_positions(adapter, there), geometry.argument, layer)
                for there in encodings
            ]
            activation = torch.cat(parts, dim=1)
        elif scale == 1.0:
            activation = adapter.lens.activation(visual[:seen], text.ids).T
        else:
            inputs = (adapter.prepare(images, prompt) for images in shown)
            hidden = torch.cat([visual_states(adapter, there, layers[0]) for there in inputs])
            activation = adapter.lens.activation(hidden, text.ids).T
        levels.append(TokenLevel(scale, activation.clamp_min(0).cpu(), geometry))
    return Reading(
        pictures=pictures,
        text=text,
        levels=levels,
        method=by,
        dropped=dropped,
        ranking_states={index: h[seen:] for index, h in zip(ranking_layers, states, strict=True)},
        last=last[seen:],
        probabilities=log_probability.exp().cpu(),
    )


def _shown_prompt(prompt: Prompt) -> str:
    """What the user wrote: the prompt, or the text of the last message."""
    if isinstance(prompt, str):
        return prompt
    content = prompt[-1]["content"]
    return content if isinstance(content, str) else " ".join(part["text"] for part in content if part["type"] == "text")
