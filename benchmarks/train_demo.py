r"""Train the demo model from scratch on two CPU cores, and write it as a Hugging Face checkpoint.

    python benchmarks/train_demo.py --work /tmp/demo-run --out captum_intramodal/demo/checkpoint
    python benchmarks/train_demo.py --world other --work /tmp/other-run --out OTHER
    python benchmarks/train_demo.py --family internvl --start-from captum_intramodal/demo/checkpoint --steps 4600 \
        --learning-rate 0.001 --work /tmp/internvl-run --out INTERNVL

A small ``Qwen2VLForConditionalGeneration`` (3 M parameters) learns three tasks on composed images: describe the image,
name the object left of, right of, above or below another, and answer whether an object is there. The loss is the
cross-entropy of the answers plus a multiple-instance loss per image: the log-mean-exp of each object word's logit over
the visual positions has to predict whether that object is in the image. No mask is used. Without the second loss, the
last layer's visual positions would get no gradient and their logit lens would be noise; it replaces the pretraining
that makes these logits meaningful in full-size models.

Each training sequence has the image once, followed by several questions. Each question attends to the image and to
itself only, at the positions that it would have alone. So the model is trained as for single questions, at a third of
the cost.

A stopped run resumes if it is started again with the same ``--work``. Each batch depends only on the seed and its step.

Needs: the package only. The demo took about three and a half hours on one core, the InternVL one hour; a second core
composes the scenes.

Prints: both losses and the seconds per step, also to ``log.jsonl`` in ``--work``. ``demo_model_card.md`` and the
README's section "Where maps point" quote the commands and the times.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from types import MethodType
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import typer
from common import WORLDS, Threads, World, save_atomically, warm_up_and_cosine, world_named
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import (
    AutoModelForImageTextToText,
    GenerationConfig,
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision

from captum_intramodal.demo.scenes import COLORS, Question, Scene, compose

PATCH, MERGE = 16, 2
TOKEN = PATCH * MERGE
SPECIAL = {
    "qwen2_vl": (
        "<pad>", "<unk>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
        "<|video_pad|>",
    ),
    "internvl": (
        "<pad>", "<unk>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>",
    ),
}  # fmt: skip
# The InternVL-type model takes an image as square tiles of this side and a thumbnail, a small image as one tile.
TILE, MAX_TILES = 192, 4
# Low, because sequences are short. The same for both families, so that they can share a language model.
ROPE_THETA = 20.0
WORDS = (
    "user assistant system describe the this picture image what is in do you see ? . , shows a an some and left right "
    "above below of there yes no nothing"
).split()
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }} "
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE"
    "{% elif part['type'] == 'video' %}VIDEO"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def build_tokenizer(classes: tuple[str, ...], family: str = "qwen2_vl") -> PreTrainedTokenizerFast:
    """Build a tokenizer with one token per word."""
    special = SPECIAL[family]
    vocabulary = {word: index for index, word in enumerate((*special, *WORDS, *COLORS, *classes))}
    names = ("start_image_token", "end_image_token", "context_image_token", "video_token")
    named = dict(zip(names, special[4:], strict=True)) if family == "internvl" else {}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<|im_end|>",
        additional_special_tokens=list(special[2:]),
        model_max_length=4096,
        padding_side="left",
        **named,
    )


def text_config(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Return the language model's configuration, which both families share."""
    token = tokenizer.convert_tokens_to_ids
    return dict(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=3,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=token("<|im_end|>"),
        pad_token_id=token("<pad>"),
        tie_word_embeddings=True,
    )


