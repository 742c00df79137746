r"""A tiny model, with random weights, of every type that ``AutoModelForImageTextToText`` knows, and its real processor.

The default configuration of a type is shrunk by rules that go by the names of its entries; what they leave wrong is
one row of :data:`TABLE`. Classes, layouts and special cases are the real ones; only sizes and weights are not.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from PIL import Image
from tokenizers import Regex, decoders, normalizers, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING_NAMES
from transformers.models.layoutlmv3 import image_processing_layoutlmv3 as layoutlmv3

from tests.testing import tiny

# UDOP's processor reads the words of the image with a program that need not be here.
if not layoutlmv3.is_pytesseract_available():
    layoutlmv3.requires_backends = lambda *names: None
    layoutlmv3.pytesseract = SimpleNamespace(
        image_to_data=lambda *args, **options: dict(
            text=["red", "house"], left=[100, 300], top=[50, 200], width=[80, 120], height=[40, 40]
        )
    )

__all__ = ["FAMILIES", "LEFT_OUT", "answer_logits", "build", "prepare"]

FAMILIES: tuple[str, ...] = tuple(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)

LEFT_OUT: dict[str, str] = {
    "evolla": "reads proteins: EvollaProcessor has no image processor",
    "mistral4": "reads no images: Mistral4ForCausalLM has no vision tower and no processor",
    "pi0": "returns robot actions: PI0ForConditionalGeneration has no language-model head",
}

WIDTH, HEADS, HEAD, LAYERS, VOCABULARY, GRID = 64, 4, 16, 2, 600, 8


@dataclass(frozen=True)
class Family:
    """What the rules cannot know of a type.

    Attributes:
        parts: classes of parts that the default configuration lacks.
        config: entries of the configuration by dotted path, such as ``vision_config.depth``; a dict replaces what is
            there, and None removes it.
        image, processor: options of the image processor and of the processor.
        attributes: attributes set on the finished processor.
        tokens: further special tokens.
        named: special tokens that the tokenizer has as an attribute.
        ids: entries of the configuration and the tokens whose ids they are.
        pieces: what the tokenizer puts before every text, and further tokens that are not special to it.
        vocabulary: tokens that go into the configuration's ``vocabulary_map``.
        placeholder: an image in the chat template; None for the processor's image token.
        image_token: whose id the configuration calls the image token; None for the processor's.
        tokens_per_image: as the processor counts them; None for what the patch grid gives.
        video: options of the image processor that the video processor shares, besides the sizes of patches.
        answer_type: the token type of the answer, where it is not that of the prompt's end.
        starts_decoder: whether a token of its own comes before what the decoder is given.
        tokenizer_class, processor_class, image_class, video_class: where the auto classes have none.
    """

    parts: Mapping[str, type] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    image: Mapping[str, Any] = field(default_factory=dict)
    processor: Mapping[str, Any] = field(default_factory=dict)
    attributes: Mapping[str, Any] = field(default_factory=dict)
    tokens: Sequence[str] = ()
    named: Mapping[str, str] = field(default_factory=dict)
    ids: Mapping[str, str] = field(default_factory=dict)
    pieces: Sequence[str] = ()
    vocabulary: Sequence[str] = ()
    placeholder: str | None = None
    image_token: str | None = None
    tokens_per_image: int | None = None
    video: tuple[str, ...] = ()
    answer_type: int | None = None
    starts_decoder: bool = True
    tokenizer_class: str | None = None
    processor_class: str | None = None
    image_class: str | None = None
    video_class: str | None = None


def _square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


def _rope(*sections: int, theta: float = 1e4) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta, "mrope_section": list(sections)}


# Quantizers of the families that turn images into words of their vocabulary.
_QUANTizER: dict[str, Any] = {
    "vq_config.base_channels": 32,
    "vq_config.num_res_blocks": 1,
    "vq_config.latent_channels": 16,
    "vq_config.embed_dim": 16,
    "vq_config.num_embeddings": 64,
}
_SAM: dict[str, Any] = {
    "vision_config.sam_config.downsample_channels": [WIDTH, WIDTH],
    "vision_config.sam_config.output_channels": 32,
    "vision_config.sam_config.global_attn_indexes": [1],
    "vision_config.sam_config.window_size": 4,
}
_RESNET: dict[str, Any] = {
    "model_type": "resnet",
    "hidden_sizes": [16, 16, 32, WIDTH],
    "depths": [1, 1, 1, 1],
    "embedding_size": 16,
    "hidden_size": WIDTH,
}
_GEMMA3N_TOWER = transformers.ResNetConfig(
    **{k: v for k, v in _RESNET.items() if k != "model_type"},
    vocab_offset=VOCABULARY,
    vocab_size=8,
    rms_norm_eps=1e-6,
)
_PINPOINTS = [[128, 256], [256, 128], [256, 256], [384, 128], [128, 384]]
# Their processors count an image as two frames.
_GLM: dict[str, Any] = dict(image=dict(size=dict(shortest_edge=8 * 28**2, longest_edge=80 * 28**2)))
_MINICPM: dict[str, Any] = dict(
    config={"insert_layer_id": 0, "vision_config.insert_layer_id": 0},
    image=dict(scale_resolution=112, max_slice_nums=4),
)
_OMNI: dict[str, Any] = dict(
    image_class="Qwen2VLImageProcessor",
    video_class="Qwen2VLVideoProcessor",
    named=dict(vision_bos_token="<vision_start>", vision_eos_token="<vision_end>"),
    ids={"vision_start_token_id": "<vision_start>", "vision_end_token_id": "<vision_end>"},
    placeholder="<vision_start><image><vision_end>",
)
_GEMMA4: dict[str, Any] = dict(image=dict(max_soft_tokens=70))
_CHAMELEON_WORDS = [f"IMGIMG{''.join(chr(ord('A') + int(digit)) for digit in str(i))}Z" for i in range(64)]
_EMU3_WORDS = ["<|extra_200|>", *(f"<|visual token {i:06d}|>" for i in range(64))]

TABLE: dict[str, Family] = {
    # AriaImageProcessor knows two sizes of image only.
    "aria": Family(
        config={
            "projector_patch_to_query_dict": {49: 128},
            "max_value_projector_patch_to_query_dict": 128,
            "vision_config.image_size": 490,
            "vision_config.patch_size": 70,
        },
        attributes={"images_kwargs": dict(max_image_size=490, min_image_size=336)},
    ),
    "chameleon": Family(
        config=_QUANTizER | {"vq_config.resolution": 128, "vq_config.channel_multiplier": [1, 1, 1, 1, 1]},
        image=dict(size={"shortest_edge": 128}, crop_size=_square(128)),
        vocabulary=_CHAMELEON_WORDS,
    ),
    "emu3": Family(
        config=_QUANTizER
        | {
            "vq_config.codebook_size": 64,
            "vq_config.channel_multiplier": [1, 1, 1, 1],
            "vq_config.hidden_size": 32,
            "vq_config.num_attention_heads": 1,
            "vq_config.attn_resolutions": [],
        },
        image=dict(min_pixels=64**2, max_pixels=96**2, size=dict(min_pixels=64**2, max_pixels=96**2)),
        vocabulary=_EMU3_WORDS,
    ),
    "janus": Family(
        config=_QUANTizER
        | {
            "vq_config.channel_multiplier": [1, 1],
            "vq_config.projection_dim": WIDTH,
            "vq_config.image_token_embed_dim": WIDTH,
            "vq_config.embed_dim": 8,
            "vision_config.mlp_ratio": 1.0,
        },
        image=dict(min_size=8),
    ),
    "aya_vision": Family(config={"vision_config.patch_size": 16, "vision_config.image_size": 128}),
    "blip": Family(config={"text_config.sep_token_id": 2}, placeholder=""),
    "blip-2": Family(placeholder=""),
    "instructblip": Family(placeholder=""),
    "instructblipvideo": Family(placeholder="", video=("size",), ids={"video_token_index": "<video>"}),
    "git": Family(placeholder=""),
    "cohere2_vision": Family(image=dict(patch_size=4)),
    "cohere_compass": Family(
        config={
            "text_config.rope_parameters": {
                kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")
            }
        },
        tokens=("<|IMAGE_PAD|>", "<|VIDEO_PAD|>", "<|VISION_START|>", "<|VISION_END|>"),
        named=dict(image_token="<|IMAGE_PAD|>", video_token="<|VIDEO_PAD|>"),
        placeholder="<|VISION_START|><|IMAGE_PAD|><|VISION_END|>",
    ),
    "cosmos3_omni": Family(processor_class="Qwen3VLProcessor"),
    "deepseek_ocr2": Family(
        # The size of the image is fixed by that of the queries, which makes its attention slow.
        config=_SAM
        | {
            "vision_config.sam_config.global_attn_indexes": [],
            "vision_config.sam_config.hidden_size": 32,
            "text_config.mlp_layer_types": ["dense", "sparse"],
            "text_config.num_experts_per_tok": 2,
            "text_config.n_group": 1,
            "text_config.topk_group": 1,
        }
    ),
    "unlimited_ocr": Family(config=_SAM, image=dict(size=_square(256), tile_size=160, maximum_pad_value=160)),
    "deepseek_vl_hybrid": Family(image=dict(high_res_size=_square(256))),
    "diffusion_gemma": Family(
        parts={"vision_config": transformers.Gemma4VisionConfig},
        config={
            "text_config.num_experts": 4,
            "text_config.num_experts_per_tok": 2,
            "text_config.top_k_experts": 2,
            "text_config.moe_intermediate_size": WIDTH,
        },
        image_class="Gemma4ImageProcessor",
        video_class="Gemma4VideoProcessor",
        **_GEMMA4,
    ),
    "gemma4": Family(parts={"vision_config": transformers.Gemma4VisionConfig}, **_GEMMA4),
    "gemma4_unified": Family(
        parts={"vision_config": transformers.Gemma4UnifiedVisionConfig},
        config={"vision_config.mm_embed_dim": WIDTH, "vision_config.output_proj_dims": WIDTH},
        **_GEMMA4,
    ),
    "dots3_note": Family(
        config={
            "text_config.qk_nope_head_dim": 8,
            "text_config.qk_rope_head_dim": 8,
            "text_config.head_dim": 16,
            "text_config.v_head_dim": 16,
            "audio_config.adapter_out_dim": WIDTH,
            "audio_config.adapter_input_size": WIDTH,
            "vision_config.adapter_in_dim": WIDTH,
            "vision_config.adapter_out_dim": WIDTH,
        },
        image=dict(temporal_patch_size=1),
    ),
    "ernie4_5_vl_moe": Family(
        config={
            "text_config.moe_intermediate_size": [WIDTH, WIDTH],
            "text_config.mlp_layer_types": ["dense", "sparse"],
            "text_config.rope_parameters": _rope(3, 3, 2, theta=5e5),
        }
    ),
    # Its own vision tower, and Gemma 3n's, are timm's, which is not needed for anything else.
    "fast_vlm": Family(
        config={"vision_config": _RESNET, "audio_config": None},
        processor=dict(patch_size=32, vision_feature_select_strategy="full"),
        processor_class="LlavaProcessor",
        image_class="CLIPImageProcessor",
    ),
    "gemma3n": Family(
        config={"vision_config": _GEMMA3N_TOWER, "vision_soft_tokens_per_image": 49}, tokens_per_image=49
    ),
    "florence2": Family(
        config={
            "vision_config.depths": [1, 1, 1, 1],
            "vision_config.embed_dim": [16, 32, 32, 64],
            "vision_config.num_heads": [2, 2, 2, 2],
            "vision_config.num_groups": [2, 2, 2, 2],
            "vision_config.projection_dim": WIDTH,
        },
        processor=dict(num_additional_image_tokens=1),
        placeholder="",
        tokens_per_image=50,
    ),
    "fuyu": Family(
        image=dict(size=dict(height=180, width=240)),
        tokens=[f"<0x0{i}>" for i in range(6)],
        pieces=("▁", "|SPEAKER|", "|NEWLINE|"),
        placeholder="",
    ),
    "gemma3": Family(tokens_per_image=16),
    "t5gemma2": Family(tokens_per_image=16),
    "shieldgemma2": Family(tokens_per_image=16, processor_class="Gemma3Processor"),
    "glm5_next": Family(
        image=dict(max_image_tokens=64),
        ids={"video_start_token_id": "<|begin_of_video|>", "video_end_token_id": "<|end_of_video|>"},
    ),
    "glm46v": Family(**_GLM),
    "glm4v": Family(**_GLM),
    "glm_ocr": Family(
        **_GLM,
        processor_class="Glm46VProcessor",
        image_class="Glm46VImageProcessor",
        video_class="Glm46VVideoProcessor",
    ),
    "glmga": Family(**_GLM, processor_class="Glm46VProcessor", video_class="Glm46VVideoProcessor"),
    "glm4v_moe": Family(**_GLM, image_class="Glm4vImageProcessor", video_class="Glm4vVideoProcessor"),
    "got_ocr2": Family(image=dict(size=_square(256)), tokens_per_image=16),
    "pp_chart2table": Family(
        image=dict(size=_square(256)),
        tokens=("<img>", "<imgpad>", "</img>"),
        placeholder=f"<img>{'<imgpad>' * 16}</img>",
        image_token="<imgpad>",
    ),
    "granite4_vision": Family(
        config={
            "vision_config.patch_size": 16,
            "vision_config.image_size": 128,
            "image_grid_pinpoints": _PINPOINTS,
            "deepstack_layer_map": [[0, 0]],
            "spatial_target_layers": [1],
            "downsample_rate": "1/2",
        }
    ),
    "hunyuan_vl": Family(
        config={"text_config.head_dim": HEAD, "text_config.rope_parameters": _rope(2, 2, 2, 2)},
        named=dict(
            image_token="<image>",
            image_start_token="<image_start>",
            image_end_token="<image_end>",
            boi_token="<image_start>",
            eoi_token="<image_end>",
        ),
        placeholder="<image_start><image><image_end>",
    ),
    # Channels grow with the patch; and with fewer layers than steps of scale it would need scipy.
    "inkling_mm_model": Family(
        config={"vision_config.n_layers": 6, "vision_config.patch_size": 8},
        image=dict(size=_square(8), rescale_image_frac=0.15),
    ),
    "kimi_k25": Family(config={"text_config.head_dim": 8}, image=dict(max_patches=160)),
    "kosmos-2": Family(processor_class="Kosmos2Processor"),
    "kosmos-2.5": Family(
        config={"latent_query_num": 64},
        processor_class="Kosmos2_5Processor",
        attributes={"images_kwargs": {"max_patches": 64}},
    ),
    "lfm2_vl": Family(
        image=dict(
            tile_size=128,
            min_image_tokens=4,
            max_image_tokens=16,
            max_num_patches=64,
            encoder_patch_size=16,
            max_tiles=4,
            max_pixels_tolerance=1.0,
        )
    ),
    "llama4": Family(
        config={
            "dtype": "float32",
            "text_config.dtype": "float32",
            "vision_config.dtype": "float32",
            "vision_config.intermediate_size": 4 * WIDTH,
            "vision_config.vision_output_dim": WIDTH,
            "vision_config.projector_input_dim": WIDTH,
            "vision_config.projector_output_dim": WIDTH,
        },
        image=dict(max_patches=4),
        processor=dict(image_token="<image>", fake_image_token="<image>"),
        image_token="<|patch|>",
    ),
    "minicpm_ocr": Family(**_MINICPM),
    "minicpmv4_6": Family(**_MINICPM),
    "minicpmv4_7": Family(**_MINICPM),
    "minimax_m3_vl": Family(
        tokens=("]<]image[>[", "]<]video[>[", "]<]start of image[>[", "]<]end of image[>["),
    ),
    "mllama": Family(config={"vision_config.vision_output_dim": 2 * WIDTH}),
    "molmo2": Family(
        image=dict(size=_square(112), max_crops=4, overlap_margins=[2, 2]),
        image_token="<im_patch>",
        ids={"image_patch_id": "<im_patch>"},
    ),
    "muse_glimmer": Family(
        config={"out_hidden_size": 4 * WIDTH, "vision_config.out_hidden_size": 4 * WIDTH},
        image=dict(max_image_tokens=64),
    ),
    "muse_spark": Family(
        config={"out_hidden_size": 4 * WIDTH, "vision_config.out_hidden_size": 4 * WIDTH},
        image=dict(max_image_tokens=64),
    ),
    "nemotron_h_omni": Family(config={"text_config.n_groups": 2}, image=dict(min_num_patches=16, max_num_patches=128)),
    "ovis2": Family(
        tokens=("<IMG_START>", "<IMG_ATOM>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"),
        image_token="<IMG_ATOM>",
    ),
    "paligemma": Family(answer_type=1),
    "perception_lm": Family(
        config={
            "vision_config": dict(
                model_type="siglip_vision_model",
                hidden_size=WIDTH,
                num_hidden_layers=LAYERS,
                num_attention_heads=HEADS,
                intermediate_size=WIDTH,
                image_size=112,
                patch_size=14,
                vision_use_head=False,
                model_args=dict(embed_dim=WIDTH),
            ),
            "vision_use_cls_token": False,
            "projector_pooling_ratio": 2,
        },
        image=dict(max_num_tiles=4),
    ),
    "pix2struct": Family(placeholder="", attributes={"images_kwargs": {"max_patches": 64}}),
    "qianfan_ocr": Family(tokens=("<IMG_CONTEXT>",), placeholder="<image>"),
    "qwen2_5_omni_thinker": Family(processor_class="Qwen2_5OmniProcessor", **_OMNI),
    "qwen3_omni_moe_thinker": Family(processor_class="Qwen3OmniMoeProcessor", **_OMNI),
    "qwen3_vl_moe": Family(image_class="Qwen2VLImageProcessor"),
    "qwen4_exp": Family(
        config={
            "text_config.indexer_n_heads": 2,
            "text_config.indexer_kv_heads": 1,
            "text_config.indexer_head_dim": 16,
            "text_config.indexer_budget": 64,
            "text_config.indexer_compress_ratio": 4,
            "text_config.ngram_vocab_size_base": 200,
            "text_config.split_ngram_parts": 4,
            "text_config.hc_lowrank": 8,
        }
    ),
    "step3p7": Family(
        config={"text_config.sliding_window": 512},
        image=dict(size=_square(112), patch_size=112, max_image_size=448),
    ),
    "udop": Family(placeholder="", tokenizer_class="UdopTokenizer"),
    "vision-encoder-decoder": Family(
        parts={"encoder": transformers.DonutSwinConfig, "decoder": transformers.MBartConfig},
        config={
            "encoder.embed_dim": WIDTH // 2,
            "encoder.hidden_size": WIDTH,
            "encoder.depths": [1, 1],
            "encoder.num_layers": 2,
            "encoder.num_heads": [2, 4],
            "encoder.window_size": 4,
            "encoder.image_size": [64, 96],
        },
        image=dict(size=dict(height=64, width=96)),
        placeholder="",
        starts_decoder=False,
        processor_class="DonutProcessor",
        image_class="DonutImageProcessor",
    ),
    "vipllava": Family(processor=dict(vision_feature_select_strategy="default")),
}


# --------------------------------------------------------------------------------------------------- configurations

Rule = int | Callable[[int], int]


def _at_most(limit: int) -> Callable[[int], int]:
    return lambda value: min(value, limit)


# What becomes of an integer entry that is not 0, by its name; the first rule that fits counts.
RULES: tuple[tuple[re.Pattern[str], Rule], ...] = tuple(
    (re.compile(pattern), rule)
    for pattern, rule in (
        (
            r"hidden_size|d_model|embed_dim|out_hidden_size|projection_dim|output_dim|vision_dim|moe_hidden_size"
            r"|(text|vision|encoder|decoder|projector|projection|image_text)_hidden_(size|dim)"
            r"|projector_(in|out)put_dim|vision_output_dim|word_embed_proj_dim|vision_embed_dim|image_token_embed_dim",
            WIDTH,
        ),
        (r".*(intermediate_size|ffn_dim|mlp_dim|d_ff|expert_dim).*", WIDTH),
        (r"(linear_key_|linear_value_|linear_|mamba_|swa_|index_|v_|attention_|resampler_)?head_dim", HEAD),
        (r"qk_head_dim|qk_nope_head_dim|d_kv|resampler_dim_head", HEAD),
        (r"qk_rope_head_dim", HEAD // 2),
        (r"[qkvo]+_lora_rank", 16),
        (r"(?!.*kv|.*key_value).*(num_heads|attention_heads|n_heads|resampler_heads|num_v?alue_heads|num_key_heads)",
         HEADS),
        (r"linear_num_\w+_heads", HEADS),
        (r"vocab_size|vocab_size_per_layer_input|unpadded_vocab_size", lambda v: VOCABULARY if v > 1000 else v),
        (r"num_experts|num_local_experts|n_routed_experts|moe_num_experts", 4),
        (r"num_experts_per_tok|moe_topk|moe_k", _at_most(2)),
        (r"n_group|topk_group|num_expert_group", 1),
        (r"first_k_dense_replace|num_nextn_predict_layers|no_rope_layer_interval|max_window_layers", _at_most(1)),
        (r"num_kv_shared_layers", 0),
        (r"max_position_embeddings", _at_most(4096)),
        (r"hidden_size_per_layer_input", 16),
    )
)  # fmt: skip
DEPTH = re.compile(
    r"(conf_)?num_hidden_layers|depth|num_layers|n_layers|layers|encoder_layers|(num_)?decoder_layers|resampler_depth"
)
KEY_VALUE_HEADS = re.compile(r".*(key_value_heads|kv_heads|num_key_value).*")
LAYER_LIST = re.compile(r"(?!.*summary).*(layers|indexes|indices|idxs|feature_layer)")
IGNORED = ("id2label", "label2id", "transformers_version", "dtype", "architectures")


def _is_config(name: str, value: Any) -> bool:
    return (
        isinstance(value, dict) and name != "per_layer_config" and (name.endswith("_config") or "model_type" in value)
    )


def _some_of_each(kinds: Sequence[Any], count: int) -> list[Any]:
    """The first ``count`` layers, moved on where they would leave out a kind of layer."""
    first = {kind: index for index, kind in reversed(list(enumerate(kinds)))}
    rest = [index for index in range(len(kinds)) if index not in first.values()]
    return [kinds[i] for i in sorted([*first.values(), *rest[: max(0, count - len(first))]])]


def _sections(total: int, count: int) -> list[int]:
    return [total // count + (index >= count - total % count) for index in range(count)]


def _shrunk_rope(rope: Mapping[str, Any], partial: float, is_text: bool) -> dict[str, Any]:
    result = {k: _shrunk_rope(v, partial, is_text) if isinstance(v, dict) else v for k, v in rope.items()}
    if is_text and ("mrope_section" in rope or rope.get("rope_type") == "default"):
        half = int(HEAD * (rope.get("partial_rotary_factor") or partial)) // 2
        result["mrope_section"] = _sections(half, len(rope.get("mrope_section") or (0, 0, 0)))
    return result


def _shrunk(config: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """A configuration, and all inside it, with sizes by :data:`RULES`."""
    config = {key: value for key, value in config.items() if key not in IGNORED}
    depth = next((v for k, v in config.items() if DEPTH.fullmatch(k) and isinstance(v, int)), None)
    layers = max(LAYERS, len(set(config.get("layer_types") or ())))
    heads = next((v for k in ("num_attention_heads", "num_heads", "encoder_attention_heads")
                  if isinstance(v := config.get(k), int)), 0)  # fmt: skip

    def entry(key: str, value: Any) -> Any:
        if _is_config(key, value):
            return _shrunk(value, f"{path}.{key}")
        if key == "rope_parameters" and isinstance(value, dict):
            return _shrunk_rope(value, config.get("partial_rotary_factor") or 1.0, "text" in path)
        if key == "per_layer_config" and isinstance(value, dict):
            return {index: own for index, own in value.items() if int(index) < layers}
        if isinstance(value, list | tuple):
            return _shrunk_list(key, list(value))
        if not isinstance(value, int) or isinstance(value, bool) or value == 0:
            return value
        if DEPTH.fullmatch(key):
            return layers
        if KEY_VALUE_HEADS.fullmatch(key):
            return HEADS if heads and value >= heads else min(value, 2)
        rule = next((rule for pattern, rule in RULES if pattern.fullmatch(key)), value)
        return rule(value) if callable(rule) else rule

    def _shrunk_list(key: str, value: list[Any]) -> Any:
        if depth and len(value) == depth > layers and not key.endswith("pinpoints"):
            if isinstance(value[0], str):
                return _some_of_each(value, layers)
            return [WIDTH if isinstance(v, int) and v > 256 else v for v in value[:layers]]
        if value and all(isinstance(v, int) for v in value) and LAYER_LIST.fullmatch(key):
            if "feature_layer" in key:
                return [-1 - index % 2 for index in range(len(value))]
            return [v for v in value if -layers <= v < layers] or [layers - 1]
        return value

    return {key: entry(key, value) for key, value in config.items()}


def _one(value: Any) -> Any:
    return value[0] if isinstance(value, list | tuple) else value


def _set_grids(config: dict[str, Any]) -> None:
    """Images of GRID x GRID patches, in every part of a configuration that has both sizes."""
    patch, size = _one(config.get("patch_size")), config.get("image_size")
    if isinstance(patch, int) and size:
        # SAM's neck halves the grid twice.
        grid = 2 * GRID if "output_channels" in config else GRID
        config["image_size"] = [patch * grid] * 2 if isinstance(size, list | tuple) else patch * grid
        for name in ("num_patches", "num_position_embeddings", "num_image_tokens"):
            if isinstance(config.get(name), int) and config[name] > 64:
                config[name] = grid**2
    for name, value in config.items():
        if _is_config(name, value) or (name in ("encoder", "decoder") and isinstance(value, dict)):
            _set_grids(value)
    vision = config.get("vision_config")
    if isinstance(vision, dict) and (side := _one(vision.get("image_size"))):
        if config.get("image_grid_pinpoints"):
            config["image_grid_pinpoints"] = [[h * side // 128, w * side // 128] for h, w in _PINPOINTS]
        for name in ("image_seq_length", "num_image_tokens"):
            if isinstance(config.get(name), int):
                config[name] = GRID**2
        if "mm_tokens_per_image" in config:
            config["mm_tokens_per_image"] = 16


def _set(config: dict[str, Any], path: str, value: Any) -> None:
    *parents, name = path.split(".")
    for parent in parents:
        config = config.get(parent) or {}
    if value is None:
        config.pop(name, None)
    else:
        config[name] = value


def _set_small_ids(config: dict[str, Any], ids: dict[int, int]) -> None:
    """Token ids beyond the vocabulary become ids at its end, equal ones the same."""

    def small(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [small(v) for v in value]
        if not isinstance(value, int) or value < VOCABULARY - 60:
            return value
        return ids.setdefault(value, VOCABULARY - 60 + len(ids))

    for name, value in config.items():
        if isinstance(value, dict):
            _set_small_ids(value, ids)
        elif isinstance(name, str) and re.search(r"(_id|_token_ids|_token_index)$", name):
            config[name] = small(value)


def _config(model_type: str, row: Family) -> Any:
    cls = getattr(transformers, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[model_type]).config_class
    shrunk = _shrunk(cls(**{name: part().to_dict() for name, part in row.parts.items()}).to_dict())
    objects = {path: value for path, value in row.config.items() if isinstance(value, PreTrainedConfig)}
    _set_small_ids(shrunk, {})
    _set_grids(shrunk)
    for path, value in row.config.items():
        if path not in objects:
            _set(shrunk, path, value)
    config = cls(**{key: value for key, value in shrunk.items() if key != "model_type"})
    # Past the configuration's own checks, which allow one kind of part only.
    vars(config).update(objects)
    return config


# ------------------------------------------------------------------------------------------------------- processors

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
PLAIN_TOKENS = ("pad_token", "bos_token", "eos_token", "unk_token", "sep_token", "cls_token", "mask_token")


def _auto_class(names: Mapping[str, Any], model_type: str, own: str | None) -> Any:
    name = own or names.get(model_type)
    if isinstance(name, dict):
        name = name.get("torchvision") or name.get("pil")
    return getattr(transformers, name) if name else None


def _tokenizer(processor_class: type, row: Family) -> PreTrainedTokenizerFast:
    """Knows the words of the tiny models, and every special token that the processor's source speaks of."""
    source = inspect.getsource(sys.modules[processor_class.__module__])
    written = re.findall(r"""["']((?:<[^<>\s"'{}]{1,40}>|\[[A-Z_]{2,20}\]))["']""", source)
    names = re.findall(r"tokenizer\.(\w+_token)(?:_id)?\b", source)
    names += re.findall(r"""getattr\(tokenizer, "(\w+_token)\"""", source)
    optional = set(re.findall(r"""hasattr\((?:self\.)?tokenizer, "(\w+_token)"\)""", source))
    named = {
        name: f"<{name.removesuffix('_token')}>"
        for name in names
        if name not in (*PLAIN_TOKENS, *optional) and not name.startswith("add_")
    }
    unused = [f"<unused{index}>" for index in range(VOCABULARY)]
    if row.tokenizer_class:
        pieces = [*SPECIAL, *dict.fromkeys(written), "▁", *(f"▁{word}" for word in tiny.WORDS), *unused]
        cls = getattr(transformers, row.tokenizer_class)
        return cls(vocab=[(piece, 0.0) for piece in pieces[:VOCABULARY]], bos_token="<s>")
    tokens = ("<image>", *written, *row.tokens, *row.vocabulary)
    tokenizer = tiny.tokenizer_of(*tokens, more=[*row.pieces, *unused], size=VOCABULARY, **{**named, **row.named})
    if row.pieces:
        # As SentencePiece, which puts a piece of its own before every text and takes it away in the end.
        known = "|".join(map(re.escape, row.pieces))
        words = tokenizer.backend_tokenizer
        words.normalizer = normalizers.Prepend(f"{row.pieces[0]} ")
        words.pre_tokenizer = pre_tokenizers.Split(Regex(rf"{known}|\w+|[^\w\s]"), "removed", invert=True)
        words.decoder = decoders.Sequence([decoders.WordPiece("##", False), decoders.Replace(row.pieces[0], "")])
    return tokenizer


