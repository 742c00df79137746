r"""Plot the attributions of a language model's answer to regions of images and pieces of text."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from captum.attr import LLMAttributionResult
from PIL import Image
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["MultimodalLLMAttributionResult"]


class MultimodalLLMAttributionResult(LLMAttributionResult):
    r"""
    Captum's result of an LLM attribution, for input features that are regions of images and pieces of text. It inherits
    Captum's plots (``plot_token_attr``, ``plot_seq_attr``) and adds a heatmap of the regions over their image.

    Args:

        input_tokens (list[str]): Names of the features: regions ``image_<image>_feature_<segment>``, then text.
        output_tokens (list[str]): The answer's tokens.
        seq_attr (Tensor): Attributions of the whole answer, float32 (features,).
        token_attr (Tensor): Attributions of each of the answer's tokens, float32 (tokens, features).
        images (list[PIL.Image.Image]): The images.
        segmentations (list[Tensor]): For each image, the index of the feature that each pixel belongs to, int64
                    (height, width).

    Examples::

        >>> result = explanation.to_llm_attribution_result(grid=(7, 10))
        >>> result.heatmap(target_token_pos=1).shape
        torch.Size([224, 320])
        >>> figure, axes = result.plot_image_heatmap(target_token_pos=1)
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
        Return the attribution of the region that each pixel of an image belongs to.

        Args:

            target_token_pos (int or tuple[int, int], optional): A token of the answer, or ``(first, end)`` to sum over
                        several.
                        Default: None, the whole answer.
            image (int, optional): Index of the image.
                        Default: 0

        Returns:
            **heatmap** (*Tensor*): float32 (height, width), of either sign.

        Raises:
            IndexError: if the token or image does not exist.
        """
        if target_token_pos is None:
            attr = self.seq_attr
        elif isinstance(target_token_pos, int):
            attr = self.token_attr[target_token_pos]
        else:
            attr = self.token_attr[slice(*target_token_pos)].sum(0)
        heatmap: Tensor = attr[self.segmentations[image]]
        return heatmap

    def plot_image_heatmap(
        self, show: bool = False, target_token_pos: int | tuple[int, int] | None = None, image: int = 0
    ) -> tuple[Figure, Axes] | None:
        r"""
        Plot :meth:`heatmap` over the image in gray: green is evidence for the answer, red against it.

        Args:

            show (bool, optional): Whether to show the plot instead of returning it.
                        Default: False
            target_token_pos (int or tuple[int, int], optional): See :meth:`heatmap`.
                        Default: None
            image (int, optional): See :meth:`heatmap`.
                        Default: 0

        Returns:
            *tuple[Figure, Axes]*, or None if the plot is shown, like Captum's plots.
        """
        import matplotlib.pyplot as plt

        heatmap = self.heatmap(target_token_pos, image).numpy()
        largest = float(np.abs(heatmap).max()) or 1.0
        figure, axes = plt.subplots()
        axes.imshow(self.images[image].convert("L"), cmap="gray")
        overlay = axes.imshow(heatmap, vmin=-largest, vmax=largest, cmap="RdYlGn", alpha=0.6)
        figure.colorbar(overlay, ax=axes, label="Attribution")
        axes.axis("off")
        if show:
            plt.show()
            return None
        return figure, axes
