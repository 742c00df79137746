from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from captum_intramodal.functional import tam
from captum_intramodal.functional.tam import estimated_causal_inference, rank_gaussian_filter, token_activation_map


def random_answer(
    tokens: int, cells: int, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(tokens, cells, generator=generator, dtype=dtype).clamp_min(0)
    activation = torch.randn(tokens, tokens, generator=generator, dtype=dtype).clamp_min(0)
    words = torch.randint(0, max(tokens // 2, 1), (tokens,), generator=generator)
    return maps, activation, words[:, None] == words


def literal_causal_inference(
    maps: list[list[float]], activation: list[list[float]], same: list[list[bool]], least_squares: bool
) -> list[list[float]]:
    """The definition, with loops."""
    result = []
    for t in range(len(maps)):
        cells = range(len(maps[t]))
        numerator, denominator = [0.0 for _ in cells], 0.0
        for j in range(t):
            if same[t][j]:
                continue
            denominator += activation[t][j]
            for v in cells:
                numerator[v] += activation[t][j] * maps[j][v]
        if denominator == 0:
            result.append(list(maps[t]))
            continue
        interference = [value / denominator for value in numerator]
        square = sum(value * value for value in interference)
        if square == 0:
            result.append(list(maps[t]))
            continue
        scale = sum(maps[t][v] * interference[v] for v in cells) / square if least_squares else 1.0
        result.append([max(0.0, maps[t][v] - scale * interference[v]) for v in cells])
    return result


def literal_filter(image: list[list[float]], size: int) -> list[list[float]]:
    """The definition, with loops."""
    height, width, half = len(image), len(image[0]), size // 2

    def mirror(position: int, length: int) -> int:
        while not 0 <= position < length:
            if length == 1:
                return 0
            position = -position if position < 0 else 2 * (length - 1) - position
        return position

    result = [[0.0] * width for _ in range(height)]
    for row in range(height):
        for column in range(width):
            window = sorted(
                image[mirror(row + down, height)][mirror(column + right, width)]
                for down in range(-half, half + 1)
                for right in range(-half, half + 1)
            )
            mean = sum(window) / len(window)
            std = math.sqrt(sum((value - mean) ** 2 for value in window) / len(window))
            sigma = std / mean if mean else 0.0
            if window[0] == window[-1] or sigma == 0:
                result[row][column] = window[len(window) // 2]
                continue
            weights = [math.exp(-((k - len(window) // 2) ** 2) / (2 * sigma**2)) for k in range(len(window))]
            result[row][column] = sum(w * x for w, x in zip(weights, window, strict=True)) / sum(weights)
    return result


@pytest.mark.parametrize("least_squares", [True, False])
@pytest.mark.parametrize(("tokens", "cells"), [(1, 4), (2, 1), (7, 12), (20, 35)])
def test_causal_inference_equals_loops(tokens: int, cells: int, least_squares: bool) -> None:
    maps, activation, same = random_answer(tokens, cells)
    expected = literal_causal_inference(maps.tolist(), activation.tolist(), same.tolist(), least_squares)
    result = estimated_causal_inference(maps, activation, same, least_squares)
    torch.testing.assert_close(result, torch.tensor(expected, dtype=torch.float64))
    # A token is never its own context, whatever the diagonal is.
    unset = same & ~torch.eye(tokens, dtype=torch.bool)
    assert torch.equal(estimated_causal_inference(maps, activation, unset, least_squares), result)


def test_causal_inference_by_hand() -> None:
    maps = torch.tensor([[1.0, 0.0], [0.0, 1.0], [4.0, 2.0]])
    activation = torch.tensor([[0.0, 0, 0], [0, 0, 0], [3, 1, 0]])
    different = torch.eye(3, dtype=torch.bool)
    # E = (3/4, 1/4), s = (4 * 3/4 + 2 * 1/4) / (10/16) = 5.6: (4, 2) - (4.2, 1.4)
    torch.testing.assert_close(
        estimated_causal_inference(maps, activation, different)[2], torch.tensor([0.0, 0.6]), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(
        estimated_causal_inference(maps, activation, different, least_squares=False)[2], torch.tensor([3.25, 1.75])
    )


def test_the_scale_minimizes_the_squared_error() -> None:
    maps, activation, _ = random_answer(6, 30)
    context = activation[5, :5] @ maps[:5] / activation[5, :5].sum()
    scales = torch.linspace(0, 3, 30001, dtype=torch.float64)
    errors = (maps[5] - scales[:, None] * context).square().sum(1)
    best = scales[errors.argmin()]
    result = estimated_causal_inference(maps, activation, torch.eye(6, dtype=torch.bool))[5]
    torch.testing.assert_close(result, (maps[5] - best * context).clamp_min(0), atol=1e-3, rtol=0)


def test_a_map_that_its_context_explains_vanishes() -> None:
    maps = torch.rand(1, 20, dtype=torch.float64)
    maps = torch.cat([maps, 7 * maps])
    result = estimated_causal_inference(maps, torch.ones(2, 2), torch.eye(2, dtype=torch.bool))
    torch.testing.assert_close(result[1], torch.zeros(20, dtype=torch.float64))


def test_maps_without_interference_are_unchanged() -> None:
    maps, activation, same = random_answer(5, 8)
    everything = torch.ones(5, 5, dtype=torch.bool)
    assert torch.equal(estimated_causal_inference(maps, activation, everything), maps)
    assert torch.equal(estimated_causal_inference(maps, torch.zeros(5, 5), same), maps)
    assert torch.equal(estimated_causal_inference(maps, activation, same)[0], maps[0])
    context_of_zeros = torch.cat([torch.zeros_like(maps[:4]), maps[4:]])
    assert torch.equal(estimated_causal_inference(context_of_zeros, activation, same), context_of_zeros)
    assert estimated_causal_inference(maps[:0], activation[:0, :0], same[:0, :0]).shape == (0, 8)


def test_only_earlier_tokens_with_another_string_count() -> None:
    maps, activation, same = random_answer(8, 10)
    expected = estimated_causal_inference(maps, activation, same)
    noisy = activation.clone()
    noisy[torch.ones(8, 8, dtype=torch.bool).triu()] = math.nan
    noisy[same] = -math.inf
    assert torch.equal(estimated_causal_inference(maps, noisy, same), expected)
    later = maps.clone()
    later[5:] = 100
    assert torch.equal(estimated_causal_inference(later, activation, same)[:5], expected[:5])


def test_causal_inference_is_equivariant_to_scaling() -> None:
    maps, activation, same = random_answer(9, 16)
    expected = estimated_causal_inference(maps, activation, same)
    torch.testing.assert_close(estimated_causal_inference(maps * 37, activation, same), expected * 37)
    rows = torch.rand(9, 1, dtype=torch.float64) + 0.5
    torch.testing.assert_close(estimated_causal_inference(maps, activation * rows, same), expected)


@pytest.mark.parametrize("size", [1, 3, 5])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 5), (4, 1), (2, 2), (2, 7), (3, 3), (7, 4), (9, 12)])
def test_filter_equals_loops(height: int, width: int, size: int) -> None:
    maps = torch.randn(2, height, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64).clamp_min(0)
    expected = torch.tensor([literal_filter(image, size) for image in maps.tolist()], dtype=torch.float64)
    torch.testing.assert_close(rank_gaussian_filter(maps, size), expected)
    single = rank_gaussian_filter(maps.float(), size)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single, expected.float(), atol=1e-6, rtol=1e-5)


def test_filter_by_hand() -> None:
    # Reflected, each window of the single row holds its three values three times: 0 0 0 3 3 3 6 6 6 in the middle.
    row = torch.tensor([[0.0, 3.0, 6.0]], dtype=torch.float64)
    sigma = math.sqrt(6) / 3
    weights = [math.exp(-(d**2) / (2 * sigma**2)) for d in range(-4, 5)]
    expected = (3 * sum(weights[3:6]) + 6 * sum(weights[6:])) / sum(weights)
    assert rank_gaussian_filter(row)[0, 1].item() == pytest.approx(expected)
    assert expected == pytest.approx(3.0)


@pytest.mark.parametrize(("padding", "length"), [(1, 1), (1, 2), (2, 2), (3, 2), (2, 3), (5, 3), (3, 10)])
def test_reflection_equals_numpy_pad(padding: int, length: int) -> None:
    expected = np.pad(np.arange(length), padding, mode="reflect")
    assert tam._reflected_indices(length, padding, torch.device("cpu")).tolist() == expected.tolist()


@pytest.mark.parametrize("value", [0.0, 1e-30, 0.1, 1 / 3, 5.0, 1e30])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_constant_windows_keep_their_value(value: float, dtype: torch.dtype) -> None:
    value = min(value, 1000.0) if dtype == torch.float16 else value
    maps = torch.full((3, 4, 5), value, dtype=dtype)
    assert torch.equal(rank_gaussian_filter(maps), maps)
    edge = torch.zeros(6, 6, dtype=dtype)
    edge[:, 3:] = value
    result = rank_gaussian_filter(edge)
    assert result.isfinite().all()
    assert torch.equal(result[:, [0, 1, 4, 5]], edge[:, [0, 1, 4, 5]])


def test_filter_commutes_with_scaling_transposition_and_flips() -> None:
    maps = torch.rand(2, 3, 8, 6, generator=torch.Generator().manual_seed(2))
    result = rank_gaussian_filter(maps)
    torch.testing.assert_close(rank_gaussian_filter(maps * 1e-25), result * 1e-25, atol=0, rtol=1e-4)
    torch.testing.assert_close(rank_gaussian_filter(maps.mT), result.mT)
    torch.testing.assert_close(rank_gaussian_filter(maps.flip(-1)), result.flip(-1))
    torch.testing.assert_close(rank_gaussian_filter(maps[1, 2]), result[1, 2])
    assert result.min() >= maps.min()
    assert result.max() <= maps.max()
    assert rank_gaussian_filter(maps[:0]).shape == (0, 3, 8, 6)


def test_filter_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    maps = torch.rand(7, 4, 5)
    expected = rank_gaussian_filter(maps)
    for limit in (1, 2 * 4 * 5 * 9):
        monkeypatch.setattr(tam, "_WINDOW_VALUES", limit)
        assert torch.equal(rank_gaussian_filter(maps), expected)


def test_the_two_steps_are_composed() -> None:
    maps, activation, same = random_answer(6, 20)
    corrected = estimated_causal_inference(maps, activation, same)
    expected = torch.tensor([literal_filter(image, 3) for image in corrected.reshape(6, 4, 5).tolist()])
    result = token_activation_map(maps, activation, same, (4, 5))
    torch.testing.assert_close(result, expected.double().flatten(1), check_dtype=False)
    torch.testing.assert_close(
        token_activation_map(maps.reshape(6, 4, 5), activation, same), result.reshape(6, 4, 5), atol=0, rtol=0
    )
    assert torch.equal(token_activation_map(maps, activation, same, filter=False), corrected)
    frames = token_activation_map(maps, activation, same, (2, 2, 5))
    torch.testing.assert_close(frames.reshape(6, 2, 2, 5), rank_gaussian_filter(corrected.reshape(6, 2, 2, 5)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_accumulated_in_float32(dtype: torch.dtype) -> None:
    maps, activation, same = random_answer(40, 30)
    maps, activation = maps.to(dtype), activation.to(dtype)
    result = token_activation_map(maps, activation, same, (5, 6))
    assert result.dtype == dtype
    assert torch.equal(result, token_activation_map(maps.float(), activation.float(), same, (5, 6)).to(dtype))


def test_causal_inference_errors() -> None:
    maps, activation, same = random_answer(3, 4)
    with pytest.raises(ValueError, match=r"maps must be T x V.*\(3, 2, 2\)"):
        estimated_causal_inference(maps.reshape(3, 2, 2), activation, same)
    with pytest.raises(ValueError, match=r"text_activation must be 3 x 3.*\(2, 3\)"):
        estimated_causal_inference(maps, activation[:2], same)
    with pytest.raises(ValueError, match=r"same_token must be 3 x 3.*\(3,\)"):
        estimated_causal_inference(maps, activation, same[0])
    with pytest.raises(ValueError, match=r"boolean.*int64"):
        estimated_causal_inference(maps, activation, same.long())
    with pytest.raises(ValueError, match=r"maps must be finite and non-negative, but 12 of 12.*-1"):
        estimated_causal_inference(torch.full((3, 4), -1.0), activation, same)
    with pytest.raises(ValueError, match=r"text_activation must be finite.*3 of 9.*nan"):
        estimated_causal_inference(maps, torch.full((3, 3), math.nan), torch.eye(3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"floating point.*int64"):
        estimated_causal_inference(maps.long(), activation, same)


def test_filter_errors() -> None:
    maps = torch.rand(4, 4)
    for size in (0, 2, -1):
        with pytest.raises(ValueError, match=f"odd and positive, but it is {size}"):
            rank_gaussian_filter(maps, size)
    with pytest.raises(ValueError, match=r"\(4,\)"):
        rank_gaussian_filter(maps[0])
    with pytest.raises(ValueError, match=r"cells.*\(4, 0\)"):
        rank_gaussian_filter(maps[:, :0])
    with pytest.raises(ValueError, match=r"1 of 16.*nan"):
        rank_gaussian_filter(maps.index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(math.nan)))


def test_grid_errors() -> None:
    maps, activation, same = random_answer(3, 6)
    with pytest.raises(ValueError, match="grid of the 6 visual tokens"):
        token_activation_map(maps, activation, same)
    with pytest.raises(ValueError, match=r"grid \(2, 2\) has 4 cells, but the maps have 6"):
        token_activation_map(maps, activation, same, (2, 2))
