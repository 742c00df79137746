r"""Does an untested model meet the assumptions of an explanation? Each is tested on the model itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedModel

from captum_intramodal._utils.image import check_images, image_to_tensor, resize_images
from captum_intramodal.adapter.model_adapter import ModelAdapter
from captum_intramodal.adapter.prompts import Prompt
from captum_intramodal.adapter.trials import logits_gap, tolerance_of
from captum_intramodal.attr.pixel_forward import PixelForward
from captum_intramodal.errors import NoTokenGeometryError
from captum_intramodal.explanation.scale_views import select_views
from captum_intramodal.geometry.oracle import geometry_oracle
from captum_intramodal.geometry.token_geometry import TokenGeometry
from captum_intramodal.models.families import family_of
from captum_intramodal.models.hooks import evaluation_mode

__all__ = ["Check", "CheckReport", "check"]

# Correct boxes score 0.97 to 1 in the oracle, wrong ones rarely reach 0.5.
ORACLE_PASSES = 0.9
# (width, height) of the image that is tested if none is given.
SIZE = (640, 400)


@dataclass(frozen=True)
class Check:
    """One tested assumption.

    Attributes:
        name (str): name of the assumption.
        passed (bool or None): whether it holds; None if the model offers nothing to test.
        detail (str): the measurement, or what went wrong and what to do.
        figures (dict): the numbers in ``detail``.
    """

    name: str
    passed: bool | None
    detail: str
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class CheckReport:
    """Result of :func:`check`.

    Attributes:
        model (str): class of the model.
        checks (tuple[Check, ...]): in the order of their execution.
    """

    model: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """True if no check failed."""
        return all(check.passed is not False for check in self.checks)

    def __getitem__(self, name: str) -> Check:
        return next(check for check in self.checks if check.name == name)

    def __str__(self) -> str:
        marks = {True: "ok  ", False: "FAIL", None: "--  "}
        lines = [f"{marks[check.passed]}  {check.name:<16} {check.detail}" for check in self.checks]
        return "\n".join([self.model, *lines])


def check(
    model: PreTrainedModel,
    processor: Any,
    image: Image.Image | None = None,
    prompt: Prompt = "describe the picture.",
    progress: Callable[[str], None] | None = None,
) -> CheckReport:
    r"""
    Test whether a model meets the assumptions of an explanation; takes seconds on a small model.

    - *geometry*: the visual token that reacts most to a small change of the image has a box that contains the change
      (:func:`~captum_intramodal.geometry.geometry_oracle`), far more often than with shuffled boxes;
    - *logit lens*: the model's logits follow from its last decoder layer's output, and how;
    - *teacher forcing*: one pass over prompt and answer predicts the tokens that ``generate`` returned;
    - *scales*: the factors at which the model processes something new, and whether the boxes hold there as well;
    - *pixels*: gradients flow through the image processor, and the logits stay the model's own.

    Args:

        model (PreTrainedModel): An image-text-to-text model.
        processor: Its processor.
        image (PIL.Image.Image, optional): An image of the size you work with.
                    Default: None, a smooth random one of 640 x 400 pixels
        prompt (str or Sequence[Mapping], optional): A question about one image.
                    Default: ``'describe the picture.'``
        progress (Callable, optional): Called with a line of text before each step.
                    Default: None

    Returns:
        CheckReport: prints as a table; ``report.passed`` and ``report["geometry"]`` in code.

    Raises:
        TypeError: not an image-text-to-text model and its processor, or not an image.
        InvalidInputError: the prompt is empty.

    Examples::

        >>> from captum_intramodal import check
        >>> report = check(model, processor)
        >>> report["geometry"].passed
        True
    """
    adapter = ModelAdapter(model, processor)
    (checked,) = check_images(_smooth_image(SIZE) if image is None else image)
    adapter.prompt_text(prompt, 1)
    steps: dict[str, Callable[[ModelAdapter, Image.Image, Prompt], Check]] = {
        "geometry": _check_geometry,
        "logit lens": _check_lens,
        "teacher forcing": _check_teacher_forcing,
        "scales": _check_scales,
        "pixels": _check_pixels,
    }

    def run() -> Iterator[Check]:
        for name, step in steps.items():
            if progress:
                progress(f"Checking {name}")
            try:
                yield step(adapter, checked, prompt)
            # Whatever an unknown model raises is the finding.
            except Exception as error:
                yield Check(name, False, f"{type(error).__name__}: {' '.join(str(error).split())}")

    with evaluation_mode(model):
        return CheckReport(type(model).__name__, tuple(run()))


def _smooth_image(size: tuple[int, int]) -> Image.Image:
    coarse = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def _oracle(
    adapter: ModelAdapter, image: Image.Image, prompt: Prompt, geometry: TokenGeometry, blocks: int = 40
) -> float:
    return geometry_oracle(adapter.model, lambda images: adapter.prepare(images, prompt), [image], geometry, blocks)


def _check_geometry(adapter: ModelAdapter, image: Image.Image, prompt: Prompt) -> Check:
    try:
        geometry = adapter.geometry([image.size])
    except NoTokenGeometryError as error:
        adapter.pixel_maps([image.size])
        return Check("geometry", None, f"no visual tokens that cover known regions ({error}); explained by its pixels")
    counts = {kind: geometry.kinds.count(kind) for kind in dict.fromkeys(geometry.kinds)}
    found = f"{len(geometry.kinds)} visual tokens ({', '.join(f'{n} {kind}' for kind, n in counts.items())})"
    found += "" if geometry.argument is None else f" in {geometry.argument}"
    if "local" not in counts:
        return Check(
            "geometry", None, f"{found}; none covers a known region of the image. The model is explained by its pixels"
        )
    if family_of(adapter.model.config).code_raster_ends is not None:
        return Check(
            "geometry", None, f"{found}; discrete codes that no small change of the image moves", {"tokens": counts}
        )
    rate = _oracle(adapter, image, prompt, geometry)
    local = geometry.is_local.nonzero().flatten()
    boxes = geometry.boxes.clone()
    boxes[local] = boxes[local[torch.randperm(len(local), generator=torch.Generator().manual_seed(0))]]
    chance = _oracle(adapter, image, prompt, replace(geometry, boxes=boxes), blocks=16)
    width, height = geometry.token_size
    return Check(
        "geometry",
        rate >= ORACLE_PASSES,
        f"{found} of {width:.0f} x {height:.0f} pixels; {rate:.0%} of changes lie in the box of the token that "
        f"reacts most (shuffled boxes: {chance:.0%})",
        {
            "tokens": counts,
            "argument": geometry.argument,
            "token_size": [round(width, 1), round(height, 1)],
            "oracle": rate,
            "chance": chance,
        },
    )


def _check_lens(adapter: ModelAdapter, image: Image.Image, prompt: Prompt) -> Check:
    lens = adapter.lens
    tail = {"fast": "head(norm(h))", "replay": "the model's own tail, replayed (slower)"}[lens.tail]
    extra = "" if lens.factor == 1 else f", times {lens.factor:.4g}"
    extra += "" if lens.cap is None else f", soft-capped at {lens.cap:g}"
    return Check(
        "logit lens",
        True,
        f"{tail}{extra}; {len(lens.layers)} layers, vocabulary {lens.vocab_size}",
        {"tail": lens.tail, "factor": lens.factor, "cap": lens.cap},
    )


def _check_teacher_forcing(adapter: ModelAdapter, image: Image.Image, prompt: Prompt) -> Check:
    inputs = adapter.prepare([image], prompt)
    answer, generated = adapter.generate_with_logits(inputs, max_new_tokens=16)
    encoding = adapter.encode(inputs, answer)
    forced = encoding.rows(adapter.run(encoding.inputs).logits[0])[-len(answer) - 1 : -1]
    gap, tolerance = logits_gap(forced, generated), tolerance_of(adapter.model.dtype).generation
    return Check(
        "teacher forcing",
        gap <= tolerance,
        f"the logits of one pass over prompt and answer differ from those of generate by {gap:.2%} of their standard "
        "deviation "
        f"({len(answer)} tokens; up to {tolerance:.0%} is rounding)",
        {"gap": gap},
    )


def _check_scales(adapter: ModelAdapter, image: Image.Image, prompt: Prompt) -> Check:
    views, _ = select_views(adapter, [image], "auto", adapter.prepare([image], prompt))
    worst, sizes = 1.0, {}
    for scale, view in views.items():
        geometry = view.layout
        if not isinstance(geometry, TokenGeometry):
            return Check(
                "scales",
                None,
                f"no tokens that cover known regions; scales {', '.join(map(str, views))} differ in their pixels",
            )
        sizes[scale] = [round(side / scale, 1) for side in geometry.token_size]
        if family_of(adapter.model.config).code_raster_ends is None:
            (resized,) = resize_images([image], geometry.image_sizes)
            worst = min(worst, _oracle(adapter, resized, prompt, geometry, blocks=16))
    listed = ", ".join(f"{scale:g}: {width:.0f} x {height:.0f}" for scale, (width, height) in sizes.items())
    return Check(
        "scales",
        worst >= ORACLE_PASSES,
        f"token size in pixels of the original at the scales of scales='auto': {listed}; the boxes contain at least "
        f"{worst:.0%} of changes",
        {"token_sizes": sizes, "oracle": worst},
    )


def _check_pixels(adapter: ModelAdapter, image: Image.Image, prompt: Prompt) -> Check:
    inputs = adapter.prepare([image], prompt)
    answer, _ = adapter.generate_with_logits(inputs, max_new_tokens=4)
    forward = PixelForward(adapter, prompt, answer)
    encoding = adapter.encode(inputs, forward.answer_ids)
    expected = encoding.rows(adapter.run(encoding.inputs).logits[0])[-len(forward.answer_ids) - 1 : -1]
    pixels = image_to_tensor(image)
    with torch.enable_grad():
        pixels.requires_grad_()
        logits = forward(pixels)
        (gradient,) = torch.autograd.grad(logits[0, 0, answer[0]], pixels)
    reached = float((gradient != 0).any(dim=1).float().mean())
    gap = logits_gap(logits[0].detach(), expected)
    return Check(
        "pixels",
        reached > 0 and gap < 0.1,
        f"a gradient reaches {reached:.0%} of the image's pixels; the logits differ from the ordinary path's by "
        f"{gap:.2%} of their standard deviation",
        {"reached": reached, "gap": gap},
    )
