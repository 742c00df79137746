r"""What the model says: one teacher-forced pass over prompts and answers, and one look at the pictures per scale."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from captum_intramodal.adapter import Encoding, ModelAdapter, Prompt
from captum_intramodal.chunks import WORKING_MEMORY
from captum_intramodal.coordinates import PixelMaps, Size
from captum_intramodal.enlarged import Enlarged
from captum_intramodal.geometry import TokenGeometry
from captum_intramodal.hooks import StepStates, hidden_rows, run_layers
from captum_intramodal.levels import (
    Level,
    Method,
    PixelLevel,
    Scales,
    Sight,
    TokenLevel,
    Windows,
    explained_by,
    find_sights,
    layer_gradient_x_activation,
    resize_pictures,
)
from captum_intramodal.logit_lens import Rankings, StepRankings, select_layers
from captum_intramodal.msea import Aggregation, ChangedDecisions, aggregate
from captum_intramodal.scoring import AnswerScorer
from captum_intramodal.text import decode_pieces, find_spans
from captum_intramodal.visual_pass import TextPrefix, visual_states

__all__ = ["Decision", "Reading", "TextTokens", "read_answer", "read_answers"]


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


class Decision(NamedTuple):
    """What the model decides at one scale, given the answer so far.

    Attributes:
        log_probability (Tensor): of the answer's T tokens, float32 (T,).
        likeliest (Tensor): the most likely tokens in their places, int64 (T,).
    """

    log_probability: Tensor
    likeliest: Tensor


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
        n_answer (int): number of the text tokens, the last ones, that are the answer.
        working_memory (int): bytes that a step which works in parts takes at a time.
        decisions (dict[float, Decision] or None): by scale, that of the originals included, what the model would say
            there; None if nobody asked.
        answer_rankings (Rankings or None): of the last layer at the position before the answer and at its tokens, where
            they were read while it was generated.
    """

    pictures: list[Image.Image]
    text: TextTokens
    levels: list[Level]
    method: Method
    dropped: list[float]
    ranking_states: dict[int, Tensor]
    last: Tensor
    n_answer: int
    working_memory: int = WORKING_MEMORY
    decisions: dict[float, Decision] | None = None
    answer_rankings: Rankings | None = None

    def maps(
        self, weights: Tensor, aggregation: Aggregation = "mean", changed_decisions: ChangedDecisions = "keep"
    ) -> list[Tensor]:
        """Per picture the maps of all text tokens over its frame, float32 (T, rows, columns), aggregated over the
        levels with their weights. The canvas is as fine as the finest level."""
        if changed_decisions != "keep" and len(self.levels) > 1:
            weights = self._weights_of_decisions(weights, changed_decisions)
        result = []
        for image, picture in enumerate(self.pictures):
            grids = [level.grid(image, picture.size) for level in self.levels]
            grid = max(grids, key=lambda grid: grid[0] * grid[1])
            drawn = (level.draw(image, picture.size, grid, self.working_memory) for level in self.levels)
            result.append(aggregate(drawn, weights, aggregation))
        return result

    def _weights_of_decisions(self, weights: Tensor, changed_decisions: ChangedDecisions) -> Tensor:
        """(levels, T): those of the answer's tokens by what the model would have said at each scale."""
        if self.decisions is None:
            raise ValueError("What the model would say at the other scales was not read.")
        original = self.decisions[1.0]
        factors = torch.ones(len(self.levels), len(self.text.ids))
        for row, level in zip(factors, self.levels, strict=True):
            decision = self.decisions[level.scale]
            row[-len(original.likeliest) :] = (
                (decision.likeliest == original.likeliest).float()
                if changed_decisions == "drop"
                else (decision.log_probability - original.log_probability).exp().clamp_max(1)
            )
        weighted = weights[:, None] * factors
        # Where the decision is another one at every scale that counts, all of them do.
        weighted = torch.where(weighted.sum(0) > 0, weighted, weights[:, None])
        return weighted / weighted.sum(0)


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
    layer: int | None = None,
    ranking_layers: Sequence[int] = (-1,),
    ranking_k: int | None = None,
    max_new_tokens: int = 128,
    method: Method = "auto",
    crops: bool = False,
    interpolate_pos_encoding: bool = False,
    report: Callable[[str], None] = lambda line: None,
    decisions: bool = False,
) -> list[Reading]:
    """Runs the model, on all examples together where it can: generation where no answer is given, one teacher-forced
    pass, one pass per other scale."""
    report("Reading the prompt")
    layers = select_layers(adapter.lens, [-1 if layer is None else layer, *ranking_layers, -1])
    examples: list[_Example] = []
    for rows, inputs in adapter.prepare_together(pictures, prompts):
        given = [answers[row] for row in rows]
        # The passes at other scales need not read again what stands before the pictures.
        prefix = TextPrefix.of(adapter, inputs) if isinstance(scales, str) or {*scales} - {1.0} else None
        batch, said = _with_answers(adapter, inputs, given, layers, ranking_k, max_new_tokens, report, prefix)
        texts = [TextTokens.of(adapter, e, shown_prompt(prompts[row])) for e, row in zip(batch, rows, strict=True)]
        positions = [_read_positions(e, text.positions) for e, text in zip(batch, texts, strict=True)]
        if said is None:
            report(f"Reading the answer ({sum(len(e.answer_ids) for e in batch)} tokens)")
            states = _read_states(adapter, batch, positions, layers, prefix)
        else:
            states = [said.of(e, p, layers) for e, p in zip(batch, positions, strict=True)]
        examples += [
            _Example(
                pictures[row],
                prompts[row],
                encoding,
                text,
                read,
                None if said is None else said.ranked(encoding),
                prefix,
            )
            for row, encoding, text, read in zip(rows, batch, texts, states, strict=True)
        ]

    report("Finding out what the model sees of the pictures")
    found: dict[tuple[Size, ...], tuple[dict[float, Sight], list[float]]] = {}
    for example in examples:
        if example.sizes not in found:
            alone = example.encoding.batch_size == 1
            inputs = example.encoding.inputs if alone else adapter.prepare(example.pictures, example.prompt)
            found[example.sizes] = find_sights(
                adapter, example.pictures, scales, inputs, method, crops, interpolate_pos_encoding
            )

    levels: list[list[Level]] = [[] for _ in examples]
    for scale in sorted({scale for sights, _ in found.values() for scale in sights}):
        report(f"Looking at scale {scale:g}")
        sights = {i: found[e.sizes][0][scale] for i, e in enumerate(examples) if scale in found[e.sizes][0]}
        for i, level in _look(adapter, scale, sights, examples, method, layer, layers[0]).items():
            levels[i].append(level)

    readings = []
    for example, seen in zip(examples, levels, strict=True):
        _, *ranking_states, last = (h[len(example.encoding.visual_positions) :] for h in example.states)
        kept, dropped = found[example.sizes]
        readings.append(
            Reading(
                pictures=example.pictures,
                text=example.text,
                levels=seen,
                method=explained_by(method, next(iter(kept.values()))),
                dropped=dropped,
                ranking_states=dict(zip(ranking_layers, ranking_states, strict=True)),
                last=last,
                n_answer=len(example.encoding.answer_ids),
                working_memory=adapter.working_memory,
                decisions=_decide(adapter, example, kept) if decisions else None,
                answer_rankings=example.answer_rankings,
            )
        )
    return readings


