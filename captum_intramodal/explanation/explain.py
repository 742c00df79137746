r"""How is a whole answer explained in one call, or several answers in batches?"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image
from transformers import PreTrainedModel

from captum_intramodal._utils.image import check_images
from captum_intramodal._utils.memory import WORKING_MEMORY
from captum_intramodal._utils.provenance import describe_model, versions
from captum_intramodal.adapter.model_adapter import ModelAdapter
from captum_intramodal.adapter.prompts import Prompt
from captum_intramodal.attr.arc import ARC
from captum_intramodal.errors import InvalidInputError, InvalidOptionError
from captum_intramodal.explanation.activations import Activations, collect_activations
from captum_intramodal.explanation.context import relate, relate_without_rankings, suppress_together
from captum_intramodal.explanation.explanation import Explanation
from captum_intramodal.explanation.options import LENS_METHODS, ChangedDecisions, ExplainOptions, Method, Scales
from captum_intramodal.functional.aggregation import Aggregation, normalized_weights
from captum_intramodal.models.hooks import evaluation_mode
from captum_intramodal.models.logit_lens import LogitLens, LogitNormalization

__all__ = ["explain", "explain_batch"]


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
    logit_normalization: LogitNormalization = "raw",
    max_new_tokens: int = 128,
    working_memory: int = WORKING_MEMORY,
    progress: Callable[[str], None] | None = None,
) -> Explanation:
    r"""
    Explain every word of an image-text-to-text model's answer: the image region and the earlier words it came from.

    The map of a token is the logit lens of its id at the visual positions, clipped at 0, computed at each of
    ``scales``, interpolated over the original image and averaged (MSEA; paper, Eq. 4 and 5). Then the part that the
    maps of irrelevant context explain is subtracted (ARC; paper, Eq. 7). This takes one forward pass per scale, without
    gradients, for all tokens together. ``scales=(1.0,), arc=None`` is the plain logit lens.

    Args:

        model (PreTrainedModel): From ``AutoModelForImageTextToText.from_pretrained``; any dtype, device and attention
                    implementation.
        processor: From ``AutoProcessor.from_pretrained``.
        images (PIL.Image.Image or Sequence[PIL.Image.Image]): The image or images, in the prompt's order.
        prompt (str or Sequence[Mapping]): The question, or chat messages as ``processor.apply_chat_template`` takes
                    them.
        answer (str or Sequence[int], optional): The answer to explain, as text or token ids.
                    Default: None, the model's own greedy answer
        scales (Sequence[float] or str, optional): Factors by which the images are resized. A scale that gives the model
                    nothing new, because its processor resizes the images to the same size anyway, is dropped with a
                    warning. ``'auto'``: those of ``(1.0, 1.5, 2.0)`` at which the model processes more; if these are
                    fewer than three, also 0.75 and 0.5 if they have a token grid of their own.
                    Default: ``'auto'``
        scale_weights (Sequence[float], optional): Weight of each of the given scales.
                    Default: None, equal weights
        aggregation (str, optional): ``'mean'``, ``'max'`` or ``'geometric_mean'``.
                    Default: ``'mean'``
        changed_decisions (str, optional): How to weight a scale at which the model would predict a different token.
                    ``'keep'``: like the others. ``'drop'``: not at all. ``'weigh'``: by its weight times the token's
                    probability there, relative to that at the original size, at most 1. A token that no scale agrees on
                    keeps all scales. Takes one more pass per scale over prompt and answer.
                    Default: ``'keep'``
        arc (bool or Mapping, optional): True for ARC with its defaults; a mapping with options of
                    :class:`~captum_intramodal.ActivationRankingCorrelation` (``k``, ``p``, ``weighting``, ...); None or
                    False for no ARC.
                    Default: True
        crops (bool, optional): If enlarging the images gives the model nothing more, as with a fixed input size,
                    process cut-outs instead: 2 x 2 at scale 2, each in a pass of its own. Such scales have smaller
                    tokens, but a cut-out is processed without its surroundings.
                    Default: False
        interpolate_pos_encoding (bool, optional): For such a model, enlarge its input size instead, with more visual
                    tokens, if its vision tower can interpolate its position embeddings. The tower was not trained at
                    that size.
                    Default: False
        video (bool, optional): Whether the images are the frames of one video, sampled as the model expects. The
                    explanation shows them as images in time; frames that the model merges have the same map.
                    Default: False
        method (str, optional): How maps are computed. ``'logit_lens'``: at visual tokens in the decoder's sequence.
                    ``'layer_gradient_x_activation'``: at visual tokens wherever the decoder reads them, including
                    cross-attention and encoder-decoders; one backward pass per token and scale.
                    ``'direct_contribution'``: how much the answer's attention to a visual token adds to the token's
                    logit, over all heads and layers; one pass over prompt and answer per scale, no gradients.
                    ``'lens_x_contribution'``: the geometric mean of lens and contribution, that is, what a visual token
                    encodes and the answer reads.
                    ``'input_x_gradient'``: at the pixels, for models whose visual tokens cover no known regions
                    (resamplers); one backward pass per token and scale. ``'auto'``: the first of
                    lens, ``'layer_gradient_x_activation'`` and ``'input_x_gradient'`` that the model supports.
                    Default: ``'auto'``
        layer (int, optional): Decoder layer whose output the lens reads, at whose input activation times gradient is
                    computed, or whose attention contributes.
                    Default: None, the last for the lens, the first for gradients, all for contributions
        logit_normalization (str, optional): ``'raw'``: the lens's logits, as in the paper. ``'centered'``: less their
                    mean over the vocabulary, which makes maps invariant to a vector added to every row of the
                    unembedding. ``'zscore'``: centered, divided by the standard deviation over the vocabulary.
                    Default: ``'raw'``
        max_new_tokens (int, optional): Maximum length of the model's own answer.
                    Default: 128
        working_memory (int, optional): Bytes of one part of a step that runs in parts. Beside the model's own passes,
                    the explanation takes at most

                    ``working_memory`` + b L (V + 2 T) D + 4 T (V + 4 C)

                    bytes for T text tokens (prompt and answer), V visual tokens at all scales, maps of C cells (at most
                    160 x 160 per image), and hidden states of D numbers of b bytes at L layers. If at least 256 tokens
                    precede the first image, their keys and values at all layers are kept as well, so that passes at
                    other scales need not read these tokens again. The size of the vocabulary does not matter. If memory
                    runs out, the parts are halved, with a warning.
                    Default: 16 MiB
        progress (Callable, optional): Called with a line of text before each step.
                    Default: None

    Returns:
        **explanation** (*Explanation*):
            Maps, text relevance and probabilities of all tokens, on the CPU.

    Raises:
        TypeError: the model is no image-text-to-text model, or an image is no PIL image.
        InvalidInputError: prompt or answer is empty, or has words that the tokenizer does not know.
        InvalidOptionError: an option has a value that it does not take.
        UnsupportedModelError: the model does not support the method, or its input size cannot be enlarged.

    Examples::

        >>> from captum_intramodal import explain
        >>> explanation = explain(model, processor, image, "describe the picture.")
        >>> [word.text for word in explanation.words][3:5]
        ['a', 'pig']
        >>> explanation.heatmap("pig").shape == (image.height, image.width)
        True
        >>> explanation.to_html("page.html").name
        'page.html'
    """
    (explanation,) = _explain_together(
        ModelAdapter(model, processor, video, working_memory),
        [images],
        [prompt],
        [answer],
        1,
        ExplainOptions(
            scales=scales,
            scale_weights=scale_weights,
            aggregation=aggregation,
            changed_decisions=changed_decisions,
            arc=arc,
            crops=crops,
            interpolate_pos_encoding=interpolate_pos_encoding,
            method=method,
            layer=layer,
            logit_normalization=logit_normalization,
            max_new_tokens=max_new_tokens,
        ),
        progress,
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
    logit_normalization: LogitNormalization = "raw",
    max_new_tokens: int = 128,
    working_memory: int = WORKING_MEMORY,
    progress: Callable[[str], None] | None = None,
) -> list[Explanation]:
    r"""
    Explain several answers as :func:`explain` does, ``batch_size`` of them in one left-padded batch: answers are
    generated together, read together, and the images of a scale are processed together.

    A trial with two small examples shows whether batching changes the model's answers (as it does with positions that
    are counted from the padding). If it does, or if the processor cannot stack the images, examples run one at a time.
    In low precision a padded example is rounded differently than alone, so that an answer may differ where two words
    are almost equally likely.

    Args:

        model, processor: See :func:`explain`.
        images (Sequence): Per example an image, or the list of its images.
        prompts (str or Sequence): Per example a prompt, as :func:`explain` takes it; or one question for all.
        answers (Sequence, optional): Per example the answer to explain, as text or token ids, or None for the model's
                    own.
                    Default: None, the model's own greedy answers
        batch_size (int, optional): Number of examples that run together; memory grows with it.
                    Default: 8
        scales, scale_weights, aggregation, changed_decisions, arc, crops, interpolate_pos_encoding, video, method,
                    layer, logit_normalization, max_new_tokens, working_memory, progress (optional): See
                    :func:`explain`; the same for all.

    Returns:
        **explanations** (*list[Explanation]*):
            One per example, in their order.

    Raises:
        TypeError, InvalidInputError, InvalidOptionError, UnsupportedModelError: see :func:`explain`; also if the
            numbers of images, prompts and answers differ, or the batch size is below 1.

    Examples::

        >>> from captum_intramodal import explain_batch
        >>> explanations = explain_batch(model, processor, [image, image], "describe the picture.")
        >>> explanations[0].answer == explanations[1].answer
        True
    """
    if isinstance(images, Image.Image):
        raise TypeError("images must hold one image, or one list of images, per example; got a single image.")
    asked = [prompts] * len(images) if isinstance(prompts, str) else list(prompts)
    given = [None] * len(images) if answers is None else list(answers)
    if isinstance(answers, str) or not len(images) == len(asked) == len(given):
        raise InvalidInputError(
            f"{len(images)} images, {len(asked)} prompts and {len(given)} answers; pass one of each per example."
        )
    if batch_size < 1:
        raise InvalidOptionError(f"batch_size must be at least 1, got {batch_size}.")
    explanations = _explain_together(
        ModelAdapter(model, processor, video, working_memory),
        images,
        asked,
        given,
        batch_size,
        ExplainOptions(
            scales=scales,
            scale_weights=scale_weights,
            aggregation=aggregation,
            changed_decisions=changed_decisions,
            arc=arc,
            crops=crops,
            interpolate_pos_encoding=interpolate_pos_encoding,
            method=method,
            layer=layer,
            logit_normalization=logit_normalization,
            max_new_tokens=max_new_tokens,
        ),
        progress,
    )
    _warn_of_dropped(explanations)
    return explanations


def _explain_together(
    adapter: ModelAdapter,
    images: Sequence[Image.Image | Sequence[Image.Image]],
    prompts: Sequence[Prompt],
    answers: Sequence[str | Sequence[int] | None],
    batch_size: int,
    options: ExplainOptions,
    progress: Callable[[str], None] | None,
) -> list[Explanation]:
    checked = [check_images(of_example) for of_example in images]
    report = progress or (lambda line: None)
    explanations: list[Explanation] = []
    for start in range(0, len(checked), batch_size):
        part = slice(start, start + batch_size)
        if len(checked) > batch_size:
            report(f"Examples {start + 1} to {min(start + batch_size, len(checked))} of {len(checked)}")
        with evaluation_mode(adapter.model):
            lens = adapter.lens.with_normalization(options.logit_normalization)
            arc = None if options.arc_options is None else ARC(model=lens, **options.arc_options)
            collected = collect_activations(
                adapter,
                checked[part],
                prompts[part],
                answers[part],
                options,
                ranking_layers=() if arc is None else arc.layers,
                # Without ARC only the normalizer of the probabilities is needed, which any ranking comes with.
                ranking_k=1 if arc is None else arc.k,
                decisions=options.changed_decisions != "keep",
                progress=report,
            )
        for activations, answer in zip(collected, answers[part], strict=True):
            settings = _settings(adapter, options, answer)
            explanations.append(_explanation(lens, activations, arc, options, settings))
    return explanations


def _settings(adapter: ModelAdapter, options: ExplainOptions, answer: str | Sequence[int] | None) -> dict[str, Any]:
    """Return what an explanation records of its versions, model and options."""
    return {
        "versions": versions(["captum", "torch", "transformers"]),
        "model": describe_model(adapter.model),
        "crops": options.crops,
        "interpolate_pos_encoding": options.interpolate_pos_encoding,
        "layer": options.layer,
        "logit_normalization": options.logit_normalization,
        "answer": "given" if answer is not None else f"greedy, at most {options.max_new_tokens} tokens",
        "aggregation": options.aggregation,
        "changed_decisions": options.changed_decisions,
    }


def _explanation(
    lens: LogitLens,
    activations: Activations,
    arc: ARC | None,
    options: ExplainOptions,
    settings: dict[str, Any],
) -> Explanation:
    """Aggregate the scales, suppress interference, and keep the tokens that the user wrote or the model answered."""
    weights = normalized_weights(activations.scales, _kept_weights(activations, options))
    maps = activations.maps(weights, options.aggregation, options.changed_decisions)
    if arc is None:
        relevance, probabilities = relate_without_rankings(lens, activations)
    else:
        context, probabilities = relate(arc, activations)
        relevance = context.text_activation * context.context
        maps = suppress_together(arc, maps, context)
    shown, text = activations.text.displayed, activations.text
    last_layer = options.layer is None and activations.method in LENS_METHODS
    return Explanation(
        images=activations.images,
        prompt=text.prompt,
        answer=text.answer,
        token_ids=text.ids[shown],
        spans=text.spans[shown],
        maps=[m[shown] for m in maps],
        relevance=relevance[shown][:, shown],
        probabilities=probabilities,
        settings=settings
        | {
            "scales": activations.scales,
            "dropped_scales": activations.dropped,
            "scale_weights": [round(w, 6) for w in weights.tolist()],
            "method": activations.method,
            "levels": [
                {
                    "scale": scale_maps.scale,
                    "visual_tokens": scale_maps.n_visual,
                    "token_size": scale_maps.cell_size(activations.images[0].size),
                }
                for scale_maps in activations.scale_maps
            ],
            "layer": -1 if last_layer else options.layer,
            "arc": None if arc is None else arc.settings,
        },
    )


def _kept_weights(activations: Activations, options: ExplainOptions) -> list[float] | None:
    """Return the weights of the scales in use; None if they weigh the same."""
    weight_of = options.weight_of
    if len(activations.scales) < 2 or not weight_of:
        return None
    kept = [weight_of[scale] for scale in activations.scales]
    if not any(kept):
        raise InvalidOptionError(
            f"The scales in use, {activations.scales}, have weight 0, and {activations.dropped} give the model nothing "
            "new; give another scale a weight."
        )
    return kept


def _warn_of_dropped(explanations: Sequence[Explanation]) -> None:
    for dropped in sorted({tuple(explanation.settings["dropped_scales"]) for explanation in explanations} - {()}):
        warnings.warn(
            f"Scales {list(dropped)} give the model nothing new and are dropped: its processor brings the images to "
            "the same size as another scale.",
            stacklevel=3,
        )
