r"""One call that explains a whole answer, or several."""

from __future__ import annotations

import platform
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from captum_intramodal._utils.image import check_images
from captum_intramodal._utils.memory import WORKING_MEMORY
from captum_intramodal._version import __version__
from captum_intramodal.adapter.model_adapter import ModelAdapter
from captum_intramodal.adapter.prompts import Prompt
from captum_intramodal.attr.arc import ARC
from captum_intramodal.explanation.activations import Activations, collect_activations
from captum_intramodal.explanation.explanation import Explanation
from captum_intramodal.explanation.scale_views import Method, Scales
from captum_intramodal.functional.aggregation import (
    CHANGED_DECISIONS,
    Aggregation,
    ChangedDecisions,
    check_scales,
    normalized_weights,
)
from captum_intramodal.functional.suppression import ContextRelevance
from captum_intramodal.models.hooks import evaluation_mode

__all__ = ["explain", "explain_batch", "relate", "suppress_together"]


def explain(
    model: PreTrainedModel,
    processor: Any,
    images: Image.Image | Sequence[Image.Image],
    prompt: Prompt,
    answer: str | Sequence[int] | None = None,
    *,
    scales: Scales = "auto",
    scale_weights: Sequence[float] | None = None,
    aggregation: Aggregation = "mean",
    changed_decisions: ChangedDecisions = "keep",
    arc: bool | Mapping[str, Any] | None = True,
    crops: bool = False,
    interpolate_pos_encoding: bool = False,
    video: bool = False,
    method: Method = "auto",
    layer: int | None = None,
    max_new_tokens: int = 128,
    working_memory: int = WORKING_MEMORY,
    progress: Callable[[str], None] | None = None,
) -> Explanation:
    r"""
    Explains every word of an image-text-to-text model's answer: the region of the image and the earlier words that it
    came from.

    The map of a token is the logit lens of its id at the visual positions, clipped at 0, at each of ``scales``,
    interpolated over the original image and averaged (MSEA); then the part that its irrelevant context explains is
    taken away (ARC). One forward pass per scale, without gradients, for all tokens together.
    ``scales=(1.0,), arc=None`` is the plain logit lens.

    Args:

        model (PreTrainedModel): From ``AutoModelForImageTextToText.from_pretrained``; any dtype, device and attention.
        processor: From ``AutoProcessor.from_pretrained``.
        images (PIL.Image.Image or Sequence[PIL.Image.Image]): The image or images, in the prompt's order.
        prompt (str or Sequence[Mapping]): The question; or chat messages as ``processor.apply_chat_template`` takes
                    them.
        answer (str or Sequence[int], optional): The answer to explain, as text or token ids.
                    Default: None, the model's own greedy answer.
        scales (Sequence[float] or str, optional): Factors by which the images are resized. A scale that shows the
                    model nothing new, because its processor brings the image to the same size anyway, is dropped with
                    a warning. ``'auto'``: ``(1.0, 1.5, 2.0)`` as far as the model sees more there; instead of the
                    others, 0.75 and 0.5 if they have a grid of tokens of their own.
                    Default: ``'auto'``
        scale_weights (Sequence[float], optional): Weight of each of the given scales.
                    Default: None, equal weights.
        aggregation (str, optional): ``'mean'``, ``'max'`` or ``'geometric_mean'``.
                    Default: ``'mean'``
        changed_decisions (str, optional): What a scale counts for a token of the answer in whose place the model would
                    say another one there. ``'keep'``: as much as for the others. ``'drop'``: nothing. ``'weigh'``: its
                    weight times the token's probability there, relative to that at the original size, at most 1. Where
                    that leaves a token no scale, all count. One more pass per scale, over prompt and answer.
                    Default: ``'keep'``
        arc (bool or Mapping, optional): True for ARC with its defaults, a mapping with options of
                    :class:`~captum_intramodal.ActivationRankingCorrelation` (``k``, ``p``, ``weighting``, ...), None
                    or False for none.
                    Default: True
        crops (bool, optional): Where the model sees nothing more of an enlarged image, as those of a fixed input size
                    do, show it cut-outs instead: 2 x 2 at scale 2, each in a pass of its own. Such levels have smaller
                    tokens; what lies in a cut-out is seen without its surroundings.
                    Default: False
        interpolate_pos_encoding (bool, optional): Show such a model the whole image at a larger input size instead,
                    with more visual tokens, where its vision tower can interpolate its position embeddings. The tower
                    was not trained at that size.
                    Default: False
        video (bool, optional): Whether the images are the frames of one video, sampled as the model expects them. The
                    explanation shows them as images in time; frames that the model merges have the same map.
                    Default: False
        method (str, optional): Whose maps: ``'logit_lens'`` at visual tokens in the decoder's sequence;
                    ``'layer_gradient_x_activation'`` at visual tokens wherever the decoder reads them (one backward
                    pass per token and scale), as in cross-attention, encoder-decoders and all that the lens can
                    explain; ``'input_x_gradient'`` with respect to the pixels (likewise), for models whose visual
                    tokens have no place in the image (resamplers). ``'auto'``: the first of these that the model can
                    do.
                    Default: ``'auto'``
        layer (int, optional): Decoder layer whose output the lens reads, or whose input activation times gradient is
                    taken at.
                    Default: None, the last for the lens, the first for gradients
        max_new_tokens (int, optional): Where the model's own answer ends at the latest.
                    Default: 128
        working_memory (int, optional): Bytes that a step which works in parts takes at a time. What the explanation
                    takes beside the model's own passes is then at most

                    ``working_memory`` + b L (V + 2 T) D + 4 T (V + 4 C)

                    bytes for T text tokens (the prompt's and the answer's), V visual tokens at all scales, maps of C
                    cells (at most 160 x 160 for each image), and hidden states of D numbers of b bytes, read at L
                    layers; and, where at least 256 tokens stand before the first image, which the passes at other
                    scales then need not read again, the keys and values of these at all layers. The size of the
                    vocabulary has no part in it. Where memory runs out earlier, the parts are halved, with a warning.
                    Default: 16 MiB
        progress (Callable, optional): Called with a line of text before each step.
                    Default: None

    Returns:
        Explanation: maps, text relevance and probabilities of all tokens, on the CPU.

    Raises:
        TypeError: not an image-text-to-text model, processor or image.
        ValueError: empty prompt or answer, words that the tokenizer does not know, scales that are not positive, an
            input size that cannot be enlarged.

    Examples::

        >>> explanation = explain(model, processor, image, "describe the picture.")
        >>> explanation.heatmap("dog").shape     # (height, width) of the image
        >>> explanation.to_html("page.html")
    """
    (explanation,) = _explain_together(
        ModelAdapter(model, processor, video, working_memory),
        [images],
        [prompt],
        [answer],
        1,
        scales=scales,
        scale_weights=scale_weights,
        aggregation=aggregation,
        changed_decisions=changed_decisions,
        arc=arc,
        crops=crops,
        interpolate_pos_encoding=interpolate_pos_encoding,
        method=method,
        layer=layer,
        max_new_tokens=max_new_tokens,
        progress=progress,
    )
    _warn_of_dropped([explanation])
    return explanation


