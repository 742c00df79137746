r"""One call that explains a whole answer."""

from __future__ import annotations

import platform
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedModel

from captum_intramodal._version import __version__
from captum_intramodal.adapter import Encoding, ModelAdapter, Prompt
from captum_intramodal.arc import ARC
from captum_intramodal.canvas import canvas_grid, draw_on_canvas
from captum_intramodal.explanation import Explanation
from captum_intramodal.geometry import TokenGeometry
from captum_intramodal.hooks import run_layers
from captum_intramodal.logit_lens import select_layers
from captum_intramodal.msea import Aggregation, aggregate, check_scales, normalized_weights
from captum_intramodal.text import decode_pieces, find_spans

__all__ = ["DEFAULT_SCALES", "explain"]

DEFAULT_SCALES: tuple[float, ...] = (1.0, 1.5, 2.0)

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Level:
    """One scale: the resized pictures, the model's inputs for them, and where their tokens lie in the originals."""

    scale: float
    inputs: dict[str, Any]
    geometry: TokenGeometry

    def boxes(self, image: int, size: tuple[int, int]) -> Tensor:
        """Boxes in pixels of the original picture; NaN for tokens of other pictures."""
        width, height = self.geometry.image_sizes[image]
        factor = torch.tensor([size[0] / width, size[1] / height] * 2)
        boxes = self.geometry.boxes * factor
        return boxes.masked_fill((self.geometry.image_index != image)[:, None], torch.nan)


