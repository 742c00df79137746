"""Models and answers that the tests of explainers share."""

from __future__ import annotations

from functools import cache

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from captum_intramodal import ModelAdapter
from captum_intramodal.demo import CHECKPOINT
from tests.testing.tiny import tiny

PROMPT = "describe the picture"


@cache
def model_of(model_type: str) -> ModelAdapter:
    return ModelAdapter(*tiny(model_type))


@cache
def demo_adapter() -> ModelAdapter:
    loaded = AutoModelForImageTextToText.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    return ModelAdapter(loaded, AutoProcessor.from_pretrained(CHECKPOINT))


def answer_to(adapter: ModelAdapter, text: str = "a red dog") -> list[int]:
    return adapter.tokenize_answer(text)
