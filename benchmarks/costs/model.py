r"""Build the model that ``benchmarks/cost.py`` measures: Qwen2-VL's classes, random weights, any size."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from captum_intramodal import ModelAdapter

PROMPT = "describe the picture ."
SPECIAL = (
    "<pad>", "<unk>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<|im_start|>",
    "<|im_end|>",
)  # fmt: skip
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }} {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)
# Side of a visual token in pixels.
TOKEN = 28


@dataclass(frozen=True)
class Shape:
    """The sizes of a model."""

    hidden: int = 1024
    layers: int = 8
    intermediate: int = 4096
    heads: int = 16
    key_value_heads: int = 4
    vocabulary: int = 151_936
    vision_width: int = 256
    vision_layers: int = 4


# Language model and vision tower of Qwen2-VL-7B.
SEVEN_BILLION = Shape(3584, 28, 18_944, 28, 4, 152_064, 1280, 32)


def build(shape: Shape, dtype: torch.dtype, device: str) -> ModelAdapter:
    """Build a model with random weights, whose words are numbers. It never ends an answer by itself."""
    words = [*SPECIAL, *"user assistant describe the picture .".split()]
    words += [f"w{number}" for number in range(shape.vocabulary - len(words))]
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    torch.manual_seed(0)
    try:
        with torch.device(device):
            model = Qwen2VLForConditionalGeneration(build_config(shape, words)).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(default)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return ModelAdapter(model, build_processor(words))


def build_config(shape: Shape, words: list[str]) -> Qwen2VLConfig:
    """Return the model's configuration."""
    ids = {f"{name}_token_id": words.index(f"<|{name}_pad|>") for name in ("image", "video")}
    ids |= {f"vision_{name}_token_id": words.index(f"<|vision_{name}|>") for name in ("start", "end")}
    eighth = shape.hidden // shape.heads // 8
    return Qwen2VLConfig(
        text_config=dict(
            model_type="qwen2_vl_text",
            vocab_size=shape.vocabulary,
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.key_value_heads,
            max_position_embeddings=32_768,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [eighth, 3 * eighth // 2, 4 * eighth - eighth - 3 * eighth // 2],
            },
            bos_token_id=None,
            eos_token_id=words.index("<|im_end|>"),
            pad_token_id=0,
            tie_word_embeddings=True,
        ),
        vision_config=dict(
            embed_dim=shape.vision_width,
            hidden_size=shape.hidden,
            num_heads=shape.vision_width // 64,
            depth=shape.vision_layers,
            patch_size=TOKEN // 2,
        ),
        tie_word_embeddings=True,
        **ids,
    )


def build_processor(words: list[str]) -> Qwen2VLProcessor:
    """Return a processor with one token per word."""
    word_level = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    word_level.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=word_level,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<|im_end|>",
        additional_special_tokens=list(SPECIAL[2:7]),
    )
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(
            patch_size=TOKEN // 2, size={"shortest_edge": 4 * TOKEN**2, "longest_edge": 2**15 * TOKEN**2}
        ),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(patch_size=TOKEN // 2),
        chat_template=TEMPLATE,
    )


def noise_image(visual_tokens: int) -> Image.Image:
    """Return an image of noise that becomes this number of visual tokens."""
    rows = 2 ** (visual_tokens.bit_length() // 2 - (visual_tokens.bit_length() % 2 == 0))
    while visual_tokens % rows:
        rows -= 1
    size = (TOKEN * rows, TOKEN * visual_tokens // rows, 3)
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, size, np.uint8))