def explain(
    model: PreTrainedModel,
    processor: Any,
    images: Image.Image | Sequence[Image.Image],
    prompt: Prompt,
    answer: str | Sequence[int] | None = None,
    *,
    scales: Sequence[float] = DEFAULT_SCALES,
    scale_weights: Sequence[float] | None = None,
    aggregation: Aggregation = "mean",
    arc: bool | Mapping[str, Any] | None = True,
    layer: int = -1,
    max_new_tokens: int = 128,
    progress: Progress | None = None,
) -> Explanation:
    r"""
    Explains every word of an image-text-to-text model's answer: the region of the picture and the earlier words that it
    came from.

    The map of a token is the logit lens of its id at the visual positions, clipped at 0, at each of ``scales``,
    interpolated over the original picture and averaged (MSEA); then the part that its irrelevant context explains is
    taken away (ARC). One forward pass per scale, without gradients, for all tokens together.
    ``scales=(1.0,), arc=None`` is the plain logit lens.

    Args:

        model (PreTrainedModel): From ``AutoModelForImageTextToText.from_pretrained``; any dtype, device and attention.
        processor: From ``AutoProcessor.from_pretrained``.
        images (PIL.Image.Image or Sequence[PIL.Image.Image]): The picture or pictures, in the prompt's order.
        prompt (str or Sequence[Mapping]): The question; or chat messages as ``processor.apply_chat_template`` takes
                    them.
        answer (str or Sequence[int], optional): The answer to explain, as text or token ids.
                    Default: None, the model's own greedy answer.
        scales (Sequence[float], optional): Factors by which the pictures are resized. A scale that shows the model
                    nothing new, because its processor brings the picture to the same size anyway, is dropped with a
                    warning.
                    Default: ``(1.0, 1.5, 2.0)``
        scale_weights (Sequence[float], optional): Weight of each scale.
                    Default: None, equal weights.
        aggregation (str, optional): ``'mean'``, ``'max'`` or ``'geometric_mean'``.
                    Default: ``'mean'``
        arc (bool or Mapping, optional): True for ARC with its defaults, a mapping with options of
                    :class:`~captum_intramodal.ActivationRankingCorrelation` (``k``, ``p``, ``weighting``, ...), None
                    or False for none.
                    Default: True
        layer (int, optional): Decoder layer that the lens reads.
                    Default: -1, the last.
        max_new_tokens (int, optional): Where the model's own answer ends at the latest.
                    Default: 128
        progress (Callable, optional): Called with a line of text before each step.
                    Default: None

    Returns:
        Explanation: maps, text relevance and probabilities of all tokens, on the CPU.

    Raises:
        TypeError: not an image-text-to-text model, processor or picture.
        ValueError: empty prompt or answer, words that the tokenizer does not know, scales that are not positive.

    Examples::

        >>> explanation = explain(model, processor, image, "describe the picture.")
        >>> explanation.heatmap("dog").shape     # (height, width) of the picture
        >>> explanation.to_html("page.html")
    """
    adapter = ModelAdapter(model, processor)
    pictures = _check_images(images)
    requested = check_scales(scales)
    weights_of = dict(zip(requested, normalized_weights(requested, scale_weights).tolist(), strict=True))
    report = progress or (lambda line: None)
    ranking = ARC(model=adapter.lens, **(arc if isinstance(arc, Mapping) else {}))
    suppress = arc is not None and arc is not False

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

    report("Finding out what each visual token sees")
    sizes = [picture.size for picture in pictures]
    levels, dropped = _levels(adapter, pictures, prompt, prompt_inputs, requested)
    if dropped:
        warnings.warn(
            f"Scales {dropped} show the model nothing new and are left out: its processor brings the pictures to the "
            "same size as another scale.",
            stacklevel=2,
        )
    weights = torch.tensor([weights_of[level.scale] for level in levels])
    weights = weights / weights.sum() if weights.sum() > 0 else torch.full((len(levels),), 1 / len(levels))

    text = _TextTokens.of(adapter, encoding, _shown_prompt(prompt))
    layers = [select_layers(adapter.lens, [layer])[0]]
    report(f"Reading the answer ({len(answer_ids)} tokens)")
    states = _TextStates.read(adapter, encoding, text, layers[0], ranking)

    grids = [
        max((canvas_grid(level.boxes(i, size), size) for level in levels), key=lambda grid: grid[0] * grid[1])
        for i, size in enumerate(sizes)
    ]
    per_level: list[list[Tensor]] = []
    for level in levels:
        if level.scale == 1.0:
            visual = states.visual
        else:
            report(f"Looking at scale {level.scale:g}")
            at = adapter.encode(level.inputs, answer_ids[:0]).visual_positions
            (visual,) = run_layers(
                lambda inputs=level.inputs: adapter.run(inputs),
                layers,
                lambda hidden, at=at: hidden[0, at.to(hidden.device)],
            )
        activation = adapter.lens.activation(visual, text.ids).clamp_min(0).T.cpu()
        per_level.append(
            [draw_on_canvas(activation, level.boxes(i, sizes[i]), sizes[i], grids[i]) for i in range(len(pictures))]
        )
    maps = [aggregate([drawn[i] for drawn in per_level], weights, aggregation) for i in range(len(pictures))]

    context = ranking.compare(states.rankings, states.last, text.ids)
    relevance = context.text_activation * context.context
    if suppress:
        report("Suppressing what irrelevant context causes")
        flat = ranking.suppress(torch.cat([m.flatten(1) for m in maps], dim=1), context)
        maps = [
            part.reshape(m.shape) for part, m in zip(flat.split([m[0].numel() for m in maps], 1), maps, strict=True)
        ]
        relevance = relevance * context.relevance

    keep = text.shown
    return Explanation(
        images=pictures,
        prompt=text.prompt,
        answer=text.answer,
        token_ids=text.ids[keep],
        spans=text.spans[keep],
        maps=[m[keep] for m in maps],
        relevance=relevance[keep][:, keep],
        probabilities=states.probabilities,
        settings={
            "versions": {"captum_intramodal": __version__, "python": platform.python_version()}
            | {name: version(name) for name in ("captum", "torch", "transformers")},
            "model": {
                "id": str(getattr(model.config, "_name_or_path", "")),
                "revision": getattr(model.config, "_commit_hash", None),
                "class": type(model).__name__,
                "dtype": str(model.dtype).removeprefix("torch."),
            },
            "scales": [level.scale for level in levels],
            "dropped_scales": dropped,
            "scale_weights": [round(w, 6) for w in weights.tolist()],
            "aggregation": aggregation,
            "levels": [
                {
                    "scale": level.scale,
                    "visual_tokens": len(level.geometry.boxes),
                    "token_size": _token_side(level, sizes[0]),
                }
                for level in levels
            ],
            "layer": layer,
            "arc": ranking.settings if suppress else None,
            "answer": "given" if answer is not None else f"greedy, at most {max_new_tokens} tokens",
        },
    )


