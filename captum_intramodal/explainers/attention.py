r"""How much does the position that predicts a token attend to the visual tokens, in one layer or through all layers?"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from captum_intramodal.adapter.encoding import Encoding
from captum_intramodal.adapter.model_adapter import ModelAdapter
from captum_intramodal.adapter.text_tokens import text_positions
from captum_intramodal.attr.visual_token_attribution import draw_positions
from captum_intramodal.errors import InvalidOptionError, UnsupportedModelError
from captum_intramodal.explainers.base import BaseExplainer, Example, TextMaps, check_decoder_sequence, check_layer
from captum_intramodal.explainers.registry import register_explainer
from captum_intramodal.models.decoder import decoder_layers

__all__ = ["AttentionMaps", "AttentionRollout", "AttentionXGradient", "eager_attention"]


@contextmanager
def eager_attention(model: PreTrainedModel) -> Iterator[None]:
    r"""
    Let a model compute its attention weights, which only transformers' eager implementation returns. Afterwards, each
    part's own implementation is restored.

    Args:

        model (PreTrainedModel): The model.

    Examples::

        >>> from captum_intramodal.explainers import eager_attention
        >>> with eager_attention(model):
        ...     model.config._attn_implementation
        'eager'
    """
    parts = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    before = [part.config._attn_implementation for part in parts]
    try:
        model.set_attn_implementation("eager")
        yield
    finally:
        # Outer parts first, as each sets those inside it. In the configs, as some parts refuse to be set to what they
        # had.
        for part, implementation in zip(parts, before, strict=True):
            part.config._attn_implementation = implementation


@dataclass(kw_only=True)
class _AttentionExplainer(BaseExplainer):
    """Base class of explainers that need attention weights at the positions that predict the answer's tokens."""

    # False if it makes sense without the layers that mix positions by other means, such as linear attention.
    needs_all_layers: ClassVar[bool] = True

    def explain(self, example: Example) -> list[Tensor]:
        encoding, values = self._attend(example)
        return draw_positions(values, example.adapter, encoding.input_ids, [image.size for image in example.images])

    def relate_text(self, example: Example) -> TextMaps:
        """Return the same values at the text tokens."""
        encoding, values = self._attend(example)
        positions = text_positions(example.adapter, encoding)
        return TextMaps(positions, values.cpu()[:, positions])

    def _attend(self, example: Example) -> tuple[Encoding, Tensor]:
        """Run the model; return the sequence and its positions' relevance to the answer's T tokens, (T, positions)."""
        adapter, images, prompt, answer_ids = example
        check_decoder_sequence(self, example)
        encoding = adapter.encode(adapter.prepare(images, prompt), answer_ids)
        length, layers = len(encoding.input_ids), len(decoder_layers(adapter.model))
        with eager_attention(adapter.model):
            output = self.run(adapter, encoding)
        attentions = [a for a in getattr(output, "attentions", None) or () if a is not None]
        shapes = sorted({tuple(a.shape) for a in attentions})
        enough = len(attentions) == layers if self.needs_all_layers else attentions
        if not enough or any(len(shape) != 4 or shape[2:] != (length, length) for shape in shapes):
            raise UnsupportedModelError(
                f"{type(adapter.model).__name__} returned self-attention of {len(attentions)} of its {layers} layers, "
                f"of shape {', '.join(map(str, shapes)) or 'none'}; {self.name} needs (1, heads, {length}, {length}) "
                f"of {'all layers' if self.needs_all_layers else 'at least one'}."
            )
        return encoding, self.relevance(encoding, output.logits[0], attentions)

    def run(self, adapter: ModelAdapter, encoding: Encoding) -> ModelOutput:
        """Run the model with attention weights."""
        with torch.no_grad():
            return adapter.run(encoding.inputs | {"output_attentions": True})

    @abstractmethod
    def relevance(self, encoding: Encoding, logits: Tensor, attentions: list[Tensor]) -> Tensor:
        """Return the positions' relevance to the answer's T tokens, (T, positions), from the logits and each layer's
        attention weights (1, heads, positions, positions)."""