@dataclass(frozen=True)
class _Example:
    """A prompt with its pictures and answer, and what was read of it: the states of each layer at the visual tokens,
    the text tokens and before these."""

    pictures: list[Image.Image]
    prompt: Prompt
    encoding: Encoding
    text: TextTokens
    states: list[Tensor]
    answer_rankings: Rankings | None
    prefix: TextPrefix | None

    @property
    def sizes(self) -> tuple[Size, ...]:
        return tuple(picture.size for picture in self.pictures)


@dataclass(frozen=True)
class _Said:
    """What decoder layers and head said while the model generated, at some positions of each prompt and at the
    answers."""

    states: StepStates
    rankings: StepRankings | None
    kept: list[Tensor]

    def of(self, encoding: Encoding, positions: Tensor, layers: Sequence[nn.Module]) -> list[Tensor]:
        """By layer an example's states at some positions of prompt and answer."""
        answer = torch.arange(encoding.prompt_length, len(encoding.input_ids))
        index = torch.searchsorted(torch.cat([self.kept[encoding.row], answer]), positions)
        states = self.states.of(encoding.row, len(answer))
        return [states[layer][index.to(states[layer].device)] for layer in layers]

    def ranked(self, encoding: Encoding) -> Rankings | None:
        return None if self.rankings is None else self.rankings.of(encoding.row, len(encoding.answer_ids))


def _with_answers(
    adapter: ModelAdapter,
    inputs: Mapping[str, Any],
    answers: Sequence[str | Sequence[int] | None],
    layers: Sequence[nn.Module],
    ranking_k: int | None,
    max_new_tokens: int,
    report: Callable[[str], None],
    prefix: TextPrefix | None,
) -> tuple[list[Encoding], _Said | None]:
    """A batch with its answers, those that are not given from the model; and what it said if all are its own."""
    given = [None if answer is None else adapter.tokenize_answer(answer) for answer in answers]
    said = None
    if None in given:
        report("Generating the answer")
        prompts = adapter.encode_batch(inputs, [[] for _ in given])
        # The last one says what the answer begins with.
        kept = [
            torch.cat([_read_positions(p, text_positions(adapter, p)), torch.tensor([p.prompt_length - 1])]).unique()
            for p in prompts
        ]
        with nullcontext() if prefix is None else prefix.captured(generating=True):
            generated, states, rankings = adapter.generate_with_states(inputs, max_new_tokens, layers, kept, ranking_k)
        if states is not None and not any(given):
            said = _Said(states, rankings, kept)
        given = [own if ids is None else ids for ids, own in zip(given, generated, strict=True)]
    answer_ids = [ids for ids in given if ids]
    if len(answer_ids) < len(given):
        raise ValueError("The model answered nothing; there is no word to explain. Pass an answer.")
    return adapter.encode_batch(inputs, answer_ids), said