def _vision_part(config: Any) -> Any:
    encoder = getattr(config, "encoder", None)
    return getattr(config, "vision_config", None) or getattr(encoder, "vision_config", None) or encoder or config


def _tokens_per_image(config: Any, row: Family) -> int:
    if row.tokens_per_image:
        return row.tokens_per_image
    shrink = 1
    for part in (config, _vision_part(config)):
        for name in ("scale_factor", "downsample_factor", "projector_pooling_ratio", "hidden_stride"):
            if isinstance(value := getattr(part, name, None), int) and value > 1:
                shrink = value
        for name in ("downsample_ratio", "pixel_shuffle_ratio"):
            if isinstance(value := getattr(part, name, None), float):
                shrink = round(1 / value)
    return (GRID // shrink) ** 2


def _image_options(config: Any, default: Any) -> dict[str, Any]:
    """Sizes for an image processor, from what the model expects and what the processor's defaults look like."""
    vision = _vision_part(config)
    side, patch = _one(getattr(vision, "image_size", None)), _one(getattr(vision, "patch_size", None))
    size: Any = getattr(default, "size", None)
    given = {name for name in ("height", "shortest_edge", "longest_edge") if getattr(size, name, None)}
    options: dict[str, Any] = {}
    if hasattr(default, "merge_size"):
        merge = _one(getattr(vision, "spatial_merge_size", None) or default.merge_size)
        patch = patch or default.patch_size
        options.update(patch_size=patch, merge_size=merge)
        if getattr(default, "temporal_patch_size", None) is not None:
            options["temporal_patch_size"] = getattr(vision, "temporal_patch_size", None) or default.temporal_patch_size
        if getattr(size, "longest_edge", None) and size.longest_edge > 10_000:
            area = (patch * merge) ** 2
            options["size"] = dict(shortest_edge=4 * area, longest_edge=40 * area)
    elif side:
        tiled = getattr(default, "max_image_size", None)
        if "height" in given:
            options["size"] = _square(side)
        elif given == {"shortest_edge"}:
            options["size"] = dict(shortest_edge=side)
        elif given == {"shortest_edge", "longest_edge"}:
            options["size"] = dict(shortest_edge=side // 2, longest_edge=side)
        elif given == {"longest_edge"}:
            options["size"] = dict(longest_edge=(3 if tiled else 2) * side)
            if tiled:
                options["max_image_size"] = dict(longest_edge=side)
        if getattr(default, "crop_size", None):
            options["crop_size"] = _square(side)
        if getattr(default, "tile_size", None):
            options["tile_size"] = side
    if patch and "patch_size" not in options and getattr(default, "patch_size", None):
        options["patch_size"] = patch if isinstance(default.patch_size, int) else _square(patch)
    if getattr(default, "image_grid_pinpoints", None) and getattr(config, "image_grid_pinpoints", None):
        options["image_grid_pinpoints"] = config.image_grid_pinpoints
    if hasattr(default, "max_patches") and hasattr(default, "min_patches"):
        options["max_patches"] = 4
    return options


def _processor(model_type: str, row: Family, config: Any) -> Any:
    cls = _auto_class(PROCESSOR_MAPPING_NAMES, model_type, row.processor_class)
    tokenizer = _tokenizer(cls, row)
    count = _tokens_per_image(config, row)
    parts: dict[str, Any] = {}
    vision = _vision_part(config)
    for name in inspect.signature(cls.__init__).parameters:
        if name == "image_processor":
            image_class = _auto_class(IMAGE_PROCESSOR_MAPPING_NAMES, model_type, row.image_class)
            parts[name] = image_class(**_image_options(config, image_class()) | dict(row.image))
            for counter in ("image_seq_length", "num_image_tokens"):
                if hasattr(parts[name], counter):
                    setattr(parts[name], counter, count)
        elif name.endswith("tokenizer"):
            parts[name] = tokenizer
        elif name == "video_processor":
            parts[name] = _video_processor(model_type, row, config)
        elif name == "feature_extractor":
            parts[name] = transformers.WhisperFeatureExtractor()
        elif name in ("image_seq_length", "image_seq_len", "num_image_tokens"):
            parts[name] = count
        elif name == "img_size":
            parts[name] = vision.image_size
        elif name == "num_additional_image_tokens" and vision.model_type == "clip_vision_model":
            parts[name] = 1
        elif name not in ("self", "args", "kwargs", "chat_template") and not name.endswith("_token"):
            owners = (config, vision, getattr(config, "text_config", None))
            values = (getattr(owner, name, None) for owner in owners)
            if (value := next((v for v in values if v is not None), None)) is not None:
                parts[name] = value
    processor = cls(**parts | dict(row.processor))
    for counter in ("image_seq_length", "num_image_tokens"):
        if isinstance(getattr(processor, counter, None), int) and counter not in parts:
            setattr(processor, counter, count)
    for name, value in row.attributes.items():
        setattr(processor, name, value)
    token = str(getattr(processor, "image_token", "<image>"))
    image = token if row.placeholder is None else row.placeholder
    video = str(getattr(processor, "video_token", None) or "<video>")
    video = image.replace(token, video) if token in image else video
    if "<|begin_of_video|>" in tokenizer.get_vocab():  # GLM's tell frames from images by it.
        video = f"<|begin_of_video|>{video}<|end_of_video|>"
    # Between two images stands a sign, as in real templates; some models tell images apart by it.
    processor.chat_template = tiny.chat_template(f"{image} ," if image else image, video)
    return processor


def _video_processor(model_type: str, row: Family, config: Any) -> Any:
    cls = _auto_class(VIDEO_PROCESSOR_MAPPING_NAMES, model_type, row.video_class) or transformers.Qwen2VLVideoProcessor
    default = cls()
    options = _image_options(config, default)
    shared = ["patch_size", "merge_size", *row.video]
    if "height" in (getattr(default, "size", None) or {}) or getattr(default, "crop_size", None):
        shared += ["size", "crop_size"]  # A tower of fixed size.
    return cls(**{name: options[name] for name in shared if name in options})


def _write_ids(config: Any, processor: Any, row: Family) -> None:
    """Gives the configuration, and all inside it, the ids of the processor's special tokens."""
    tokenizer = processor.tokenizer
    image = row.image_token or getattr(processor, "image_token", None)
    owners = (tokenizer, processor) if row.image_token is None else ()
    ids = [i for owner in owners if isinstance(i := getattr(owner, "image_token_id", None), int)]
    if image is not None:
        ids.append(tokenizer.convert_tokens_to_ids(str(image)))

    def write(part: Any) -> None:
        for name, value in list(vars(part).items()):
            if isinstance(value, PreTrainedConfig):
                write(value)
            elif match := re.fullmatch(r"(\w+)_(token_id|token_index)", name):
                attribute = f"{match[1]}_token_id"
                found = ids if match[1] == "image" else [getattr(o, attribute, None) for o in (processor, tokenizer)]
                if (value := next((i for i in found if isinstance(i, int)), None)) is not None:
                    setattr(part, name, value)

    write(config)
    for name, token in row.ids.items():
        setattr(config, name, tokenizer.convert_tokens_to_ids(token))
    if row.vocabulary:
        words = {word: tokenizer.convert_tokens_to_ids(word) for word in row.vocabulary}
        config.vocabulary_map = {"<image>": ids[0], **words}


# ------------------------------------------------------------------------------------------------------ entire models


def build(model_type: str, seed: int = 0) -> tuple[PreTrainedModel, Any]:
    """A random model of this type, in float32 and evaluation mode, and its processor.

    Args:
        model_type (str): One of :data:`FAMILIES`, not of :data:`LEFT_OUT`.
        seed (int): Seed of the weights; the global random state is left as it was.
    """
    if model_type in LEFT_OUT:
        raise ValueError(f"{model_type} is left out: it {LEFT_OUT[model_type]}.")
    if model_type not in FAMILIES:
        raise ValueError(f"No model of type {model_type!r}; known types: {', '.join(FAMILIES)}.")
    if model_type in tiny.MODEL_TYPES:
        return tiny.tiny(model_type, seed)
    row = TABLE.get(model_type, Family())
    config = _config(model_type, row)
    processor = _processor(model_type, row, config)
    _write_ids(config, processor, row)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[model_type])(config)
        for parameter in model.requires_grad_(False).parameters():
            # Gates and projections that begin closed would hide the image.
            if parameter.ndim > 1 and parameter.numel() > 1 and parameter.std() == 0:
                parameter.add_(0.1 * torch.randn_like(parameter))
        model = tiny.finished(model, processor.tokenizer)
    known = {*tiny.WORDS, *(f"▁{word}" for word in tiny.WORDS), "</s>"}
    strange = [[i] for word, i in processor.tokenizer.get_vocab().items() if word not in known and i < VOCABULARY]
    # Some generate with the settings of a part.
    for part in model.modules():
        if getattr(part, "generation_config", None) is not None:
            tiny.set_generation(part, processor.tokenizer)
            # Unlike suppressed tokens, these are not replaced by a caller's own.
            part.generation_config.update(suppress_tokens=None, bad_words_ids=strange)
    return model, processor


def prepare(model: Any, processor: Any, images: Sequence[Image.Image], question: str) -> dict[str, Any]:
    """Model inputs of one question about images, float32 where they are not integers."""
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    options: dict[str, Any] = dict(return_tensors="pt", add_special_tokens=False)
    if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
        options["return_mm_token_type_ids"] = True
    if getattr(processor, "image_processor", None) is None:
        # A model of videos sees an image as four frames that are all the same.
        images = [image for image in images for _ in range(4)]
    if model.config.model_type == "idefics":  # Texts and images in their order, to which it puts its own first token.
        before, after = text.removeprefix(processor.tokenizer.bos_token).split("<image>")
        batch = processor(text=[[before, *images, after]], **options)
    else:
        batch = processor(images=list(images), text=[text], **options)
    return {k: v.float() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in batch.items()}


ALONG_THE_SEQUENCE = (
    "attention_mask",
    "decoder_attention_mask",
    "token_type_ids",
    "mm_token_type_ids",
    "moe_mm_token_type_ids",
    "image_attention_mask",
    "image_embeds_position_mask",
    "cross_attention_mask",
)


def answer_logits(model: Any, inputs: Mapping[str, Any], answer: Sequence[int]) -> Tensor:
    """Logits that predict each token of an answer, given the prompt and the answer so far; (tokens, vocabulary)."""
    forced = torch.tensor([list(answer)])
    is_decoder_apart = model.config.is_encoder_decoder
    if "input_ids" not in inspect.signature(model.forward).parameters and "input_ids" in inputs:
        # A prompt that the encoder does not read begins what the decoder writes.
        inputs = {"decoder_input_ids": inputs["input_ids"], "pixel_values": inputs["pixel_values"]}
    extended = {key: value for key, value in inputs.items() if key != "labels"}
    name = "decoder_input_ids" if is_decoder_apart else "input_ids"
    row = TABLE.get(model.config.model_type, Family())
    if is_decoder_apart and row.starts_decoder:
        extended[name] = torch.tensor([[model.generation_config.decoder_start_token_id]])
        for key in ("decoder_input_ids", "decoder_attention_mask"):
            if key in inputs:
                first = extended[name] if key == name else torch.ones_like(inputs[key][:, :1])
                extended[key] = torch.cat([first, inputs[key]], dim=1)
    prompt = extended[name]
    extended[name] = torch.cat([prompt, forced], dim=1)
    for key, value in list(extended.items()):
        # Masks and token types go on as at the prompt's last, textual position. By name: the shapes of others, such as
        # the coordinates of patches, may be the same by chance.
        belongs = key in ALONG_THE_SEQUENCE and key.startswith("decoder_") == is_decoder_apart
        if belongs and value.shape[:2] == prompt.shape:
            more = value[:, -1:].expand(1, len(answer), *value.shape[2:])
            if key == "token_type_ids" and row.answer_type is not None:
                more = torch.full_like(more, row.answer_type)
            extended[key] = torch.cat([value, more], dim=1)
    with torch.no_grad():
        return model(**extended, use_cache=False).logits[0, -len(answer) - 1 : -1]