@register_explainer("attention")
@dataclass(kw_only=True)
class AttentionMaps(_AttentionExplainer):
    r"""
    Attention of one decoder layer from the position that predicts each token, averaged over heads.

    Args:

        layer (int, optional): Index among the layers that have attention weights.
                    Default: -1
    """

    needs_all_layers: ClassVar[bool] = False

    layer: int = -1

    def relevance(self, encoding: Encoding, logits: Tensor, attentions: list[Tensor]) -> Tensor:
        check_layer(self.layer, len(attentions))
        return attentions[self.layer][0].float().mean(0)[_predicting(encoding)]


@register_explainer("attention_rollout")
@dataclass(kw_only=True)
class AttentionRollout(_AttentionExplainer):
    r"""
    Attention rollout: the product, over all layers, of the attention averaged over heads and mixed with the identity,
    which accounts for the residual connection.

    Source: Abnar and Zuidema, "Quantifying Attention Flow in Transformers", 2020.

    Args:

        residual (float, optional): Share of the identity, from 0 to 1.
                    Default: 0.5
    """

    residual: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.residual <= 1:
            raise InvalidOptionError(f"residual must be from 0 to 1, got {self.residual}.")

    def relevance(self, encoding: Encoding, logits: Tensor, attentions: list[Tensor]) -> Tensor:
        rows = _one_hot(encoding, attentions[0].device)
        for attention in reversed(attentions):
            mixed = (1 - self.residual) * (rows @ attention[0].float().mean(0).to(rows)) + self.residual * rows
            rows = mixed / mixed.sum(1, keepdim=True)
        return rows


@register_explainer("attention_x_gradient")
@dataclass(kw_only=True)
class AttentionXGradient(_AttentionExplainer):
    r"""
    Relevance from attention times gradient, for the self-attention of a decoder: from :math:`R = I`, layer by layer
    :math:`R \leftarrow R + \bar A R`, with :math:`\bar A` the mean over heads of :math:`\max(0, \nabla A \odot A)`.

    It runs one backward pass per token, from its logit, and keeps the attention of all layers for it.

    Source: Chefer et al., "Generic Attention-model Explainability for Interpreting Bi-Modal and Encoder-Decoder
    Transformers", 2021.
    """

    def run(self, adapter: ModelAdapter, encoding: Encoding) -> ModelOutput:
        """Run the model with attention weights and the graph of their gradients."""

        def require_gradient(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            # Models change embeddings in place, which autograd does not allow for a leaf.
            return output.detach().requires_grad_().clone()

        with adapter.model.get_input_embeddings().register_forward_hook(require_gradient):
            return adapter.run(encoding.inputs | {"output_attentions": True})

    def relevance(self, encoding: Encoding, logits: Tensor, attentions: list[Tensor]) -> Tensor:
        logits = encoding.rows(logits)[_predicting(encoding)]
        scores = logits.gather(1, torch.tensor(encoding.answer_ids, device=logits.device)[:, None])[:, 0]
        result = []
        for score, row in zip(scores, _one_hot(encoding, attentions[0].device), strict=True):
            gradients = torch.autograd.grad(score, attentions, retain_graph=True)
            for attention, gradient in zip(reversed(attentions), reversed(gradients), strict=True):
                relevant = (attention.detach() * gradient)[0].clamp_min(0).float().mean(0)
                row = row + row @ relevant.to(row)
            result.append(row)
        return torch.stack(result)


def _predicting(encoding: Encoding) -> slice:
    """Return the positions before each of the answer's tokens."""
    return slice(encoding.prompt_length - 1, -1)


def _one_hot(encoding: Encoding, device: torch.device) -> Tensor:
    """Return the rows of the identity for the positions before each of the answer's tokens."""
    return torch.eye(len(encoding.input_ids), device=device)[_predicting(encoding)]