def explain_batch(
    model: PreTrainedModel,
    processor: Any,
    images: Sequence[Image.Image | Sequence[Image.Image]],
    prompts: str | Sequence[Prompt],
    answers: Sequence[str | Sequence[int] | None] | None = None,
    batch_size: int = 8,
    *,
    scales: Scales = "auto",
    scale_weights: Sequence[float] | None = None,
    aggregation: Aggregation = "mean",
    changed_decisions: ChangedDecisions = "keep",
    arc: bool | Mapping[str, Any] | None = True,
    crops: bool = False,
    interpolate_pos_encoding: bool = False,
    video: bool = False,
    method: Method = "auto",
    layer: int | None = None,
    max_new_tokens: int = 128,
    working_memory: int = WORKING_MEMORY,
    progress: Callable[[str], None] | None = None,
) -> list[Explanation]:
    r"""
    Explains several answers as :func:`explain` does each, ``batch_size`` of them in one left-padded batch: the model
    generates the answers together, reads them together, and looks at the images of a scale together.

    Whether the model says the same in a batch as alone is tried on two small examples first. Where it does not (as
    with positions that count from the padding on), or its processor cannot stack these images, the examples run one
    after another. In low precision a padded example is rounded otherwise than alone; an answer may then differ where
    two words are almost equally likely.

    Args:

        model, processor: See :func:`explain`.
        images (Sequence): Per example an image, or the list of its images.
        prompts (str or Sequence): Per example a prompt, as :func:`explain` takes it; or one question for all.
        answers (Sequence, optional): Per example the answer to explain, as text or token ids, or None for the model's
                    own.
                    Default: None, the model's own greedy answers.
        batch_size (int, optional): Number of examples that run together, which bounds memory.
                    Default: 8
        scales, scale_weights, aggregation, changed_decisions, arc, crops, interpolate_pos_encoding, video, method,
                    layer, max_new_tokens, working_memory, progress (optional): See :func:`explain`; the same for all.

    Returns:
        *list[Explanation]*: one per example, in their order.

    Raises:
        TypeError, ValueError: see :func:`explain`; and numbers of images, prompts and answers that differ, or a
            batch size below 1.

    Examples::

        >>> explanations = explain_batch(model, processor, [photo, drawing], "describe the picture.")
        >>> [explanation.answer for explanation in explanations]
    """
    if isinstance(images, Image.Image):
        raise TypeError("images must hold one image, or one list of images, per example; got a single image.")
    asked = [prompts] * len(images) if isinstance(prompts, str) else list(prompts)
    given = [None] * len(images) if answers is None else list(answers)
    if isinstance(answers, str) or not len(images) == len(asked) == len(given):
        raise ValueError(
            f"{len(images)} images, {len(asked)} prompts and {len(given)} answers do not belong together; pass one of "
            "each per example."
        )
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    explanations = _explain_together(
        ModelAdapter(model, processor, video, working_memory),
        images,
        asked,
        given,
        batch_size,
        scales=scales,
        scale_weights=scale_weights,
        aggregation=aggregation,
        changed_decisions=changed_decisions,
        arc=arc,
        crops=crops,
        interpolate_pos_encoding=interpolate_pos_encoding,
        method=method,
        layer=layer,
        max_new_tokens=max_new_tokens,
        progress=progress,
    )
    _warn_of_dropped(explanations)
    return explanations


