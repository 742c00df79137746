r"""Run Token Activation Map's own code, and this package's TAM with the definitions of that code."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
from costs.model import TOKEN
from PIL import Image
from torch import Tensor

from captum_intramodal import ModelAdapter
from captum_intramodal.functional.tam import estimated_causal_inference, rank_gaussian_filter
from captum_intramodal.models.logit_lens import LogitLens


class OwnTAM:
    """TAM's own code after the model's pass, as its demo runs it: the logits of all positions, then a map for each
    token of prompt and answer."""

    def __init__(self, folder: Path) -> None:
        # tam.py imports fitz, but needs it for drawing text only.
        sys.modules.setdefault("fitz", types.ModuleType("fitz"))
        spec = importlib.util.spec_from_file_location("tam", folder / "tam.py")
        if spec is None or spec.loader is None:
            raise FileNotFoundError(f"There is no tam.py in {folder}.")
        self.module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.module)

    def __call__(
        self, adapter: ModelAdapter, states: Tensor, ids: list[int], prompt: int, image: Image.Image
    ) -> list[np.ndarray]:
        """Compute the maps from the normalized last states (positions, D), before they become 8-bit images."""
        model, tokenizer = adapter.model, adapter.tokenizer
        logits = [model.lm_head(states[None, :prompt])]
        logits += [model.lm_head(states[None, i : i + 1]) for i in range(prompt, len(states))]
        vision, end, start = tokenizer.convert_tokens_to_ids(["<|vision_end|>", "<|im_end|>", "<|im_start|>"])
        special = {
            "img_id": [model.config.image_token_id],
            "prompt_id": [vision, end],
            "answer_id": [[start, tokenizer.convert_tokens_to_ids("assistant")], -1],
        }
        filtered: list[np.ndarray] = []
        original = self.module.rank_guassian_filter

        def recorded(*args: Any) -> np.ndarray:
            filtered.append(original(*args))
            return filtered[-1]

        grid = image.height // TOKEN, image.width // TOKEN
        raw: list[np.ndarray] = []
        self.module.rank_guassian_filter = recorded
        try:
            for target in range(len(logits)):
                self.module.TAM(ids, grid, logits, special, [image], adapter.processor, "", target, raw, eval_only=True)
        finally:
            self.module.rank_guassian_filter = original
        return filtered


def compute_tam(
    lens: LogitLens,
    visual: Tensor,
    text: Tensor,
    classes: Tensor,
    words: Tensor,
    n_question: int,
    grid: tuple[int, int],
) -> Tensor:
    """Compute TAM from hidden states for tokens whose logits are those of ``classes`` and whose strings are those of
    ``words``; the first ``n_question`` belong to the question. As in TAM's code, the minimum over a map and its text is
    subtracted."""
    maps = lens.activation(visual, classes).T.clamp_min(0).contiguous()
    activation = lens.activation(text, classes).T.clamp_min(0).contiguous()
    maps = estimated_causal_inference(maps, activation, words[:, None] == words)
    token = torch.arange(len(words), device=maps.device)
    later = token >= token[:, None].clamp_min(n_question)
    smallest = torch.minimum(maps.amin(1), activation.masked_fill(later, torch.inf).amin(1))
    return rank_gaussian_filter((maps - smallest[:, None]).reshape(len(words), *grid)).flatten(1)
