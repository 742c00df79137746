from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from typer.testing import CliRunner

from captum_intramodal import check
from captum_intramodal.cli import app
from tests.testing.tiny import tiny

NAMES = ["geometry", "logit lens", "teacher forcing", "scales", "pixels"]


@pytest.mark.parametrize("model_type", ["qwen2_vl", "llava", "smolvlm"])
def test_a_supported_model_passes(model_type: str) -> None:
    report = check(*tiny(model_type))
    assert [entry.name for entry in report.checks] == NAMES
    assert report.passed, str(report)
    assert "100% of changes lie in the box" in report["geometry"].detail
    assert all(name in str(report) for name in NAMES)


def test_the_model_is_left_as_it_was() -> None:
    model, processor = tiny("llava")
    model.train()
    state = torch.random.get_rng_state()
    check(model, processor)
    assert model.training and torch.equal(torch.random.get_rng_state(), state)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_misuse() -> None:
    model, processor = tiny("llava")
    with pytest.raises(TypeError, match="PIL images"):
        check(model, processor, "image.png")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="prompt is empty"):
        check(model, processor, prompt=" ")
    with pytest.raises(TypeError, match="generates text"):
        check("model", processor)  # type: ignore[arg-type]


def test_geometry_that_follows_the_content_fails() -> None:
    model, processor = tiny("llava")
    inner = processor.image_processor

    class Mirrored(type(inner)):  # type: ignore[misc]
        """Turns colored images round, which the gray ones that measure the geometry cannot show."""

        def __call__(self, images: Any, **kwargs: Any) -> Any:
            if all(isinstance(image, Image.Image) for image in images):
                images = [
                    ImageOps.mirror(i) if any(len(set(p)) > 1 for p in i.resize((4, 4)).getdata()) else i
                    for i in images
                ]
            return super().__call__(images, **kwargs)

    inner.__class__ = Mirrored
    report = check(model, processor)
    assert report["geometry"].passed is False and not report.passed
    assert report["logit lens"].passed


def test_a_head_that_looks_at_neighbors_fails() -> None:
    model, processor = tiny("llava")
    model.lm_head.register_forward_hook(lambda module, args, output: output.roll(1, dims=-2))
    report = check(model, processor)
    assert report["logit lens"].passed is False
    assert "lens would be wrong" in report["logit lens"].detail
    assert report["geometry"].passed


def test_a_model_that_generates_something_else_fails() -> None:
    model, processor = tiny("llava")

    class Drifting(nn.Module):
        """Shifts the logits of every token that is read from the cache."""

        def __init__(self, head: nn.Linear) -> None:
            super().__init__()
            self.weight, self.head = head.weight, head

        def forward(self, hidden: Tensor) -> Tensor:
            logits: Tensor = self.head(hidden)
            return logits.roll(1, dims=-1) if hidden.shape[1] == 1 else logits

    model.lm_head = Drifting(model.lm_head)
    report = check(model, processor)
    assert report["teacher forcing"].passed is False


def test_pixels_without_gradient_fail() -> None:
    model, processor = tiny("llava")
    inner = processor.image_processor

    class Detached(type(inner)):  # type: ignore[misc]
        def __call__(self, images: Any, **kwargs: Any) -> Any:
            return super().__call__([i.detach() if isinstance(i, Tensor) else i for i in images], **kwargs)

    inner.__class__ = Detached
    report = check(model, processor)
    assert report["pixels"].passed is False and "No gradient passes" in report["pixels"].detail
    assert report["geometry"].passed


def test_command(tmp_path: Path) -> None:
    model, processor = tiny("llava")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    result = CliRunner().invoke(app, ["check", "--model", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert all(name in result.output for name in NAMES) and "fails" not in result.output
    result = CliRunner().invoke(app, ["check", "--model", str(tmp_path), "--image", str(tmp_path / "missing.png")])
    assert result.exit_code == 2