def _read_positions(encoding: Encoding, text: Tensor) -> Tensor:
    """Where an example is read: the visual tokens, the text tokens and before these."""
    return torch.cat([encoding.visual_positions, text, (text - 1).clamp_min(0)])


def _read_states(
    adapter: ModelAdapter,
    batch: Sequence[Encoding],
    positions: Sequence[Tensor],
    layers: Sequence[nn.Module],
    prefix: TextPrefix | None,
) -> list[list[Tensor]]:
    """Per example of a batch and per layer the hidden states at its positions, from one teacher-forced pass."""

    def select(hidden: Tensor) -> Tensor:
        each = [e.rows(hidden_rows(hidden, e.row, e.batch_size)) for e in batch]
        return torch.cat([h[p.to(hidden.device)] for h, p in zip(each, positions, strict=True)])

    with nullcontext() if prefix is None else prefix.captured():
        hidden = run_layers(lambda: adapter.run(batch[0].inputs), layers, select)
    split = [h.split([len(p) for p in positions]) for h in hidden]
    return [list(each) for each in zip(*split, strict=True)]


def _look(
    adapter: ModelAdapter,
    scale: float,
    sights: Mapping[int, Sight],
    examples: Sequence[_Example],
    method: Method,
    layer: int | None,
    lens_layer: nn.Module,
) -> dict[int, Level]:
    """What a scale shows of each example that it shows something to."""
    viewers = {i: sight.adapter if isinstance(sight, Enlarged) else adapter for i, sight in sights.items()}
    bare = {i: sight.sight if isinstance(sight, Enlarged) else sight for i, sight in sights.items()}
    by_lens = [i for i, sight in bare.items() if explained_by(method, sight) == "logit_lens"]
    # The pass over the answer has shown the originals.
    passes = {i: _passes(bare[i], examples[i]) for i in by_lens if scale != 1.0 or viewers[i] is not adapter}
    states = _visual_states(viewers, passes, examples, lens_layer)
    levels: dict[int, Level] = {}
    for i, sight in bare.items():
        example, viewer = examples[i], viewers[i]
        if isinstance(sight, PixelMaps):
            (encoding,) = _encode_passes(viewer, sight, example)
            levels[i] = PixelLevel.of(viewer, scale, sight, encoding, text_positions(viewer, encoding))
            continue
        geometry = sight.geometry if isinstance(sight, Windows) else sight
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
        levels[i] = TokenLevel(scale, activation.clamp_min(0).cpu(), geometry)
    return levels


def _decide(adapter: ModelAdapter, example: _Example, sights: Mapping[float, Sight]) -> dict[float, Decision]:
    """What the model would say at each scale and of the originals, in one teacher-forced pass each."""
    decided = {}
    for scale in dict.fromkeys((1.0, *sights)):
        sight = sights.get(scale)
        viewer, bare = (sight.adapter, sight.sight) if isinstance(sight, Enlarged) else (adapter, sight)
        if isinstance(bare, Windows):
            raise ValueError(
                "A cut-out shows the model a part of the picture; what it would say of the whole at that scale is not "
                'known. Leave out crops, or changed_decisions="drop" or "weigh".'
            )
        shown = example.pictures if bare is None else resize_pictures(example.pictures, bare.image_sizes)
        scorer = AnswerScorer(viewer, example.prompt, example.encoding.answer_ids)
        log_probability, likeliest = scorer.predict([shown])
        decided[scale] = Decision(log_probability[0], likeliest[0])
    return decided


def _passes(sight: TokenGeometry | PixelMaps | Windows, example: _Example) -> list[list[Image.Image]]:
    """The pictures of each pass that it takes to see them."""
    if isinstance(sight, Windows):
        return list(sight.show(example.pictures))
    return [resize_pictures(example.pictures, sight.image_sizes)]


def _encode_passes(
    viewer: ModelAdapter, sight: TokenGeometry | PixelMaps | Windows, example: _Example
) -> Iterator[Encoding]:
    for shown in _passes(sight, example):
        yield viewer.encode(viewer.prepare(shown, example.prompt), example.encoding.answer_ids)


def _visual_states(
    viewers: Mapping[int, ModelAdapter],
    passes: Mapping[int, list[list[Image.Image]]],
    examples: Sequence[_Example],
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


def shown_prompt(prompt: Prompt) -> str:
    """What the user wrote: the prompt, or the text of the last message."""
    if isinstance(prompt, str):
        return prompt
    content = prompt[-1]["content"]
    return content if isinstance(content, str) else " ".join(part["text"] for part in content if part["type"] == "text")
