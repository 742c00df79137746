r"""What the model says: one teacher-forced pass over prompts and answers, and one look at the images per scale."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from captum_intramodal._utils.memory import WORKING_MEMORY
from captum_intramodal.adapter.encoding import Encoding
from captum_intramodal.adapter.model_adapter import ModelAdapter
from captum_intramodal.adapter.prefix_cache import TextPrefix
from captum_intramodal.adapter.prompts import Prompt
from captum_intramodal.adapter.text_tokens import TextTokens, shown_prompt, text_positions
from captum_intramodal.explanation.decisions import Decision, decide
from captum_intramodal.explanation.passes import Example, compute_scale_maps
from captum_intramodal.explanation.scale_maps import ScaleMaps
from captum_intramodal.explanation.scale_views import Method, Scales, ScaleView, explained_by, select_views
from captum_intramodal.functional.aggregation import Aggregation, ChangedDecisions, aggregate
from captum_intramodal.geometry.pixel_map import Size
from captum_intramodal.models.generation_states import StepRankings, StepStates
from captum_intramodal.models.hooks import hidden_rows, run_layers
from captum_intramodal.models.logit_lens import select_layers
from captum_intramodal.models.ranking import Rankings

__all__ = ["Activations", "collect_activations", "collect_answer_activations"]


@dataclass(frozen=True)
class Activations:
    """All that an explanation is made of, before scales are aggregated and context is suppressed.

    Attributes:
        images (list[PIL.Image.Image]): the originals.
        text (TextTokens): the T text tokens.
        levels (list[ScaleMaps]): one per scale.
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

    images: list[Image.Image]
    text: TextTokens
    levels: list[ScaleMaps]
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
        """Per image the maps of all text tokens over its frame, float32 (T, rows, columns), aggregated over the
        levels with their weights. The canvas is as fine as the finest level."""
        if changed_decisions != "keep" and len(self.levels) > 1:
            weights = self._weights_of_decisions(weights, changed_decisions)
        result = []
        for index, image in enumerate(self.images):
            grids = [level.grid(index, image.size) for level in self.levels]
            grid = max(grids, key=lambda grid: grid[0] * grid[1])
            drawn = (level.draw(index, image.size, grid, self.working_memory) for level in self.levels)
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


def collect_answer_activations(
    adapter: ModelAdapter,
    images: list[Image.Image],
    prompt: Prompt,
    answer: str | Sequence[int] | None,
    scales: Scales,
    **options: Any,
) -> Activations:
    """:func:`collect_activations` of one example."""
    return collect_activations(adapter, [images], [prompt], [answer], scales, **options)[0]


def collect_activations(
    adapter: ModelAdapter,
    images: Sequence[list[Image.Image]],
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
) -> list[Activations]:
    """Runs the model, on all examples together where it can: generation where no answer is given, one teacher-forced
    pass, one pass per other scale."""
    report("Reading the prompt")
    layers = select_layers(adapter.lens, [-1 if layer is None else layer, *ranking_layers, -1])
    examples: list[Example] = []
    for rows, inputs in adapter.prepare_together(images, prompts):
        given = [answers[row] for row in rows]
        # The passes at other scales need not read again what stands before the images.
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
            Example(
                images[row],
                prompts[row],
                encoding,
                text,
                read,
                None if said is None else said.ranked(encoding),
                prefix,
            )
            for row, encoding, text, read in zip(rows, batch, texts, states, strict=True)
        ]

    report("Finding out what the model sees of the images")
    found: dict[tuple[Size, ...], tuple[dict[float, ScaleView], list[float]]] = {}
    for example in examples:
        if example.sizes not in found:
            alone = example.encoding.batch_size == 1
            inputs = example.encoding.inputs if alone else adapter.prepare(example.images, example.prompt)
            found[example.sizes] = select_views(
                adapter, example.images, scales, inputs, method, crops, interpolate_pos_encoding
            )

    levels: list[list[ScaleMaps]] = [[] for _ in examples]
    for scale in sorted({scale for sights, _ in found.values() for scale in sights}):
        report(f"Looking at scale {scale:g}")
        sights = {i: found[e.sizes][0][scale] for i, e in enumerate(examples) if scale in found[e.sizes][0]}
        for i, level in compute_scale_maps(adapter, scale, sights, examples, method, layer, layers[0]).items():
            levels[i].append(level)

    readings = []
    for example, seen in zip(examples, levels, strict=True):
        _, *ranking_states, last = (h[len(example.encoding.visual_positions) :] for h in example.states)
        kept, dropped = found[example.sizes]
        readings.append(
            Activations(
                images=example.images,
                text=example.text,
                levels=seen,
                method=explained_by(method, next(iter(kept.values()))),
                dropped=dropped,
                ranking_states=dict(zip(ranking_layers, ranking_states, strict=True)),
                last=last,
                n_answer=len(example.encoding.answer_ids),
                working_memory=adapter.working_memory,
                decisions=decide(adapter, example, kept) if decisions else None,
                answer_rankings=example.answer_rankings,
            )
        )
    return readings


@dataclass(frozen=True)
class GenerationRecord:
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
) -> tuple[list[Encoding], GenerationRecord | None]:
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
            said = GenerationRecord(states, rankings, kept)
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