@torch.no_grad()
def coarsen_filters(weight: Tensor) -> None:
    """Initialize patch filters with low frequencies: random ones of a quarter of the side, enlarged."""
    coarse = torch.randn(*weight.shape[:2], PATCH // 4, PATCH // 4) * 0.05
    fine = F.interpolate(coarse, size=(PATCH, PATCH), mode="nearest") / 4
    weight.copy_(fine.unsqueeze(2).expand_as(weight) if weight.ndim == 5 else fine)


def build_internvl_processor(tokenizer: PreTrainedTokenizerFast) -> InternVLProcessor:
    """Build the InternVL-type model's processor, which splits images into tiles."""
    shared: dict[str, Any] = dict(
        size={"height": TILE, "width": TILE},
        crop_to_patches=True,
        max_patches=MAX_TILES,
        image_mean=list(MEAN),
        image_std=list(STD),
    )
    return InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(**shared),
        tokenizer=tokenizer,
        video_processor=InternVLVideoProcessor(size={"height": TILE, "width": TILE}),
        image_seq_length=(TILE // TOKEN) ** 2,
        chat_template=CHAT_TEMPLATE.replace("IMAGE", "<IMG_CONTEXT>").replace("VIDEO", "<video>"),
    )


def build_internvl(tokenizer: PreTrainedTokenizerFast) -> InternVLForConditionalGeneration:
    """Build an untrained InternVL-type model."""
    token = tokenizer.convert_tokens_to_ids
    config = InternVLConfig(
        text_config=dict(
            model_type="qwen2",
            rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
            **text_config(tokenizer),
        ),
        vision_config=dict(
            model_type="internvl_vision",
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            attention_bias=True,
            hidden_act="quick_gelu",
            image_size=TILE,
            patch_size=PATCH,
            layer_scale_init_value=1.0,
            use_mean_pooling=True,
        ),
        image_token_id=token("<IMG_CONTEXT>"),
        image_seq_length=(TILE // TOKEN) ** 2,
        downsample_ratio=1 / MERGE,
        tie_word_embeddings=True,
    )
    config._attn_implementation = "eager"
    model = InternVLForConditionalGeneration(config)
    coarsen_filters(model.model.vision_tower.embeddings.patch_embeddings.projection.weight)
    return model


@torch.no_grad()
def adopt_parts(model: InternVLForConditionalGeneration, demo: Qwen2VLForConditionalGeneration) -> None:
    """Copy the demo's language model and vision blocks. Position embeddings and projector remain to be learned."""
    model.model.language_model.load_state_dict(demo.model.language_model.state_dict())
    tower, visual = model.model.vision_tower, demo.model.visual
    # The demo's filters span two frames, which are equal for an image.
    tower.embeddings.patch_embeddings.projection.weight.copy_(visual.patch_embed.proj.weight.sum(2))
    for layer, block in zip(tower.encoder.layer, visual.blocks, strict=True):
        attention = layer.attention
        for name in ("weight", "bias"):
            parts = getattr(block.attn.qkv, name).chunk(3)
            for projection, part in zip((attention.q_proj, attention.k_proj, attention.v_proj), parts, strict=True):
                getattr(projection, name).copy_(part)
        attention.projection_layer.load_state_dict(block.attn.proj.state_dict())
        layer.mlp.fc1.load_state_dict(block.mlp.fc1.state_dict())
        layer.mlp.fc2.load_state_dict(block.mlp.fc2.state_dict())
        layer.layernorm_before.load_state_dict(block.norm1.state_dict())
        layer.layernorm_after.load_state_dict(block.norm2.state_dict())


def build_processor(tokenizer: PreTrainedTokenizerFast) -> Qwen2VLProcessor:
    """Build the demo model's processor."""
    shared: dict[str, Any] = dict(
        patch_size=PATCH,
        merge_size=MERGE,
        temporal_patch_size=2,
        image_mean=list(MEAN),
        image_std=list(STD),
        size={"shortest_edge": 4 * TOKEN**2, "longest_edge": 256 * TOKEN**2},
    )
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(**shared),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**shared),
        chat_template=CHAT_TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>").replace(
            "VIDEO", "<|vision_start|><|video_pad|><|vision_end|>"
        ),
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen2VLForConditionalGeneration:
    """Build an untrained demo model."""
    token = tokenizer.convert_tokens_to_ids
    rope = {"rope_type": "default", "rope_theta": ROPE_THETA, "mrope_section": [4, 6, 6]}
    vision = dict(
        depth=4,
        embed_dim=128,
        num_heads=4,
        hidden_size=192,
        patch_size=PATCH,
        spatial_merge_size=MERGE,
        temporal_patch_size=2,
    )
    config = Qwen2VLConfig(
        text_config=dict(rope_parameters=rope, **text_config(tokenizer)),
        vision_config=vision,
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    # On a CPU, the backward pass of fused attention in bf16 would take half of the time.
    config._attn_implementation = "eager"
    model = Qwen2VLForConditionalGeneration(config)
    coarsen_filters(model.model.visual.patch_embed.proj.weight)
    return model


class Sequence(NamedTuple):
    """Ids, which of their positions are trained, the number of each one's question (0 for the image), and positions
    (3, ids)."""

    ids: list[int]
    trained: list[bool]
    segments: list[int]
    positions: np.ndarray


class Batches(Dataset[dict[str, Tensor]]):
    """Training batches, each a function of ``(seed, step)`` alone."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, world: str, seed: int, steps: int, family: str = "qwen2_vl"
    ) -> None:
        self.tokenizer, self.seed, self.steps, self.family = tokenizer, seed, steps, family
        self.classes, self.sprites = WORLDS[world]
        self.words = [*self.classes, *COLORS]
        self.word_index = {word: index for index, word in enumerate(self.words)}
        self.tiler = build_internvl_processor(tokenizer).image_processor if family == "internvl" else None

    def __len__(self) -> int:
        return self.steps

    def _layout(self, rng: np.random.Generator, progress: float) -> tuple[int, tuple[int, int], tuple[int, int]]:
        """Draw batch size, image size in tokens and number of objects: small images early, large ones late."""
        small, medium = 0.45 * (1 - progress) ** 2, 0.35 * (1 - progress) + 0.05
        kind = rng.random()
        if kind < small:
            side = rng.integers(2, 4, size=2)
            return 48, (int(side[0]), int(side[1])), (1, 1)
        if kind < small + medium:
            side = rng.integers(3, 6, size=2)
            return 40, (int(side[0]), int(side[1])), (1, 3)
        if progress > 0.3 and rng.random() < 0.12:
            side = rng.integers(8, 13, size=2)
            return 10, (int(side[0]), int(side[1])), (1, 5)
        return 24, (int(rng.integers(5, 10)), int(rng.integers(5, 8))), (1, 5)

    def _segment(self, question: Question, rng: np.random.Generator) -> tuple[list[int], list[bool]]:
        """Return the ids of a question and its answer, and which positions are trained."""
        prompt = question.prompt[:-1] if rng.random() < 0.2 else question.prompt
        ids = self.tokenizer(f"{prompt}<|im_end|><|im_start|>assistant")["input_ids"]
        answer = self.tokenizer(f"{question.answer}<|im_end|>")["input_ids"]
        # A position is trained if its next token belongs to the answer.
        return ids + answer, [False] * (len(ids) - 1) + [True] * len(answer) + [False]

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        rng = np.random.default_rng((self.seed, step))
        batch, (columns, rows), count = self._layout(rng, step / self.steps)
        size = (columns * TOKEN, rows * TOKEN)
        if self.tiler is not None:
            tiles = self.tiler.get_number_of_image_patches(size[1], size[0])
            columns, rows, batch = TILE // TOKEN, tiles * TILE // TOKEN, batch // (2 if tiles == 1 else 5)
        prefix, prefix_positions = self._prefix(columns, rows)
        sequences = []
        pixels = np.empty((batch, size[1], size[0], 3), np.uint8)
        present = np.zeros((batch, len(self.words)), np.float32)
        for index in range(batch):
            # Held-out scenes have seeds below 2**32; these lie above.
            scene = compose(int(rng.integers(2**32, 2**62)), size, count, self.classes, self.sprites)
            pixels[index] = np.asarray(scene.image)
            for item in scene.objects:
                present[index, self.word_index[item.name]] = 1
                if item.color:
                    present[index, self.word_index[item.color]] = 1
            sequences.append(self._sequence(scene, rng, prefix, prefix_positions))
        images = torch.from_numpy(pixels)
        if self.tiler is not None:
            images = self.tiler(list(images.permute(0, 3, 1, 2)), return_tensors="pt")["pixel_values"]
        padded = pad_sequences(sequences, self.tokenizer.pad_token_id)
        return {"pixels": images, "present": torch.from_numpy(present), **padded}

    def _prefix(self, columns: int, rows: int) -> tuple[list[int], np.ndarray]:
        """Return the ids up to the end of the image, and their positions (3, ids)."""
        image_tokens = columns * rows
        start, end, image = SPECIAL[self.family][4:7]
        head = self.tokenizer(f"<|im_start|>user{start}")["input_ids"]
        tail = self.tokenizer(end)["input_ids"]
        ids = head + [self.tokenizer.convert_tokens_to_ids(image)] * image_tokens + tail
        if self.tiler is not None:  # One position per token.
            return ids, np.tile(np.arange(len(head) + image_tokens + 1), (3, 1))
        grid_h, grid_w = np.divmod(np.arange(image_tokens), columns)
        positions = [
            np.tile(np.arange(len(head)), (3, 1)),
            np.stack([np.zeros_like(grid_h), grid_h, grid_w]) + len(head),
            np.full((3, 1), len(head) + max(columns, rows)),
        ]
        return ids, np.concatenate(positions, axis=1)

    def _sequence(
        self, scene: Scene, rng: np.random.Generator, prefix: list[int], prefix_positions: np.ndarray
    ) -> Sequence:
        """Return an image's sequence with several questions."""
        questions = [scene.describe_question(rng), scene.exists_question(rng, self.classes)]
        questions += [q for q in (scene.relation_question(rng) for _ in range(8)) if q is not None]
        ids, trained, segments, positions = list(prefix), [False] * len(prefix), [0] * len(prefix), [prefix_positions]
        first = int(prefix_positions[0, -1]) + 1
        for number, question in enumerate(dict.fromkeys(questions), start=1):
            part, mask = self._segment(question, rng)
            positions.append(np.tile(np.arange(len(part)) + first, (3, 1)))
            ids += part
            trained += mask
            segments += [number] * len(part)
        return Sequence(ids, trained, segments, np.concatenate(positions, axis=1))


def pad_sequences(sequences: list[Sequence], padding: int) -> dict[str, Tensor]:
    """Stack sequences, padded on the right."""
    batch, length = len(sequences), max(len(sequence.ids) for sequence in sequences)
    input_ids = torch.full((batch, length), padding)
    trained = torch.zeros(batch, length, dtype=torch.bool)
    segments = torch.full((batch, length), -1)
    positions = torch.zeros(3, batch, length, dtype=torch.long)
    for index, sequence in enumerate(sequences):
        n = len(sequence.ids)
        input_ids[index, :n] = torch.tensor(sequence.ids)
        trained[index, :n] = torch.tensor(sequence.trained)
        segments[index, :n] = torch.tensor(sequence.segments)
        positions[:, index, :n] = torch.from_numpy(sequence.positions)
    return {"input_ids": input_ids, "trained": trained, "segments": segments, "positions": positions}


def attention_mask(segments: Tensor) -> Tensor:
    """Return the mask to add to attention scores, (B, 1, L, L): causal, and each question attends to the image and to
    itself."""
    length = segments.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    same = segments[:, :, None] == segments[:, None, :]
    allowed = causal & (same | (segments == 0)[:, None, :])
    return torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.bfloat16).min)[:, None]


