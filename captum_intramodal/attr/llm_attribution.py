r"""Attribute a language model's answer to regions of images and words of the prompt, by perturbation."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any, Literal

import torch
from captum.attr import (
    Attribution,
    FeatureAblation,
    FeaturePermutation,
    Lime,
    Occlusion,
    PerturbationAttribution,
    ShapleyValueSampling,
)
from torch import Tensor

from captum_intramodal._utils.captum import log_usage
from captum_intramodal.adapter.answer_scorer import AnswerScorer
from captum_intramodal.adapter.model_adapter import ModelAdapter
from captum_intramodal.attr.llm_input import ImageTextInput
from captum_intramodal.attr.llm_result import MultimodalLLMAttributionResult
from captum_intramodal.errors import EmptyAnswerError, InvalidOptionError
from captum_intramodal.models.hooks import evaluation_mode
from captum_intramodal.text.spans import decode_pieces

__all__ = ["MultimodalLLMAttribution"]


class MultimodalLLMAttribution(Attribution):
    r"""
    A Captum perturbation method on features of images and text, as ``LLMAttribution`` is one on features of text. It
    attributes the log-probability of each token of the answer, and of the whole answer.

    Every perturbation is one teacher-forced pass from its own processor inputs, without a cache, for all tokens of the
    answer at once, so that images affect every token. ``perturbations_per_eval`` perturbations run as one batch if a
    trial shows that batching does not change the model's logits, and one at a time otherwise. A repeated combination
    of features is computed once.

    Args:

        attr_method (PerturbationAttribution): An instance of FeatureAblation, ShapleyValueSampling, ShapleyValues, Lime
                    or KernelShap, such as ``FeatureAblation(model)``. It is copied and never modified.
        adapter (ModelAdapter): The model and its processor.
        attr_target (str, optional): ``'log_prob'`` or ``'prob'``.
                    Default: ``'log_prob'``

    Raises:
        TypeError: if the method is another one.
        InvalidOptionError: if ``attr_target`` is unknown.

    Examples::

        >>> from captum.attr import FeatureAblation
        >>> from captum_intramodal import ImageTextInput, MultimodalLLMAttribution
        >>> inp = ImageTextInput(adapter, image, "describe the picture.", grid=(2, 2))
        >>> llm_attribution = MultimodalLLMAttribution(FeatureAblation(adapter.model), adapter)
        >>> result = llm_attribution.attribute(inp, "a dog.", perturbations_per_eval=8)
        >>> result.token_attr.shape  # (tokens of the answer, features)
        torch.Size([3, 8])
        >>> figure, axes = result.plot_image_heatmap(target_token_pos=1)
    """

    SUPPORTED_METHODS = (FeatureAblation, ShapleyValueSampling, Lime)
    # Subclasses of FeatureAblation that need windows of an image or a batch of examples.
    UNSUPPORTED_METHODS = (Occlusion, FeaturePermutation)

    def __init__(
        self,
        attr_method: PerturbationAttribution,
        adapter: ModelAdapter,
        attr_target: Literal["log_prob", "prob"] = "log_prob",
    ) -> None:
        if not isinstance(attr_method, self.SUPPORTED_METHODS) or isinstance(attr_method, self.UNSUPPORTED_METHODS):
            raise TypeError(
                "attr_method must be an instance of FeatureAblation, ShapleyValueSampling, ShapleyValues, Lime or "
                f"KernelShap, got {attr_method!r}."
            )
        if attr_target not in ("log_prob", "prob"):
            raise InvalidOptionError(f"attr_target must be 'log_prob' or 'prob', got {attr_target!r}.")
        super().__init__(attr_method.forward_func)
        self.attr_method = attr_method
        self.adapter = adapter
        self.attr_target = attr_target

    @log_usage(part_of_slo=True)
    def attribute(
        self,
        inp: ImageTextInput,
        target: str | Sequence[int] | Tensor | None = None,
        num_trials: int = 1,
        max_new_tokens: int = 128,
        **kwargs: Any,
    ) -> MultimodalLLMAttributionResult:
        r"""
        Attribute an answer to the features of the input.

        Args:

            inp (ImageTextInput): Images and prompt.
            target (str, Sequence[int] or Tensor, optional): The answer, as text or token ids.
                        Default: None, the model's own greedy answer.
            num_trials (int, optional): How many times the method runs; its attributions are averaged.
                        Default: 1
            max_new_tokens (int, optional): Maximum length of the model's own answer, in tokens.
                        Default: 128
            **kwargs (Any, optional): Arguments of the method's ``attribute``, such as ``perturbations_per_eval`` and
                        ``n_samples``.

        Returns:
            **result** (*MultimodalLLMAttributionResult*): on the CPU. Lime and KernelShap attribute each token too,
            from the same samples.

        Raises:
            InvalidOptionError: if ``num_trials`` is less than 1.
            EmptyAnswerError: if ``target`` is empty, or the model generates an empty answer.
            InvalidInputError: if ``target`` has words that the tokenizer does not know.
        """
        if num_trials < 1:
            raise InvalidOptionError(f"num_trials must be at least 1, got {num_trials}.")
        answer_ids = self._answer_ids(inp, target, max_new_tokens)
        method = copy(self.attr_method)
        method.forward_func = _FeatureMaskForward(self.adapter, inp, answer_ids, self.attr_target == "prob")
        attr = torch.zeros(1 + len(answer_ids), inp.n_itp_features)
        for _ in range(num_trials):
            # Every token draws the same random features, whose log-probabilities are then cached.
            state = torch.get_rng_state()
            for output, row in enumerate(attr):
                torch.set_rng_state(state)
                row += method.attribute(inp.to_tensor(), target=output, **kwargs).reshape(-1) / num_trials
        answer, spans = decode_pieces(self.adapter.tokenizer, answer_ids)
        return MultimodalLLMAttributionResult(
            input_tokens=inp.values,
            output_tokens=[answer[a:b].strip() for a, b in spans],
            seq_attr=attr[0],
            token_attr=attr[1:],
            images=inp.images,
            segmentations=inp.segmentations,
        )

    def _answer_ids(
        self, inp: ImageTextInput, target: str | Sequence[int] | Tensor | None, max_new_tokens: int
    ) -> list[int]:
        """Return the token ids of the target, or of the model's own answer."""
        if target is not None:
            return self.adapter.tokenize_answer(target.tolist() if isinstance(target, Tensor) else target)
        with evaluation_mode(self.adapter.model):
            answer_ids = self.adapter.generate(inp.to_model_input(), max_new_tokens)
        if not answer_ids:
            raise EmptyAnswerError("The model generated an empty answer, which cannot be explained; pass a target.")
        return answer_ids

    def attribute_future(self) -> None:
        """Not implemented."""
        raise NotImplementedError("attribute_future is not implemented for MultimodalLLMAttribution")


