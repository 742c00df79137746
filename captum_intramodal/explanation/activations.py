r"""What is captured from the model before anything is aggregated or suppressed? One call runs all passes."""

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
from captum_intramodal.adapter.prefix_cache import TextPrefix, reusable_prefix
from captum_intramodal.adapter.prompts import Prompt
from captum_intramodal.adapter.text_tokens import TextTokens, text_positions, user_text
from captum_intramodal.errors import EmptyAnswerError, InvalidInputError
from captum_intramodal.explanation.decisions import Decision, predict_at_scales, weight_by_decisions
from captum_intramodal.explanation.options import ChangedDecisions, ExplainOptions, Method, Scales
from captum_intramodal.explanation.passes import Example, compute_scale_maps
from captum_intramodal.explanation.scale_maps import ScaleMaps
from captum_intramodal.explanation.scale_views import ScaleView, select_views
from captum_intramodal.functional.aggregation import Aggregation, aggregate
from captum_intramodal.geometry.pixel_map import Size
from captum_intramodal.models.early_exit import run_layers
from captum_intramodal.models.generation_states import StepRankings, StepStates
from captum_intramodal.models.layer_io import hidden_rows
from captum_intramodal.models.logit_lens import select_layers
from captum_intramodal.models.ranking import Rankings

__all__ = ["Activations", "collect_activations", "collect_answer_activations"]

Answer = str | Sequence[int] | None
Progress = Callable[[str], None]
Views = tuple[dict[float, ScaleView], list[float]]


def _silent(line: str) -> None:
    pass


@dataclass(frozen=True)
class Activations:
    r"""
    All that one explanation is computed from.

    Attributes:
        images (list[PIL.Image.Image]): the original images.
        text (TextTokens): the T text tokens.
        scale_maps (list[ScaleMaps]): one per scale, in ascending order.
        method (str): the method of the maps.
        dropped (list[float]): scales that give the model nothing new.
        ranking_states (dict[int, Tensor]): by decoder layer the hidden states at the text tokens and at the positions
            before them, (2T, D).
        last (Tensor): likewise of the last layer.
        n_answer (int): number of text tokens, the last ones, that are the answer.
        working_memory (int): bytes of one part of a step that runs in parts.
        decisions (dict[float, Decision] or None): by scale, 1.0 included, what the model predicts there; None if not
            requested.
        answer_rankings (Rankings or None): of the last layer at the position before the answer and at its tokens;
            captured while the answer was generated.
    """

    images: list[Image.Image]
    text: TextTokens
    scale_maps: list[ScaleMaps]
    method: Method
    dropped: list[float]
    ranking_states: dict[int, Tensor]
    last: Tensor
    n_answer: int
    working_memory: int = WORKING_MEMORY
    decisions: dict[float, Decision] | None = None
    answer_rankings: Rankings | None = None

    @property
    def scales(self) -> list[float]:
        """The scales in use."""
        return [maps.scale for maps in self.scale_maps]

    def maps(
        self, weights: Tensor, aggregation: Aggregation = "mean", changed_decisions: ChangedDecisions = "keep"
    ) -> list[Tensor]:
        r"""
        Aggregate the maps of all scales in the frame of the original images (paper, Eq. 4 and 5).

        Args:

            weights (Tensor): Weight of each scale, float32 (S,).
            aggregation (str, optional): As in :func:`~captum_intramodal.functional.aggregation.aggregate`.
                        Default: ``'mean'``
            changed_decisions (str, optional): As in :func:`captum_intramodal.explain`.
                        Default: ``'keep'``

        Returns:
            **maps** (*list[Tensor]*):
                Per image the maps of all text tokens, float32 (T, rows, columns), on the finest scale's raster.
        """
        if changed_decisions != "keep" and len(self.scale_maps) > 1:
            if self.decisions is None:
                raise InvalidInputError("The predictions at the other scales were not collected; pass decisions=True.")
            weights = weight_by_decisions(weights, self.decisions, self.scales, len(self.text.ids), changed_decisions)
        result = []
        for index, image in enumerate(self.images):
            grid = max((maps.grid(index, image.size) for maps in self.scale_maps), key=lambda grid: grid[0] * grid[1])
            rasters = (maps.rasterize(index, image.size, grid, self.working_memory) for maps in self.scale_maps)
            result.append(aggregate(rasters, weights, aggregation))
        return result


