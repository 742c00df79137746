r"""Captum's LLM results for images and text: of an explanation, or of a perturbation method on words and regions."""

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
from captum_intramodal.attr.llm_input import ImageTextInput, Row
from captum_intramodal.attr.llm_result import MultimodalLLMAttributionResult
from captum_intramodal.models.hooks import evaluation_mode
from captum_intramodal.text.spans import decode_pieces

__all__ = ["MultimodalLLMAttribution"]


class MultimodalLLMAttribution(Attribution):
    r"""
    A Captum perturbation method on the features of images and text, as ``LLMAttribution`` is on those of text: its
    attributions are for the log-probability of each token of the answer, and of the whole.

    Every perturbation is one teacher-forced pass from its own processor inputs, without a cache, for all tokens of the
    answer together, so that images count for all of them. ``perturbations_per_eval`` perturbations run as one batch
    where the model says in a batch what it says alone, which is tried once; else one by one. A combination of
    features that occurs again is not run again.

    Args:

        attr_method (PerturbationAttribution): An instance such as ``FeatureAblation(model)``: FeatureAblation,
                    ShapleyValueSampling, ShapleyValues, Lime or KernelShap. It stays as it is; a copy runs.
        adapter (ModelAdapter): The model and its processor.
        attr_target (str, optional): ``'log_prob'`` or ``'prob'``.
                    Default: ``'log_prob'``

    Raises:
        TypeError: another method.
        ValueError: another ``attr_target``.

    Examples::

        >>> adapter = ModelAdapter(model, processor)
        >>> inp = ImageTextInput(adapter, image, "describe the picture.", grid=(4, 4))
        >>> llm_attribution = MultimodalLLMAttribution(ShapleyValueSampling(model), adapter)
        >>> result = llm_attribution.attribute(inp, "a dog.", n_samples=10, perturbations_per_eval=8)
        >>> result.token_attr.shape                              # (tokens of the answer, features)
        >>> result.plot_image_heatmap(target_token_pos=1)
    """

    SUPPORTED_METHODS = (FeatureAblation, ShapleyValueSampling, Lime)
    # Subclasses of FeatureAblation that need windows of an image, or a batch of examples.
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
            raise ValueError(f"attr_target must be 'log_prob' or 'prob', got {attr_target!r}.")
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
        Args:

            inp (ImageTextInput): Images and prompt.
            target (str, Sequence[int] or Tensor, optional): The answer, as text or token ids.
                        Default: None, the model's own greedy answer.
            num_trials (int, optional): How often the method runs; the attributions are averaged.
                        Default: 1
            max_new_tokens (int, optional): Where the model's own answer ends at the latest.
                        Default: 128
            **kwargs (Any, optional): Arguments of the method's ``attribute``, such as ``perturbations_per_eval`` and
                        ``n_samples``.

        Returns:
            *MultimodalLLMAttributionResult*: on the CPU; Lime and KernelShap too have attributions of each token, from
            the same samples.

        Raises:
            ValueError: an empty answer, words that the tokenizer does not know, or no trials.
        """
        if num_trials < 1:
            raise ValueError(f"num_trials must be at least 1, got {num_trials}.")
        if target is None:
            with evaluation_mode(self.adapter.model):
                answer_ids = self.adapter.generate(inp.to_model_input(), max_new_tokens)
            if not answer_ids:
                raise ValueError("The model answered nothing; there is no word to explain. Pass a target.")
        else:
            answer_ids = self.adapter.tokenize_answer(target.tolist() if isinstance(target, Tensor) else target)
        method = copy(self.attr_method)
        method.forward_func = _AnswerForward(self.adapter, inp, answer_ids, self.attr_target == "prob")
        attr = torch.zeros(1 + len(answer_ids), inp.n_itp_features)
        for _ in range(num_trials):
            # The same random features for every token, whose passes are then known.
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

    def attribute_future(self) -> None:
        """This method is not implemented for MultimodalLLMAttribution."""
        raise NotImplementedError("attribute_future is not implemented for MultimodalLLMAttribution")


class _AnswerForward:
    """(Log-)probability of an answer, and of each of its tokens, as a function of which features are present."""

    def __init__(self, adapter: ModelAdapter, inp: ImageTextInput, answer_ids: list[int], as_probability: bool) -> None:
        self.scorer = AnswerScorer(adapter, inp.prompt, answer_ids)
        self.inp = inp
        self.as_probability = as_probability
        self.known: dict[Row, Tensor] = {}

    def __call__(self, features: Tensor) -> Tensor:
        """(B, features) -> (B, 1 + tokens), float32, on the CPU."""
        rows: list[Row] = [tuple(row) for row in (features != 0).tolist()]
        new = [row for row in dict.fromkeys(rows) if row not in self.known]
        if new:
            self.scorer.batch_size = len(new)
            images = [self.inp.perturb_images(torch.tensor(row)) for row in new]
            replaced = [self.inp.absent_positions(torch.tensor(row)) for row in new]
            read = self.scorer.log_probability(images, replaced, self.inp.text_baseline)
            self.known |= zip(new, read, strict=True)
        log_probability = torch.stack([self.known[row] for row in rows])
        values = torch.cat([log_probability.sum(1, keepdim=True), log_probability], dim=1)
        return values.exp() if self.as_probability else values