class _FeatureMaskForward:
    """(Log-)probability of an answer, and of each of its tokens, as a function of which features are present."""

    def __init__(self, adapter: ModelAdapter, inp: ImageTextInput, answer_ids: list[int], as_probability: bool) -> None:
        self.scorer = AnswerScorer(adapter, inp.prompt, answer_ids)
        self.inp = inp
        self.as_probability = as_probability
        self._log_probs: dict[tuple[bool, ...], Tensor] = {}

    def __call__(self, features: Tensor) -> Tensor:
        """Score each row of features, (B, features) -> (B, 1 + tokens), float32, on the CPU."""
        masks: list[tuple[bool, ...]] = [tuple(row) for row in (features != 0).tolist()]
        new = [mask for mask in dict.fromkeys(masks) if mask not in self._log_probs]
        if new:
            self.scorer.batch_size = len(new)
            images = [self.inp.perturb_images(torch.tensor(mask)) for mask in new]
            replaced = [self.inp.absent_positions(torch.tensor(mask)) for mask in new]
            scores = self.scorer.log_probability(images, replaced, self.inp.text_baseline)
            self._log_probs |= zip(new, scores, strict=True)
        tokens = torch.stack([self._log_probs[mask] for mask in masks])
        values = torch.cat([tokens.sum(1, keepdim=True), tokens], dim=1)
        return values.exp() if self.as_probability else values
