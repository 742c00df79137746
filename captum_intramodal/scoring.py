r"""How likely an answer is when pictures or words are changed: teacher-forced, batched."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from captum_intramodal.adapter import Encoding, ModelAdapter, Prompt
from captum_intramodal.hooks import evaluation_mode

__all__ = ["AnswerScorer"]

Pictures = Image.Image | Sequence[Image.Image]


class AnswerScorer:
    r"""
    Log-probabilities of an answer's tokens, each given all before it, for any number of changed prompts. Each is one
    teacher-forced pass without a cache; they run in batches where the model says the same in a batch as alone
    (:attr:`ModelAdapter.batches <captum_intramodal.adapter.ModelAdapter.batches>`).

    Args:

        adapter (ModelAdapter): The model and its processor.
        prompt (str or Sequence[Mapping]): The question.
        answer (str or Sequence[int]): The answer.
        batch_size (int, optional): Prompts that run together; memory grows with it.
                    Default: 16

    Raises:
        ValueError: an empty answer, words that the tokenizer does not know, or a batch size below 1.

    Examples::

        >>> scorer = AnswerScorer(adapter, "describe the picture.", "a dog.")
        >>> dog = scorer.of_pictures([picture, darker_picture])[:, 1].exp()      # probability of the second token
        >>> whole = scorer.of_pictures([picture, darker_picture]).sum(1).exp()   # of the whole answer
    """

    def __init__(
        self, adapter: ModelAdapter, prompt: Prompt, answer: str | Sequence[int], batch_size: int = 16
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        self.adapter = adapter
        self.prompt = prompt
        self.answer_ids = adapter.tokenize_answer(answer)
        self.batch_size = batch_size

    def of_pictures(self, pictures: Sequence[Pictures]) -> Tensor:
        r"""
        Args:

            pictures (Sequence): For each prompt its picture or pictures.

        Returns:
            *Tensor* float32 (len(pictures), tokens of the answer), at most 0, on the CPU.
        """
        return self._score(pictures, None, None)

    def without_tokens(
        self, pictures: Pictures, positions: Tensor, removed: Tensor, baseline: int | None = None
    ) -> Tensor:
        r"""
        Args:

            pictures (PIL.Image.Image or Sequence[PIL.Image.Image]): The prompt's picture or pictures.
            positions (Tensor): Positions of T text tokens in the sequence, of the prompt or the answer, int64 (T,).
            removed (Tensor): Which of them each row replaces, bool (N, T).
            baseline (int, optional): The token that stands in their place.
                        Default: None, the tokenizer's unknown token; where it has none, its padding or end token.

        Returns:
            *Tensor* float32 (N, tokens of the answer), at most 0, on the CPU. A token of the answer that is replaced
            keeps its own column, the probability of what stood there.

        Raises:
            ValueError: shapes that do not belong together, or an encoder-decoder, whose prompt is another sequence.
        """
        if self.adapter.is_encoder_decoder:
            raise ValueError(f"{type(self.adapter.model).__name__} reads prompt and answer as two sequences.")
        if removed.ndim != 2 or removed.dtype != torch.bool or removed.shape[1] != len(positions):
            raise ValueError(
                f"removed must be bool (N, {len(positions)}), got {removed.dtype} {tuple(removed.shape)}."
            )
        token = self.adapter.baseline_token if baseline is None else baseline
        return self._score([pictures] * len(removed), [positions[row] for row in removed.cpu()], token)

    @torch.no_grad()
    def _score(self, pictures: Sequence[Pictures], replaced: Sequence[Tensor] | None, baseline: int | None) -> Tensor:
        count = len(self.answer_ids)
        target = torch.tensor(self.answer_ids)
        result = torch.empty(len(pictures), count)
        shown = [[p] if isinstance(p, Image.Image) else list(p) for p in pictures]
        with evaluation_mode(self.adapter.model):
            for start in range(0, len(shown), self.batch_size):
                part = shown[start : start + self.batch_size]
                for rows, inputs in self.adapter.prepare_together(part, [self.prompt] * len(part)):
                    encodings = self.adapter.encode_batch(inputs, [self.answer_ids] * len(rows))
                    if replaced is not None:
                        _replace(encodings, [replaced[start + row] for row in rows], baseline)
                    # All padding is on the left.
                    logits = self.adapter.run(encodings[0].inputs).logits[:, -count - 1 : -1].float().log_softmax(-1)
                    ids = target.to(logits.device).expand(len(rows), -1)
                    result[[start + row for row in rows]] = logits.gather(2, ids[..., None])[..., 0].cpu()
        return result


def _replace(encodings: Sequence[Encoding], positions: Sequence[Tensor], token: int | None) -> None:
    ids = encodings[0].inputs["input_ids"]
    for encoding, where in zip(encodings, positions, strict=True):
        start = ids.shape[1] - len(encoding.input_ids)
        ids[encoding.row, (where + start).to(ids.device)] = token