def collect_answer_activations(
    adapter: ModelAdapter,
    images: list[Image.Image],
    prompt: Prompt,
    answer: Answer,
    scales: Scales = "auto",
    ranking_layers: Sequence[int] = (-1,),
    ranking_k: int | None = None,
    decisions: bool = False,
    progress: Progress = _silent,
    **options: Any,
) -> Activations:
    """Call :func:`collect_activations` for one example; ``options`` are those of :class:`ExplainOptions`."""
    return collect_activations(
        adapter,
        [images],
        [prompt],
        [answer],
        ExplainOptions(scales=scales, **options),
        ranking_layers,
        ranking_k,
        decisions,
        progress,
    )[0]


def collect_activations(
    adapter: ModelAdapter,
    images: Sequence[list[Image.Image]],
    prompts: Sequence[Prompt],
    answers: Sequence[Answer],
    options: ExplainOptions,
    ranking_layers: Sequence[int] = (-1,),
    ranking_k: int | None = None,
    decisions: bool = False,
    progress: Progress = _silent,
) -> list[Activations]:
    r"""
    Run the model on all examples, together if it can: generation if no answer is given, one teacher-forced pass, and
    one pass per further scale.

    Args:

        adapter (ModelAdapter): The model and its processor, in evaluation mode.
        images (Sequence): Per example its images, RGB.
        prompts (Sequence): Per example its prompt.
        answers (Sequence): Per example the answer as text or token ids, or None for the model's own.
        options (ExplainOptions): Scales, method, layer and length of the answer.
        ranking_layers (Sequence[int], optional): Decoder layers whose states are returned for rankings.
                    Default: ``(-1,)``
        ranking_k (int, optional): Length of the rankings to capture while the answer is generated.
                    Default: None, no rankings
        decisions (bool, optional): Whether to predict the answer's tokens at every scale too, in one more pass each.
                    Default: False
        progress (Callable, optional): Called with a line of text before each step.
                    Default: no calls

    Returns:
        **activations** (*list[Activations]*):
            One per example, in their order.
    """
    layers = select_layers(adapter.lens, [-1 if options.layer is None else options.layer, *ranking_layers, -1])
    examples = _read_examples(adapter, images, prompts, answers, options, layers, ranking_k, progress)

    progress("Measuring the geometry of the visual tokens")
    found: dict[tuple[Size, ...], Views] = {}
    for example in examples:
        if example.sizes not in found:
            found[example.sizes] = _views_of(adapter, example, options)

    scale_maps: list[list[ScaleMaps]] = [[] for _ in examples]
    for scale in sorted({scale for views, _ in found.values() for scale in views}):
        progress(f"Computing maps at scale {scale:g}")
        views = {i: found[e.sizes][0][scale] for i, e in enumerate(examples) if scale in found[e.sizes][0]}
        for i, maps in compute_scale_maps(adapter, scale, views, examples, options, layers[0]).items():
            scale_maps[i].append(maps)

    results = []
    for example, maps_of_example in zip(examples, scale_maps, strict=True):
        _, *ranking_states, last = (h[len(example.encoding.visual_positions) :] for h in example.states)
        kept, dropped = found[example.sizes]
        results.append(
            Activations(
                images=example.images,
                text=example.text,
                scale_maps=maps_of_example,
                method=next(iter(kept.values())).method(options.method),
                dropped=dropped,
                ranking_states=dict(zip(ranking_layers, ranking_states, strict=True)),
                last=last,
                n_answer=len(example.encoding.answer_ids),
                working_memory=adapter.working_memory,
                decisions=predict_at_scales(adapter, example, kept) if decisions else None,
                answer_rankings=example.answer_rankings,
            )
        )
    return results


def _read_examples(
    adapter: ModelAdapter,
    images: Sequence[list[Image.Image]],
    prompts: Sequence[Prompt],
    answers: Sequence[Answer],
    options: ExplainOptions,
    layers: Sequence[nn.Module],
    ranking_k: int | None,
    progress: Progress,
) -> list[Example]:
    """Generate answers that are not given, and capture the states of prompts and answers at the original size."""
    progress("Reading the prompt")
    # Passes at other scales can reuse the keys and values of the text before the images.
    several = isinstance(options.scales, str) or bool({*options.scales} - {1.0})
    examples: list[Example] = []
    for rows, inputs in adapter.prepare_together(images, prompts):
        prefix = reusable_prefix(adapter, inputs) if several else None
        batch, record = _with_answers(
            adapter, inputs, [answers[row] for row in rows], options, layers, ranking_k, progress, prefix
        )
        texts = [
            TextTokens.from_encoding(adapter, e, user_text(prompts[row])) for e, row in zip(batch, rows, strict=True)
        ]
        positions = [_captured_positions(e, text.positions) for e, text in zip(batch, texts, strict=True)]
        if record is None:
            progress(f"Reading the answer ({sum(len(e.answer_ids) for e in batch)} tokens)")
            states = _teacher_forced_states(adapter, batch, positions, layers, prefix)
        else:
            states = [record.states_at(e, p, layers) for e, p in zip(batch, positions, strict=True)]
        examples += [
            Example(
                images=images[row],
                prompt=prompts[row],
                encoding=encoding,
                text=text,
                states=captured,
                answer_rankings=None if record is None else record.rankings_of(encoding),
                prefix=prefix,
            )
            for row, encoding, text, captured in zip(rows, batch, texts, states, strict=True)
        ]
    return examples


