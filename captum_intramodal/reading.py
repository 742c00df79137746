r"""What the model says: one teacher-forced pass over prompts and answers, and one look at the pictures per scale."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from captum_intramodal.adapter import Encoding, ModelAdapter, Prompt
from captum_intramodal.coordinates import PixelMaps, Size
from captum_intramodal.enlarged import Enlarged
from captum_intramodal.geometry import TokenGeometry
from captum_intramodal.hooks import hidden_rows, run_layers
from captum_intramodal.levels import (
    Level,
    Method,
    PixelLevel,
    Scales,
    Sight,
    TokenLevel,
    Windows,
    find_sights,
    resize_pictures,
    visual_states,
)
from captum_intramodal.logit_lens import select_layers
from captum_intramodal.msea import Aggregation, aggregate
from captum_intramodal.text import decode_pieces, find_spans

__all__ = ["Reading", "TextTokens", "read_answer", "read_answers"]


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
    **options: Any,
) -> Reading:
    """:func:`read_answers` of one example."""
    return read_answers(adapter, [pictures], [prompt], [answer], scales, **options)[0]


def read_answers(
    adapter: ModelAdapter,
    pictures: Sequence[list[Image.Image]],
    prompts: Sequence[Prompt],
    answers: Sequence[str | Sequence[int] | None],
    scales: Scales,
    layer: int = -1,
    ranking_layers: Sequence[int] = (-1,),
    max_new_tokens: int = 128,
    method: Method = "auto",
    crops: bool = False,
    interpolate_pos_encoding: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> list[Reading]:
    """Runs the model, on all examples together where it can: generation where no answer is given, one teacher-forced
    pass, one pass per other scale."""
    report("Reading the prompt")
    encodings: list[Encoding] = []
    texts: list[TextTokens] = []
    states: list[list[Tensor]] = []
    layers = select_layers(adapter.lens, [layer, *ranking_layers, -1])
    for rows, inputs in adapter.prepare_together(pictures, prompts):
        batch = _with_answers(adapter, inputs, [answers[row] for row in rows], max_new_tokens, report)
        read = [TextTokens.of(adapter, e, shown_prompt(prompts[row])) for e, row in zip(batch, rows, strict=True)]
        report(f"Reading the answer ({sum(len(e.answer_ids) for e in batch)} tokens)")
        states += _read_states(adapter, batch, read, layers)
        encodings += batch
        texts += read

    report("Finding out what the model sees of the pictures")
    found: dict[tuple[Size, ...], tuple[dict[float, Sight], list[float]]] = {}
    sizes = [tuple(picture.size for picture in shown) for shown in pictures]
    for i, encoding in enumerate(encodings):
        if sizes[i] not in found:
            alone = encoding.inputs if encoding.batch_size == 1 else adapter.prepare(pictures[i], prompts[i])
            found[sizes[i]] = find_sights(adapter, pictures[i], scales, alone, method, crops, interpolate_pos_encoding)

    levels: list[list[Level]] = [[] for _ in encodings]
    for scale in sorted({scale for sights, _ in found.values() for scale in sights}):
        report(f"Looking at scale {scale:g}")
        there = {i: found[sizes[i]][0][scale] for i in range(len(encodings)) if scale in found[sizes[i]][0]}
        viewers = {i: sight.adapter if isinstance(sight, Enlarged) else adapter for i, sight in there.items()}
        seen = {i: sight.sight if isinstance(sight, Enlarged) else sight for i, sight in there.items()}
        own = {i for i in seen if scale == 1.0 and viewers[i] is adapter}  # The pass over the answer has shown them.
        passes = {i: [] if i in own else _passes(sight, pictures[i]) for i, sight in seen.items()}
        looks = _look(viewers, passes, prompts, layers[0])
        for i, sight in seen.items():
            if isinstance(sight, PixelMaps):
                inputs = viewers[i].prepare(resize_pictures(pictures[i], sight.image_sizes), prompts[i])
                encoding = viewers[i].encode(inputs, encodings[i].answer_ids)
                positions = text_positions(viewers[i], encoding)
                levels[i].append(PixelLevel.of(viewers[i], scale, sight, encoding, positions))
                continue
            visual = torch.cat(looks[i]) if looks[i] else states[i][0][: len(encodings[i].visual_positions)]
            geometry = sight.geometry if isinstance(sight, Windows) else sight
            levels[i].append(TokenLevel.of(adapter, scale, geometry, visual, texts[i].ids))

    readings = []
    for i, (encoding, text) in enumerate(zip(encodings, texts, strict=True)):
        _, *ranked, last = (h[len(encoding.visual_positions) :] for h in states[i])
        # The answer's tokens, each at the position before it.
        answer_ids = text.ids[-len(encoding.answer_ids) :]
        log_probability = adapter.lens.log_probability(last[-len(answer_ids) :], answer_ids.to(last.device))
        readings.append(
            Reading(
                pictures=pictures[i],
                text=text,
                levels=levels[i],
                dropped=found[sizes[i]][1],
                ranking_states=dict(zip(ranking_layers, ranked, strict=True)),
                last=last,
                probabilities=log_probability.exp().cpu(),
            )
        )
    return readings


def _with_answers(
    adapter: ModelAdapter,
    inputs: Mapping[str, Any],
    answers: Sequence[str | Sequence[int] | None],
    max_new_tokens: int,
    report: Callable[[str], None],
) -> list[Encoding]:
    """A batch with its answers, those that are not given from the model."""
    given = [None if answer is None else adapter.tokenize_answer(answer) for answer in answers]
    if None in given:
        report("Generating the answer")
        generated = adapter.generate_batch(inputs, max_new_tokens)
        given = [own if ids is None else ids for ids, own in zip(given, generated, strict=True)]
    answer_ids = [ids for ids in given if ids]
    if len(answer_ids) < len(given):
        raise ValueError("The model answered nothing; there is no word to explain. Pass an answer.")
    return adapter.encode_batch(inputs, answer_ids)


def _read_states(
    adapter: ModelAdapter, batch: Sequence[Encoding], texts: Sequence[TextTokens], layers: Sequence[nn.Module]
) -> list[list[Tensor]]:
    """Per example of a batch and per layer the hidden states at the visual tokens, the text tokens and before these."""
    rows = [
        torch.cat([e.visual_positions, text.positions, (text.positions - 1).clamp_min(0)])
        for e, text in zip(batch, texts, strict=True)
    ]

    def select(hidden: Tensor) -> Tensor:
        each = [e.rows(hidden_rows(hidden, e.row, e.batch_size)) for e in batch]
        return torch.cat([h[r.to(hidden.device)] for h, r in zip(each, rows, strict=True)])

    hidden = run_layers(lambda: adapter.run(batch[0].inputs), layers, select)
    split = [h.split([len(r) for r in rows]) for h in hidden]
    return [list(each) for each in zip(*split, strict=True)]


def _passes(sight: TokenGeometry | PixelMaps | Windows, pictures: list[Image.Image]) -> list[list[Image.Image]]:
    """The pictures of each pass without gradients that it takes to see them."""
    if isinstance(sight, Windows):
        return list(sight.show(pictures))
    return [] if isinstance(sight, PixelMaps) else [resize_pictures(pictures, sight.image_sizes)]


def _look(
    viewers: Mapping[int, ModelAdapter],
    passes: Mapping[int, list[list[Image.Image]]],
    prompts: Sequence[Prompt],
    layer: nn.Module,
) -> dict[int, list[Tensor]]:
    """Per example the hidden states at the visual positions in each of its passes; examples run together."""
    looks: dict[int, list[Tensor]] = {i: [] for i in passes}
    for turn in range(max(map(len, passes.values()))):
        waiting = [i for i, shown in passes.items() if turn < len(shown)]
        for viewer in dict.fromkeys(viewers[i] for i in waiting):
            group = [i for i in waiting if viewers[i] is viewer]
            shown = [passes[i][turn] for i in group]
            for rows, inputs in viewer.prepare_together(shown, [prompts[i] for i in group]):
                for row, hidden in zip(rows, visual_states(viewer, inputs, layer), strict=True):
                    looks[group[row]].append(hidden)
    return looks


def shown_prompt(prompt: Prompt) -> str:
    """What the user wrote: the prompt, or the text of the last message."""
    if isinstance(prompt, str):
        return prompt
    content = prompt[-1]["content"]
    return content if isinstance(content, str) else " ".join(part["text"] for part in content if part["type"] == "text")
