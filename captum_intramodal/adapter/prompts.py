r"""How do a prompt and its images become a model's inputs? Chat templates, placeholders, left padding and stacking."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from inspect import signature
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from captum_intramodal._utils.image import stack_frames
from captum_intramodal.errors import InvalidInputError, UnsupportedModelError
from captum_intramodal.models.decoder import input_device
from captum_intramodal.models.families import family_of
from captum_intramodal.models.placeholders import image_token_id, visual_positions

__all__ = ["Prompt", "find_prompt_tokens", "prepare_inputs", "render_prompt", "stack_inputs"]

Prompt = str | Sequence[Mapping[str, Any]]


def render_prompt(processor: ProcessorMixin, prompt: Prompt, n_images: int, video: bool = False) -> str:
    r"""
    Render a prompt in the processor's chat template, if it has one, with a placeholder for each image.

    Args:

        processor (ProcessorMixin): The processor.
        prompt (str or Sequence[Mapping]): The prompt, or messages in transformers' chat format.
        n_images (int): Number of images; they precede a prompt given as a string.
        video (bool, optional): Whether the images are the frames of one video.
                    Default: False

    Returns:
        *str*: the text to be tokenized.

    Raises:
        InvalidInputError: an empty prompt, or messages for a processor without a chat template.
    """
    if isinstance(prompt, str):
        if not prompt.strip():
            raise InvalidInputError("The prompt is empty; ask the model something about the image.")
        media = [{"type": "video"}] if video else [{"type": "image"}] * n_images
        messages: Sequence[Mapping[str, Any]] = [
            {"role": "user", "content": [*media, {"type": "text", "text": prompt}]}
        ]
    else:
        messages = prompt
    if getattr(processor, "chat_template", None) or getattr(processor.tokenizer, "chat_template", None):
        return str(processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    if not isinstance(prompt, str):
        raise InvalidInputError(
            f"{type(processor).__name__} has no chat template; pass the prompt as a string instead of messages."
        )
    return f"{_placeholder(processor) * n_images}{prompt}"


def prepare_inputs(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    images: Sequence[Sequence[Image.Image | Tensor]],
    prompts: Sequence[Prompt],
    video: bool = False,
) -> dict[str, Any]:
    r"""
    Process prompts, each with its own images, into model inputs: left-padded, on the model's device.

    Args:

        model (PreTrainedModel): The model.
        processor (ProcessorMixin): Its processor.
        images (Sequence[Sequence[PIL.Image.Image or Tensor]]): The images of each prompt.
        prompts (Sequence): One prompt per example, see :func:`render_prompt`.
        video (bool, optional): Whether the images of a prompt are the frames of one video.
                    Default: False

    Returns:
        *dict*: keyword arguments of the model's forward, with ``input_ids`` (B, sequence).

    Raises:
        InvalidInputError: prompts that cannot be tokenized together, or placeholders that do not match the images.
        UnsupportedModelError: the model or its processor does not support several prompts at a time. Processors raise
            errors of their own if they cannot stack images of different sizes.
    """
    texts: list[Any] = [
        render_prompt(processor, prompt, len(listed), video) for prompt, listed in zip(prompts, images, strict=True)
    ]
    several = len(texts) > 1
    if several and model.config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"{type(model).__name__} is an encoder-decoder, which takes one prompt at a time; got {len(texts)}."
        )
    options = _tokenizer_options(processor.tokenizer, texts)
    if "mm_token_type_ids" in forward_arguments(model):
        options["return_mm_token_type_ids"] = True
    if several:
        options |= {"padding": True, "padding_side": "left"}
    if video:
        options |= {
            "videos": [stack_frames(frames) for frames in images],
            "do_sample_frames": False,
            "return_metadata": True,  # Some processors write each frame's time into the prompt.
        }
    elif family_of(model.config).interleaves_images:
        texts = [_interleave(processor, text, listed) for text, listed in zip(texts, images, strict=True)]
    else:
        options["images"] = [list(listed) for listed in images] if several else list(images[0])
    batch = processor(text=texts, return_tensors="pt", **options)
    device = input_device(model)
    inputs = {
        key: value.to(device) if isinstance(value, Tensor) else value
        for key, value in batch.items()
        if key not in ("labels", "video_metadata")  # The forward pass does not use them.
    }
    if model.config.is_encoder_decoder:
        return _start_decoder(model, inputs)
    if several:
        mask = inputs.get("attention_mask")
        if mask is None or mask.shape != inputs["input_ids"].shape or bool((mask.long().diff(dim=1) < 0).any()):
            raise UnsupportedModelError(f"{type(processor).__name__} does not pad several prompts on the left.")
    return inputs


def _placeholder(processor: ProcessorMixin) -> str:
    return getattr(processor, "image_token", None) or "<image>"


def _tokenizer_options(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> dict[str, Any]:
    """Return options that keep the tokenizer from adding a second beginning-of-sequence token after a template's."""
    begun = {bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token) for text in texts}
    if len(begun) > 1:
        raise InvalidInputError(
            f"Some prompts begin with {tokenizer.bos_token}, some do not; they cannot be tokenized together."
        )
    return {"add_special_tokens": False} if begun == {True} else {}