def _explain_together(
    adapter: ModelAdapter,
    images: Sequence[Image.Image | Sequence[Image.Image]],
    prompts: Sequence[Prompt],
    answers: Sequence[str | Sequence[int] | None],
    batch_size: int,
    *,
    scales: Scales,
    scale_weights: Sequence[float] | None,
    aggregation: Aggregation,
    changed_decisions: ChangedDecisions,
    arc: bool | Mapping[str, Any] | None,
    crops: bool,
    interpolate_pos_encoding: bool,
    method: Method,
    layer: int | None,
    max_new_tokens: int,
    progress: Callable[[str], None] | None,
) -> list[Explanation]:
    checked = [check_images(shown) for shown in images]
    if changed_decisions not in CHANGED_DECISIONS:
        raise ValueError(f"changed_decisions must be one of {CHANGED_DECISIONS}, got {changed_decisions!r}.")
    weight_of: dict[float, float] = {}
    if not isinstance(scales, str):
        scales = check_scales(scales)
        weight_of = dict(zip(scales, normalized_weights(scales, scale_weights).tolist(), strict=True))
    elif scale_weights is not None:
        raise ValueError(f"scale_weights need the scales that they belong to; scales is {scales!r}.")
    settings = {
        "versions": {"captum_intramodal": __version__, "python": platform.python_version()}
        | {name: version(name) for name in ("captum", "torch", "transformers")},
        "model": {
            "id": str(getattr(adapter.model.config, "_name_or_path", "")),
            "revision": getattr(adapter.model.config, "_commit_hash", None),
            "class": type(adapter.model).__name__,
            "dtype": str(adapter.model.dtype).removeprefix("torch."),
        },
        "crops": crops,
        "interpolate_pos_encoding": interpolate_pos_encoding,
        "layer": layer,
    }
    explanations: list[Explanation] = []
    for start in range(0, len(checked), batch_size):
        part = slice(start, start + batch_size)
        if len(checked) > batch_size and progress is not None:
            progress(f"Examples {start + 1} to {min(start + batch_size, len(checked))} of {len(checked)}")
        with evaluation_mode(adapter.model):
            ranking = ARC(model=adapter.lens, **(arc if isinstance(arc, Mapping) else {}))
            readings = collect_activations(
                adapter,
                checked[part],
                prompts[part],
                answers[part],
                scales,
                layer,
                ranking.layers,
                ranking.k,
                max_new_tokens,
                method,
                crops,
                interpolate_pos_encoding,
                progress or _silent,
                changed_decisions != "keep",
            )
        for reading, answer in zip(readings, answers[part], strict=True):
            origin = "given" if answer is not None else f"greedy, at most {max_new_tokens} tokens"
            suppress = arc is not None and arc is not False
            explanations.append(
                _explanation(
                    reading, ranking, suppress, weight_of, aggregation, changed_decisions, settings | {"answer": origin}
                )
            )
    return explanations


