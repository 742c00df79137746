r"""Tiny image-text-to-text models with random weights and their real processors, built offline in a moment.

Real transformers classes throughout; only sizes are small. Every model reads the same words, has a chat template and a
generation config, so that prompts, ``generate`` and teacher forcing work as with a checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.smolvlm import processing_smolvlm

__all__ = ["MODEL_TYPES", "WORDS", "chat_template", "finished", "random_image", "tiny", "tokenizer_of"]

MODEL_TYPES = ("qwen2_vl", "qwen2_5_vl", "llava", "smolvlm", "idefics3", "internvl")

WORDS = (
    "the a an what where is are was in on at of and or to with this that there it picture image photo describe how "
    "many which color colour red green blue yellow black white left right top bottom above below next cat dog bird "
    "car boat house tree person man woman two three one yes no . , ? ! : user assistant"
).split()

# SmolVLM's processor refuses to start without num2words, which it needs for video prompts only.
if processing_smolvlm.num2words is None:
    processing_smolvlm.num2words = str


def random_image(width: int = 200, height: int = 136, seed: int = 0) -> Image.Image:
    """A smooth random image, whose detail no resizing loses."""
    coarse = np.random.default_rng(seed).integers(0, 255, (max(1, height // 8), max(1, width // 8), 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def _image_processor(family: str, **options: Any) -> Any:
    """The torchvision-backed image processor, which early transformers 5 keeps under a name of its own."""
    plain = getattr(transformers, f"{family}ImageProcessor")
    cls = plain if hasattr(plain, "backend") else getattr(transformers, f"{family}ImageProcessorFast")
    return cls(**options)


def tokenizer_of(
    *tokens: str, more: Sequence[str] = (), size: int | None = None, **named: str
) -> PreTrainedTokenizerFast:
    """Knows the :data:`WORDS` these special tokens, and ``more`` ordinary ones, up to ``size`` in all."""
    special = ["<pad>", "<s>", "</s>", "<unk>", *tokens, *named.values()]
    vocabulary = {word: index for index, word in enumerate([*dict.fromkeys([*special, *WORDS, *more])][:size])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=special[4:],
        **named,
    )


def chat_template(image: str, video: str = "<video>") -> str:
    return (
        "<s>{% for message in messages %}{{ message['role'] }} : "
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}" + image + " {% elif part['type'] == 'video' %}" + video + " "
        "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
        "{% endfor %}{% endif %} {% if message['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}assistant : {% endif %}"
    )


def _text_config(model_type: str, tokenizer: PreTrainedTokenizerFast, **more: Any) -> dict[str, Any]:
    return dict(
        model_type=model_type,
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **more,
    )


def _siglip_like(image_size: int = 112, patch_size: int = 14, **more: Any) -> dict[str, Any]:
    return dict(
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=image_size,
        patch_size=patch_size,
        **more,
    )


def _qwen(model_type: str) -> tuple[Any, Any]:
    tokenizer = tokenizer_of("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    ids = {
        f"{name}_id": tokenizer.convert_tokens_to_ids(f"<|{text}|>")
        for name, text in (
            ("image_token", "image_pad"),
            ("video_token", "video_pad"),
            ("vision_start_token", "vision_start"),
            ("vision_end_token", "vision_end"),
        )
    }
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    patches = dict(patch_size=14, spatial_merge_size=2, temporal_patch_size=2, num_heads=4, depth=2)
    if model_type == "qwen2_vl":
        config = transformers.Qwen2VLConfig(
            text_config=_text_config("qwen2_vl_text", tokenizer, rope_parameters=rope),
            vision_config=dict(embed_dim=32, hidden_size=64, mlp_ratio=2, **patches),
            tie_word_embeddings=True,
            **ids,
        )
        model_class, processor_class = transformers.Qwen2VLForConditionalGeneration, transformers.Qwen2VLProcessor
    else:
        config = transformers.Qwen2_5_VLConfig(
            text_config=_text_config("qwen2_5_vl_text", tokenizer, rope_parameters=rope),
            vision_config=dict(
                hidden_size=32,
                intermediate_size=64,
                out_hidden_size=64,
                window_size=56,
                fullatt_block_indexes=[1],
                **patches,
            ),
            tie_word_embeddings=False,
            **ids,
        )
        model_class, processor_class = transformers.Qwen2_5_VLForConditionalGeneration, transformers.Qwen2_5_VLProcessor
    processor = processor_class(
        image_processor=_image_processor(
            "Qwen2VL", patch_size=14, merge_size=2, size={"shortest_edge": 4 * 28**2, "longest_edge": 160 * 28**2}
        ),
        tokenizer=tokenizer,
        video_processor=transformers.Qwen2VLVideoProcessor(patch_size=14, merge_size=2),
        chat_template=chat_template(
            "<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>"
        ),
    )
    return model_class(config), processor


def _llava() -> tuple[Any, Any]:
    tokenizer = tokenizer_of("<image>")
    config = transformers.LlavaConfig(
        text_config=_text_config("llama", tokenizer),
        vision_config=_siglip_like(model_type="clip_vision_model", projection_dim=48),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=64,
        tie_word_embeddings=False,
    )
    processor = transformers.LlavaProcessor(
        image_processor=_image_processor("CLIP", size={"shortest_edge": 112}, crop_size={"height": 112, "width": 112}),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template("<image>"),
    )
    return transformers.LlavaForConditionalGeneration(config), processor


def _idefics(model_type: str) -> tuple[Any, Any]:
    cells = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    tokenizer = tokenizer_of(
        "<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", "<video>", *cells
    )
    shared: dict[str, Any] = dict(
        text_config=_text_config("llama", tokenizer),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
        scale_factor=2,
    )
    sizes: dict[str, Any] = dict(size={"longest_edge": 168}, max_image_size={"longest_edge": 56})
    vision = _siglip_like(image_size=56, patch_size=7)
    template = chat_template("<image>")
    if model_type == "idefics3":
        config = transformers.Idefics3Config(vision_config=vision, tie_word_embeddings=False, **shared)
        processor = transformers.Idefics3Processor(
            _image_processor("Idefics3", **sizes), tokenizer, image_seq_len=16, chat_template=template
        )
        return transformers.Idefics3ForConditionalGeneration(config), processor
    config = transformers.SmolVLMConfig(vision_config=vision, tie_word_embeddings=True, **shared)
    processor = transformers.SmolVLMProcessor(
        _image_processor("SmolVLM", **sizes),
        tokenizer,
        transformers.SmolVLMVideoProcessor(size={"longest_edge": 56}, max_image_size={"longest_edge": 56}),
        image_seq_len=16,
        chat_template=template,
    )
    return transformers.SmolVLMForConditionalGeneration(config), processor


def _internvl() -> tuple[Any, Any]:
    tokenizer = tokenizer_of(
        "<IMG_CONTEXT>",
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    config = transformers.InternVLConfig(
        text_config=_text_config("qwen2", tokenizer, tie_word_embeddings=True),
        vision_config=_siglip_like(model_type="internvl_vision"),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=16,
        downsample_ratio=0.5,
        tie_word_embeddings=True,
    )
    processor = transformers.InternVLProcessor(
        image_processor=_image_processor(
            "GotOcr2", size={"height": 112, "width": 112}, crop_to_patches=True, min_patches=1, max_patches=6
        ),
        tokenizer=tokenizer,
        video_processor=transformers.InternVLVideoProcessor(size={"height": 112, "width": 112}),
        image_seq_length=16,
        chat_template=chat_template("<IMG_CONTEXT>"),
    )
    return transformers.InternVLForConditionalGeneration(config), processor


def finished(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """The model in float32, frozen, with weights that let the image through and settings to generate words."""
    model = model.float().eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        # A real checkpoint has neither constant gains and gates nor weights so small that the image drowns.
        if parameter.ndim < 2 or parameter.numel() == 1:
            parameter.add_(0.1 * torch.randn_like(parameter))
        elif "embed" not in name or "patch" in name:
            inputs = parameter.shape[-1] if "expert" in name else parameter[0].numel()
            parameter.mul_(inputs**-0.5 / parameter.std())
    set_generation(model, tokenizer)
    return model


def set_generation(model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    """At least three tokens, all of them words: random weights would answer with placeholders, or not at all."""
    start = getattr(model.config, "decoder_start_token_id", None)
    settings = dict(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        decoder_start_token_id=start if start is not None else tokenizer.bos_token_id,
        suppress_tokens=[i for word, i in tokenizer.get_vocab().items() if word not in (*WORDS, "</s>")],
        min_new_tokens=3,
    )
    for name, value in settings.items():
        setattr(model.generation_config, name, value)


def tiny(model_type: str, seed: int = 0) -> tuple[PreTrainedModel, Any]:
    """A random model of this type, in float32 and evaluation mode, and its processor.

    Args:
        model_type (str): One of :data:`MODEL_TYPES`.
        seed (int): Seed of the weights; the global random state is left as it was.
    """
    if model_type not in MODEL_TYPES:
        raise ValueError(f"No tiny model of type {model_type!r}; known types: {', '.join(MODEL_TYPES)}.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if model_type in ("qwen2_vl", "qwen2_5_vl"):
            model, processor = _qwen(model_type)
        elif model_type in ("idefics3", "smolvlm"):
            model, processor = _idefics(model_type)
        else:
            model, processor = {"llava": _llava, "internvl": _internvl}[model_type]()
        return finished(model, processor.tokenizer), processor
