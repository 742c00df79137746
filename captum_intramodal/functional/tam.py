r"""Token Activation Map (TAM), the baseline: Li et al., "Token Activation Map to Visually Explain Multimodal LLMs",
ICCV 2025.

Written from the method's definition, for all tokens of an answer at once. A visual map of text token :math:`t` with id
:math:`c_t` is the clipped logit lens :math:`A_t(v) = \max(0, h_v \cdot w_{c_t})`; TAM removes from it what the earlier
text tokens explain (:func:`estimated_causal_inference`) and denoises the rest (:func:`rank_gaussian_filter`).

Left out on purpose: TAM's reference evaluation rescales the scores over image and text of a token to [0, 1] jointly,
which makes a visual map depend on the text scores. Maps stay in logit units here.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

__all__ = ["estimated_causal_inference", "rank_gaussian_filter", "token_activation_map"]

# A window holds size * size copies of the maps; larger batches are filtered in parts of about this many values.
_WINDOW_VALUES = 2**24


def estimated_causal_inference(
    maps: Tensor, text_activation: Tensor, same_token: Tensor, least_squares: bool = True
) -> Tensor:
    r"""Subtracts from every token's map the interference of its context (TAM's first step, "ECI").

    With :math:`A_t` the map of text token :math:`t`, :math:`r_t(j)` its activation at the earlier text position
    :math:`j`, and the context :math:`C_t` of all :math:`j < t` whose string differs from that of :math:`t`:

    .. math::
        E_t = \frac{\sum_{j \in C_t} r_t(j) A_j}{\sum_{j \in C_t} r_t(j)}, \qquad
        s_t = \arg\min_s \lVert A_t - s E_t \rVert^2 = \frac{\langle A_t, E_t \rangle}{\langle E_t, E_t \rangle},
        \qquad \hat A_t = \max(0, A_t - s_t E_t)

    The context maps are the raw ones, not those already corrected, so all tokens take one matrix product. A token
    without context, without activation on it, or whose context maps are all zero keeps its map.

    Args:

        maps (Tensor): Non-negative visual maps of all text tokens, of the prompt and of the answer, in sequence order.
                    Shape: T x V, floating point.
        text_activation (Tensor): :math:`r_t(j) = \max(0, h_j \cdot w_{c_t})` in row t and column j, non-negative below
                    the diagonal; the diagonal and what lies above it is never used. Shape: T x T.
        same_token (Tensor): True in row t and column j where the strings of the tokens t and j are equal. Boolean,
                    shape: T x T.
        least_squares (bool): Whether to scale the interference by :math:`s_t`; otherwise :math:`s_t = 1`.
                    Default: ``True``

    Returns:
        **maps** (*Tensor*):
            The corrected, non-negative maps, with the shape, dtype and device of ``maps``. Sums are taken in float32,
            in float64 if an input has it.

    Raises:
        ValueError: If shapes or dtypes do not fit, or a value used is negative or not finite.

    Examples::

        >>> maps = torch.tensor([[2.0, 0.0, 0.0], [1.0, 3.0, 0.0]])  # two tokens on three visual tokens
        >>> activation = torch.tensor([[0.0, 0.0], [5.0, 0.0]])
        >>> words = ["a", "dog"]
        >>> same = torch.tensor([[first == second for second in words] for first in words])
        >>> estimated_causal_inference(maps, activation, same)
        tensor([[2., 0., 0.],
                [0., 3., 0.]])
    """
    _check_maps(maps, 2, "T x V")
    tokens = maps.shape[0]
    for name, matrix in (("text_activation", text_activation), ("same_token", same_token)):
        if matrix.shape != (tokens, tokens):
            raise ValueError(
                f"{name} must be {tokens} x {tokens} for {tokens} maps, but its shape is {tuple(matrix.shape)}."
            )
    if same_token.dtype != torch.bool:
        raise ValueError(f"same_token must be boolean, but its dtype is {same_token.dtype}.")

    dtype = torch.promote_types(torch.promote_types(maps.dtype, text_activation.dtype), torch.float32)
    raw = maps.to(dtype)
    # A mask and not a product: what stands above the diagonal may be anything, infinity and NaN included.
    earlier = torch.ones_like(same_token).tril(-1)
    weights = text_activation.to(dtype).masked_fill(~earlier | same_token, 0)
    _check_values("text_activation", weights)

    interference = _divide(weights @ raw, weights.sum(1, keepdim=True))
    if least_squares:
        overlap = (raw * interference).sum(1, keepdim=True)
        interference = _divide(overlap, interference.square().sum(1, keepdim=True)) * interference
    return (raw - interference).clamp_min(0).to(maps.dtype)


def rank_gaussian_filter(maps: Tensor, size: int = 3) -> Tensor:
    r"""Denoises maps with a Gaussian over the ranks of each window (TAM's second step, "RGF").

    The :math:`n = size^2` values of the window around a cell are sorted, :math:`x_0 \le \dots \le x_{n-1}`, and
    averaged with weights that fall with the distance from the median and adapt to the window's spread:

    .. math::
        \hat x = \frac{\sum_k g_k x_k}{\sum_k g_k}, \qquad g_k = \exp\left(-\frac{(k - c)^2}{2 \sigma^2}\right), \qquad
        c = \frac{n - 1}{2}, \qquad \sigma = \frac{\mathrm{std}(x)}{\mathrm{mean}(x)}

    The standard deviation is that of the population (divided by n): :math:`\sigma` describes these n values, it does
    not estimate anything from them. Where :math:`\sigma` is 0, in a constant window or one of mean 0, only the median
    has a weight, which is the limit of the formula, and a constant window gives its own value.

    Borders are reflected without repeating the edge, as ``numpy.pad(mode="reflect")`` does it also where the padding
    is larger than the map: the reflection goes on back and forth, and an axis of length 1 repeats its value.

    Args:

        maps (Tensor): Non-negative maps. Shape: ... x H x W, floating point; any H, W of 1 or more.
        size (int): Odd side of the window. Default: ``3``

    Returns:
        **maps** (*Tensor*):
            The filtered maps, with the shape, dtype and device of ``maps``; every value lies between the smallest and
            the largest of its window. Computed in float32, in float64 if ``maps`` has it.

    Raises:
        ValueError: If ``size`` is not odd and positive, ``maps`` has no cells or fewer than two dimensions, is not
            floating point, or holds a negative or not finite value.

    Examples::

        >>> maps = torch.zeros(2, 4, 6)
        >>> maps[0, 1, 2] = 9.0  # a speck fades
        >>> maps[1] = 5.0  # a constant stays
        >>> filtered = rank_gaussian_filter(maps)
        >>> filtered.shape
        torch.Size([2, 4, 6])
        >>> round(filtered[0].max().item(), 2), filtered[1].unique()
        (0.74, tensor([5.]))
    """
    if size < 1 or size % 2 == 0:
        raise ValueError(f"size must be odd and positive, but it is {size}.")
    _check_maps(maps, None, "... x H x W")
    height, width = maps.shape[-2:]
    if height == 0 or width == 0:
        raise ValueError(f"maps must have cells, but their shape is {tuple(maps.shape)}.")

    flat = maps.reshape(-1, height, width).to(torch.promote_types(maps.dtype, torch.float32))
    rows = _reflected(height, size // 2, maps.device)
    columns = _reflected(width, size // 2, maps.device)
    part = max(1, _WINDOW_VALUES // (height * width * size**2))
    filtered = [_filter_padded(some[:, rows[:, None], columns], size) for some in torch.split(flat, part)]
    return torch.cat(filtered).reshape(maps.shape).to(maps.dtype)


def token_activation_map(
    maps: Tensor,
    text_activation: Tensor,
    same_token: Tensor,
    grid: Sequence[int] | None = None,
    filter: bool = True,
) -> Tensor:
    r"""Token Activation Maps of all text tokens: causal inference, then the rank Gaussian filter.

    Args:

        maps (Tensor): Non-negative visual maps of all text tokens in sequence order. Shape: T x V with ``grid``, or
                    T x ... x H x W.
        text_activation (Tensor): See :func:`estimated_causal_inference`. Shape: T x T.
        same_token (Tensor): See :func:`estimated_causal_inference`. Boolean, shape: T x T.
        grid (Sequence[int], optional): Layout (..., H, W) of the V visual tokens, row by row; leading entries, such as
                    the frames of a video, are filtered apart. Needed to filter maps of shape T x V; never guessed.
                    Default: ``None``
        filter (bool): Whether to filter; causal inference alone needs no grid. Default: ``True``

    Returns:
        **maps** (*Tensor*):
            One non-negative map for each text token, with the shape, dtype and device of ``maps``.

    Raises:
        ValueError: If ``grid`` is missing or does not hold V cells, or as in the two steps.

    Examples::

        >>> tokens, grid = 5, (3, 4)
        >>> maps = torch.rand(tokens, 12)
        >>> activation = torch.rand(tokens, tokens)
        >>> same = torch.eye(tokens, dtype=torch.bool)
        >>> token_activation_map(maps, activation, same, grid).shape
        torch.Size([5, 12])
        >>> token_activation_map(maps.reshape(tokens, *grid), activation, same).shape
        torch.Size([5, 3, 4])
    """
    _check_maps(maps, None, "T x V or T x ... x H x W")
    layout = tuple(maps.shape[1:]) if grid is None else tuple(grid)
    if filter and len(layout) < 2:
        raise ValueError(
            f"The filter needs the grid of the {maps.shape[1]} visual tokens: pass grid=(H, W), maps of shape "
            f"T x H x W, or filter=False."
        )
    cells = prod(maps.shape[1:])
    if prod(layout) != cells:
        raise ValueError(f"grid {layout} has {prod(layout)} cells, but the maps have {cells}.")

    # Half precision is rounded once, at the end.
    exact = maps.to(torch.promote_types(maps.dtype, torch.float32))
    result = estimated_causal_inference(exact.reshape(maps.shape[0], cells), text_activation, same_token)
    if filter:
        result = rank_gaussian_filter(result.reshape(maps.shape[0], *layout))
    return result.reshape(maps.shape).to(maps.dtype)


def _check_maps(maps: Tensor, dimensions: int | None, layout: str) -> None:
    if maps.dim() < 2 or (dimensions is not None and maps.dim() != dimensions):
        raise ValueError(f"maps must be {layout}, but their shape is {tuple(maps.shape)}.")
    if not maps.is_floating_point():
        raise ValueError(f"maps must be floating point, but their dtype is {maps.dtype}.")
    _check_values("maps", maps)


def _check_values(name: str, values: Tensor) -> None:
    wrong = ~(torch.isfinite(values) & (values >= 0))
    if wrong.any():
        example = values[wrong][0].item()
        raise ValueError(
            f"{name} must be finite and non-negative, but {int(wrong.sum())} of {values.numel()} values are not, "
            f"the first is {example}."
        )


def _divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    positive = denominator > 0
    return torch.where(positive, numerator / denominator.where(positive, 1), 0)


def _reflected(length: int, padding: int, device: torch.device) -> Tensor:
    period = max(2 * (length - 1), 1)
    index = torch.arange(-padding, length + padding, device=device) % period
    return torch.minimum(index, period - index) if length > 1 else index


def _filter_padded(padded: Tensor, size: int) -> Tensor:
    values = padded.unfold(-2, size, 1).unfold(-2, size, 1).flatten(-2).sort(-1).values
    tiny = torch.finfo(values.dtype).tiny
    mean = values.mean(-1, keepdim=True)
    # Dividing by the mean before squaring keeps very small maps from underflowing.
    variance = ((values - mean) / mean.clamp_min(tiny)).square().mean(-1, keepdim=True)
    distance = torch.arange(size**2, dtype=values.dtype, device=values.device) - size**2 // 2
    # At variance 0 the exponent is 0 at the center and -inf elsewhere: the center alone has a weight.
    weights = torch.exp(-distance.square() / (2 * variance.clamp_min(tiny)))
    return (weights * values).sum(-1) / weights.sum(-1)
