r"""Token Activation Map (TAM): Li et al., "Token Activation Map to Visually Explain Multimodal LLMs", ICCV 2025.

Implemented from the method's definition, for all tokens of an answer at once. The map of text token :math:`t` with id
:math:`c_t` is the clipped logit lens :math:`A_t(v) = \max(0, h_v \cdot w_{c_t})`. TAM subtracts the part that earlier
text tokens explain (:func:`estimated_causal_inference`) and denoises the result (:func:`rank_gaussian_filter`).

Omitted on purpose: TAM's reference evaluation rescales each token's scores over image and text jointly to [0, 1], which
makes a visual map depend on the text scores. Here, maps stay in units of logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from captum_intramodal.errors import InvalidInputError, InvalidOptionError
from captum_intramodal.functional.suppression import suppress_interference

__all__ = ["estimated_causal_inference", "rank_gaussian_filter", "token_activation_map"]

# Windows hold size * size copies of the maps; maps are filtered in chunks of about this many values.
_WINDOW_VALUES = 2**24


def estimated_causal_inference(
    maps: Tensor, text_activation: Tensor, same_token: Tensor, least_squares: bool = True
) -> Tensor:
    r"""
    Subtract the interference of the context from each token's map (TAM's first step, "ECI").

    With :math:`A_t` the map of text token :math:`t`, :math:`r_t(j)` its activation at the earlier text position
    :math:`j`, and the context :math:`C_t` of all :math:`j < t` whose string differs from that of :math:`t`:

    .. math::
        E_t = \frac{\sum_{j \in C_t} r_t(j) A_j}{\sum_{j \in C_t} r_t(j)}, \qquad
        s_t = \arg\min_s \lVert A_t - s E_t \rVert^2 = \frac{\langle A_t, E_t \rangle}{\langle E_t, E_t \rangle},
        \qquad \hat A_t = \max(0, A_t - s_t E_t)

    The maps of the context are the uncorrected ones, so one matrix product serves all tokens. A token keeps its map if
    it has no context, no activation at its context, or only zero maps in its context.

    Source: Li et al., "Token Activation Map to Visually Explain Multimodal LLMs", ICCV 2025.

    Args:

        maps (Tensor): Non-negative visual maps of all text tokens, of the prompt and of the answer, in sequence order.
                    Shape: T x V, floating point.
        text_activation (Tensor): :math:`r_t(j) = \max(0, h_j \cdot w_{c_t})` in row t and column j, non-negative below
                    the diagonal; other values are not used. Shape: T x T.
        same_token (Tensor): True in row t and column j if the strings of the tokens t and j are equal. Boolean,
                    shape: T x T.
        least_squares (bool, optional): Whether to scale the interference by :math:`s_t`; otherwise :math:`s_t = 1`.
                    Default: True

    Returns:
        **maps** (*Tensor*): the corrected, non-negative maps, with the shape, dtype and device of ``maps``. Sums are
        accumulated in float32, or in float64 if an input has it.

    Raises:
        InvalidInputError: shapes or dtypes do not fit, or a value that is used is negative or not finite.

    Examples::

        >>> from captum_intramodal.functional.tam import estimated_causal_inference
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
            raise InvalidInputError(
                f"{name} must be {tokens} x {tokens} for {tokens} maps, but its shape is {tuple(matrix.shape)}."
            )
    if same_token.dtype != torch.bool:
        raise InvalidInputError(f"same_token must be boolean, but its dtype is {same_token.dtype}.")

    dtype = torch.promote_types(torch.promote_types(maps.dtype, text_activation.dtype), torch.float32)
    raw = maps.to(dtype)
    # A mask, not a product: values above the diagonal may be infinite or NaN.
    earlier = torch.ones_like(same_token).tril(-1)
    weights = text_activation.to(dtype).masked_fill(~earlier | same_token, 0)
    _check_values("text_activation", weights)

    return suppress_interference(raw, weights, least_squares).to(maps.dtype)