def _views_of(adapter: ModelAdapter, example: Example, options: ExplainOptions) -> Views:
    alone = example.encoding.batch_size == 1
    inputs = example.encoding.inputs if alone else adapter.prepare(example.images, example.prompt)
    return select_views(
        adapter,
        example.images,
        options.scales,
        inputs,
        options.method,
        options.crops,
        options.interpolate_pos_encoding,
    )


@dataclass(frozen=True)
class GenerationRecord:
    """States and rankings captured while a batch of answers was generated.

    Attributes:
        states (StepStates): of the decoder layers.
        rankings (StepRankings or None): by the head.
        kept (list[Tensor]): for each prompt the positions that were captured, ascending, int64.
    """

    states: StepStates
    rankings: StepRankings | None
    kept: list[Tensor]

    def states_at(self, encoding: Encoding, positions: Tensor, layers: Sequence[nn.Module]) -> list[Tensor]:
        """Return one example's states at positions of prompt and answer, by layer (positions, D)."""
        answer = torch.arange(encoding.prompt_length, len(encoding.input_ids))
        index = torch.searchsorted(torch.cat([self.kept[encoding.row], answer]), positions)
        states = self.states.states_for(encoding.row, len(answer))
        return [states[layer][index.to(states[layer].device)] for layer in layers]

    def rankings_of(self, encoding: Encoding) -> Rankings | None:
        """Return the rankings at the position before one example's answer and at its tokens."""
        return None if self.rankings is None else self.rankings.rankings_for(encoding.row, len(encoding.answer_ids))


def _with_answers(
    adapter: ModelAdapter,
    inputs: Mapping[str, Any],
    answers: Sequence[Answer],
    options: ExplainOptions,
    layers: Sequence[nn.Module],
    ranking_k: int | None,
    progress: Progress,
    prefix: TextPrefix | None,
) -> tuple[list[Encoding], GenerationRecord | None]:
    """Encode a batch with its answers, and return what was captured if the model generated all of them."""
    given = [None if answer is None else adapter.tokenize_answer(answer) for answer in answers]
    record = None
    if None in given:
        progress("Generating the answer")
        prompts = adapter.encode_batch(inputs, [[] for _ in given])
        # The last position of the prompt predicts the answer's first token.
        kept = [
            torch.cat(
                [_captured_positions(p, text_positions(adapter, p)), torch.tensor([p.prompt_length - 1])]
            ).unique()
            for p in prompts
        ]
        with nullcontext() if prefix is None else prefix.captured(generating=True):
            generated, states, rankings = adapter.generate_with_states(
                inputs, options.max_new_tokens, layers, kept, ranking_k
            )
        if states is not None and not any(given):
            record = GenerationRecord(states, rankings, kept)
        given = [own if ids is None else ids for ids, own in zip(given, generated, strict=True)]
    answer_ids = [ids for ids in given if ids]
    if len(answer_ids) < len(given):
        raise EmptyAnswerError("The model generated no answer, so there is no word to explain. Pass an answer.")
    return adapter.encode_batch(inputs, answer_ids), record


def _captured_positions(encoding: Encoding, text: Tensor) -> Tensor:
    """Return the positions of the visual tokens, of the text tokens and of those before them."""
    return torch.cat([encoding.visual_positions, text, (text - 1).clamp_min(0)])


def _teacher_forced_states(
    adapter: ModelAdapter,
    batch: Sequence[Encoding],
    positions: Sequence[Tensor],
    layers: Sequence[nn.Module],
    prefix: TextPrefix | None,
) -> list[list[Tensor]]:
    """Return the hidden states of a batch at each example's positions, per example and layer, from one pass."""

    def select(hidden: Tensor) -> Tensor:
        each = [e.rows(hidden_rows(hidden, e.row, e.batch_size)) for e in batch]
        return torch.cat([h[p.to(hidden.device)] for h, p in zip(each, positions, strict=True)])

    with nullcontext() if prefix is None else prefix.captured():
        hidden = run_layers(lambda: adapter.run(batch[0].inputs), layers, select)
    split = [h.split([len(p) for p in positions]) for h in hidden]
    return [list(each) for each in zip(*split, strict=True)]