def patchify(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Convert uint8 images (B, H, W, 3) as ``Qwen2VLImageProcessor`` does if they need no resizing."""
    batch, height, width, _ = pixels.shape
    images = (pixels.permute(0, 3, 1, 2).float() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(
        3, 1, 1
    )
    h, w = height // PATCH, width // PATCH
    patches = images.reshape(batch, 3, h // MERGE, MERGE, PATCH, w // MERGE, MERGE, PATCH)
    patches = patches.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6).expand(-1, -1, -1, -1, -1, -1, 2, -1, -1)
    return patches.reshape(batch * h * w, -1), torch.tensor([[1, h, w]] * batch)


def speed_up_vision(model: Qwen2VLForConditionalGeneration) -> None:
    """Replace attention by one call for images of one size, and the patch convolution by a matrix product."""

    def attend(
        self: Any, hidden_states: Tensor, cu_seqlens: Tensor, position_embeddings: tuple[Tensor, Tensor], **_: Any
    ) -> Tensor:
        n = hidden_states.shape[0]
        images = cu_seqlens.numel() - 1
        query, key, value = self.qkv(hidden_states).reshape(n, 3, self.num_heads, -1).unbind(1)
        query, key = apply_rotary_pos_emb_vision(query, key, *position_embeddings)
        query, key, value = (
            x.reshape(images, n // images, self.num_heads, -1).transpose(1, 2).to(value.dtype)
            for x in (query * self.scaling, key, value)
        )
        out = (query @ key.transpose(-1, -2)).softmax(-1).to(value.dtype) @ value
        return self.proj(out.transpose(1, 2).reshape(n, -1))

    def embed(self: Any, hidden_states: Tensor) -> Tensor:
        return F.linear(hidden_states, self.proj.weight.flatten(1))

    for block in model.model.visual.blocks:
        block.attn.forward = MethodType(attend, block.attn)
    model.model.visual.patch_embed.forward = MethodType(embed, model.model.visual.patch_embed)


def losses(model: Any, batch: dict[str, Tensor], words: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the cross-entropy of the answers, and the loss of the words' presence in the image."""
    ids = batch["input_ids"]
    image = ids == model.config.image_token_id
    inputs: dict[str, Any]
    if model.config.model_type == "internvl":
        inputs = dict(pixel_values=batch["pixels"], position_ids=batch["positions"][0])
    else:
        pixel_values, grid = patchify(batch["pixels"])
        inputs = dict(
            pixel_values=pixel_values,
            image_grid_thw=grid,
            mm_token_type_ids=image.long(),
            position_ids=batch["positions"],
        )
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(
            input_ids=ids,
            attention_mask={"full_attention": attention_mask(batch["segments"])},
            use_cache=False,
            **inputs,
        ).last_hidden_state
    hidden = hidden.float()
    weight = model.lm_head.weight
    trained = batch["trained"]
    targets = ids.roll(-1, dims=1)[trained]
    answer_loss = F.cross_entropy(hidden[trained] @ weight.T, targets)
    visual = hidden[image].reshape(ids.shape[0], -1, hidden.shape[-1]) @ weight[words].T
    pooled = visual.logsumexp(1) - math.log(visual.shape[1])
    presence_loss = F.binary_cross_entropy_with_logits(pooled, batch["present"], pos_weight=torch.tensor(4.0))
    return answer_loss, presence_loss


def export(model: Any, processor: Any, out: Path) -> None:
    """Write model and processor as a checkpoint, without the faster forwards."""
    token = processor.tokenizer.convert_tokens_to_ids
    model.generation_config = GenerationConfig(
        eos_token_id=token("<|im_end|>"), pad_token_id=token("<pad>"), max_new_tokens=48, do_sample=False
    )
    out.mkdir(parents=True, exist_ok=True)
    for module in model.modules():
        module.__dict__.pop("forward", None)
    model.to(torch.bfloat16).eval().save_pretrained(out)
    processor.save_pretrained(out)


def build(family: str, tokenizer: PreTrainedTokenizerFast) -> tuple[Any, Any]:
    """Build a family's untrained model and its processor."""
    if family == "internvl":
        processor = build_internvl_processor(tokenizer)
        return build_internvl(tokenizer), processor
    processor, model = build_processor(tokenizer), build_model(tokenizer)
    speed_up_vision(model)
    return model, processor


def build_optimizer(model: nn.Module, learning_rate: float) -> torch.optim.AdamW:
    """Build an optimizer that decays matrices only."""
    decay = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98))


