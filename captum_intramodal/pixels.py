r"""A multimodal model as a differentiable function of its pictures' pixels: what Captum methods need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from captum_intramodal.adapter import ModelAdapter, Prompt

__all__ = ["PixelForward"]


class PixelForward(nn.Module):
    r"""
    Logits of an answer's tokens as a function of the picture, for Captum methods on pixels.

    The picture goes through the model's own image processor, whose torchvision version is differentiable: resizing,
    tiling, patching and normalisation included. Any picture size works, so that MSEA can resize its input; the prompt's
    placeholders follow. Each example runs on its own, so that Captum's internal batches never mix pictures.

    Args:

        adapter (ModelAdapter): The model and its processor.
        prompt (str or Sequence[Mapping]): The question about one picture.
        answer (str or Sequence[int]): The answer whose tokens are predicted, teacher-forced.

    Raises:
        TypeError: at the first pass with gradients, if the image processor is not the torchvision-backed one.

    Examples::

        >>> forward = PixelForward(ModelAdapter(model, processor), "describe the picture.", "a dog.")
        >>> picture = torch.rand(1, 3, 192, 256)                  # in [0, 1]
        >>> forward(picture).shape                                # (1, answer tokens, vocabulary)
        >>> target = (1, forward.answer_ids[1])                   # the second token
        >>> attribution = IntegratedGradients(forward).attribute(picture, target=target)
    """

    def __init__(self, adapter: ModelAdapter, prompt: Prompt, answer: str | Sequence[int]) -> None:
        super().__init__()
        self.model = adapter.model
        self.adapter = adapter
        self.prompt = prompt
        self.answer_ids = adapter.tokenize_answer(answer)

    def inputs(self, picture: Tensor) -> dict[str, Any]:
        """The model's inputs for a picture, (3, height, width) in [0, 1]: differentiable pixels, and the text."""
        # In the range of ordinary pictures, in which processors also give the colour of their padding.
        scaled = picture * 255
        try:
            inputs = self.adapter.prepare([scaled], self.prompt)
        except (TypeError, ValueError):
            # Idefics2's processor takes only PIL pictures, its image processor tensors as well.
            blank = Image.new("RGB", (picture.shape[2], picture.shape[1]), "gray")
            pixels = self.adapter.processor.image_processor(images=[scaled], return_tensors="pt")
            inputs = self.adapter.prepare([blank], self.prompt)
            inputs |= {key: value.to(self.adapter.device) for key, value in pixels.items() if key in inputs}
        followed = any(isinstance(value, Tensor) and value.requires_grad for value in inputs.values())
        if picture.requires_grad and torch.is_grad_enabled() and not followed:
            name = type(self.adapter.processor.image_processor).__name__
            raise TypeError(
                f"No gradient passes through {name}; install torchvision and load the processor with "
                "AutoProcessor.from_pretrained(path), which then takes its torchvision version (use_fast=True in early "
                "transformers 5)."
            )
        return self.adapter.encode(inputs, self.answer_ids).inputs

    def positions(self, picture: Tensor) -> Tensor:
        """Positions of the answer's tokens in the sequence, int64 (answer tokens,)."""
        length = self.adapter.sequence_length(self.inputs(picture.detach()))
        return torch.arange(length - len(self.answer_ids), length)

    def forward(self, pictures: Tensor) -> Tensor:
        r"""
        Args:

            pictures (Tensor): float (N, 3, height, width) in [0, 1].

        Returns:
            *Tensor* (N, answer tokens, vocabulary): logits that predict each of the answer's tokens.
        """
        if pictures.ndim != 4 or pictures.shape[1] != 3 or not pictures.is_floating_point():
            raise ValueError(f"Pictures must be float (N, 3, height, width) in [0, 1], got {tuple(pictures.shape)}.")
        count = len(self.answer_ids)
        return torch.cat([self.adapter.run(self.inputs(p)).logits[:, -count - 1 : -1] for p in pictures])
