r"""Logit-lens activations of target tokens as a Captum layer attribution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from captum.attr import LayerAttribution
from torch import Tensor, nn
from transformers import PreTrainedModel

from captum_intramodal._utils.captum import format_additional_forward_args, format_tensor_into_tuples, log_usage
from captum_intramodal.errors import InvalidInputError
from captum_intramodal.models.early_exit import run_layers
from captum_intramodal.models.logit_lens import LogitLens, LogitNormalization

__all__ = ["LayerLogitLens", "find_model"]

Targets = int | tuple[int, ...] | list[int] | list[tuple[int, ...]] | Tensor


class LayerLogitLens(LayerAttribution):
    r"""
    Logit-lens activation of target tokens at every position of the output of decoder layers, the base attribution of
    TAM (Li et al., ICCV 2025) and of arXiv 2509.22415:

    .. math::
        A_c(v) = \max(0, \; g(\mathrm{norm}(h_v) \cdot w_c)).

    One forward pass without gradients serves any number of targets, and ends after the deepest layer needed. The final
    norm is applied exactly once.

    Args:

        forward_func (Callable or torch.nn.Module): The model, or any function that runs it.
        layer (torch.nn.Module or list[torch.nn.Module]): Decoder layers whose output is attributed, such as
                    ``model.get_decoder().layers[-1]``.
        lens (LogitLens, optional): The lens of the model behind ``forward_func``.
                    Default: None, created from ``forward_func``, which must then be a transformers model or a module
                    that contains exactly one
        logit_normalization (str, optional): ``'raw'``, ``'centered'`` or ``'zscore'``, as in
                    :class:`~captum_intramodal.LogitLens`.
                    Default: None, as the lens has it

    Examples::

        >>> from captum_intramodal import LayerLogitLens, PixelForward
        >>> forward = PixelForward(adapter, "describe the picture.", "a dog.")
        >>> method = LayerLogitLens(forward, model.get_decoder().layers[-1])
        >>> activation = method.attribute(torch.rand(1, 3, 96, 128), target=forward.answer_ids[1])
        >>> activation.ndim, bool((activation >= 0).all())  # (images, positions)
        (2, True)
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: nn.Module | list[nn.Module],
        lens: LogitLens | None = None,
        logit_normalization: LogitNormalization | None = None,
    ) -> None:
        super().__init__(forward_func, layer)
        lens = lens if lens is not None else LogitLens(find_model(forward_func))
        self.lens = lens if logit_normalization is None else lens.with_normalization(logit_normalization)

    @property
    def multiplies_by_inputs(self) -> bool:
        return False

    @log_usage(part_of_slo=True)
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Targets,
        additional_forward_args: Any = None,
        relu_attributions: bool = True,
    ) -> Tensor | tuple[Tensor, ...]:
        r"""
        Compute the activation of target tokens at every position.

        Args:

            inputs (Tensor or tuple[Tensor, ...]): Positional inputs of ``forward_func``; dimension 0 is the batch.
            target (int, tuple, list or Tensor): Token ids. An int is one token for all B examples; a list of ints or a
                        1-D tensor holds one token per example; a 2-D tensor (B or 1, n) holds n tokens per example. For
                        a tuple, such as the (position, token) targets of other methods, the last entry is the token.
            additional_forward_args (Any, optional): Further positional arguments of ``forward_func``.
                        Default: None
            relu_attributions (bool, optional): Clip negative activations at 0, as the paper does.
                        Default: True

        Returns:
            **attributions** (*Tensor* or *tuple[Tensor, ...]*): logits, float32 (B, positions), or (B, n, positions)
            for a 2-D target; a tuple with one entry per layer if ``layer`` is a list.

        Raises:
            InvalidInputError: if a token id lies outside the vocabulary, or the number of targets is neither 1 nor B.
        """
        forward_args = format_tensor_into_tuples(inputs) + (
            format_additional_forward_args(additional_forward_args) or ()
        )
        layers = self.layer if isinstance(self.layer, list) else [self.layer]
        hidden = run_layers(lambda: self.forward_func(*forward_args), layers)
        tokens, several = self._tokens(target, hidden[0].shape[0])
        attributions = []
        for states in hidden:
            rows = [self.lens.activation(h, t).T for h, t in zip(states, tokens.expand(len(states), -1), strict=True)]
            activation = torch.stack(rows) if several else torch.cat(rows)
            attributions.append(activation.clamp_min(0) if relu_attributions else activation)
        return tuple(attributions) if isinstance(self.layer, list) else attributions[0]

    def _tokens(self, target: Targets, batch: int) -> tuple[Tensor, bool]:
        """Return token ids (1 or B, n), and whether the target was 2-D."""
        if isinstance(target, tuple):
            target = target[-1]
        elif isinstance(target, list):
            target = [entry[-1] if isinstance(entry, tuple) else entry for entry in target]
        tokens = torch.as_tensor(target)
        if tokens.is_floating_point() or tokens.ndim > 2:
            raise InvalidInputError(
                f"target must hold integer token ids in at most 2 dimensions, got {tokens.dtype} {tuple(tokens.shape)}."
            )
        several = tokens.ndim == 2
        tokens = tokens if several else tokens.reshape(-1, 1)
        if tokens.shape[0] not in (1, batch):
            raise InvalidInputError(
                f"Got {tokens.shape[0]} targets for {batch} examples; pass one token, one per example, or a 2-D tensor "
                "(1 or examples, tokens)."
            )
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.lens.vocab_size:
            raise InvalidInputError(
                f"Token ids from {int(tokens.min())} to {int(tokens.max())} lie outside the vocabulary of "
                f"{self.lens.vocab_size}."
            )
        return tokens, several


def find_model(forward_func: Callable[..., Any]) -> PreTrainedModel:
    """Return the transformers model with a language-model head that ``forward_func`` is or contains."""
    if isinstance(forward_func, nn.Module):
        for module in forward_func.modules():
            if isinstance(module, PreTrainedModel) and module.get_output_embeddings() is not None:
                return module
    raise TypeError(
        f"No transformers model with output embeddings found in {type(forward_func).__name__}; pass "
        "lens=LogitLens(model)."
    )
