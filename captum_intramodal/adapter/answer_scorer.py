r"""How likely an answer is when images or words are changed: teacher-forced, batched."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from captum_intramodal.adapter.encoding import Encoding
from captum_intramodal.adapter.model_adapter import ModelAdapter
from captum_intramodal.adapter.prompts import Prompt
from captum_intramodal.models.hooks import evaluation_mode

__all__ = ["AnswerScorer", "Images"]

Images = Image.Image | Sequence[Image.Image]


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
        >>> dog = scorer.log_probability([image, darker_image])[:, 1].exp()      # probability of the second token
        >>> whole = scorer.log_probability([image, darker_image]).sum(1).exp()   # of the whole answer
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

    def log_probability(
        self,
        images: Sequence[Images],
        replaced: Sequence[Tensor] | None = None,
        baseline: int | None = None,
    ) -> Tensor:
        r"""
        Args:

            images (Sequence): For each prompt its image or images.
            replaced (Sequence[Tensor], optional): For each prompt the positions of tokens that another one replaces,
                        int64: in the decoder's sequence of prompt and answer; of an encoder-decoder in its prompt.
                        Default: None
            baseline (int, optional): The token that replaces them.
                        Default: None, :attr:`ModelAdapter.baseline_token`.

        Returns:
            *Tensor* float32 (prompts, tokens of the answer), at most 0, on the CPU. A token of the answer that is
            replaced keeps its column: the probability of what stood there.

        Raises:
            ValueError: not as many lists of positions as prompts, or positions outside the sequence; the processor
                makes prompts of different lengths of the images, so that positions have no meaning.
        """
        return self._run(images, replaced, baseline)[0]

    def predict(self, images: Sequence[Images]) -> tuple[Tensor, Tensor]:
        r"""
        Args:

            images (Sequence): For each prompt its image or images.

        Returns:
            *tuple* of Tensors (prompts, tokens of the answer) on the CPU: the log-probabilities, float32, and the ids
            of the most likely tokens in their places, int64.
        """
        return self._run(images)

    @torch.no_grad()
    def _run(
        self,
        images: Sequence[Images],
        replaced: Sequence[Tensor] | None = None,
        baseline: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        if replaced is not None and len(replaced) != len(images):
            raise ValueError(f"{len(replaced)} lists of positions for {len(images)} prompts.")
        shown = [[p] if isinstance(p, Image.Image) else list(p) for p in images]
        result = torch.empty(len(shown), len(self.answer_ids))
        likeliest = torch.empty(result.shape, dtype=torch.int64)
        lengths = set()
        with evaluation_mode(self.adapter.model):
            for start in range(0, len(shown), self.batch_size):
                part = shown[start : start + self.batch_size]
                for rows, inputs in self.adapter.prepare_together(part, [self.prompt] * len(part)):
                    encodings = self.adapter.encode_batch(inputs, [self.answer_ids] * len(rows))
                    numbers = [start + row for row in rows]
                    if replaced is not None:
                        lengths |= {encoding.prompt_length for encoding in encodings}
                        self._replace(encodings, [replaced[number] for number in numbers], baseline)
                    result[numbers], likeliest[numbers] = self._read(encodings)
        if len(lengths) > 1:
            raise ValueError(
                f"The processor makes prompts of {sorted(lengths)} tokens of these images; positions in one are not "
                "those in another. Change images in a way that keeps their layout, or words only."
            )
        return result, likeliest

    def without_tokens(self, images: Images, positions: Tensor, removed: Tensor, baseline: int | None = None) -> Tensor:
        r"""
        Args:

            images (PIL.Image.Image or Sequence[PIL.Image.Image]): The prompt's image or images.
            positions (Tensor): Positions of T tokens, as in :meth:`log_probability`, int64 (T,).
            removed (Tensor): Which of them each row replaces, bool (N, T).
            baseline (int, optional): As in :meth:`log_probability`.

        Returns:
            *Tensor* float32 (N, tokens of the answer), at most 0, on the CPU.

        Raises:
            ValueError: shapes that do not belong together.
        """
        if removed.ndim != 2 or removed.dtype != torch.bool or removed.shape[1] != len(positions):
            raise ValueError(f"removed must be bool (N, {len(positions)}), got {removed.dtype} {tuple(removed.shape)}.")
        rows = [positions[row] for row in removed.cpu()]
        return self.log_probability([images] * len(rows), rows, baseline)

    def _replace(self, encodings: Sequence[Encoding], positions: Sequence[Tensor], baseline: int | None) -> None:
        token = self.adapter.baseline_token if baseline is None else baseline
        inputs = encodings[0].inputs
        key = "input_ids" if "input_ids" in inputs else "decoder_input_ids"
        ids = inputs[key].clone()
        for encoding, where in zip(encodings, positions, strict=True):
            length = ids.shape[1] if self.adapter.is_encoder_decoder else len(encoding.input_ids)
            if len(where) and not 0 <= int(where.min()) <= int(where.max()) < length:
                raise ValueError(f"Positions {where.tolist()[:8]} lie outside the sequence of {length} tokens.")
            padding = 0 if self.adapter.is_encoder_decoder else ids.shape[1] - len(encoding.input_ids)
            ids[encoding.row, (where + padding).to(ids.device)] = token
        inputs[key] = ids

    def _read(self, encodings: Sequence[Encoding]) -> tuple[Tensor, Tensor]:
        """Of the answers, which end the sequences: all padding is on the left."""
        count = len(self.answer_ids)
        logits = self.adapter.logits(encodings[0].inputs, torch.arange(-count - 1, -1)).float().log_softmax(-1)
        ids = torch.tensor(self.answer_ids, device=logits.device).expand(len(encodings), -1)
        return logits.gather(2, ids[..., None])[..., 0].cpu(), logits.argmax(-1).cpu()
