r"""Hidden states and rankings captured while a model generates, so that the answer needs no second pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from captum_intramodal.models.hooks import register_hooks
from captum_intramodal.models.layer_io import first_tensor, hidden_rows
from captum_intramodal.models.logit_lens import LogitLens
from captum_intramodal.models.ranking import Rankings

__all__ = ["StepRankings", "StepStates"]


class StepStates:
    r"""
    Hidden states of decoder layers, captured during generation.

    The first pass processes the prompts, of which some positions are kept; each later pass processes one generated
    token.

    Args:

        layers (Sequence[torch.nn.Module]): Layers to capture.
        columns (Sequence[Tensor]): For each example of a left-padded batch, the positions of the prompt to keep,
                    counted with the padding, int64.
        length (int): Length of the prompts, padding included.

    Examples::

        >>> from captum_intramodal.models.generation_states import StepStates
        >>> inputs = adapter.prepare([image], "describe the picture.")
        >>> layer, length = adapter.lens.layers[-1], inputs["input_ids"].shape[1]
        >>> states = StepStates([layer], [torch.arange(length)], length)
        >>> with states.recording():
        ...     generated = model.generate(**inputs, max_new_tokens=4).shape[1] - length
        >>> states.is_complete(generated)
        True
        >>> len(states.states_for(0, generated - 1)[layer]) == length + generated - 1
        True
    """

    def __init__(self, layers: Sequence[nn.Module], columns: Sequence[Tensor], length: int) -> None:
        self.layers = list(dict.fromkeys(layers))
        self.columns = columns
        self.length = length
        self._passes: dict[nn.Module, list[list[Tensor]]] = {layer: [] for layer in self.layers}
        self._processed = dict.fromkeys(self.layers, 0)
        self._regular = True

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Capture the states while the ``with`` block generates."""
        with register_hooks(self.layers, self._record):
            yield

    def _record(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Keep one pass's states of a layer: at the chosen positions of the prompts, or at the newest token."""
        hidden, batch = first_tensor(output), len(self.columns)
        examples = [hidden_rows(hidden, row, batch) for row in range(batch)]
        count, before = len(examples[0]), self._processed[layer]
        if before == 0:
            # Some models put the visual tokens before the prompt.
            offset = count - self.length
            self._regular &= offset >= 0
            kept = [
                rows[(offset + columns).clamp_min(0).to(rows.device)]
                for rows, columns in zip(examples, self.columns, strict=True)
            ]
        else:
            # Without a cache, the model processes the whole sequence again.
            self._regular &= count in (1, before + 1)
            kept = [rows[-1:].clone() for rows in examples]
        self._processed[layer] = before + 1 if before else count
        self._passes[layer].append(kept)

    def is_complete(self, generated: int) -> bool:
        """Return whether all of ``generated`` tokens but the last one were processed, one per pass after the prompt."""
        return self._regular and all(len(passes) == generated for passes in self._passes.values())

    def states_for(self, row: int, processed: int) -> dict[nn.Module, Tensor]:
        """Return one example's states at the kept positions and at ``processed`` generated tokens, by layer (N, D)."""
        return {layer: torch.cat([p[row] for p in passes[: processed + 1]]) for layer, passes in self._passes.items()}


class StepRankings:
    r"""
    Rankings by the logits that a model computes during generation: at the prompts' last position, and at each
    generated token that is processed after it.

    Args:

        lens (LogitLens): The model's lens, whose :attr:`LogitLens.ranks_as_generated` is True.
        k (int): Length of the rankings.

    Examples::

        >>> from captum_intramodal.models.generation_states import StepRankings
        >>> inputs = adapter.prepare([image], "describe the picture.")
        >>> rankings = StepRankings(adapter.lens, k=20)
        >>> with rankings.recording():
        ...     generated = model.generate(**inputs, max_new_tokens=4).shape[1] - inputs["input_ids"].shape[1]
        >>> rankings.is_complete(generated)
        True
        >>> rankings.rankings_for(0, generated - 1).ids.shape == (generated, 20)
        True
    """

    def __init__(self, lens: LogitLens, k: int) -> None:
        self.lens, self.k = lens, k
        self._passes: list[Rankings] = []
        self._regular = True

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Capture the rankings while the ``with`` block generates."""
        with register_hooks([cast(nn.Module, self.lens.head)], self._record):
            yield

    @torch.no_grad()
    def _record(self, head: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """Rank one pass's logits."""
        # Under autocast, the head's logits are less precise than the lens's.
        self._regular &= output.dtype == torch.float32 and output.ndim == 3
        if self._regular:
            self._passes.append(self.lens.rank_logits(output[:, -1], self.k))

    def is_complete(self, generated: int) -> bool:
        """Return whether the head ran once for each of ``generated`` tokens."""
        return self._regular and len(self._passes) == generated

    def rankings_for(self, row: int, processed: int) -> Rankings:
        """Return one example's rankings at its prompt's last position and at ``processed`` generated tokens."""
        passes = self._passes[: processed + 1]
        ids, normalizers = zip(*((p.ids[row], p.log_normalizer[row]) for p in passes), strict=True)
        return Rankings(torch.stack(ids), torch.stack(normalizers))
