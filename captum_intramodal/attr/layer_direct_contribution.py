r"""Direct contributions of positions to a token's logit as a Captum layer attribution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from captum.attr import LayerAttribution
from torch import Tensor, nn
from transformers import PreTrainedModel

from captum_intramodal._utils.captum import format_additional_forward_args, format_tensor_into_tuples, log_usage
from captum_intramodal.attr.answer_forward import TOKEN_OUTPUTS, AnswerForward
from captum_intramodal.attr.layer_logit_lens import find_model
from captum_intramodal.errors import InvalidInputError, InvalidOptionError
from captum_intramodal.models.decoder import decoder_blocks
from captum_intramodal.models.direct_contribution import DirectContribution, direct_contribution
from captum_intramodal.models.logit_lens import LogitLens

__all__ = ["LayerDirectContribution"]

Target = int | tuple[int, ...]
Targets = Target | list[int] | list[tuple[int, ...]] | Tensor


class LayerDirectContribution(LayerAttribution):
    r"""
    Direct contribution of every position to the logit of a token, through the attention of decoder layers:

    .. math::
        C_c(s) = \sum_{\mathrm{layers}} \sum_h A^h_{qs} \; ({W_O^h} V^h_s) \cdot u,

    where :math:`q` is the position that predicts token :math:`c`, and :math:`u` its unembedding row times the final
    norm's gain over its statistic at :math:`q`. Over all layers, and together with the contributions of the embedding,
    the MLPs and the biases, the values sum to the token's logit, see
    :func:`~captum_intramodal.models.direct_contribution.direct_contribution`.

    Only the attention rows of :math:`q` are computed, in the model's own forward pass, without gradients and with any
    attention implementation.

    Args:

        forward_func (Callable or torch.nn.Module): The model, or any function that runs it, such as a ``PixelForward``.
        layer (torch.nn.Module or list[torch.nn.Module]): A decoder layer, or a module that contains several, whose
                    contributions are summed: ``model.get_decoder()`` for all of them.
        model (transformers.PreTrainedModel, optional): The model behind ``forward_func``.
                    Default: None, found in ``forward_func``
        lens (LogitLens, optional): The model's lens.
                    Default: None, created

    Raises:
        InvalidInputError: if ``layer`` contains no decoder layer.

    Examples::

        >>> from captum_intramodal import LayerDirectContribution, PixelForward, VisualTokenAttribution
        >>> forward = PixelForward(adapter, "describe the picture.", "a dog.")
        >>> method, pixels = LayerDirectContribution(forward, model.get_decoder()), torch.rand(1, 3, 96, 128)
        >>> method.attribute(pixels, target=forward.targets[1]).ndim  # (images, positions)
        2
        >>> VisualTokenAttribution(method).attribute(pixels, target=forward.targets[1]).shape
        torch.Size([1, 1, 96, 128])
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: nn.Module | list[nn.Module],
        model: PreTrainedModel | None = None,
        lens: LogitLens | None = None,
    ) -> None:
        super().__init__(forward_func, layer)
        # In a tuple: wrappers of layer methods replace a forward function and a layer by their own.
        self._own = (forward_func,)
        self.model = find_model(forward_func) if model is None else model
        self._lens = lens
        blocks = decoder_blocks(self.model)
        self._groups: list[list[nn.Module]] = []
        for part in layer if isinstance(layer, list) else [layer]:
            inside = set(part.modules())
            self._groups.append([block for block in blocks if block in inside])
            if not self._groups[-1]:
                raise InvalidInputError(
                    f"layer must be, or contain, layers of the model's decoder; {type(part).__name__} does not."
                )

    @property
    def multiplies_by_inputs(self) -> bool:
        return True

    @property
    def lens(self) -> LogitLens:
        """The model's lens."""
        if self._lens is None:
            forward = self._own[0]
            self._lens = forward.adapter.lens if isinstance(forward, AnswerForward) else LogitLens(self.model)
        return self._lens

    @log_usage(part_of_slo=True)
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Targets,
        additional_forward_args: Any = None,
        attribute_to_states: bool = False,
        relu_attributions: bool = False,
    ) -> Tensor | tuple[Tensor, ...]:
        r"""
        Compute the contribution of every position to a token's logit. Examples run one at a time.

        Args:

            inputs (Tensor or tuple[Tensor, ...]): Positional inputs of ``forward_func``; dimension 0 is the batch.
            target (int, tuple, list or Tensor): As Captum selects a logit of the output, for all examples, or one per
                        example: ``(position, token)`` for outputs (B, positions, vocabulary), where the positions of a
                        ``PixelForward`` are those of its answer's tokens; the index of the answer's token for outputs
                        of the answer's own tokens. An int for other functions is a token at the last position.
            additional_forward_args (Any, optional): Further positional arguments of ``forward_func``.
                        Default: None
            attribute_to_states (bool, optional): Attribute to the states that cross-attention reads instead of the
                        positions of the decoder's own sequence.
                        Default: False
            relu_attributions (bool, optional): Clip negative contributions at 0.
                        Default: False

        Returns:
            **attributions** (*Tensor* or *tuple[Tensor, ...]*): logits, float32 (B, positions); a tuple with one entry
            per layer if ``layer`` is a list.

        Raises:
            InvalidInputError: if a target does not exist, or there are neither 1 nor B targets.
            InvalidOptionError: if the output of ``forward_func`` has no logit per token.
            UnsupportedModelError: if the model's logits are not a sum of contributions.
        """
        first = format_tensor_into_tuples(inputs)
        forward_args = first + (format_additional_forward_args(additional_forward_args) or ())
        count = len(first[0])
        results = []
        for index, chosen in enumerate(_per_example(target, count)):
            own = [
                arg[index : index + 1] if isinstance(arg, Tensor) and arg.ndim and len(arg) == count else arg
                for arg in forward_args
            ]
            results.append(self._trace(own, chosen, attribute_to_states))
        attributions = tuple(torch.stack(rows) for rows in zip(*results, strict=True))
        if relu_attributions:
            attributions = tuple(values.clamp_min(0) for values in attributions)
        return attributions if isinstance(self.layer, list) else attributions[0]

    def _trace(self, forward_args: list[Any], target: Target, states: bool) -> list[Tensor]:
        """Return one example's contributions (positions,) of each group of layers."""
        forward = self._own[0]
        query, tokens, signs = self._terms(target, forward_args)
        layers = list(dict.fromkeys(block for group in self._groups for block in group))
        result: DirectContribution = direct_contribution(
            self.model,
            lambda: forward(*forward_args),
            torch.full((len(tokens),), query),
            torch.tensor(tokens),
            lens=self.lens,
            layers=layers,
            detail="sum" if len(self._groups) == 1 else "layer",
            working_memory=self.lens.working_memory,
        )
        values = result.states if states else result.positions
        values = (values * torch.tensor(signs, device=values.device)[:, None]).sum(-2)
        if len(self._groups) == 1:
            return [values]
        order = [block for block in result.blocks if block in layers]
        return [values[[block in group for block in order]].sum(0) for group in self._groups]

    def _terms(self, target: Target, forward_args: list[Any]) -> tuple[int, list[int], list[float]]:
        """Return the position that predicts a target, counted from the end for answers, its tokens and their signs."""
        forward = self._own[0]
        if not isinstance(forward, AnswerForward):
            if isinstance(target, tuple):
                return int(target[-2]), [self._token(target[-1])], [1.0]
            return -1, [self._token(target)], [1.0]
        answer, contrast = _answer_ids(forward, forward_args)
        position = target[0] if isinstance(target, tuple) else target
        if not -len(answer) <= position < len(answer):
            raise InvalidInputError(f"target {target!r} is no token of an answer of {len(answer)} tokens.")
        position %= len(answer)
        query = position - len(answer) - 1
        if forward.output not in TOKEN_OUTPUTS:
            if not isinstance(target, tuple) or len(target) != 2:
                raise InvalidInputError(
                    f"output={forward.output!r} needs a target (token index, token id), got {target!r}."
                )
            return query, [self._token(target[1])], [1.0]
        if forward.output == "answer_log_prob":
            raise InvalidOptionError("output='answer_log_prob' has no logit per token; use output='token_logits'.")
        if contrast is None:
            return query, [answer[position]], [1.0]
        return query, [answer[position], contrast[position]], [1.0, -1.0]

    def _token(self, token: int) -> int:
        if not 0 <= token < self.lens.vocab_size:
            raise InvalidInputError(f"Token id {token} lies outside the vocabulary of {self.lens.vocab_size}.")
        return int(token)


def _answer_ids(forward: AnswerForward, forward_args: list[Any]) -> tuple[list[int], list[int] | None]:
    """Return the ids of the answer and of its contrast in one example's call."""
    given = [arg[0].tolist() for arg in forward_args if isinstance(arg, Tensor) and not arg.is_floating_point()]
    answer = given[0] if given else list(forward.answer_ids)
    contrast = given[1] if len(given) > 1 else forward.contrast_ids
    return answer, None if contrast is None else list(contrast)


def _per_example(target: Targets, count: int) -> list[Target]:
    """Return one target per example.

    Raises:
        InvalidInputError: neither 1 nor ``count`` targets, or no integers.
    """
    if isinstance(target, Tensor):
        if target.is_floating_point() or target.ndim > 1:
            raise InvalidInputError(
                f"target must hold one integer per example, got {target.dtype} {tuple(target.shape)}."
            )
        target = target.reshape(-1).tolist()
    targets: list[Any] = target if isinstance(target, list) else [target]
    if len(targets) not in (1, count):
        raise InvalidInputError(f"Got {len(targets)} targets for {count} examples; pass one, or one per example.")
    return targets * count if len(targets) == 1 else targets
