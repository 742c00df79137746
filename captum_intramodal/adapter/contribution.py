r"""How much does each token, visual or textual, contribute directly to the logits of an answer's tokens?"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from captum_intramodal.adapter.encoding import Encoding
from captum_intramodal.adapter.model_adapter import ModelAdapter
from captum_intramodal.errors import InvalidOptionError
from captum_intramodal.geometry.decoder_inputs import visual_rows
from captum_intramodal.models import direct_contribution as model_contribution
from captum_intramodal.models.decoder import decoder_layers

__all__ = ["direct_contribution", "position_contribution"]


def direct_contribution(
    adapter: ModelAdapter,
    encoding: Encoding,
    positions: Tensor,
    argument: str | None = None,
    layer: int | None = None,
) -> Tensor:
    r"""
    Compute the direct contributions of visual tokens to the logits of text tokens, in one teacher-forced pass.

    Args:

        adapter (ModelAdapter): The model.
        encoding (Encoding): Prompt and answer.
        positions (Tensor): Positions of the text tokens, int64 (T,). The token at position 0 is not predicted: its
                    contributions are 0.
        argument (str, optional): The argument of the decoder's blocks that holds the visual tokens, as in
                    :class:`~captum_intramodal.geometry.TokenGeometry`.
                    Default: None, placeholders in the decoder's sequence
        layer (int, optional): The decoder layer whose attention is counted.
                    Default: None, the sum over all layers

    Returns:
        **contributions** (*Tensor*):
            logits, float32 (T, V), of either sign, on the CPU.

    Raises:
        InvalidOptionError: the layer does not exist.
        UnsupportedModelError: the model's logits are not a sum of contributions.

    Examples::

        >>> from captum_intramodal.adapter.contribution import direct_contribution
        >>> inputs, answer = adapter.prepare([image], "describe the picture."), adapter.tokenize_answer("a dog.")
        >>> encoding = adapter.encode(inputs, answer)
        >>> positions = torch.arange(encoding.prompt_length, len(encoding.input_ids))
        >>> direct_contribution(adapter, encoding, positions).shape == (len(positions), len(encoding.visual_positions))
        True
    """
    result = _contributions(adapter, encoding, positions, layer)
    if argument is None:
        values = encoding.rows(result.positions.mT).mT
        return values[:, encoding.visual_positions]
    values = result.positions if argument == "hidden_states" else result.states
    rows = visual_rows(adapter.model, encoding.inputs, argument, values.shape[1])
    return values[:, rows.cpu()]


def position_contribution(
    adapter: ModelAdapter, encoding: Encoding, positions: Tensor, layer: int | None = None
) -> Tensor:
    r"""
    Compute the direct contributions of all S tokens of the decoder's sequence, visual and textual, to the logits of
    text tokens.

    Args:

        adapter, encoding, positions, layer: As for :func:`direct_contribution`.

    Returns:
        **contributions** (*Tensor*):
            logits, float32 (T, S), on the CPU; 0 where a token is not before the one it would predict.

    Raises:
        InvalidOptionError: the layer does not exist.
        UnsupportedModelError: the model's logits are not a sum of contributions.

    Examples::

        >>> from captum_intramodal.adapter.contribution import position_contribution
        >>> inputs, answer = adapter.prepare([image], "describe the picture."), adapter.tokenize_answer("a dog.")
        >>> encoding = adapter.encode(inputs, answer)
        >>> last = torch.tensor([len(encoding.input_ids) - 1])
        >>> position_contribution(adapter, encoding, last).shape == (1, len(encoding.input_ids))
        True
    """
    return encoding.rows(_contributions(adapter, encoding, positions, layer).positions.mT).mT


def _contributions(
    adapter: ModelAdapter, encoding: Encoding, positions: Tensor, layer: int | None
) -> model_contribution.DirectContribution:
    """Return contributions on the CPU; those to tokens that nothing predicts are 0."""
    layers: list[nn.Module] | None = None
    if layer is not None:
        known = decoder_layers(adapter.model)
        if not -len(known) <= layer < len(known):
            raise InvalidOptionError(f"Layer {layer} does not exist; the decoder has {len(known)} layers.")
        layers = [known[layer]]
    queries = (positions - 1).clamp_min(0) - len(encoding.input_ids)
    result = model_contribution.direct_contribution(
        adapter.model,
        lambda: adapter.logits(encoding.inputs, queries),
        queries,
        encoding.input_ids[positions],
        torch.full_like(queries, encoding.row),
        lens=adapter.lens,
        layers=layers,
        working_memory=adapter.working_memory,
    )
    if result.unattributed:
        warnings.warn(
            f"{len(result.unattributed)} of {len(result.blocks)} decoder blocks of {type(adapter.model).__name__} have "
            "no softmax attention (linear attention, convolutions, MLPs); what they read from other positions is "
            "missing from the contributions.",
            stacklevel=3,
        )
    return result.scaled((positions > 0).float())
