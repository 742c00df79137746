r"""A transformers image-text-to-text model and its processor, bound together: prompts, answers, hidden states."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from copy import copy
from difflib import SequenceMatcher
from functools import cached_property
from inspect import signature
from typing import Any
from weakref import WeakKeyDictionary

import torch
from PIL import Image
from torch import Tensor

from captum_intramodal._utils.image import stack_frames
from captum_intramodal._utils.memory import WORKING_MEMORY
from captum_intramodal.adapter.encoding import Encoding, append_left_padded, stack_inputs
from captum_intramodal.adapter.prompts import Prompt
from captum_intramodal.adapter.trials import logits_gap, noise_image
from captum_intramodal.geometry.cache import cached_geometry, cached_pixels
from captum_intramodal.geometry.pixel_map import PixelMaps, Size
from captum_intramodal.geometry.token_geometry import TokenGeometry
from captum_intramodal.models.decoder import input_device
from captum_intramodal.models.families import family_of
from captum_intramodal.models.generation_states import StepRankings, StepStates
from captum_intramodal.models.hooks import evaluation_mode
from captum_intramodal.models.logit_lens import LogitLens
from captum_intramodal.models.placeholders import image_token_id, visual_positions

__all__ = ["ModelAdapter"]

# How a model's logits follow from its states is found out once.
_LENSES: WeakKeyDictionary[torch.nn.Module, LogitLens] = WeakKeyDictionary()


class ModelAdapter:
    r"""
    Binds a model and its processor, and knows what is the same for all of them: how a prompt with images becomes
    model inputs, at any image size; how an answer is generated or appended; where the visual tokens are and which
    region of the image each stands for (measured, see :mod:`captum_intramodal.geometry`).

    Args:

        model (PreTrainedModel): An image-text-to-text model, in any dtype, on any device.
        processor: Its processor, from ``AutoProcessor.from_pretrained``.
        video (bool, optional): Whether the images of a prompt are the frames of one video, all of one size.
                    Default: False
        working_memory (int, optional): Bytes that a step which works in parts takes at a time.
                    Default: 16 MiB

    Raises:
        TypeError: not a generating transformers model, or a processor without tokenizer or image processor.
        ValueError: a video for a model that takes none.
    """

    def __init__(self, model: Any, processor: Any, video: bool = False, working_memory: int = WORKING_MEMORY) -> None:
        # A compiled module would be compiled anew for every hook and image size.
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
                "and an image processor); load it with AutoProcessor.from_pretrained. A text-only model has no image "
                "to explain."
            )
        if video and getattr(processor, "video_processor", None) is None:
            raise ValueError(f"{type(model).__name__} takes no videos; pass its frames as images.")
        self.video = video
        self.working_memory = working_memory
        self.model: Any = model
        self.processor = processor
        self.tokenizer = processor.tokenizer

    @cached_property
    def lens(self) -> LogitLens:
        known = _LENSES.get(self.model)
        if known is None or not known.fits(self.model):
            known = self._make_lens()
            if known.tail == "fast":  # Others hold on to their model.
                _LENSES[self.model] = known
        lens = copy(known)
        lens.working_memory = self.working_memory
        return lens

    def _make_lens(self) -> LogitLens:
        try:
            return LogitLens(self.model, working_memory=self.working_memory)
        except (ValueError, TypeError, RuntimeError, IndexError, KeyError, AttributeError):
            # Not every model runs on text alone. All-black images are dropped by some.
            inputs = self.prepare([noise_image((64, 64))], "describe")
            ids = [i for i in range(len(self.tokenizer)) if i not in set(self.tokenizer.all_special_ids)]
            return LogitLens(self.model, self._cast(self.encode(inputs, ids[:8]).inputs), self.working_memory)

    @cached_property
    def batches(self) -> bool:
        """Whether the model says the same of the examples of a left-padded batch as of each alone: tried with two."""
        if self.is_encoder_decoder:
            return False
        images = [self.trial_images(size) for size in ((96, 64), (200, 136))]
        prompts = ["describe", "describe describe describe"]
        try:
            with evaluation_mode(self.model):
                together = self._try_batch(images, prompts)
                alone = [self._try_batch([shown], [p])[0] for shown, p in zip(images, prompts, strict=True)]
        except Exception:  # Whatever a processor or model raises that was not made for batches.
            return False
        return all(
            torch.equal(ids, expected_ids)
            and all(logits_gap(*pair) <= self.tolerance for pair in zip(logits, expected, strict=False))
            for (ids, logits), (expected_ids, expected) in zip(together, alone, strict=True)
        )

    @cached_property
    def stacks(self) -> bool:
        """Whether inputs of single prompts, stacked by :func:`stack_inputs`, are read as each alone: tried with two."""
        images = [self.trial_images((96, 64), seed) for seed in (0, 1)]
        try:
            with evaluation_mode(self.model):
                answer = self.tokenize_answer("describe")
                inputs = [self.encode(self.prepare(shown, "describe"), answer).inputs for shown in images]
                together = self.run(stack_inputs(inputs)).logits
                gaps = [
                    logits_gap(logits[-1:], self.run(single).logits[0, -1:])
                    for logits, single in zip(together, inputs, strict=True)
                ]
        except Exception:  # Whatever a model raises that was not made for batches.
            return False
        return max(gaps) <= self.tolerance

    @property
    def tolerance(self) -> float:
        """Largest :func:`logits_gap` between two ways of running the model that say the same."""
        return 1e-3 if self.model.dtype in (torch.float32, torch.float64) else 5e-2

    def trial_images(self, size: Size, seed: int = 0) -> list[Image.Image]:
        """Noise, as a prompt's image or as the frames of its video, to try on the model what it can do."""
        return [noise_image(size, seed)] * (2 if self.video else 1)

    def _try_batch(self, images: Sequence[Any], prompts: Sequence[str]) -> list[tuple[Tensor, list[Tensor]]]:
        """Per example its ids, and the logits of an answer (the prompt's words) and of two generated tokens."""
        inputs = self.prepare_batch(images, prompts)
        encodings = self.encode_batch(inputs, [self.tokenize_answer(prompt) for prompt in prompts])
        forced = self.run(encodings[0].inputs).logits
        steps = self._generate(inputs, 2, output_logits=True, min_new_tokens=0).logits
        return [
            (e.input_ids, [e.rows(forced[e.row])[-len(e.answer_ids) :], *(step[e.row] for step in steps)])
            for e in encodings
        ]

    @property
    def device(self) -> torch.device:
        """Where the model wants its inputs."""
        return input_device(self.model)

    def prompt_text(self, prompt: Prompt, n_images: int) -> str:
        """The prompt as the model reads it: in its chat template where it has one, with a placeholder per image."""
        if isinstance(prompt, str):
            if not prompt.strip():
                raise ValueError("The prompt is empty; ask the model something about the image.")
            shown = [{"type": "video"}] if self.video else [{"type": "image"}] * n_images
            content = [*shown, {"type": "text", "text": prompt}]
            messages: Sequence[Mapping[str, Any]] = [{"role": "user", "content": content}]
        else:
            messages = prompt
        if getattr(self.processor, "chat_template", None) or getattr(self.tokenizer, "chat_template", None):
            return str(self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
        if not isinstance(prompt, str):
            raise ValueError("This processor has no chat template; pass the prompt as a string instead of messages.")
        return f"{self._placeholder * n_images}{prompt}"

    def prepare(self, images: Sequence[Image.Image | Tensor], prompt: Prompt) -> dict[str, Any]:
        """Model inputs for a prompt about images, as the processor makes them, on the model's device."""
        return self.prepare_batch([images], [prompt])

    def prepare_batch(
        self, images: Sequence[Sequence[Image.Image | Tensor]], prompts: Sequence[Prompt]
    ) -> dict[str, Any]:
        r"""
        Model inputs for several prompts, each about images of its own, as the processor makes them, left-padded and
        on the model's device.

        Args:

            images (Sequence[Sequence[PIL.Image.Image]]): The images of each prompt.
            prompts (Sequence): One per example, see :meth:`prompt_text`.

        Returns:
            *dict*: keyword arguments of the model's forward, with ``input_ids`` (B, sequence).

        Raises:
            ValueError: a processor that does not pad several prompts on the left. Others raise errors of their own
                where they cannot stack images of different sizes.
        """
        texts: list[Any] = [self.prompt_text(prompt, len(shown)) for prompt, shown in zip(prompts, images, strict=True)]
        extra, *others = [self._tokenizing(text) for text in texts]
        if any(other != extra for other in others):
            raise ValueError(
                f"Some prompts begin with {self.tokenizer.bos_token}, some do not; they cannot be tokenized together."
            )
        if "mm_token_type_ids" in self.reads:
            extra["return_mm_token_type_ids"] = True
        several = len(texts) > 1
        if several:
            extra |= {"padding": True, "padding_side": "left"}
        if self.video:
            extra |= {
                "videos": [stack_frames(frames) for frames in images],
                "do_sample_frames": False,
                "return_metadata": True,  # Some write each frame's time into the prompt.
            }
        elif family_of(self.model.config).interleaves_images:
            texts = [self._interleave(text, shown) for text, shown in zip(texts, images, strict=True)]
        else:
            extra["images"] = [list(shown) for shown in images] if several else list(images[0])
        batch = self.processor(text=texts, return_tensors="pt", **extra)
        inputs = {key: value.to(self.device) if isinstance(value, Tensor) else value for key, value in batch.items()}
        for name in ("labels", "video_metadata"):  # Nothing that the model reads.
            inputs.pop(name, None)
        if self.is_encoder_decoder:
            if several:
                raise ValueError(f"{type(self.model).__name__} is an encoder-decoder; it reads one prompt at a time.")
            return self._begin_decoding(inputs)
        if several:
            mask = inputs.get("attention_mask")
            if mask is None or mask.shape != inputs["input_ids"].shape or bool((mask.long().diff(dim=1) < 0).any()):
                raise ValueError(f"{type(self.processor).__name__} does not pad several prompts on the left.")
        return inputs

    def _interleave(self, text: str, images: Sequence[Any]) -> list[Any]:
        """A prompt's texts and images in their order; such processors begin it themselves."""
        first, *others = text.removeprefix(self.tokenizer.bos_token or "").split(self._placeholder)
        if len(others) != len(images):
            raise ValueError(f"The prompt has {len(others)} places for images, but there are {len(images)}.")
        pieces: list[Any] = [first]
        for image, piece in zip(images, others, strict=True):
            pieces += [image, piece]
        return [piece for piece in pieces if not isinstance(piece, str) or piece.strip()]

    @property
    def _placeholder(self) -> str:
        return getattr(self.processor, "image_token", None) or "<image>"

    def prepare_together(
        self, images: Sequence[Sequence[Image.Image | Tensor]], prompts: Sequence[Prompt]
    ) -> Iterator[tuple[list[int], dict[str, Any]]]:
        """The numbers of some prompts and their inputs: all in one batch where that says the same as one by one."""
        if len(prompts) > 1 and self.batches:
            try:
                inputs = self.prepare_batch(images, prompts)
            except Exception:  # These images cannot be stacked; an error of the caller's comes again below.
                pass
            else:
                yield list(range(len(prompts))), inputs
                return
        for index, (shown, prompt) in enumerate(zip(images, prompts, strict=True)):
            yield [index], self.prepare(shown, prompt)

    def visual_prefix(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs as far as the states of the visual tokens depend on them: up to the last one, and the special
        tokens that close its image."""
        ids = self._decoder_ids(inputs)
        if family_of(self.model.config).attends_ahead:
            return dict(inputs)
        placeholders = torch.cat([row[self.visual_positions(row)] for row in ids]).unique()
        columns = torch.isin(ids, placeholders).any(0)
        special = torch.isin(ids, torch.tensor(self.tokenizer.all_special_ids, device=ids.device)).all(0) | columns
        last = int(columns.nonzero()[-1])
        end = last + int(special[last:].long().cumprod(0).sum())
        return {key: value[:, :end] if self._runs_along(key, value, ids) else value for key, value in inputs.items()}

    def _runs_along(self, key: str, value: Any, ids: Tensor) -> bool:
        """Whether an input has an entry for each token of the sequence, as masks and token types have."""
        along = isinstance(value, Tensor) and value.shape[:2] == ids.shape and not value.is_floating_point()
        return along and (value is ids or key not in self._image_keys)

    def starts(self, inputs: Mapping[str, Any]) -> list[int]:
        """Where each prompt of a left-padded batch begins in its sequence."""
        count, length = self._decoder_ids(inputs).shape
        return [0] if count == 1 else (length - inputs["attention_mask"].sum(1)).tolist()

    def _tokenizing(self, text: str) -> dict[str, Any]:
        """Options with which a prompt that a chat template began is not begun once more."""
        bos = self.tokenizer.bos_token
        return {"add_special_tokens": False} if bos and text.startswith(bos) else {}

    def prompt_positions(self, inputs: Mapping[str, Any], prompt: Prompt) -> tuple[Tensor, Tensor]:
        r"""
        The tokens of a prompt about one image, the chat template's included, without what the processor puts in the
        place of the image: as many at every size of the image.

        Args:

            inputs (dict): What :meth:`prepare` makes of the image and the prompt.
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
        if "input_ids" not in self.reads and "input_ids" in inputs:
            prompt = inputs.pop("input_ids")
            inputs.pop("attention_mask", None)
        ids = [] if prompt is None else prompt[0].tolist()
        start = self._decoder_start
        ids = ids if ids[:1] == [start] else [start, *ids]
        return inputs | {"decoder_input_ids": torch.tensor([ids], device=self.device)}

    def run(self, inputs: Mapping[str, Any]) -> Any:
        """One forward pass with the processor's inputs, in the model's dtype; keeps no cache."""
        return self.model(**self._cast(inputs), use_cache=False)

    def logits(self, inputs: Mapping[str, Any], positions: Tensor) -> Tensor:
        r"""
        Logits of one forward pass at some positions; the head need not run over the others.

        Args:

            inputs (Mapping): Of :meth:`run`.
            positions (Tensor): Counted from the end, negative, int64 (n,): there may be visual tokens or padding before
                        the prompt.

        Returns:
            *Tensor* (B, n, vocabulary).
        """
        n = len(positions)
        # Of as many positions as there are one could not tell whether the model heeded them.
        few = "logits_to_keep" in self.reads and n < self.sequence_length(inputs)
        kept = {"logits_to_keep": positions.to(self.device)} if few else {}
        logits: Tensor = self.run({**inputs, **kept}).logits
        return logits if few and logits.shape[1] == n else logits[:, positions.to(logits.device)]

    def _cast(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        dtype = self.model.dtype
        return {
            key: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
            for key, value in inputs.items()
        }

    def generate(self, inputs: Mapping[str, Any], max_new_tokens: int = 128) -> list[int]:
        """Greedy answer as token ids, without the tokens that end it."""
        return self.generate_batch(inputs, max_new_tokens)[0]

    def generate_batch(self, inputs: Mapping[str, Any], max_new_tokens: int = 128) -> list[list[int]]:
        """Greedy answer to each prompt of a left-padded batch as token ids, without the tokens that end it."""
        answers = self._generate(inputs, max_new_tokens).sequences[:, self.sequence_length(inputs) :]
        return [self._strip_end(self._until_end(answer.tolist())) for answer in answers]

    def generate_with_states(
        self,
        inputs: Mapping[str, Any],
        max_new_tokens: int,
        layers: Sequence[torch.nn.Module],
        kept: Sequence[Tensor],
        k: int | None = None,
    ) -> tuple[list[list[int]], StepStates | None, StepRankings | None]:
        r"""
        As :meth:`generate_batch`, and what the model computes meanwhile, so that neither the answers nor the vocabulary
        need be read again.

        Args:

            inputs (Mapping): A left-padded batch of prompts.
            max_new_tokens (int): Where an answer ends at the latest.
            layers (Sequence[torch.nn.Module]): The layers to read.
            kept (Sequence[Tensor]): For each prompt the positions to read, without padding, int64.
            k (int, optional): Length of the rankings.
                        Default: None, no rankings

        Returns:
            **answers, states, rankings** (*tuple[list[list[int]], StepStates or None, StepRankings or None]*):
                The states, of all tokens of the answers too; None if the model does not read its answer token by token.
                Rankings by the logits; None if the lens would read other ones, or finer ones.
        """
        length = self.sequence_length(inputs)
        columns = [start + positions for start, positions in zip(self.starts(inputs), kept, strict=True)]
        states = StepStates(layers, columns, length)
        rankings = StepRankings(self.lens, k) if k is not None and self.lens.ranks_as_generated else None
        with states.recorded(), rankings.recorded() if rankings else nullcontext():
            # One token more: a model does not read the last one.
            generated = self._generate(inputs, max_new_tokens + 1).sequences[:, length:]
        answers = [self._strip_end(self._until_end(answer.tolist())[:max_new_tokens]) for answer in generated]
        count = generated.shape[1]
        if not states.complete(count):
            return answers, None, None
        return answers, states, rankings if rankings and rankings.complete(count) else None

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
        prompt_ids = self._decoder_ids(inputs)
        placeholders = torch.cat([ids[self.visual_positions(ids)] for ids in prompt_ids]).unique().tolist()
        return self.model.generate(
            **self._cast(inputs),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            # In the answer they would ask for the features of one more image.
            suppress_tokens=placeholders or None,
            **({} if self.model.generation_config.pad_token_id is not None else {"pad_token_id": self._pad_token_id}),
            return_dict_in_generate=True,
            **options,
        )

    @cached_property
    def reads(self) -> set[str]:
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
    def _image_keys(self) -> set[str]:
        """Inputs that belong to the images; one may by chance be as long as the sequence."""
        return set(getattr(self.processor.image_processor, "model_input_names", ()))

    def visual_positions(self, input_ids: Tensor) -> Tensor:
        """Positions of the visual tokens in one sequence, which may be a row of a left-padded batch, int64 (V,); none
        where images do not enter by placeholders."""
        if self.is_encoder_decoder or image_token_id(self.model) is None:
            return torch.empty(0, dtype=torch.int64, device=input_ids.device)
        return visual_positions(self.model, input_ids)

    @property
    def _pad_token_id(self) -> int | None:
        return self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id

    @property
    def baseline_token(self) -> int:
        """The token that stands in the place of a removed one: the unknown token, else padding or end.

        Raises:
            ValueError: the tokenizer has none of them.
        """
        for token in (self.tokenizer.unk_token_id, self._pad_token_id):
            if token is not None:
                return int(token)
        raise ValueError(f"{type(self.tokenizer).__name__} has no unknown, padding or end token; name one yourself.")

    @property
    def _ends(self) -> list[int | None]:
        eos = getattr(self.model.generation_config, "eos_token_id", None)
        return eos if isinstance(eos, list) else [eos]

    def _until_end(self, generated: list[int]) -> list[int]:
        """In a batch, answers that ended early are padded."""
        return generated[: next((i for i, token in enumerate(generated) if token in self._ends), None)]

    def _strip_end(self, answer: Sequence[int] | Tensor) -> list[int]:
        ids = [int(i) for i in answer]
        ends = {*self._ends, self.tokenizer.eos_token_id, self.tokenizer.pad_token_id}
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
        return self.encode_batch(inputs, [answer_ids])[0]

    def encode_batch(self, inputs: Mapping[str, Any], answers: Sequence[Sequence[int]]) -> list[Encoding]:
        """Appends an answer to each prompt of a left-padded batch. All padding stays on the left."""
        name = "decoder_input_ids" if self.is_encoder_decoder else "input_ids"
        shape = inputs[name].shape
        extended: dict[str, Any] = dict(inputs)
        for key, value in inputs.items():
            # Whatever runs along the sequence goes on as at the prompt's last, textual position.
            if key == name:
                more = [torch.tensor(list(answer), dtype=value.dtype, device=value.device) for answer in answers]
                extended[key] = append_left_padded(value, more, self._pad_token_id or 0)
            elif not self.is_encoder_decoder and self._runs_along(key, value, inputs[name]):
                last = value[:, -1:]
                answer_type = family_of(self.model.config).answer_token_type
                if key == "token_type_ids" and answer_type is not None:
                    last = torch.full_like(last, answer_type)
                more = [end.expand(len(answer), *end.shape[1:]) for end, answer in zip(last, answers, strict=True)]
                extended[key] = append_left_padded(value, more, 0)
        encodings = []
        for row, (start, answer) in enumerate(zip(self.starts(inputs), answers, strict=True)):
            length = shape[1] - start
            ids = extended[name][row, -length - len(answer) :].cpu()
            encodings.append(Encoding(extended, ids, length, self.visual_positions(ids[:length]), row, shape[0]))
        return encodings

    def geometry(self, image_sizes: Sequence[tuple[int, int]]) -> TokenGeometry:
        """Region of the image that each visual token stands for, for images of these (width, height).

        Raises:
            ValueError: the decoder reads no visual tokens, or their regions cannot be measured.
        """
        return cached_geometry(
            self.model, self.processor, lambda images: self.prepare(images, "describe"), tuple(image_sizes), self.video
        )

    def pixel_maps(self, image_sizes: Sequence[tuple[int, int]]) -> PixelMaps:
        """What each element of the processor's pixel tensors samples, for images of these (width, height)."""
        return cached_pixels(
            self.model, self.processor, lambda images: self.prepare(images, "describe"), tuple(image_sizes), self.video
        )
