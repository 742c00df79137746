r"""How likely is a given answer if images or words are changed? Teacher-forced passes, in batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from captum_intramodal.adapter.encoding import Encoding
from captum_intramodal.adapter.model_adapter import ModelAdapter
from captum_intramodal.adapter.prompts import Prompt
from captum_intramodal.errors import InvalidInputError, InvalidOptionError
from captum_intramodal.models.hooks import evaluation_mode

__all__ = ["AnswerScorer", "Images"]

Images = Image.Image | Sequence[Image.Image]


class AnswerScorer:
    r"""
    AnswerScorer computes the log-probability of each token of an answer, given all tokens before it, for any number of
    changed prompts. Each prompt takes one teacher-forced pass without a cache; prompts run in batches if that preserves
    the model's outputs (:attr:`ModelAdapter.batches <captum_intramodal.adapter.ModelAdapter.batches>`).

    Args:

        adapter (ModelAdapter): The model and its processor.
        prompt (str or Sequence[Mapping]): The question.
        answer (str or Sequence[int]): The answer.
        batch_size (int, optional): Prompts that run together; memory grows with it.
                    Default: 16

    Raises:
        EmptyAnswerError: an answer without tokens.
        InvalidInputError: an answer with words that the tokenizer does not know.
        InvalidOptionError: a batch size below 1.

    Examples::

        >>> from captum_intramodal.adapter import AnswerScorer
        >>> scorer = AnswerScorer(adapter, "describe the picture.", "a dog.")
        >>> scores = scorer.log_probability([image, image.rotate(180)])
        >>> scores.shape
        torch.Size([2, 3])
        >>> whole_answer = scores.sum(1).exp()
        >>> bool((whole_answer <= scores[:, 1].exp()).all())
        True
    """

    def __init__(
        self, adapter: ModelAdapter, prompt: Prompt, answer: str | Sequence[int], batch_size: int = 16
    ) -> None:
        if batch_size < 1:
            raise InvalidOptionError(f"batch_size must be at least 1, got {batch_size}.")
        self.adapter = adapter
        self.prompt = prompt
        self.answer_ids = adapter.tokenize_answer(answer)
        self.batch_size = batch_size

    def log_probability(
        self,
        images: Sequence[Images],
        replaced: Sequence[Tensor] | None = None,
        baseline: int | None = None,
    ) -> Tensor:
        r"""
        Compute the log-probability of each token of the answer for several prompts.

        Args:

            images (Sequence): For each prompt its image or images.
            replaced (Sequence[Tensor], optional): For each prompt the positions of tokens to replace, int64: in the
                        decoder's sequence of prompt and answer, or in the prompt of an encoder-decoder.
                        Default: None
            baseline (int, optional): The token that replaces them.
                        Default: None, :attr:`ModelAdapter.baseline_token`.

        Returns:
            *Tensor*: float32 (prompts, tokens of the answer), at most 0, on the CPU. If a token of the answer is
            replaced, its column holds the log-probability of the original token.

        Raises:
            InvalidInputError: the number of position lists differs from that of the prompts; positions outside the
                sequence; images that make prompts of different lengths, so that positions have no common meaning.
        """
        return self._score(images, replaced, baseline)[0]

    def predict(self, images: Sequence[Images]) -> tuple[Tensor, Tensor]:
        r"""
        Compute the log-probability of each token of the answer, and the most likely token in its place.

        Args:

            images (Sequence): For each prompt its image or images.

        Returns:
            **log_probability, likeliest** (*tuple[Tensor, Tensor]*):
                float32 and int64 (prompts, tokens of the answer), on the CPU.
        """
        return self._score(images)

    def without_tokens(self, images: Images, positions: Tensor, removed: Tensor, baseline: int | None = None) -> Tensor:
        r"""
        Compute the log-probability of each token of the answer with some tokens replaced.

        Args:

            images (PIL.Image.Image or Sequence[PIL.Image.Image]): The prompt's image or images.
            positions (Tensor): Positions of T tokens, as in :meth:`log_probability`, int64 (T,).
            removed (Tensor): Which of them each row replaces, bool (N, T).
            baseline (int, optional): As in :meth:`log_probability`.
                        Default: None

        Returns:
            *Tensor*: float32 (N, tokens of the answer), at most 0, on the CPU.

        Raises:
            InvalidInputError: ``removed`` is not bool, or its width is not T.
        """
        if removed.ndim != 2 or removed.dtype != torch.bool or removed.shape[1] != len(positions):
            raise InvalidInputError(
                f"removed must be bool (N, {len(positions)}), got {removed.dtype} {tuple(removed.shape)}."
            )
        rows = [positions[row] for row in removed.cpu()]
        return self.log_probability([images] * len(rows), rows, baseline)

    @torch.no_grad()
    def _score(
        self,
        images: Sequence[Images],
        replaced: Sequence[Tensor] | None = None,
        baseline: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run all prompts in batches; return log-probabilities and most likely tokens."""
        if replaced is not None and len(replaced) != len(images):
            raise InvalidInputError(f"{len(replaced)} lists of positions for {len(images)} prompts; pass one for each.")
        listed = [[own] if isinstance(own, Image.Image) else list(own) for own in images]
        result = torch.empty(len(listed), len(self.answer_ids))
        likeliest = torch.empty(result.shape, dtype=torch.int64)
        lengths = set()
        with evaluation_mode(self.adapter.model):
            for start in range(0, len(listed), self.batch_size):
                part = listed[start : start + self.batch_size]
                for rows, inputs in self.adapter.prepare_together(part, [self.prompt] * len(part)):
                    encodings = self.adapter.encode_batch(inputs, [self.answer_ids] * len(rows))
                    indices = [start + row for row in rows]
                    if replaced is not None:
                        lengths |= {encoding.prompt_length for encoding in encodings}
                        self._replace_tokens(encodings, [replaced[index] for index in indices], baseline)
                    result[indices], likeliest[indices] = self._score_batch(encodings)
        if len(lengths) > 1:
            raise InvalidInputError(
                f"The processor makes prompts of {sorted(lengths)} tokens of these images; positions in one are not "
                "those in another. Change images in a way that keeps their layout, or words only."
            )
        return result, likeliest

    def _replace_tokens(self, encodings: Sequence[Encoding], positions: Sequence[Tensor], baseline: int | None) -> None:
        """Replace tokens in a batch's inputs."""
        token = self.adapter.baseline_token if baseline is None else baseline
        inputs = encodings[0].inputs
        key = "input_ids" if "input_ids" in inputs else "decoder_input_ids"
        ids = inputs[key].clone()
        for encoding, own in zip(encodings, positions, strict=True):
            length = ids.shape[1] if self.adapter.is_encoder_decoder else len(encoding.input_ids)
            if len(own) and not 0 <= int(own.min()) <= int(own.max()) < length:
                raise InvalidInputError(f"Positions {own.tolist()[:8]} lie outside the sequence of {length} tokens.")
            padding = ids.shape[1] - length
            ids[encoding.row, (own + padding).to(ids.device)] = token
        inputs[key] = ids

    def _score_batch(self, encodings: Sequence[Encoding]) -> tuple[Tensor, Tensor]:
        """Run one batch; all padding is on the left, so the answers are at its end."""
        count = len(self.answer_ids)
        logits = self.adapter.logits(encodings[0].inputs, torch.arange(-count - 1, -1)).float().log_softmax(-1)
        ids = torch.tensor(self.answer_ids, device=logits.device).expand(len(encodings), -1)
        return logits.gather(2, ids[..., None])[..., 0].cpu(), logits.argmax(-1).cpu()
