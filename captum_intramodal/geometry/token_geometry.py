r"""Which box of which image does each visual token cover? The answer, in pixels of the original images."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from captum_intramodal.errors import InvalidInputError
from captum_intramodal.geometry.pixel_map import Size

__all__ = ["TokenGeometry"]


@dataclass(frozen=True)
class TokenGeometry:
    r"""
    Boxes of the visual tokens of one model input, in pixels of the original images.

    Every attribute lists the V visual tokens in the order in which the decoder receives them.

    Attributes:
        boxes (Tensor): x0, y0, x1, y1 of each token's box; a row of NaN if it has none. float32 (V, 4).
        kinds (tuple[str, ...]): kind of each token. ``'local'``: depends on the part of the image in its box, which may
            be the whole image (a thumbnail of one token). ``'global'``: depends on the whole image, through pixels that
            it shares with other tokens or through attention only. ``'padding'``: depends only on padding that the
            processor added. ``'separator'``: does not depend on the image.
        image_index (Tensor): index of each token's image; for tokens that depend on no image, that of the nearest token
            that does. int64 (V,).
        image_sizes (tuple[tuple[int, int], ...]): (width, height) of every image in pixels.
        last_image_index (Tensor, optional): if the model merges successive frames of a video, index of the last frame
            that each token depends on; ``image_index`` is that of the first. int64 (V,).
            Default: None, every token depends on one image
        argument (str, optional): name of the argument of the decoder's blocks that holds the visual tokens, such as
            ``'encoder_hidden_states'``; ``'hidden_states'`` if they are prepended to the decoder's sequence.
            Default: None, the tokens are at the placeholders in the decoder's sequence

    Examples::

        >>> from captum_intramodal.geometry import TokenGeometry
        >>> boxes = torch.tensor([[0.0, 0, 32, 20], [32, 0, 64, 20]])
        >>> geometry = TokenGeometry(boxes, ("local", "local"), torch.tensor([0, 0]), ((64, 20),))
        >>> geometry.token_size
        (32.0, 20.0)
        >>> geometry.coverage()
        (0.0, 0.0, 64.0, 20.0)
    """

    boxes: Tensor
    kinds: tuple[str, ...]
    image_index: Tensor
    image_sizes: tuple[Size, ...]
    last_image_index: Tensor | None = None
    argument: str | None = None

    @property
    def frames(self) -> Tensor:
        """Index of the first and the last image, or frame of a video, of each token, int64 (V, 2).

        They differ if the model merges successive frames, as the Qwen-VL and GLM-V types merge every two.
        """
        last = self.image_index if self.last_image_index is None else self.last_image_index
        return torch.stack([self.image_index, last], dim=1)

    def sees(self, image: int) -> Tensor:
        """Return which tokens belong to an image, or to a frame of the video, bool (V,)."""
        first, last = self.frames.unbind(1)
        return (first <= image) & (image <= last)

    @property
    def is_local(self) -> Tensor:
        """True for tokens that have a box, bool (V,)."""
        return torch.tensor([kind == "local" for kind in self.kinds], dtype=torch.bool)

    @property
    def token_size(self) -> tuple[float, float]:
        """Median width and height of the local tokens' boxes in pixels; NaN without local tokens."""
        boxes = self.boxes[self.is_local]
        if len(boxes) == 0:
            return math.nan, math.nan
        width, height = (boxes[:, 2:] - boxes[:, :2]).median(dim=0).values.tolist()
        return width, height

    def coverage(self, image: int = 0) -> tuple[float, float, float, float]:
        r"""
        Return the bounding rectangle of an image's boxes; no token covers what is outside, such as cropped margins.

        Args:

            image (int, optional): Index of the image.
                        Default: 0

        Returns:
            **rectangle** (*tuple[float, float, float, float]*):
                x0, y0, x1, y1 in pixels; all NaN if no local token belongs to the image.

        Raises:
            InvalidInputError: the index is out of range.
        """
        if not 0 <= image < len(self.image_sizes):
            raise InvalidInputError(f"image must be an index from 0 to {len(self.image_sizes) - 1}, got {image}.")
        boxes = self.boxes[self.is_local & self.sees(image)]
        if len(boxes) == 0:
            return (math.nan,) * 4
        x0, y0 = boxes[:, :2].amin(dim=0).tolist()
        x1, y1 = boxes[:, 2:].amax(dim=0).tolist()
        return x0, y0, x1, y1

    def shows_same(self, other: object) -> bool:
        r"""
        Return whether the model divides the same images into the same tokens at two sizes.

        Args:

            other (object): The geometry of the images at another size; the result for anything else is False.

        Returns:
            **same** (*bool*):
                True if there are equally many tokens, and their boxes are equal up to 2 % of the image.
        """
        if not isinstance(other, TokenGeometry) or len(self.boxes) != len(other.boxes):
            return False
        first, second = (
            g.boxes / torch.tensor(g.image_sizes, dtype=torch.float32)[g.image_index].repeat(1, 2)
            for g in (self, other)
        )
        return bool(torch.allclose(first, second, atol=0.02, rtol=0, equal_nan=True))