def _interleave(processor: ProcessorMixin, text: str, images: Sequence[Image.Image | Tensor]) -> list[Any]:
    """Split a prompt at its placeholders into texts and images in their order."""
    # Processors that take such lists add the beginning-of-sequence token themselves.
    first, *others = text.removeprefix(processor.tokenizer.bos_token or "").split(_placeholder(processor))
    if len(others) != len(images):
        raise InvalidInputError(f"The prompt has {len(others)} places for images, but there are {len(images)}.")
    pieces: list[Any] = [first]
    for image, piece in zip(images, others, strict=True):
        pieces += [image, piece]
    return [piece for piece in pieces if not isinstance(piece, str) or piece.strip()]


def _start_decoder(model: PreTrainedModel, inputs: dict[str, Any]) -> dict[str, Any]:
    """Give an encoder-decoder's decoder its start token, then the prompt if the encoder does not take it."""
    inputs.pop("decoder_attention_mask", None)
    prompt = inputs.pop("decoder_input_ids", None)
    if "input_ids" not in forward_arguments(model) and "input_ids" in inputs:
        prompt = inputs.pop("input_ids")
        inputs.pop("attention_mask", None)
    ids = [] if prompt is None else prompt[0].tolist()
    start = _decoder_start_token(model)
    ids = ids if ids[:1] == [start] else [start, *ids]
    return inputs | {"decoder_input_ids": torch.tensor([ids], device=input_device(model))}


def _decoder_start_token(model: PreTrainedModel) -> int:
    configs = (model.generation_config, model.config, model.config.get_text_config(decoder=True))
    for name in ("decoder_start_token_id", "bos_token_id"):
        for config in configs:
            if isinstance(start := getattr(config, name, None), int):
                return start
    raise UnsupportedModelError(
        f"The configuration of {type(model).__name__} does not define the token that starts an answer; set "
        "model.generation_config.decoder_start_token_id."
    )


def find_prompt_tokens(
    model: PreTrainedModel, processor: ProcessorMixin, inputs: Mapping[str, Any], text: str
) -> tuple[Tensor, Tensor]:
    """Return the positions and ids of a rendered prompt's tokens in prepared inputs, without those for its image."""
    sequence = inputs["input_ids"] if "input_ids" in inputs else decoder_ids(model, inputs)
    plain = processor.tokenizer(text, **_tokenizer_options(processor.tokenizer, [text]))["input_ids"]
    ids = sequence[0].tolist()
    blocks = SequenceMatcher(None, plain, ids, autojunk=False).get_matching_blocks()
    shared = [block.b + i for block in blocks for i in range(block.size)]
    placeholder = image_token_id(model)
    positions = torch.tensor([i for i in shared if ids[i] != placeholder], dtype=torch.int64)
    return positions, sequence[0].cpu()[positions]


def forward_arguments(model: PreTrainedModel) -> set[str]:
    """Return the names of the arguments of a model's forward."""
    return set(signature(model.forward).parameters)


def cast_inputs(model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Convert floating-point inputs to the model's dtype."""
    return {
        key: value.to(model.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in inputs.items()
    }


def decoder_ids(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Tensor:
    """Return the token ids of the decoder's sequence, (B, sequence)."""
    ids: Tensor = inputs["decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"]
    return ids


def sequence_starts(model: PreTrainedModel, inputs: Mapping[str, Any]) -> list[int]:
    """Return the position of each prompt's first token in a left-padded batch."""
    count, length = decoder_ids(model, inputs).shape
    return [0] if count == 1 else (length - inputs["attention_mask"].sum(1)).tolist()


def visual_token_positions(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """Return the positions of the visual tokens in one sequence; none if images do not enter by placeholders."""
    if model.config.is_encoder_decoder or image_token_id(model) is None:
        return torch.empty(0, dtype=torch.int64, device=input_ids.device)
    return visual_positions(model, input_ids)


def placeholder_ids(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Tensor:
    """Return the ids of the tokens at visual positions, without duplicates."""
    rows = decoder_ids(model, inputs)
    return torch.cat([row[visual_token_positions(model, row)] for row in rows]).unique()


def has_entry_per_token(processor: ProcessorMixin, key: str, value: object, ids: Tensor) -> bool:
    """Return whether an input has an entry for each token of the sequence, as masks and token types have."""
    if not isinstance(value, Tensor) or value.shape[:2] != ids.shape or value.is_floating_point():
        return False
    # An input that belongs to the images may have the same shape by chance.
    return value is ids or key not in getattr(processor.image_processor, "model_input_names", ())


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the padding token, or the end-of-sequence token if there is none."""
    token: int | None = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return token


def append_left_padded(rows: Tensor, more: Sequence[Tensor], padding: int) -> Tensor:
    """Append a tensor of its own length to each row of a batch, and pad the rows on the left."""
    longer = [torch.cat([row, end]) for row, end in zip(rows, more, strict=True)]
    return pad_sequence(longer, batch_first=True, padding_value=padding, padding_side="left")


def stack_inputs(examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    r"""
    Concatenate the inputs of prompts of equal length into those of one batch.

    Args:

        examples (Sequence[Mapping]): Inputs of one example each, with tensors of equal shapes, whose first dimension
                    may count examples, images, tiles or patches.

    Returns:
        *dict*: inputs of the batch.

    Examples::

        >>> from captum_intramodal.adapter import stack_inputs
        >>> inputs = adapter.prepare([image], "describe the picture.")
        >>> stack_inputs([inputs, inputs])["input_ids"].shape[0]
        2
    """
    return {
        key: torch.cat([example[key] for example in examples]) if isinstance(value, Tensor) else value
        for key, value in examples[0].items()
    }
