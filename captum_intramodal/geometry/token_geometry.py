r"""TODO."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from captum_intramodal.geometry.pixel_map import Size

__all__ = ["TokenGeometry"]


@dataclass(frozen=True)
class TokenGeometry:
    r"""Where the visual tokens of one model input lie in the original images.

    V is the number of visual tokens; every attribute lists them as they stand where the decoder reads them.

    Attributes:
        boxes (Tensor): x0, y0, x1, y1 in pixels of the original image; a row of NaN where the token has no box.
            float32, shape: V x 4.
        kinds (tuple of str): ``'local'``: sees the part of the image in its box, which may be all of it (a thumbnail
            of one token). ``'global'``: sees the image as a whole, through pixels it shares with other tokens or
            through attention only. ``'padding'``: sees only what the processor padded. ``'separator'``: sees nothing.
        image_index (Tensor): the image each token belongs to; tokens that see none belong to the image of the
            nearest token that does. int64, shape: V.
        image_sizes (tuple): (width, height) of every image in pixels.
        last_image_index (Tensor, optional): where the model merges successive frames of a video, the last one that each
            token sees; ``image_index`` is the first. int64, shape: V. None: each token sees one image. :attr:`frames`
            has both.
        argument (str, optional): where the tokens are not placeholders in the decoder's sequence, the argument of its
            blocks that holds their states, such as ``'encoder_hidden_states'``; ``'hidden_states'`` where they stand
            before the sequence.

    Examples::

        >>> geometry = TokenGeometry(
        ...     torch.tensor([[0.0, 0, 32, 20], [32, 0, 64, 20]]), ("local",) * 2, torch.tensor([0, 0]), ((64, 20),)
        ... )
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
        """First and last image, in a video the first and last frame, that each token belongs to; int64, shape: V x 2.

        They differ where the model merges successive frames, as the Qwen-VL and GLM-V types do with every two.
        """
        last = self.image_index if self.last_image_index is None else self.last_image_index
        return torch.stack([self.image_index, last], dim=1)

    def sees(self, image: int) -> Tensor:
        """Boolean, shape: V; true where the token belongs to an image, or to a frame of the video."""
        first, last = self.frames.unbind(1)
        return (first <= image) & (image <= last)

    @property
    def is_local(self) -> Tensor:
        """Boolean, shape: V; true where the token has a box."""
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
        r"""The rectangle of an image that its tokens see; what lies outside (a center crop's margins) no token sees.

        Args:
            image (int): Index of the image.
                        Default: 0

        Returns:
            **rectangle** (*tuple of float*):
                x0, y0, x1, y1 in pixels; all NaN if no local token belongs to the image.
        """
        if not 0 <= image < len(self.image_sizes):
            raise ValueError(f"There is no image {image}; the geometry has {len(self.image_sizes)}.")
        boxes = self.boxes[self.is_local & self.sees(image)]
        if len(boxes) == 0:
            return (math.nan,) * 4
        x0, y0 = boxes[:, :2].amin(dim=0).tolist()
        x1, y1 = boxes[:, 2:].amax(dim=0).tolist()
        return x0, y0, x1, y1

    def shows_same(self, other: object) -> bool:
        r"""
        Whether two sizes of the same images give the model the same tokens.

        Args:
            other (object): A geometry of the images at another size; anything else is not the same.

        Returns:
            **same** (*bool*):
                As many tokens, with boxes equal to 2 % of the image.
        """
        if not isinstance(other, TokenGeometry) or len(self.boxes) != len(other.boxes):
            return False
        first, second = (
            g.boxes / torch.tensor(g.image_sizes, dtype=torch.float32)[g.image_index].repeat(1, 2)
            for g in (self, other)
        )
        return bool(torch.allclose(first, second, atol=0.02, rtol=0, equal_nan=True))
