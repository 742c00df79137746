r"""What can a model do in a batch, and how far may two results that should agree differ? Tried on noise images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin
from transformers.utils import ModelOutput

from captum_intramodal._utils.image import noise_image
from captum_intramodal.adapter.encoding import encode_batch
from captum_intramodal.adapter.generation import generate, tokenize_answer
from captum_intramodal.adapter.prompts import prepare_inputs, stack_inputs
from captum_intramodal.geometry.pixel_map import Size
from captum_intramodal.models.hooks import evaluation_mode

__all__ = ["TRIAL_PROMPT", "Tolerance", "logits_gap", "tolerance_of", "trial_images", "trial_succeeds"]

TRIAL_PROMPT = "describe"


class Tolerance(NamedTuple):
    """Largest :func:`logits_gap` that rounding explains.

    Attributes:
        passes (float): between two passes over the same tokens.
        generation (float): between a pass over prompt and answer and token-by-token generation.
    """

    passes: float
    generation: float


_TOLERANCES = {torch.float64: Tolerance(1e-3, 1e-2), torch.float32: Tolerance(1e-3, 1e-2)}
_HALF_PRECISION = Tolerance(5e-2, 1e-1)


def tolerance_of(dtype: torch.dtype) -> Tolerance:
    r"""
    Return the tolerances of computations in a dtype.

    Args:

        dtype (torch.dtype): The model's dtype.

    Returns:
        Tolerance: those of half precision for any dtype but float32 and float64.

    Examples::

        >>> from captum_intramodal.adapter.trials import tolerance_of
        >>> tolerance_of(torch.bfloat16).passes
        0.05
    """
    return _TOLERANCES.get(dtype, _HALF_PRECISION)


def logits_gap(actual: Tensor, expected: Tensor) -> float:
    r"""
    Measure the mean absolute difference of logits or states, in standard deviations of the expected ones.

    Args:

        actual (Tensor): Logits or states (..., N).
        expected (Tensor): Those to compare with; of a padded vocabulary only the entries that both have count, and
                    masked entries do not.

    Returns:
        *float*: at least 0.

    Examples::

        >>> from captum_intramodal.adapter import logits_gap
        >>> logits_gap(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 3.0]))
        0.0
    """
    width = min(actual.shape[-1], expected.shape[-1])
    actual, expected = actual[..., :width].float().cpu(), expected[..., :width].float().cpu()
    unmasked = expected.isfinite() & (expected > torch.finfo(torch.float32).min / 4)
    return float((actual - expected)[unmasked].abs().mean() / expected[unmasked].std())


def trial_images(size: Size, video: bool, seed: int = 0) -> list[Image.Image]:
    """Draw noise as the image of a prompt, or as the frames of its video; some processors drop all-black images."""
    return [noise_image(size, seed)] * (2 if video else 1)


def trial_succeeds(model: PreTrainedModel, trial: Callable[[], bool]) -> bool:
    """Run a trial in evaluation mode; return its result, or False if the model or its processor raises."""
    try:
        with evaluation_mode(model):
            return trial()
    except Exception:  # Code that was not made for the trial raises anything.
        return False


def batching_preserves_outputs(
    model: PreTrainedModel, processor: ProcessorMixin, run: Callable[[Mapping[str, Any]], ModelOutput], video: bool
) -> bool:
    """Compare two examples in a left-padded batch with each alone: tokens, logits of an answer, generated logits."""
    images = [trial_images(size, video) for size in ((96, 64), (200, 136))]
    prompts = [TRIAL_PROMPT, " ".join([TRIAL_PROMPT] * 3)]

    def outputs(images: Sequence[list[Image.Image]], prompts: Sequence[str]) -> list[tuple[Tensor, list[Tensor]]]:
        inputs = prepare_inputs(model, processor, images, prompts, video)
        # The prompt's own words are the answer.
        answers = [tokenize_answer(model, processor.tokenizer, prompt) for prompt in prompts]
        encodings = encode_batch(model, processor, inputs, answers)
        forced = run(encodings[0].inputs).logits
        steps = generate(model, processor.tokenizer, inputs, 2, output_logits=True, min_new_tokens=0).logits
        return [
            (e.input_ids, [e.rows(forced[e.row])[-len(e.answer_ids) :], *(step[e.row] for step in steps)])
            for e in encodings
        ]

    together = outputs(images, prompts)
    alone = [outputs([own], [prompt])[0] for own, prompt in zip(images, prompts, strict=True)]
    return all(
        torch.equal(ids, expected_ids)
        and all(logits_gap(*pair) <= tolerance_of(model.dtype).passes for pair in zip(logits, expected, strict=False))
        for (ids, logits), (expected_ids, expected) in zip(together, alone, strict=True)
    )


def stacking_preserves_outputs(
    model: PreTrainedModel, processor: ProcessorMixin, run: Callable[[Mapping[str, Any]], ModelOutput], video: bool
) -> bool:
    """Compare two examples of equal length, stacked by :func:`stack_inputs`, with each alone."""
    answer = tokenize_answer(model, processor.tokenizer, TRIAL_PROMPT)
    inputs = []
    for seed in (0, 1):
        prepared = prepare_inputs(model, processor, [trial_images((96, 64), video, seed)], [TRIAL_PROMPT], video)
        inputs.append(encode_batch(model, processor, prepared, [answer])[0].inputs)
    together = run(stack_inputs(inputs)).logits
    return all(
        logits_gap(logits[-1:], run(single).logits[0, -1:]) <= tolerance_of(model.dtype).passes
        for logits, single in zip(together, inputs, strict=True)
    )
