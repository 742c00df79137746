r"""A transformers image-text-to-text model and its processor, bound together: prompts, answers, hidden states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cached_property
from inspect import signature
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from captum_intramodal.coordinates import PixelMaps
from captum_intramodal.decoder import input_device
from captum_intramodal.geometry import (
    TokenGeometry,
    cached_geometry,
    cached_pixels,
    image_token_id,
    visual_positions,
)
from captum_intramodal.logit_lens import LogitLens

__all__ = ["Encoding", "ModelAdapter", "check_images"]

# Model types whose processor takes one list of pictures per prompt.
NESTED_IMAGES = ("idefics",)
# Model types that tell the answer from the prompt by its token type.
ANSWER_TYPES: dict[str, int] = {"paligemma": 1}

Prompt = str | Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Encoding:
    """Prompt, pictures and answer as one teacher-forced model input (batch of 1).

    Attributes:
        inputs (dict): keyword arguments of the model's forward.
        input_ids (Tensor): the decoder's tokens, int64 (sequence,), on the CPU.
        prompt_length (int): number of positions before the answer.
        visual_positions (Tensor): int64 (V,), on the CPU.
    """

    inputs: dict[str, Any]
    input_ids: Tensor
    prompt_length: int
    visual_positions: Tensor

    @property
    def answer_ids(self) -> list[int]:
        return self.input_ids[self.prompt_length :].tolist()

    def rows(self, states: Tensor) -> Tensor:
        """The rows of a decoder's states or logits that belong to ``input_ids``; visual tokens may stand before."""
        return states[len(states) - len(self.input_ids) :]