@dataclass(frozen=True)
class _TextTokens:
    """The sequence's text tokens in order: all may be context; those of the user's prompt and the answer are shown."""

    positions: Tensor
    ids: Tensor
    spans: Tensor
    shown: Tensor
    prompt: str
    answer: str

    @classmethod
    def of(cls, adapter: ModelAdapter, encoding: Encoding, prompt: str) -> _TextTokens:
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
class _TextStates:
    """Hidden states of the one teacher-forced pass at the original scale, at the positions that are needed."""

    visual: Tensor
    rankings: list[Tensor]
    last: Tensor
    probabilities: Tensor

    @classmethod
    def read(
        cls, adapter: ModelAdapter, encoding: Encoding, text: _TextTokens, layer: nn.Module, arc: ARC
    ) -> _TextStates:
        positions = text.positions
        before = (positions - 1).clamp_min(0)
        rows = torch.cat([encoding.visual_positions, positions, before])
        visual, *states, last = run_layers(
            lambda: adapter.run(encoding.inputs),
            [layer, *arc.modules, adapter.lens.layers[-1]],
            lambda hidden: hidden[0, rows.to(hidden.device)],
        )
        seen, n_answer = len(encoding.visual_positions), len(encoding.answer_ids)
        log_probability = adapter.lens.log_probability(last[-n_answer:], text.ids[-n_answer:].to(last.device))
        return cls(visual[:seen], [h[seen:] for h in states], last[seen:], log_probability.exp().cpu())


def _levels(
    adapter: ModelAdapter,
    pictures: list[Image.Image],
    prompt: Prompt,
    inputs: dict[str, Any],
    scales: Sequence[float],
) -> tuple[list[Level], list[float]]:
    """The scales that show the model something of their own, and those that do not."""
    sizes = [picture.size for picture in pictures]
    original = adapter.geometry(sizes)
    kept: list[Level] = []
    dropped: list[float] = []
    # Upwards from the original: an enlargement repeats whatever smaller one has the same tokens.
    for scale in sorted(scales, key=lambda s: (s > 1, s)):
        resized = [(max(1, round(width * scale)), max(1, round(height * scale))) for width, height in sizes]
        geometry = original if scale == 1.0 else adapter.geometry(resized)
        twins = [original, *(level.geometry for level in kept if level.scale > 1)] if scale > 1 else []
        if any(_same_tokens(geometry, twin) for twin in twins):
            dropped.append(scale)
            continue
        if scale != 1.0:
            at_scale = [
                picture.resize(size, Image.Resampling.BICUBIC) for picture, size in zip(pictures, resized, strict=True)
            ]
            inputs_at = adapter.prepare(at_scale, prompt)
        kept.append(Level(scale, inputs if scale == 1.0 else inputs_at, geometry))
    if not kept:  # Only enlargements were asked for, and all of them repeat the original.
        kept, dropped = [Level(1.0, inputs, original)], list(scales)
    return kept, dropped


def _same_tokens(one: TokenGeometry, other: TokenGeometry) -> bool:
    """Whether two sizes of the same pictures give the same tokens: boxes equal to 2 % of the picture."""
    if len(one.boxes) != len(other.boxes):
        return False
    relative = [
        g.boxes / torch.tensor(g.image_sizes, dtype=torch.float32)[g.image_index].repeat(1, 2) for g in (one, other)
    ]
    return bool(torch.allclose(*relative, atol=0.02, rtol=0, equal_nan=True))


def _check_images(images: Any) -> list[Image.Image]:
    pictures = [images] if isinstance(images, Image.Image) else list(images)
    if not pictures or not all(isinstance(picture, Image.Image) for picture in pictures):
        raise TypeError(
            f"images must be one or several PIL images, got {[type(p).__name__ for p in pictures] or 'none'}; "
            "open a file with PIL.Image.open(path)."
        )
    return [picture.convert("RGB") for picture in pictures]


def _shown_prompt(prompt: Prompt) -> str:
    """What the user wrote: the prompt, or the text of the last message."""
    if isinstance(prompt, str):
        return prompt
    content = prompt[-1]["content"]
    return content if isinstance(content, str) else " ".join(part["text"] for part in content if part["type"] == "text")


def _token_side(level: Level, size: tuple[int, int]) -> list[float]:
    """Median width and height of the tokens' boxes in pixels of the original picture."""
    boxes = level.boxes(0, size)
    boxes = boxes[~boxes.isnan().any(1)]
    return [round(float((boxes[:, 2 + axis] - boxes[:, axis]).median()), 2) for axis in (0, 1)]