def start_or_resume(work: Path, model: Any, optimizer: torch.optim.Optimizer, start_from: Path | None) -> int:
    """Load the run's state, or else the weights to start from, and return the next step."""
    checkpoint = work / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        print(f"resumed at step {state['step']}", flush=True)
        return int(state["step"])
    if start_from is not None:
        weights = AutoModelForImageTextToText.from_pretrained(start_from, dtype=torch.float32)
        if isinstance(weights, type(model)):
            model.load_state_dict(weights.state_dict())
        else:
            adopt_parts(model, weights)
    return 0


def run_steps(
    model: Any,
    loader: DataLoader[dict[str, Tensor]],
    words: Tensor,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    steps: range,
    presence_weight: float,
    work: Path,
) -> None:
    """Train for some steps, with a line of the log every 50 and a checkpoint every 500."""
    averages, began = np.zeros(2), time.time()
    for step, batch in enumerate(loader, start=steps.start):
        answer_loss, presence_loss = losses(model, batch, words)
        optimizer.zero_grad(set_to_none=True)
        (answer_loss + presence_weight * presence_loss).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        averages += (answer_loss.item(), presence_loss.item())
        if (step + 1) % 50 == 0:
            record = {
                "step": step + 1,
                "answer_loss": round(float(averages[0]) / 50, 4),
                "presence_loss": round(float(averages[1]) / 50, 4),
                "seconds_per_step": round((time.time() - began) / 50, 3),
            }
            with (work / "log.jsonl").open("a") as log:
                log.write(json.dumps(record) + "\n")
            print(record, flush=True)
            averages, began = np.zeros(2), time.time()
        if (step + 1) % 500 == 0 or step + 1 == steps.stop:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            save_atomically(state, work / "checkpoint.pt")


