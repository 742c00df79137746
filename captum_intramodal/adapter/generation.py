r"""How is an answer generated, and what is captured meanwhile? Greedy decoding, answers as tokens, end tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import ModelOutput

from captum_intramodal.adapter.prompts import cast_inputs, decoder_ids, pad_token_id, placeholder_ids, sequence_starts
from captum_intramodal.errors import EmptyAnswerError, InvalidInputError
from captum_intramodal.models.generation_states import StepRankings, StepStates
from captum_intramodal.models.logit_lens import LogitLens

__all__ = ["generate", "generate_answers", "generate_with_logits", "generate_with_states", "tokenize_answer"]


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs: Mapping[str, Any],
    max_new_tokens: int,
    **options: Any,
) -> ModelOutput:
    """Decode greedily with the model's own ``generate``; ``options`` are passed on to it."""
    if model.generation_config.pad_token_id is None:
        options["pad_token_id"] = pad_token_id(tokenizer)
    return model.generate(
        **cast_inputs(model, inputs),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        temperature=None,
        top_p=None,
        top_k=None,
        # In the answer, a placeholder would require the features of one more image.
        suppress_tokens=placeholder_ids(model, inputs).tolist() or None,
        return_dict_in_generate=True,
        **options,
    )


def generate_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, inputs: Mapping[str, Any], max_new_tokens: int
) -> list[list[int]]:
    """Generate an answer to each prompt of a left-padded batch, without the tokens that end it."""
    sequences = generate(model, tokenizer, inputs, max_new_tokens).sequences
    return _answers(model, tokenizer, sequences[:, decoder_ids(model, inputs).shape[1] :], max_new_tokens)


def generate_with_logits(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, inputs: Mapping[str, Any], max_new_tokens: int
) -> tuple[list[int], Tensor]:
    """Generate one answer with the tokens that end it, and the logits of each of them, (tokens, vocabulary)."""
    output = generate(model, tokenizer, inputs, max_new_tokens, output_logits=True)
    return output.sequences[0, decoder_ids(model, inputs).shape[1] :].tolist(), torch.cat(output.logits)


def generate_with_states(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs: Mapping[str, Any],
    max_new_tokens: int,
    layers: Sequence[nn.Module],
    positions: Sequence[Tensor],
    lens: LogitLens | None = None,
    k: int = 0,
) -> tuple[list[list[int]], StepStates | None, StepRankings | None]:
    """Generate answers and capture hidden states meanwhile, and rankings of length ``k`` if a lens is given; see
    :meth:`ModelAdapter.generate_with_states`."""
    length = decoder_ids(model, inputs).shape[1]
    columns = [start + own for start, own in zip(sequence_starts(model, inputs), positions, strict=True)]
    states = StepStates(layers, columns, length)
    rankings = StepRankings(lens, k) if lens is not None and lens.ranks_as_generated else None
    with states.recording(), rankings.recording() if rankings else nullcontext():
        # One token more, because the model does not process the last one.
        generated = generate(model, tokenizer, inputs, max_new_tokens + 1).sequences[:, length:]
    answers = _answers(model, tokenizer, generated, max_new_tokens)
    count = generated.shape[1]
    if not states.is_complete(count):
        return answers, None, None
    return answers, states, rankings if rankings and rankings.is_complete(count) else None


def _answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, generated: Tensor, max_new_tokens: int
) -> list[list[int]]:
    """Cut generated rows at their first end token; rows of a batch that end early are padded."""
    ends, answers = _end_tokens(model), []
    for row in generated.tolist():
        end = next((i for i, token in enumerate(row) if token in ends), None)
        answers.append(_strip_end(model, tokenizer, row[:end][:max_new_tokens]))
    return answers


def _end_tokens(model: PreTrainedModel) -> set[int | None]:
    eos = getattr(model.generation_config, "eos_token_id", None)
    return {*eos} if isinstance(eos, list) else {eos}


def _strip_end(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, answer: Sequence[int]) -> list[int]:
    """Remove trailing end and padding tokens."""
    ends = _end_tokens(model) | {tokenizer.eos_token_id, tokenizer.pad_token_id}
    length = len(answer)
    while length and answer[length - 1] in ends:
        length -= 1
    return list(answer[:length])


def tokenize_answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, answer: str | Sequence[int]
) -> list[int]:
    """Return the token ids of an answer given as text or as ids, without the tokens that end it."""
    if not isinstance(answer, str):
        ids = [int(i) for i in answer]
        if bad := [i for i in ids if not 0 <= i < len(tokenizer)]:
            raise InvalidInputError(
                f"Answer ids {bad[:5]} lie outside the vocabulary of {len(tokenizer)}; pass ids of this model's "
                "tokenizer, or the answer as text."
            )
    else:
        ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
        if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
            raise InvalidInputError(_unknown_words(tokenizer, answer))
    ids = _strip_end(model, tokenizer, ids)
    if not ids:
        raise EmptyAnswerError("The answer is empty; pass an answer with at least one word to explain.")
    return ids


def _unknown_words(tokenizer: PreTrainedTokenizerBase, answer: str) -> str:
    """Write the message that names the first words of an answer that the tokenizer maps to the unknown token."""
    words = answer.split()
    unknown = [w for w in words if tokenizer.unk_token_id in tokenizer(w, add_special_tokens=False)["input_ids"]]
    named = ", ".join(repr(word[:40]) for word in unknown[:5]) or "the answer"
    return f"The model's tokenizer cannot encode {named} ({len(unknown)} of {len(words)} words); use words it knows."
