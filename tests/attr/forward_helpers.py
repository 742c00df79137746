"""Tiny models, random images, and the model's own answer logits as an oracle for the forward functions."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from captum_intramodal import ModelAdapter
from tests.testing.families import answer_logits, build, prepare

PROMPT, ANSWER = "describe the picture", "a red cat"

# One for each way to split an image: packed patches, a single square, and tiles with a thumbnail (three families).
SPLITS = ("qwen2_vl", "llava", "llava_next", "idefics3", "internvl")


@cache
def adapter_of(model_type: str) -> ModelAdapter:
    return ModelAdapter(*build(model_type))


def random_image(width: int = 96, height: int = 64, seed: int = 3) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 9, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255


def to_image(tensor: Tensor) -> Image.Image:
    return Image.fromarray((tensor * 255).round().byte().permute(1, 2, 0).numpy())


def ids_of(adapter: ModelAdapter, words: str) -> list[int]:
    vocabulary = adapter.tokenizer.get_vocab()
    return [vocabulary.get(word, vocabulary.get(f"▁{word}")) for word in words.split()]


def prepared(adapter: ModelAdapter, image: Image.Image) -> dict[str, Any]:
    return prepare(adapter.model, adapter.processor, [image], PROMPT)


def own_logits(adapter: ModelAdapter, image: Image.Image, answer: str = ANSWER) -> Tensor:
    """Compute the model's own logits (tokens, vocabulary) without the package's code."""
    return answer_logits(adapter.model, prepared(adapter, image), ids_of(adapter, answer))


def own_log_probs(adapter: ModelAdapter, image: Image.Image, answer: str = ANSWER) -> list[float]:
    """Compute the log-probability of each of the answer's tokens without the package's code."""
    logits = own_logits(adapter, image, answer)
    return [float(row.log_softmax(0)[i]) for row, i in zip(logits, ids_of(adapter, answer), strict=True)]