def _explanation(
    reading: Activations,
    ranking: ARC,
    suppress: bool,
    weight_of: Mapping[float, float],
    aggregation: Aggregation,
    changed_decisions: ChangedDecisions,
    settings: dict[str, Any],
) -> Explanation:
    kept = [level.scale for level in reading.levels]
    kept_weights = [weight_of[scale] for scale in kept] if len(kept) > 1 and weight_of else None
    if kept_weights is not None and not any(kept_weights):
        raise ValueError(
            f"The scales that are left, {kept}, have no weight, and {reading.dropped} show the model nothing new; give "
            "another scale a weight."
        )
    weights = normalized_weights(kept, kept_weights)
    maps = reading.maps(weights, aggregation, changed_decisions)
    context, probabilities = relate(ranking, reading)
    if suppress:
        maps = suppress_together(ranking, maps, context)
    shown = reading.text.shown
    return Explanation(
        images=reading.images,
        prompt=reading.text.prompt,
        answer=reading.text.answer,
        token_ids=reading.text.ids[shown],
        spans=reading.text.spans[shown],
        maps=[m[shown] for m in maps],
        relevance=(context.text_activation * context.context)[shown][:, shown],
        probabilities=probabilities,
        settings=settings
        | {
            "scales": kept,
            "dropped_scales": reading.dropped,
            "scale_weights": [round(w, 6) for w in weights.tolist()],
            "aggregation": aggregation,
            "changed_decisions": changed_decisions,
            "method": reading.method,
            "levels": [
                {
                    "scale": level.scale,
                    "visual_tokens": level.n_visual,
                    "token_size": level.cell_size(reading.images[0].size),
                }
                for level in reading.levels
            ],
            "layer": -1 if settings["layer"] is None and reading.method == "logit_lens" else settings["layer"],
            "arc": ranking.settings if suppress else None,
        },
    )


def relate(ranking: ARC, reading: Activations) -> tuple[ContextRelevance, Tensor]:
    """Relevance of context, and the probabilities of the answer's tokens. Both take the whole vocabulary, which is read
    once for both where they take the same layer, and not again for what was ranked while the answer was generated."""
    lens, ids, last, known = ranking.lens, reading.text.ids, reading.last, reading.answer_rankings
    n = reading.n_answer
    said = last[-n:]  # At the position before each token of the answer: the first one's, and the other tokens'.
    at_token = ranking.ranking_position == "token"
    rankings, normalizer = [], None if known is None else known.log_normalizer[:-1]
    for layer, module in zip(ranking.layers, ranking.modules, strict=True):
        states = ranking.ranked_states(reading.ranking_states[layer])
        if module is not lens.layers[-1]:
            rankings.append(lens.topk(states, ranking.k))
        elif known is not None:
            asked = lens.topk(states[:-n], ranking.k)
            rankings.append(torch.cat([asked, (known.ids[1:] if at_token else known.ids[:-1]).to(asked.device)]))
        elif at_token:
            ranked, sums = lens.rank(torch.cat([said[:1], states]), ranking.k)
            rankings.append(ranked[1:])
            normalizer = torch.cat([sums[:1], sums[-n:-1]])
        else:
            ranked, sums = lens.rank(states, ranking.k)
            rankings.append(ranked)
            normalizer = sums[-n:]
    log_probability = lens.log_probability(said, ids[-n:].to(said.device), log_normalizer=normalizer)
    return ranking.relate(rankings, last, ids), log_probability.exp().cpu()


def _warn_of_dropped(explanations: Sequence[Explanation]) -> None:
    for dropped in sorted({tuple(explanation.settings["dropped_scales"]) for explanation in explanations} - {()}):
        warnings.warn(
            f"Scales {list(dropped)} show the model nothing new and are left out: its processor brings the images "
            "to the same size as another scale.",
            stacklevel=3,
        )


def suppress_together(arc: ARC, maps: Sequence[Tensor], context: ContextRelevance) -> list[Tensor]:
    """ARC on the maps of several images, with one scale of the interference per token for all of them."""
    flat = arc.suppress(torch.cat([m.flatten(1) for m in maps], dim=1), context)
    parts = flat.split([m[0].numel() for m in maps], dim=1)
    return [part.reshape(m.shape) for part, m in zip(parts, maps, strict=True)]


def _silent(line: str) -> None:
    pass
