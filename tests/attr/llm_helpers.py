"""The log-probabilities of an answer for changed images and prompts, without the package's code."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from captum_intramodal import ModelAdapter

PROMPT, ANSWER = "describe the picture", "a red dog"


def painted(image: Image.Image, *boxes: tuple[int, int, int, int]) -> Image.Image:
    """Fill boxes (top, bottom, left, right) of an image with its mean color."""
    pixels = np.asarray(image).copy()
    mean = np.asarray(image).reshape(-1, 3).mean(0).round()
    for top, bottom, left, right in boxes:
        pixels[top:bottom, left:right] = mean
    return Image.fromarray(pixels)


def log_probabilities(
    adapter: ModelAdapter, images: Sequence[Image.Image], prompt: str = PROMPT, without: str | None = None
) -> Tensor:
    """Compute the log-probabilities of the answer's tokens, optionally with one word of the prompt unknown, by
    appending the answer to the processor's inputs."""
    processor, tokenizer = adapter.processor, adapter.tokenizer
    messages = [{"role": "user", "content": [*[{"type": "image"}] * len(images), {"type": "text", "text": prompt}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = dict(processor(images=list(images), text=[text], return_tensors="pt", add_special_tokens=False))
    if without is not None:
        word = inputs["input_ids"] == tokenizer.convert_tokens_to_ids(without)
        inputs["input_ids"] = inputs["input_ids"].masked_fill(word, tokenizer.unk_token_id)
    answer = torch.tensor(tokenizer.convert_tokens_to_ids(ANSWER.split()))
    continuation = {"input_ids": answer, "attention_mask": torch.ones(3), "mm_token_type_ids": torch.zeros(3)}
    for key in continuation.keys() & inputs.keys():
        inputs[key] = torch.cat([inputs[key], continuation[key][None].to(inputs[key])], dim=1)
    with torch.no_grad():
        logits = adapter.model(**inputs, use_cache=False).logits[0, -4:-1]
    return logits.log_softmax(-1)[range(3), answer]
