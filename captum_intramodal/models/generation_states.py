r"""What decoder layers and head compute while a model generates, captured so that nothing is read twice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from captum_intramodal.models.hooks import first_tensor, hidden_rows
from captum_intramodal.models.logit_lens import LogitLens
from captum_intramodal.models.ranking import Rankings

__all__ = ["StepRankings", "StepStates"]


class StepStates:
    r"""
    Hidden states of decoder layers, collected while a model generates: at some positions of the prompts, which its
    first pass reads, and at each generated token that it reads afterwards, one in each pass. So the answer need not be
    read again.

    Args:

        layers (Sequence[torch.nn.Module]): Layers to read.
        columns (Sequence[Tensor]): For each example of a left-padded batch the positions of the prompt to keep, padding
                    included, int64.
        length (int): Length of the prompts, padding included.

    Examples::

        >>> states = StepStates(layers, [torch.arange(12)], 12)
        >>> with states.recorded():
        ...     output = model.generate(**inputs, return_dict_in_generate=True)
        >>> generated = output.sequences.shape[1] - 12
        >>> states.of(0, generated - 1)[layers[0]].shape        # the last token is not read any more
        torch.Size([12 + generated - 1, D])
    """

    def __init__(self, layers: Sequence[nn.Module], columns: Sequence[Tensor], length: int) -> None:
        self.layers = list(dict.fromkeys(layers))
        self.columns = columns
        self.length = length
        self._passes: dict[nn.Module, list[list[Tensor]]] = {layer: [] for layer in self.layers}
        self._read = dict.fromkeys(self.layers, 0)
        self._regular = True

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Collects the states while the body of the ``with`` statement generates."""
        handles = [layer.register_forward_hook(self._record) for layer in self.layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _record(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        hidden, batch = first_tensor(output), len(self.columns)
        each = [hidden_rows(hidden, row, batch) for row in range(batch)]
        count, before = len(each[0]), self._read[layer]
        if before == 0:
            # Visual tokens may stand before the prompt.
            offset = count - self.length
            self._regular &= offset >= 0
            kept = [rows[(offset + c).clamp_min(0).to(rows.device)] for rows, c in zip(each, self.columns, strict=True)]
        else:
            # Without a cache the model reads all again.
            self._regular &= count in (1, before + 1)
            kept = [rows[-1:].clone() for rows in each]
        self._read[layer] = before + 1 if before else count
        self._passes[layer].append(kept)

    def complete(self, generated: int) -> bool:
        """Whether the model generated so many tokens by reading the prompt, and then each of them but the last."""
        return self._regular and all(len(passes) == generated for passes in self._passes.values())

    def of(self, row: int, read: int) -> dict[nn.Module, Tensor]:
        """By layer an example's states at its kept positions of the prompt and at so many generated tokens, (N, D)."""
        return {layer: torch.cat([p[row] for p in passes[: read + 1]]) for layer, passes in self._passes.items()}


class StepRankings:
    r"""
    Rankings by the logits that a model computes anyway while it generates, so that the vocabulary need not be read
    again: at the prompts' last position, and at each generated token that is read afterwards, one in each pass.

    Args:

        lens (LogitLens): The model's lens, which must be able to: :attr:`LogitLens.ranks_as_generated`.
        k (int): Length of the rankings.

    Examples::

        >>> rankings = StepRankings(lens, 50)
        >>> with rankings.recorded():
        ...     output = model.generate(**inputs, return_dict_in_generate=True)
        >>> generated = output.sequences.shape[1] - inputs["input_ids"].shape[1]
        >>> rankings.complete(generated)
        True
        >>> rankings.of(0, generated - 1).ids.shape        # the last token is not read any more
        torch.Size([generated, 50])
    """

    def __init__(self, lens: LogitLens, k: int) -> None:
        self.lens, self.k = lens, k
        self._passes: list[Rankings] = []
        self._regular = True

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Collects the rankings while the body of the ``with`` statement generates."""
        with cast(nn.Module, self.lens.head).register_forward_hook(self._record):
            yield

    @torch.no_grad()
    def _record(self, head: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        # Under autocast it says something less precise.
        self._regular &= output.dtype == torch.float32 and output.ndim == 3
        if self._regular:
            self._passes.append(self.lens.rank_logits(output[:, -1], self.k))

    def complete(self, generated: int) -> bool:
        """Whether the head ran once for each of so many generated tokens."""
        return self._regular and len(self._passes) == generated

    def of(self, row: int, read: int) -> Rankings:
        """An example's rankings at its prompt's last position and at so many generated tokens."""
        ids, normalizers = zip(*((p.ids[row], p.log_normalizer[row]) for p in self._passes[: read + 1]), strict=True)
        return Rankings(torch.stack(ids), torch.stack(normalizers))
