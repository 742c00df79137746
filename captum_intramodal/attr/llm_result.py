r"""TODO."""

from __future__ import annotations

from typing import Any

import numpy as np
from captum.attr import LLMAttributionResult
from PIL import Image
from torch import Tensor

__all__ = ["MultimodalLLMAttributionResult"]


class MultimodalLLMAttributionResult(LLMAttributionResult):
    r"""
    Captum's result of an LLM attribution, whose input features are regions of images and pieces of text. It has the
    plots of Captum's own (``plot_token_attr``, ``plot_seq_attr``), and draws the regions over their image.

    Args:

        input_tokens (list[str]): Names of the features: regions ``image_<image>_feature_<segment>``, then text.
        output_tokens (list[str]): The answer's tokens.
        seq_attr (Tensor): Attributions of the whole answer, float32 (features,).
        token_attr (Tensor): Of each of its tokens, float32 (tokens, features).
        images (list[PIL.Image.Image]): The images.
        segmentations (list[Tensor]): Per image the index of the feature that each pixel belongs to, int64
                    (height, width).
    """

    def __init__(
        self,
        *,
        input_tokens: list[str],
        output_tokens: list[str],
        seq_attr: Tensor,
        token_attr: Tensor,
        images: list[Image.Image],
        segmentations: list[Tensor],
    ) -> None:
        super().__init__(
            seq_attr=seq_attr, token_attr=token_attr, input_tokens=input_tokens, output_tokens=output_tokens
        )
        self.images = images
        self.segmentations = segmentations

    def heatmap(self, target_token_pos: int | tuple[int, int] | None = None, image: int = 0) -> Tensor:
        r"""
        Attributions of an image's regions, in its frame.

        Args:

            target_token_pos (int or tuple[int, int], optional): An answer's token, or ``(first, end)`` of several,
                        whose attributions are summed up.
                        Default: None, the whole answer.
            image (int, optional): Which image.
                        Default: 0

        Returns:
            *Tensor* float32 (height, width), of either sign.

        Raises:
            IndexError: a token or image that does not exist.
        """
        if target_token_pos is None:
            attr = self.seq_attr
        elif isinstance(target_token_pos, int):
            attr = self.token_attr[target_token_pos]
        else:
            attr = self.token_attr[slice(*target_token_pos)].sum(0)
        result: Tensor = attr[self.segmentations[image]]
        return result

    def plot_image_heatmap(
        self, show: bool = False, target_token_pos: int | tuple[int, int] | None = None, image: int = 0
    ) -> Any:
        r"""
        Draws :meth:`heatmap` over the image in gray: green speaks for the answer, red against it.

        Args:

            show (bool, optional): Show the plot instead of returning it.
                        Default: False
            target_token_pos, image: As in :meth:`heatmap`.

        Returns:
            None or *tuple[Figure, Axes]*, as Captum's plots.
        """
        import matplotlib.pyplot as plt

        heat = self.heatmap(target_token_pos, image).numpy()
        largest = float(np.abs(heat).max()) or 1.0
        figure, axes = plt.subplots()
        axes.imshow(self.images[image].convert("L"), cmap="gray")
        drawn = axes.imshow(heat, vmin=-largest, vmax=largest, cmap="RdYlGn", alpha=0.6)
        figure.colorbar(drawn, ax=axes, label="Attribution")
        axes.axis("off")
        if show:
            plt.show()
            return None
        return figure, axes