class ModelAdapter:
    r"""
    Binds a model and its processor, and knows what is the same for all of them: how a prompt with pictures becomes
    model inputs, at any picture size; how an answer is generated or appended; where the visual tokens are and which
    region of the picture each stands for (measured, see :mod:`captum_intramodal.geometry`).

    Args:

        model (PreTrainedModel): An image-text-to-text model, in any dtype, on any device.
        processor: Its processor, from ``AutoProcessor.from_pretrained``.
        video (bool, optional): Whether the pictures of a prompt are the frames of one video, all of one size.
                    Default: False

    Raises:
        TypeError: not a generating transformers model, or a processor without tokenizer or image processor.
        ValueError: a video for a model that takes none.
    """

    def __init__(self, model: Any, processor: Any, video: bool = False) -> None:
        # A compiled module would be compiled anew for every hook and picture size.
        model = getattr(model, "_orig_mod", model)
        if (
            not isinstance(model, torch.nn.Module)
            or not hasattr(model, "get_decoder")
            or not hasattr(model, "generate")
        ):
            raise TypeError(f"Expected a transformers model that generates text, got {type(model).__name__}.")
        if getattr(processor, "tokenizer", None) is None or getattr(processor, "image_processor", None) is None:
            raise TypeError(
                f"{type(processor).__name__} is not the processor of an image-text-to-text model (it needs a tokenizer "
                "and an image processor); load it with AutoProcessor.from_pretrained. A text-only model has no picture "
                "to explain."
            )
        if video and getattr(processor, "video_processor", None) is None:
            raise ValueError(f"{type(model).__name__} takes no videos; pass its frames as pictures.")
        self.video = video
        self.model: Any = model
        self.processor = processor
        self.tokenizer = processor.tokenizer

    @cached_property
    def lens(self) -> LogitLens:
        try:
            return LogitLens(self.model)
        except (ValueError, TypeError, RuntimeError, IndexError, KeyError, AttributeError):
            # Not every model runs on text alone. All-black pictures are dropped by some.
            picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
            inputs = self.prepare([picture], "describe")
            ids = [i for i in range(len(self.tokenizer)) if i not in set(self.tokenizer.all_special_ids)]
            return LogitLens(self.model, self._cast(self.encode(inputs, ids[:8]).inputs))

    @property
    def device(self) -> torch.device:
        """Where the model wants its inputs."""
        return input_device(self.model)

    def prompt_text(self, prompt: Prompt, n_images: int) -> str:
        """The prompt as the model reads it: in its chat template where it has one, with a placeholder per picture."""
        if isinstance(prompt, str):
            if not prompt.strip():
                raise ValueError("The prompt is empty; ask the model something about the picture.")
            shown = [{"type": "video"}] if self.video else [{"type": "image"}] * n_images
            content = [*shown, {"type": "text", "text": prompt}]
            messages: Sequence[Mapping[str, Any]] = [{"role": "user", "content": content}]
        else:
            messages = prompt
        if getattr(self.processor, "chat_template", None) or getattr(self.tokenizer, "chat_template", None):
            return str(self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
        if not isinstance(prompt, str):
            raise ValueError("This processor has no chat template; pass the prompt as a string instead of messages.")
        placeholder = getattr(self.processor, "image_token", None) or "<image>"
        return f"{placeholder * n_images}{prompt}"

    def prepare(self, images: Sequence[Image.Image | Tensor], prompt: Prompt) -> dict[str, Any]:
        """Model inputs for a prompt about pictures, as the processor makes them, on the model's device."""
        text = self.prompt_text(prompt, len(images))
        extra = self._tokenizing(text)
        if "mm_token_type_ids" in self._reads:
            extra["return_mm_token_type_ids"] = True
        if self.video:
            if len(sizes := {frame.shape[1:] if isinstance(frame, Tensor) else frame.size for frame in images}) > 1:
                raise ValueError(f"The frames of a video must have one size, got {sorted(map(tuple, sizes))}.")
            extra |= {"videos": [torch.stack([_channels_first(frame) for frame in images])], "do_sample_frames": False}
        else:
            nested = self.model.config.model_type in NESTED_IMAGES
            extra["images"] = [list(images)] if nested else list(images)
        batch = self.processor(text=[text], return_tensors="pt", **extra)
        inputs = {key: value.to(self.device) if isinstance(value, Tensor) else value for key, value in batch.items()}
        inputs.pop("labels", None)
        return self._begin_decoding(inputs) if self.is_encoder_decoder else inputs

    def _tokenizing(self, text: str) -> dict[str, Any]:
        """Options with which a prompt that a chat template began is not begun once more."""
        bos = self.tokenizer.bos_token
        return {"add_special_tokens": False} if bos and text.startswith(bos) else {}

    def prompt_positions(self, inputs: Mapping[str, Any], prompt: Prompt) -> tuple[Tensor, Tensor]:
        r"""
        The tokens of a prompt about one picture, the chat template's included, without what the processor puts in the
        place of the picture: as many at every size of the picture.

        Args:

            inputs (dict): What :meth:`prepare` makes of the picture and the prompt.
            prompt (str or Sequence[Mapping]): The prompt.

        Returns:
            **positions, ids** (*tuple[Tensor, Tensor]*):
                int64 (T,) each, on the CPU: places in the sequence that the model's text embeddings read (of an
                encoder-decoder whose encoder reads the prompt, the encoder's), and the tokens there.
        """
        read = inputs["input_ids"] if "input_ids" in inputs else self._decoder_ids(inputs)
        text = self.prompt_text(prompt, 1)
        plain = self.tokenizer(text, **self._tokenizing(text))["input_ids"]
        ids = read[0].tolist()
        blocks = SequenceMatcher(None, plain, ids, autojunk=False).get_matching_blocks()
        same = [block.b + i for block in blocks for i in range(block.size)]
        placeholder = image_token_id(self.model)
        positions = torch.tensor([i for i in same if ids[i] != placeholder], dtype=torch.int64)
        return positions, read[0].cpu()[positions]

    def _begin_decoding(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """What an encoder-decoder's decoder reads first: its start token, and the prompt if the encoder does not."""
        inputs.pop("decoder_attention_mask", None)
        prompt = inputs.pop("decoder_input_ids", None)
        if "input_ids" not in self._reads and "input_ids" in inputs:
            prompt = inputs.pop("input_ids")
            inputs.pop("attention_mask", None)
        ids = [] if prompt is None else prompt[0].tolist()
        start = self._decoder_start
        ids = ids if ids[:1] == [start] else [start, *ids]
        return inputs | {"decoder_input_ids": torch.tensor([ids], device=self.device)}

    def run(self, inputs: Mapping[str, Any]) -> Any:
        """One forward pass with the processor's inputs, in the model's dtype; keeps no cache."""
        return self.model(**self._cast(inputs), use_cache=False)

    def _cast(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        dtype = self.model.dtype
        return {
            key: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
            for key, value in inputs.items()
        }

    def generate(self, inputs: Mapping[str, Any], max_new_tokens: int = 128) -> list[int]:
        """Greedy answer as token ids, without the tokens that end it."""
        return self._strip_end(self._generate(inputs, max_new_tokens).sequences[0, self.sequence_length(inputs) :])

    def generate_with_logits(self, inputs: Mapping[str, Any], max_new_tokens: int = 128) -> tuple[list[int], Tensor]:
        """Greedy answer with the tokens that end it, and the model's logits for each of them, (tokens, vocabulary)."""
        output = self._generate(inputs, max_new_tokens, output_logits=True)
        return output.sequences[0, self.sequence_length(inputs) :].tolist(), torch.cat(output.logits)

    def sequence_length(self, inputs: Mapping[str, Any]) -> int:
        """Number of tokens that the decoder reads."""
        return int(self._decoder_ids(inputs).shape[1])

    def _decoder_ids(self, inputs: Mapping[str, Any]) -> Tensor:
        ids: Tensor = inputs["decoder_input_ids" if self.is_encoder_decoder else "input_ids"]
        return ids

    @torch.no_grad()
    def _generate(self, inputs: Mapping[str, Any], max_new_tokens: int, **options: Any) -> Any:
        prompt_ids = self._decoder_ids(inputs)[0]
        placeholders = prompt_ids[self.visual_positions(prompt_ids)].unique().tolist()
        return self.model.generate(
            **self._cast(inputs),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            # In the answer they would ask for the features of one more picture.
            suppress_tokens=placeholders or None,
            **({} if self.model.generation_config.pad_token_id is not None else {"pad_token_id": self._pad_token_id}),
            return_dict_in_generate=True,
            **options,
        )

    @cached_property
    def _reads(self) -> set[str]:
        """Names of the arguments of the model's forward."""
        return set(signature(self.model.forward).parameters)

    @property
    def is_encoder_decoder(self) -> bool:
        return bool(getattr(self.model.config, "is_encoder_decoder", False))

    @property
    def _decoder_start(self) -> int:
        configs = (self.model.generation_config, self.model.config, self.model.config.get_text_config(decoder=True))
        for name in ("decoder_start_token_id", "bos_token_id"):
            for config in configs:
                if isinstance(start := getattr(config, name, None), int):
                    return start
        raise ValueError(f"The config of {type(self.model).__name__} does not say with which token an answer begins.")

    @property
    def _picture_keys(self) -> set[str]:
        """Inputs that belong to the pictures; one may by chance be as long as the sequence."""
        return set(getattr(self.processor.image_processor, "model_input_names", ()))

    def visual_positions(self, input_ids: Tensor) -> Tensor:
        """Positions of the visual tokens, int64 (V,); none where pictures do not enter by placeholders."""
        if self.is_encoder_decoder or image_token_id(self.model) is None:
            return torch.empty(0, dtype=torch.int64, device=input_ids.device)
        return visual_positions(self.model, input_ids)

    @property
    def _pad_token_id(self) -> int | None:
        return self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id

    def _strip_end(self, answer: Sequence[int] | Tensor) -> list[int]:
        ids = [int(i) for i in answer]
        eos = getattr(self.model.generation_config, "eos_token_id", None)
        ends = {*(eos if isinstance(eos, list) else [eos]), self.tokenizer.eos_token_id, self.tokenizer.pad_token_id}
        while ids and ids[-1] in ends:
            ids = ids[:-1]
        return ids

    def tokenize_answer(self, answer: str | Sequence[int]) -> list[int]:
        """Ids of an answer given as text or as ids.

        Raises:
            ValueError: an empty answer, or one with words that the tokenizer does not know.
        """
        if not isinstance(answer, str):
            ids = [int(i) for i in answer]
            if bad := [i for i in ids if not 0 <= i < len(self.tokenizer)]:
                raise ValueError(f"Answer ids {bad[:5]} lie outside the vocabulary of {len(self.tokenizer)}.")
        else:
            ids = self.tokenizer(answer, add_special_tokens=False)["input_ids"]
            unknown = self.tokenizer.unk_token_id
            if unknown is not None and unknown in ids:
                known = [
                    w for w in answer.split() if unknown in self.tokenizer(w, add_special_tokens=False)["input_ids"]
                ]
                raise ValueError(f"The model's tokenizer cannot encode {', '.join(map(repr, known)) or repr(answer)}.")
        ids = self._strip_end(ids)
        if not ids:
            raise ValueError("The answer is empty; there is no word to explain.")
        return ids

    def encode(self, inputs: Mapping[str, Any], answer_ids: Sequence[int]) -> Encoding:
        """Appends an answer to a prompt's inputs for one teacher-forced pass; an encoder-decoder decodes it."""
        ids = self._decoder_ids(inputs)
        length = ids.shape[1]
        answer = torch.tensor([list(answer_ids)], dtype=ids.dtype, device=ids.device)
        decoded = torch.cat([ids, answer], dim=1)
        if self.is_encoder_decoder:
            none = torch.empty(0, dtype=torch.int64)
            return Encoding({**inputs, "decoder_input_ids": decoded}, decoded[0].cpu(), length, none)
        extended: dict[str, Any] = dict(inputs)
        for key, value in inputs.items():
            # Whatever runs along the sequence (masks, token types) goes on as at the prompt's last, textual position.
            along = isinstance(value, Tensor) and value.shape[:2] == (1, length) and not value.is_floating_point()
            if along and key not in self._picture_keys and key != "input_ids":
                more = value[:, -1:].expand(1, answer.shape[1], *value.shape[2:])
                if key == "token_type_ids":
                    more = more.new_full(more.shape, ANSWER_TYPES.get(self.model.config.model_type, int(value[0, -1])))
                extended[key] = torch.cat([value, more], dim=1)
        extended["input_ids"] = decoded
        visual = self.visual_positions(ids[0]).cpu()
        return Encoding(extended, extended["input_ids"][0].cpu(), length, visual)

    def geometry(self, image_sizes: Sequence[tuple[int, int]]) -> TokenGeometry:
        """Region of the picture that each visual token stands for, for pictures of these (width, height).

        Raises:
            ValueError: the decoder has no visual tokens, or their regions cannot be measured.
        """
        if self.is_encoder_decoder or image_token_id(self.model) is None:
            raise ValueError(f"{type(self.model).__name__} has no visual tokens in its decoder's sequence.")
        return cached_geometry(
            self.model, self.processor, lambda images: self.prepare(images, "describe"), tuple(image_sizes), self.video
        )

    def pixel_maps(self, image_sizes: Sequence[tuple[int, int]]) -> PixelMaps:
        """What each element of the processor's pixel tensors samples, for pictures of these (width, height)."""
        return cached_pixels(
            self.model, self.processor, lambda images: self.prepare(images, "describe"), tuple(image_sizes), self.video
        )


def check_images(images: Any) -> list[Image.Image]:
    """One or several PIL pictures, in RGB."""
    pictures = [images] if isinstance(images, Image.Image) else list(images)
    if not pictures or not all(isinstance(picture, Image.Image) for picture in pictures):
        raise TypeError(
            f"images must be one or several PIL images, got {[type(p).__name__ for p in pictures] or 'none'}; "
            "open a file with PIL.Image.open(path)."
        )
    return [picture.convert("RGB") for picture in pictures]


def _channels_first(frame: Image.Image | Tensor) -> Tensor:
    """A frame as videos take them: uint8 (3, height, width), or a float tensor as it is."""
    return frame if isinstance(frame, Tensor) else torch.from_numpy(np.array(frame)).permute(2, 0, 1)
