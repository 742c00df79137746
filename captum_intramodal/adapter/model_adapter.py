r"""How is any model and its processor used in the same way? One object with all the package needs of the two."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from functools import cached_property, partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import ModelOutput

from captum_intramodal._utils.memory import WORKING_MEMORY
from captum_intramodal.adapter.encoding import Encoding, encode_batch
from captum_intramodal.adapter.generation import (
    generate_answers,
    generate_with_logits,
    generate_with_states,
    tokenize_answer,
)
from captum_intramodal.adapter.prompts import (
    Prompt,
    cast_inputs,
    decoder_ids,
    find_prompt_tokens,
    forward_arguments,
    pad_token_id,
    prepare_inputs,
    render_prompt,
    sequence_starts,
    visual_token_positions,
)
from captum_intramodal.adapter.trials import (
    TRIAL_PROMPT,
    batching_preserves_outputs,
    stacking_preserves_outputs,
    trial_images,
    trial_succeeds,
)
from captum_intramodal.errors import UnsupportedModelError
from captum_intramodal.geometry.cache import cached_geometry, cached_pixels
from captum_intramodal.geometry.pixel_map import PixelMaps
from captum_intramodal.geometry.token_geometry import TokenGeometry
from captum_intramodal.models.decoder import input_device
from captum_intramodal.models.generation_states import StepRankings, StepStates
from captum_intramodal.models.logit_lens import LogitLens

__all__ = ["ModelAdapter"]

# Calibrating a lens takes a forward pass.
_LENSES: WeakKeyDictionary[nn.Module, LogitLens] = WeakKeyDictionary()


class ModelAdapter:
    r"""
    ModelAdapter is a model and its processor, with one interface for all model families: preparing prompts and images,
    generating answers, teacher-forced passes, and the geometry of the visual tokens, which is measured on the model
    (see :mod:`captum_intramodal.geometry`).

    Args:

        model (PreTrainedModel): An image-text-to-text model, in any dtype, on any device.
        processor (ProcessorMixin): Its processor, from ``AutoProcessor.from_pretrained``.
        video (bool, optional): Whether the images of a prompt are the frames of one video, all of one size.
                    Default: False
        working_memory (int, optional): Bytes that a step which runs in parts uses at a time.
                    Default: 16 MiB

    Raises:
        TypeError: not a generating transformers model, or a processor without tokenizer or image processor.
        UnsupportedModelError: a video for a model that takes none.

    Examples::

        >>> from captum_intramodal import ModelAdapter
        >>> adapter = ModelAdapter(model, processor)
        >>> inputs = adapter.prepare([image], "describe the picture.")
        >>> answer = adapter.generate(inputs)
        >>> encoding = adapter.encode(inputs, answer)
        >>> adapter.run(encoding.inputs).logits.shape[1] == len(encoding.input_ids)
        True
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        video: bool = False,
        working_memory: int = WORKING_MEMORY,
    ) -> None:
        # A compiled module would be recompiled for every hook and image size.
        model = getattr(model, "_orig_mod", model)
        if not isinstance(model, nn.Module) or not hasattr(model, "get_decoder") or not hasattr(model, "generate"):
            raise TypeError(f"Expected a transformers model that generates text, got {type(model).__name__}.")
        if getattr(processor, "tokenizer", None) is None or getattr(processor, "image_processor", None) is None:
            raise TypeError(
                f"{type(processor).__name__} is not the processor of an image-text-to-text model (it needs a tokenizer "
                "and an image processor); load it with AutoProcessor.from_pretrained. A text-only model has no image "
                "to explain."
            )
        if video and getattr(processor, "video_processor", None) is None:
            raise UnsupportedModelError(f"{type(model).__name__} takes no videos; pass its frames as images.")
        self.video = video
        self.working_memory = working_memory
        self.model: PreTrainedModel = model
        self.processor = processor
        self.tokenizer: PreTrainedTokenizerBase = processor.tokenizer

    @cached_property
    def lens(self) -> LogitLens:
        """The model's logit lens."""
        known = _LENSES.get(self.model)
        if known is None or not known.fits(self.model):
            known = self._make_lens()
            if known.tail == "fast":  # A lens that replays the model's tail holds a reference to the model.
                _LENSES[self.model] = known
        lens = copy(known)
        lens.working_memory = self.working_memory
        return lens

    def _make_lens(self) -> LogitLens:
        try:
            return LogitLens(self.model, working_memory=self.working_memory)
        except Exception:  # Not every model runs on text alone; those that do not raise anything.
            inputs = self.prepare(trial_images((64, 64), video=False), TRIAL_PROMPT)
            ids = [i for i in range(len(self.tokenizer)) if i not in set(self.tokenizer.all_special_ids)]
            sample = cast_inputs(self.model, self.encode(inputs, ids[:8]).inputs)
            return LogitLens(self.model, sample, self.working_memory)

    @cached_property
    def batches(self) -> bool:
        """Whether examples in a left-padded batch get the same outputs as alone; tried once, on two examples."""
        trial = partial(batching_preserves_outputs, self.model, self.processor, self.run, self.video)
        return not self.is_encoder_decoder and trial_succeeds(self.model, trial)

    @cached_property
    def stacks(self) -> bool:
        """Whether inputs of equal shapes get the same outputs stacked (:func:`stack_inputs`) as alone; tried once."""
        trial = partial(stacking_preserves_outputs, self.model, self.processor, self.run, self.video)
        return trial_succeeds(self.model, trial)

    @property
    def device(self) -> torch.device:
        """The device of the model's inputs."""
        return input_device(self.model)

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether the model is an encoder-decoder, whose decoder's sequence is apart from the encoder's."""
        return bool(self.model.config.is_encoder_decoder)

    @property
    def baseline_token(self) -> int:
        """The token that replaces a removed one: the unknown token, or else the padding or end token.

        Raises:
            UnsupportedModelError: the tokenizer has none of them.
        """
        for token in (self.tokenizer.unk_token_id, pad_token_id(self.tokenizer)):
            if token is not None:
                return int(token)
        raise UnsupportedModelError(
            f"{type(self.tokenizer).__name__} has no unknown, padding or end token; pass the id of a replacement."
        )

    def prompt_text(self, prompt: Prompt, n_images: int) -> str:
        r"""
        Render a prompt in the model's chat template, if it has one, with a placeholder for each image.

        Args:

            prompt (str or Sequence[Mapping]): The prompt, or messages in transformers' chat format.
            n_images (int): Number of images; they precede a prompt given as a string.

        Returns:
            *str*: the text that the processor tokenizes.

        Raises:
            InvalidInputError: an empty prompt, or messages for a processor without a chat template.
        """
        return render_prompt(self.processor, prompt, n_images, self.video)

    def prompt_positions(self, inputs: Mapping[str, Any], prompt: Prompt) -> tuple[Tensor, Tensor]:
        r"""
        Find the tokens of a prompt about one image, including those of the chat template, but not those that stand for
        the image. Their number does not depend on the image's size.

        Args:

            inputs (Mapping): Result of :meth:`prepare` for the image and the prompt.
            prompt (str or Sequence[Mapping]): The prompt.

        Returns:
            **positions, ids** (*tuple[Tensor, Tensor]*):
                int64 (T,) each, on the CPU: positions in the sequence that the text embeddings process (the encoder's
                if an encoder takes the prompt), and the tokens there.
        """
        return find_prompt_tokens(self.model, self.processor, inputs, self.prompt_text(prompt, 1))

    def prepare(self, images: Sequence[Image.Image | Tensor], prompt: Prompt) -> dict[str, Any]:
        """Process one prompt and its images into model inputs, see :meth:`prepare_batch`."""
        return self.prepare_batch([images], [prompt])

    def prepare_batch(
        self, images: Sequence[Sequence[Image.Image | Tensor]], prompts: Sequence[Prompt]
    ) -> dict[str, Any]:
        r"""
        Process prompts, each with its own images, into model inputs: left-padded, on the model's device.

        Args:

            images (Sequence[Sequence[PIL.Image.Image or Tensor]]): The images of each prompt.
            prompts (Sequence): One prompt per example, see :meth:`prompt_text`.

        Returns:
            *dict*: keyword arguments of the model's forward, with ``input_ids`` (B, sequence).

        Raises:
            InvalidInputError: prompts that cannot be tokenized together, or placeholders that do not match the images.
            UnsupportedModelError: the model or its processor does not support several prompts at a time. Processors
                raise errors of their own if they cannot stack images of different sizes.
        """
        return prepare_inputs(self.model, self.processor, images, prompts, self.video)

    def prepare_together(
        self, images: Sequence[Sequence[Image.Image | Tensor]], prompts: Sequence[Prompt]
    ) -> Iterator[tuple[list[int], dict[str, Any]]]:
        """Yield the indices of some prompts and their inputs: one batch if that preserves the model's outputs
        (:attr:`batches`), or else one prompt at a time."""
        if len(prompts) > 1 and self.batches:
            try:
                inputs = self.prepare_batch(images, prompts)
            except Exception:  # Some images cannot be stacked. An error in the arguments is raised again below.
                pass
            else:
                yield list(range(len(prompts))), inputs
                return
        for index, (own, prompt) in enumerate(zip(images, prompts, strict=True)):
            yield [index], self.prepare(own, prompt)

    def starts(self, inputs: Mapping[str, Any]) -> list[int]:
        """Return the position of each prompt's first token in a left-padded batch."""
        return sequence_starts(self.model, inputs)

    def sequence_length(self, inputs: Mapping[str, Any]) -> int:
        """Return the length of the decoder's sequence, padding included."""
        return int(decoder_ids(self.model, inputs).shape[1])

    def visual_positions(self, input_ids: Tensor) -> Tensor:
        """Return the positions of the visual tokens in one sequence, int64 (V,); the sequence may be a row of a
        left-padded batch. V is 0 for models whose images do not enter by placeholders."""
        return visual_token_positions(self.model, input_ids)

    def run(self, inputs: Mapping[str, Any]) -> ModelOutput:
        """Run one forward pass, with the inputs in the model's dtype and without a cache."""
        return self.model(**cast_inputs(self.model, inputs), use_cache=False)

    def logits(self, inputs: Mapping[str, Any], positions: Tensor) -> Tensor:
        r"""
        Compute logits at some positions in one forward pass; if the model can, its head skips the others.

        Args:

            inputs (Mapping): As for :meth:`run`.
            positions (Tensor): Positions counted from the end, negative, int64 (n,), since padding or visual tokens may
                        precede the prompt.

        Returns:
            *Tensor*: (B, n, vocabulary).
        """
        n = len(positions)
        # With all positions requested, we cannot tell whether the model honors logits_to_keep.
        few = "logits_to_keep" in forward_arguments(self.model) and n < self.sequence_length(inputs)
        kept = {"logits_to_keep": positions.to(self.device)} if few else {}
        logits: Tensor = self.run({**inputs, **kept}).logits
        return logits if few and logits.shape[1] == n else logits[:, positions.to(logits.device)]

    def generate(self, inputs: Mapping[str, Any], max_new_tokens: int = 128) -> list[int]:
        """Generate a greedy answer as token ids, without the tokens that end it."""
        return self.generate_batch(inputs, max_new_tokens)[0]

    def generate_batch(self, inputs: Mapping[str, Any], max_new_tokens: int = 128) -> list[list[int]]:
        """Generate a greedy answer to each prompt of a left-padded batch, without the tokens that end it."""
        return generate_answers(self.model, self.tokenizer, inputs, max_new_tokens)

    def generate_with_logits(self, inputs: Mapping[str, Any], max_new_tokens: int = 128) -> tuple[list[int], Tensor]:
        """Generate a greedy answer with the tokens that end it; return its logits as well, (tokens, vocabulary)."""
        return generate_with_logits(self.model, self.tokenizer, inputs, max_new_tokens)

    def generate_with_states(
        self,
        inputs: Mapping[str, Any],
        max_new_tokens: int,
        layers: Sequence[nn.Module],
        kept: Sequence[Tensor],
        k: int | None = None,
    ) -> tuple[list[list[int]], StepStates | None, StepRankings | None]:
        r"""
        Generate answers as :meth:`generate_batch` does, and capture hidden states and rankings meanwhile, which saves a
        second pass.

        Args:

            inputs (Mapping): Inputs of a left-padded batch of prompts.
            max_new_tokens (int): Maximum length of an answer.
            layers (Sequence[torch.nn.Module]): The decoder layers to capture.
            kept (Sequence[Tensor]): For each prompt the positions to capture, not counting padding, int64.
            k (int, optional): Length of the rankings.
                        Default: None, no rankings

        Returns:
            **answers, states, rankings** (*tuple[list[list[int]], StepStates or None, StepRankings or None]*):
                States also cover the tokens of the answers; None if the model does not process its answer token by
                token. Rankings are by the model's logits; None if the lens's own rankings differ or are more precise.
        """
        lens = None if k is None else self.lens
        return generate_with_states(self.model, self.tokenizer, inputs, max_new_tokens, layers, kept, lens, k or 0)

    def tokenize_answer(self, answer: str | Sequence[int]) -> list[int]:
        r"""
        Return the token ids of an answer given as text or as ids, without the tokens that end it.

        Args:

            answer (str or Sequence[int]): The answer.

        Returns:
            *list[int]*: at least one id.

        Raises:
            EmptyAnswerError: an answer without tokens.
            InvalidInputError: words that the tokenizer does not know, or ids outside the vocabulary.
        """
        return tokenize_answer(self.model, self.tokenizer, answer)

    def encode(self, inputs: Mapping[str, Any], answer_ids: Sequence[int]) -> Encoding:
        """Append an answer to one prompt's inputs for a teacher-forced pass, see :meth:`encode_batch`."""
        return self.encode_batch(inputs, [answer_ids])[0]

    def encode_batch(self, inputs: Mapping[str, Any], answers: Sequence[Sequence[int]]) -> list[Encoding]:
        """Append an answer to each prompt of a left-padded batch; all padding stays on the left."""
        return encode_batch(self.model, self.processor, inputs, answers)

    def geometry(self, image_sizes: Sequence[tuple[int, int]]) -> TokenGeometry:
        r"""
        Measure which region of the image each visual token covers.

        Args:

            image_sizes (Sequence[tuple[int, int]]): (width, height) of each image.

        Returns:
            TokenGeometry: the same object for the same sizes.

        Raises:
            NoTokenGeometryError: the decoder processes no visual tokens, or their regions cannot be measured.
        """
        return cached_geometry(
            self.model, self.processor, partial(self.prepare, prompt=TRIAL_PROMPT), tuple(image_sizes), self.video
        )

    def pixel_maps(self, image_sizes: Sequence[tuple[int, int]]) -> PixelMaps:
        r"""
        Measure which pixels of the image each element of the processor's pixel tensors samples.

        Args:

            image_sizes (Sequence[tuple[int, int]]): (width, height) of each image.

        Returns:
            PixelMaps: the same object for the same sizes.
        """
        return cached_pixels(
            self.model, self.processor, partial(self.prepare, prompt=TRIAL_PROMPT), tuple(image_sizes), self.video
        )