def rank_gaussian_filter(maps: Tensor, size: int = 3) -> Tensor:
    r"""
    Denoise maps with a Gaussian over the ranks of each window (TAM's second step, "RGF").

    The :math:`n = size^2` values of the window around a cell are sorted, :math:`x_0 \le \dots \le x_{n-1}`, and
    averaged with weights that fall with the distance from the median and adapt to the window's spread:

    .. math::
        \hat x = \frac{\sum_k g_k x_k}{\sum_k g_k}, \qquad g_k = \exp\left(-\frac{(k - c)^2}{2 \sigma^2}\right), \qquad
        c = \frac{n - 1}{2}, \qquad \sigma = \frac{\mathrm{std}(x)}{\mathrm{mean}(x)}

    The standard deviation is that of the population (divided by n), as :math:`\sigma` describes these n values and
    estimates nothing from them. If :math:`\sigma` is 0, which it is in a constant window, only the median has a weight:
    the limit of the formula, by which a constant window keeps its value.

    Borders are reflected without repeating the edge, as by ``numpy.pad(mode="reflect")``, also if the padding is larger
    than the map: the reflection continues back and forth, and an axis of length 1 repeats its value.

    Source: Li et al., "Token Activation Map to Visually Explain Multimodal LLMs", ICCV 2025.

    Args:

        maps (Tensor): Non-negative maps. Shape: ... x H x W, floating point; any H, W of 1 or more.
        size (int, optional): Odd side of the window.
                    Default: 3

    Returns:
        **maps** (*Tensor*): the filtered maps, with the shape, dtype and device of ``maps``; every value lies between
        the smallest and the largest of its window. Computed in float32, or in float64 if ``maps`` has it.

    Raises:
        InvalidOptionError: ``size`` is not odd and positive.
        InvalidInputError: ``maps`` has no cells or fewer than two dimensions, is not floating point, or has a negative
            or non-finite value.

    Examples::

        >>> from captum_intramodal.functional.tam import rank_gaussian_filter
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
        raise InvalidOptionError(f"size must be odd and positive, but it is {size}.")
    _check_maps(maps, None, "... x H x W")
    height, width = maps.shape[-2:]
    if height == 0 or width == 0:
        raise InvalidInputError(f"maps must have cells, but their shape is {tuple(maps.shape)}.")

    flat = maps.reshape(-1, height, width).to(torch.promote_types(maps.dtype, torch.float32))
    rows = _reflected_indices(height, size // 2, maps.device)
    columns = _reflected_indices(width, size // 2, maps.device)
    count = max(1, _WINDOW_VALUES // (height * width * size**2))
    filtered = [_filter_padded(chunk[:, rows[:, None], columns], size) for chunk in flat.split(count)]
    return torch.cat(filtered).reshape(maps.shape).to(maps.dtype)


def token_activation_map(
    maps: Tensor,
    text_activation: Tensor,
    same_token: Tensor,
    grid: Sequence[int] | None = None,
    filter: bool = True,
) -> Tensor:
    r"""
    Compute the Token Activation Maps of all text tokens: causal inference, then the rank Gaussian filter.

    Source: Li et al., "Token Activation Map to Visually Explain Multimodal LLMs", ICCV 2025.

    Args:

        maps (Tensor): Non-negative visual maps of all text tokens in sequence order. Shape: T x V with ``grid``, or
                    T x ... x H x W.
        text_activation (Tensor): See :func:`estimated_causal_inference`. Shape: T x T.
        same_token (Tensor): See :func:`estimated_causal_inference`. Boolean, shape: T x T.
        grid (Sequence[int], optional): Layout (..., H, W) of the V visual tokens, row by row; leading entries, such as
                    the frames of a video, are filtered separately. Required to filter maps of shape T x V.
                    Default: None, the shape of the maps.
        filter (bool, optional): Whether to filter; causal inference alone needs no grid.
                    Default: True

    Returns:
        **maps** (*Tensor*): one non-negative map for each text token, with the shape, dtype and device of ``maps``.

    Raises:
        InvalidOptionError: ``grid`` is missing, or does not have V cells.
        InvalidInputError: as in the two steps.

    Examples::

        >>> from captum_intramodal.functional.tam import token_activation_map
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
        raise InvalidOptionError(
            f"The filter needs the grid of the {maps.shape[1]} visual tokens: pass grid=(H, W), maps of shape "
            f"T x H x W, or filter=False."
        )
    cells = prod(maps.shape[1:])
    if prod(layout) != cells:
        raise InvalidOptionError(f"grid {layout} has {prod(layout)} cells, but the maps have {cells}.")

    # Round half precision only once, at the end.
    exact = maps.to(torch.promote_types(maps.dtype, torch.float32))
    result = estimated_causal_inference(exact.reshape(maps.shape[0], cells), text_activation, same_token)
    if filter:
        result = rank_gaussian_filter(result.reshape(maps.shape[0], *layout))
    return result.reshape(maps.shape).to(maps.dtype)


def _check_maps(maps: Tensor, dimensions: int | None, layout: str) -> None:
    """Check the number of dimensions (None: at least 2), the dtype and the values of maps."""
    if maps.dim() < 2 or (dimensions is not None and maps.dim() != dimensions):
        raise InvalidInputError(f"maps must be {layout}, but their shape is {tuple(maps.shape)}.")
    if not maps.is_floating_point():
        raise InvalidInputError(f"maps must be floating point, but their dtype is {maps.dtype}.")
    _check_values("maps", maps)


def _check_values(name: str, values: Tensor) -> None:
    """Check that all values are finite and non-negative."""
    invalid = ~(torch.isfinite(values) & (values >= 0))
    if invalid.any():
        raise InvalidInputError(
            f"{name} must be finite and non-negative, but {int(invalid.sum())} of {values.numel()} values are not, "
            f"the first is {values[invalid][0].item()}."
        )


def _reflected_indices(length: int, padding: int, device: torch.device) -> Tensor:
    """Return the indices of an axis that is padded at both ends by reflection, int64 (length + 2 padding,)."""
    period = max(2 * (length - 1), 1)
    index = torch.arange(-padding, length + padding, device=device) % period
    return torch.minimum(index, period - index) if length > 1 else index


def _filter_padded(padded: Tensor, size: int) -> Tensor:
    """Filter the windows of padded maps, (N, H + size - 1, W + size - 1) -> (N, H, W)."""
    values = padded.unfold(-2, size, 1).unfold(-2, size, 1).flatten(-2).sort(-1).values
    tiny = torch.finfo(values.dtype).tiny
    mean = values.mean(-1, keepdim=True)
    # Dividing by the mean before squaring keeps very small maps from underflowing.
    variance = ((values - mean) / mean.clamp_min(tiny)).square().mean(-1, keepdim=True)
    distance = torch.arange(size**2, dtype=values.dtype, device=values.device) - size**2 // 2
    # At variance 0 the exponent is 0 at the center and -inf elsewhere: the center alone has a weight.
    weights = torch.exp(-distance.square() / (2 * variance.clamp_min(tiny)))
    return (weights * values).sum(-1) / weights.sum(-1)