def train(
    work: Annotated[Path, typer.Option(help="Folder of the run: checkpoint and log.")],
    out: Annotated[Path, typer.Option(help="Directory to write the trained checkpoint to.")],
    world: World = "demo",
    family: Annotated[str, typer.Option(help="'qwen2_vl' (the demo), or 'internvl': tiles of a fixed size.")] = (
        "qwen2_vl"
    ),
    start_from: Annotated[
        Path | None, typer.Option(help="Checkpoint to start from; of another family, the parts that fit.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps of the whole run.")] = 9000,
    learning_rate: Annotated[float, typer.Option(help="Highest learning rate.")] = 1.5e-3,
    presence_weight: Annotated[float, typer.Option(help="Weight of the multiple-instance loss.")] = 2.0,
    seed: Annotated[int, typer.Option(help="Seed of weights and batches.")] = 0,
    threads: Threads = 1,
    workers: Annotated[int, typer.Option(min=0, help="Processes that compose scenes.")] = 1,
    stop_after: Annotated[int | None, typer.Option(help="Stop after this many steps of this call.")] = None,
) -> None:
    if family not in SPECIAL:
        raise typer.BadParameter(f"--family is {family!r}; choose one of {', '.join(SPECIAL)}.")
    classes, _ = world_named(world)
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(classes, family)
    model, processor = build(family, tokenizer)
    optimizer = build_optimizer(model, learning_rate)
    start = start_or_resume(work, model, optimizer, start_from)
    schedule = warm_up_and_cosine(optimizer, learning_rate, 200, steps, start)
    data = Batches(tokenizer, world, seed, steps, family)
    words = torch.tensor(tokenizer.convert_tokens_to_ids(data.words))
    todo = range(start, min(steps, start + stop_after) if stop_after else steps)
    loader = DataLoader(
        data, batch_size=None, sampler=todo, num_workers=workers, prefetch_factor=4 if workers else None
    )
    model.train()
    run_steps(model, loader, words, optimizer, schedule, todo, presence_weight, work)
    export(model, processor, out)
    print(f"wrote {out}")


if __name__ == "__main__":
    typer.run(train)
