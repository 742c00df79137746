"""The examples in docstrings run, and print what they say."""

from __future__ import annotations

import doctest
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import captum_intramodal
from captum_intramodal import ModelAdapter, explain
from captum_intramodal.demo import CHECKPOINT, IMAGES

ROOT = Path(captum_intramodal.__file__).parent
MODULES = sorted(
    ".".join(file.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")
    for file in ROOT.rglob("*.py")
    if file.name != "__main__.py" and ">>>" in file.read_text(encoding="utf-8")
)


@cache
def demo_objects() -> dict[str, Any]:
    """The names that examples use without importing them."""
    model = AutoModelForImageTextToText.from_pretrained(CHECKPOINT, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(CHECKPOINT)
    image = Image.open(IMAGES[0]).convert("RGB")
    return {
        "model": model,
        "processor": processor,
        "image": image,
        "adapter": ModelAdapter(model, processor),
        "explanation": explain(model, processor, image, "describe the picture."),
    }


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = {"torch": torch, "np": np, "Image": Image, **demo_objects()}
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    failed, tried = doctest.testmod(import_module(name), extraglobs=names, optionflags=flags)
    assert tried and not failed
